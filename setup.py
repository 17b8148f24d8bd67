"""Packages of the distribution, and the CUDA extension where it can be built; everything else stands in pyproject.toml.

``kernels/`` and ``benchmarks/`` lie beside the package and are imported as ``pytransformer.kernels`` and ``pytransformer.benchmarks`` (in a
checkout through the committed links of those names). Of the benchmarks the results and the pytest suites stay out: they are no
packages.

The extension (csrc/, compiled by csrc/build.py) is an extra: without nvcc or without torch's headers the installation succeeds in seconds,
with Triton's kernels only. PYTRANSFORMER_CUDA=1 makes whatever is missing an error, =0 never builds. Editable installations build it with
=1 only; ``make cuda`` does it at any time.
"""

import contextlib
import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
version = re.search(r'^__version__ = "([^"]+)"', (ROOT / "pytransformer/_version.py").read_text(), re.MULTILINE)
if version is None:
    raise RuntimeError("pytransformer/_version.py has no __version__")
WANTED = os.environ.get("PYTRANSFORMER_CUDA", "")
if WANTED not in ("", "0", "1"):
    raise SystemExit(f"PYTRANSFORMER_CUDA must be 0 or 1, or not be set, got {WANTED!r}")


def builder():
    """csrc/build.py as a module: it lies outside the import path of a build."""
    spec = importlib.util.spec_from_file_location("pytransformer_cuda_build", ROOT / "csrc/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def packages():
    """Names of everything that is installed."""
    beside = ("kernels", "benchmarks")
    inner = {f"pytransformer.{folder}.{name}" for folder in beside for name in find_packages(str(ROOT / folder))}
    outer = find_packages(include=["pytransformer", "pytransformer.*"])
    return sorted({*outer, *(f"pytransformer.{folder}" for folder in beside), *inner})


def say(text):
    """To the log, which pip shows with -v only, and to the terminal of whoever waits, if there is one."""
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(f"\r\n{text}\r\n")


class BuildWithCuda(build_py):
    """Copies the Python files, then builds the extension beside them, or leaves a note why there is none."""

    def run(self):
        super().run()
        editable = getattr(self, "editable_mode", False)
        if WANTED == "0" or (editable and WANTED != "1"):
            return
        package = (ROOT if editable else Path(self.build_lib)) / "pytransformer"
        build = builder()
        try:
            folder = Path(self.build_lib).resolve().parent / "cuda"
            build.build("cuda", output=package.resolve() / "_cuda.so", folder=folder, say=say)
        except build.BuildError as error:
            if WANTED == "1":
                raise SystemExit(f"PYTRANSFORMER_CUDA=1: {error}") from None
            print(f"pytransformer: installing without the CUDA backend: {error}", file=sys.stderr)
            if not editable:
                (package / "_cuda_absent.txt").write_text(str(error).splitlines()[0] + "\n")

    def get_outputs(self, include_bytecode=1):
        built = (Path(self.build_lib) / "pytransformer").glob("_cuda*")
        return [*super().get_outputs(include_bytecode), *map(str, built)]


class Wheel(bdist_wheel):
    """A wheel with the extension is bound to the platform, but to no Python: the library uses torch's stable ABI and no Python ABI."""

    def get_tag(self):
        package = Path(self.get_finalized_command("build_py").build_lib) / "pytransformer"
        if not (package / "_cuda.so").is_file():
            return super().get_tag()
        self.root_is_pure = False
        return "py3", "none", super().get_tag()[2]


setup(
    version=version.group(1),
    packages=packages(),
    package_dir={"pytransformer.kernels": "kernels", "pytransformer.benchmarks": "benchmarks"},
    package_data={"pytransformer": ["py.typed"], "pytransformer.benchmarks.harness": ["schema.json"]},
    cmdclass={"build_py": BuildWithCuda, "bdist_wheel": Wheel},
)
