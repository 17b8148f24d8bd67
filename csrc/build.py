"""Builds the CUDA extension with ninja: nvcc for the kernels, the C++ compiler for the rest, against torch's stable ABI.

Used by setup.py, by ``make cuda`` and by the tests, which build the same sources for the host emulator (``--flavor``). Nothing here imports
torch: its headers are found beside the interpreter, so that an isolated build (which sees no torch) works too.

    python csrc/build.py [--flavor cuda|emulated|address|thread] [--archs "80 90"] [--define NAME=VALUE …] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EMULATOR = ROOT / "tests/cuda_emulator"
LIBRARY = ROOT / "pytransformer/_cuda.so"
# One binary for torch 2.10 and later: the oldest stable ABI that has what the ops need.
TORCH_TARGET = "0x020a000000000000"
# One binary for each generation: sm_80 serves 8.6 and 8.9 too, sm_100 10.3, sm_120 12.1. For all others the driver compiles the PTX.
#
# The front end, a third of the time, runs for two of them. From the PTX of compute_80 sm_90 gets the same instructions as from its own, or
# fewer; Blackwell gets fewer from its own. What needs an instruction that compute_80 lacks lists its front ends itself (see units).
ARCHITECTURES = ("80", "90", "100", "120")
FRONT_ENDS = ("80", "100")
OLDEST = 80
# For the estimate: CPU seconds of a file, and of each binary in it, as a busy machine measured them.
SECONDS_OF_A_FILE, SECONDS_OF_A_BINARY = 4.0, 1.4
FLAVORS = ("cuda", "emulated", "address", "thread")
SANITIZE = {
    "emulated": ("-O2",),
    "address": (
        "-O1",
        "-finline-small-functions",
        "-g1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ),
    "thread": ("-O1", "-finline-small-functions", "-g1", "-fsanitize=thread"),
}
# The emulator itself has no sanitizer and tells that of the kernels what it does.
TOLD = {"emulated": (), "address": ("-DEMULATOR_ASAN",), "thread": ("-DEMULATOR_TSAN",)}


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what to install."""


@dataclass(frozen=True)
class Torch:
    """Where torch's headers and libraries are."""

    root: Path

    @property
    def include_flags(self) -> list[str]:
        return [f"-isystem{self.root}/include", f"-isystem{self.root}/include/torch/csrc/api/include"]


def find_torch() -> Torch:
    """torch of this interpreter, also from inside an isolated build, whose import path leaves it out."""
    candidates = [Path(path) / "torch" for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.insert(0, Path(spec.origin).parent)
    for root in candidates:
        if (root / "include/torch/csrc/stable/library.h").is_file():
            return Torch(root)
    raise BuildError(
        "the CUDA extension is built against torch's headers and no torch >= 2.10 was found for "
        f"{sys.executable}: install torch first (pip install 'torch>=2.10'), then this package"
    )


def find_nvcc() -> Path:
    """nvcc of $CUDA_HOME where that is set, else the one on the path, else in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    candidates = [Path(home) / "bin/nvcc"] if home else [Path(on_path or "nvcc"), Path("/usr/local/cuda/bin/nvcc")]
    for nvcc in candidates:
        if nvcc.is_file():
            return nvcc
    where = (
        f"CUDA_HOME is {home}, which has no bin/nvcc"
        if home
        else "nvcc is neither on the path nor in /usr/local/cuda/bin"
    )
    raise BuildError(
        f"no CUDA compiler: {where}; install the CUDA toolkit (12 or newer), or set PYTRANSFORMER_CUDA=0 to install without"
    )


def toolkit_root(nvcc: Path) -> Path:
    """The toolkit that this nvcc belongs to; nvcc itself is asked, as it may be a link or a script that starts another."""
    dry_run = subprocess.run([str(nvcc), "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE)
    return Path(found.group(1).strip()).resolve() if found else nvcc.parent.parent


def find_cuda_headers() -> Path:
    """cuda_bf16.h and its like for the emulator: of the toolkit, or those that come with triton."""
    candidates = []
    with contextlib.suppress(BuildError):  # without a toolkit triton's copy serves as well
        candidates.append(toolkit_root(find_nvcc()) / "include")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/include")
    for include in candidates:
        if (include / "cuda_bf16.h").is_file():
            return include
    raise BuildError("no CUDA headers: neither a CUDA toolkit nor triton is installed")


def find_compiler() -> str:
    """The C++ compiler: $CXX or g++ (ThreadSanitizer with fibers works with g++ only)."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("no C++ compiler: install g++ 11 or newer, or set CXX")
    return compiler


def find_ninja() -> list[str]:
    """How to call ninja: its Python package, or the program."""
    if importlib.util.find_spec("ninja") is not None:
        return [sys.executable, "-m", "ninja"]
    program = shutil.which("ninja") or shutil.which("ninja-build")
    if program is None:
        raise BuildError("ninja is missing: pip install ninja")
    return [program]


def nvcc_version(nvcc: Path) -> str:
    """E.g. "13.0"."""
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise BuildError(f"{nvcc} --version does not say its release: {text!r}")
    return found.group(1)


def known_architectures(nvcc: Path) -> set[str]:
    """Architectures this nvcc compiles for, e.g. {"80", "90"}."""
    text = subprocess.run([str(nvcc), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"sm_(\d+)\b", text))


def local_architectures() -> list[str]:
    """Architectures of the GPUs here, e.g. ["90"]; empty without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    if result.returncode:
        return []
    return sorted({"".join(digits) for digits in re.findall(r"^\s*(\d+)\.(\d+)\s*$", result.stdout, re.MULTILINE)})


def chosen_architectures(nvcc: Path, asked: str | None = None) -> list[str]:
    """What to compile for: asked for, else PYTRANSFORMER_CUDA_ARCHS, else the GPUs that are here, else everything ("all" says so).

    Raises:
        BuildError: an architecture that nvcc does not know, or one older than sm_80.
    """
    known = known_architectures(nvcc)
    asked = asked or os.environ.get("PYTRANSFORMER_CUDA_ARCHS", "")
    # "9.0a" is 90: nothing in the sources needs the instructions of one architecture alone.
    wanted = re.sub(r"sm_|\.|(?<=\d)[af]\b", "", asked.replace(",", " ")).split()
    if not wanted:
        wanted = local_architectures()
    if not wanted or wanted == ["all"]:
        return [arch for arch in ARCHITECTURES if arch in known]
    usable = sorted((name for name in known if int(name) >= OLDEST), key=int)
    for arch in wanted:
        if arch not in usable:
            raise BuildError(
                f"PYTRANSFORMER_CUDA_ARCHS: {arch!r} is not one of those that {nvcc} compiles for: {' '.join(usable)}"
            )
    return wanted


def front_end(name: str, front_ends: Sequence[str] = FRONT_ENDS) -> str:
    """The one whose PTX "sm_90" is assembled from."""
    return max((arch for arch in front_ends if int(arch) <= int(name.split("_")[1])), key=int)


def front_ends(source: Path, macros: Sequence[str]) -> tuple[str, ...]:
    """Of a unit: :data:`FRONT_ENDS`, unless a line ``// Front ends of PYT_CACHE=widened: 80 89 100`` lists others for one of its macros."""
    listed = re.findall(r"^// Front ends of (PYT_\w+=\w+): ([\d ]+)$", source.read_text(), re.MULTILINE)
    return next((tuple(archs.split()) for macro, archs in listed if f"-D{macro}" in macros), FRONT_ENDS)


def with_front_ends(flags: Sequence[str], of_unit: Sequence[str]) -> list[str]:
    """nvcc's flags with the PTX of each binary by these front ends."""
    return [
        re.sub(
            r"^-gencode=arch=compute_\d+,code=(\w+)$",
            lambda m: f"-gencode=arch=compute_{front_end(m[1], of_unit)},code={m[1]}",
            flag,
        )
        for flag in flags
    ]


def source_files(suffix: str) -> list[Path]:
    return sorted(CSRC.rglob(f"*{suffix}"))


def units(source: Path) -> dict[str, list[str]]:
    """The objects that a source is compiled to, with the macros of each: one, or one for each combination of the values that its lines
    ``// PYT_TYPE = float16 bfloat16`` list (attention/forward_instances.cu: csrc_attention_forward_float16_64.cu.o and so on)."""
    lists = re.findall(r"^// (PYT_\w+) = (.+)$", source.read_text(), re.MULTILINE)
    names = [name for name, _ in lists]
    stem = source.relative_to(ROOT).with_suffix("").as_posix().replace("/", "_").removesuffix("_instances")
    return {
        "_".join([stem, *values]) + source.suffix + ".o": [f"-D{name}={value}" for name, value in zip(names, values)]
        for values in itertools.product(*(listed.split() for _, listed in lists))
    }


def source_id() -> str:
    """Hash of everything that is compiled: a binary built from other sources is refused."""
    digest = hashlib.sha256()
    for path in sorted(path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h")):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def package_version() -> str:
    text = (ROOT / "pytransformer/_version.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise BuildError("pytransformer/_version.py has no __version__")
    return found.group(1)


def info_defines(architectures: str, cuda_version: str) -> list[str]:
    facts = {
        "PYT_VERSION": package_version(),
        "PYT_SOURCE_ID": source_id(),
        "PYT_ARCHITECTURES": architectures,
        "PYT_CUDA_VERSION": cuda_version,
    }
    return [f'-D{name}="{value}"' for name, value in facts.items()]


@dataclass(frozen=True)
class Plan:
    """Compiler and flags of one build."""

    cxx: str
    cxx_flags: Sequence[str]
    kernel_compiler: str
    kernel_flags: Sequence[str]
    info_flags: Sequence[str]
    link_flags: Sequence[str]
    extra_sources: Sequence[Path] = ()
    # The emulator itself, and how it is compiled.
    engine: Path | None = None
    engine_flags: Sequence[str] = ()
    architectures: Sequence[str] = ()
    # Headers that g++ reads once for all files of a rule ("kernel", "cxx"): half the time of a small file.
    precompiled: Mapping[str, Path] = field(default_factory=dict)


def cuda_plan(torch: Torch, archs: str | None, defines: Sequence[str]) -> Plan:
    nvcc = find_nvcc()
    toolkit = toolkit_root(nvcc)
    architectures = chosen_architectures(nvcc, archs)
    names = [f"sm_{arch}" for arch in architectures]
    if len(architectures) > 1:
        names.append(f"compute_{OLDEST}")
    # Line numbers for profilers and sanitizers make a binary three times as large: only in one for the GPU that is here.
    lines = ["-lineinfo"] if len(architectures) == 1 else []
    common = [f"-I{CSRC}/common", *(f"-D{define}" for define in defines)]
    kernel_flags = [
        *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings", *lines),
        "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror",
        *(*(f"-gencode=arch=compute_{front_end(name)},code={name}" for name in names), *common),
    ]
    cxx_flags = [
        *("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
        *("-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"),
        *(*torch.include_flags, f"-isystem{toolkit}/include", *common),
    ]
    library_folder = next(
        (
            folder
            for folder in (toolkit / name for name in ("lib64", "targets/x86_64-linux/lib", "lib"))
            if folder.is_dir()
        ),
        toolkit / "lib64",
    )
    link_flags = [
        *(f"-L{torch.root}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"),
        *(f"-L{library_folder}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"),
    ]
    info = info_defines(" ".join(names), nvcc_version(nvcc))
    return Plan(find_compiler(), cxx_flags, str(nvcc), kernel_flags, info, link_flags, architectures=names)


def emulated_plan(torch: Torch, flavor: str, defines: Sequence[str]) -> Plan:
    sanitize = SANITIZE[flavor]
    common = [
        *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DPYT_EMULATED"),
        *(f"-I{CSRC}/common", f"-I{EMULATOR}/include", f"-isystem{find_cuda_headers()}"),
        *(f"-idirafter{EMULATOR}/include_after", *(f"-D{define}" for define in defines)),
    ]
    kernel_flags = [*common, *sanitize, "-Wno-unknown-pragmas", "-Wno-psabi", "-x", "c++"]
    # What runs once for each call is not worth the optimiser's time.
    unoptimised = [] if flavor == "emulated" else ["-O0"]
    cxx_flags = [*common, *sanitize, *unoptimised, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *torch.include_flags]
    link_flags = [
        *(f"-L{torch.root}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"),
        *(flag for flag in sanitize if flag.startswith("-fsanitize")),
    ]
    compiler = find_compiler()
    info = info_defines("emulated", "none")
    return Plan(
        *(compiler, cxx_flags, compiler, kernel_flags, info, link_flags, (EMULATOR / "exports.cpp",)),
        engine=EMULATOR / "engine/emulator.cpp",
        engine_flags=[*common, "-O2", "-g1", *TOLD[flavor]],
        precompiled={"kernel": CSRC / "common/device.cuh", "cxx": CSRC / "common/tensor.h"},
    )


def ninja_file(plan: Plan, output: Path) -> str:
    """The build description."""
    lines = [
        f"cxx = {plan.cxx}",
        f"kernel_compiler = {plan.kernel_compiler}",
        f"cxx_flags = {' '.join(plan.cxx_flags)}",
        f"kernel_flags = {' '.join(plan.kernel_flags)}",
        f"engine_flags = {' '.join(plan.engine_flags)}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxx_flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = C++ $in",
        "rule kernel",
        "  command = $kernel_compiler -MMD -MF $out.d $kernel_flags $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = kernel $out",
        "rule engine",
        "  command = $cxx -MMD -MF $out.d $engine_flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = emulator $out",
        "rule header",
        "  command = $cxx -MMD -MF $out.d $flags -x c++-header $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = header $out",
        "rule link",
        f"  command = $cxx -shared -o $out $in {' '.join(plan.link_flags)}",
        "  description = link $out",
    ]
    # For "-include kernel.h" g++ takes kernel.h.gch of its working folder.
    for rule in plan.precompiled:
        flags = plan.kernel_flags if rule == "kernel" else plan.cxx_flags
        lines += [f"build {rule}.h.gch: header {rule}.h", f"  flags = {' '.join(flags).removesuffix('-x c++')}"]
    objects = []
    if plan.engine is not None:
        objects.append("emulator.o")
        lines.append(f"build emulator.o: engine {plan.engine}")
    for rule, sources in (("kernel", source_files(".cu")), ("cxx", [*source_files(".cpp"), *plan.extra_sources])):
        for source in sources:
            for name, macros in units(source).items():
                objects.append(name)
                extra = list(plan.info_flags if source.name == "build_info.cpp" else macros)
                is_precompiled = rule in plan.precompiled
                lines.append(f"build {name}: {rule} {source}" + (f" | {rule}.h.gch" if is_precompiled else ""))
                if is_precompiled:
                    extra += ["-include", f"{rule}.h"]
                lines.append(f"  extra = {shlex.join(extra)}")
                of_unit = front_ends(source, macros)
                if rule == "kernel" and of_unit != FRONT_ENDS:
                    lines.append(f"  kernel_flags = {' '.join(with_front_ends(plan.kernel_flags, of_unit))}")
    lines.append(f"build {output}: link {' '.join(objects)}")
    lines.append(f"default {output}")
    return "\n".join(lines) + "\n"


def announce(command: Sequence[str], plan: Plan, say: Callable[[str], None]) -> None:
    """Says what ``command`` (ninja) is about to compile."""
    steps = subprocess.run([*command, "-n"], capture_output=True, text=True, check=False).stdout
    files, cores = len(re.findall(r"^\[.*\] kernel ", steps, re.MULTILINE)), os.cpu_count() or 1
    if files == 0:
        return
    minutes = files * (SECONDS_OF_A_FILE + SECONDS_OF_A_BINARY * len(plan.architectures)) / cores / 60
    about = f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"
    say(
        f"pytransformer: compiling {files} CUDA files for {' '.join(plan.architectures)} with nvcc, about {about} on {cores} cores "
        "(PYTRANSFORMER_CUDA=0 installs without them, PYTRANSFORMER_CUDA_ARCHS=90 for one architecture only)"
    )


def build(
    flavor: str = "cuda",
    *,
    output: Path | None = None,
    folder: Path | None = None,
    archs: str | None = None,
    defines: Sequence[str] = (),
    jobs: int | None = None,
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Builds one flavor of the extension and returns its path; only what has changed since the last call is compiled.

    Args:
        flavor: "cuda", or for the host emulator "emulated" (no sanitizer), "address" (ASan and UBSan), "thread" (TSan).
        output: the library; by default inside the build folder, for "cuda" pytransformer/_cuda.so.
        folder: objects; by default build/<flavor> in the checkout.
        archs: see :func:`chosen_architectures`.
        defines: macros, "NAME" or "NAME=VALUE" (the tests inject faults with them).
        jobs: parallel compilations; ninja's default if None.
        quiet: shows nothing.
        say: is told what will be compiled, for what and about how long that takes, unless there is nothing to do.

    Raises:
        BuildError: something needed is missing, or a compiler failed; its output is in the message.
    """
    torch = find_torch()
    folder = folder or ROOT / "build" / flavor
    output = (output or (LIBRARY if flavor == "cuda" else folder / "_cuda.so")).resolve()
    plan = cuda_plan(torch, archs, defines) if flavor == "cuda" else emulated_plan(torch, flavor, defines)
    folder.mkdir(parents=True, exist_ok=True)
    description = folder / "build.ninja"
    text = ninja_file(plan, output)
    _write(description, text)
    for rule, header in plan.precompiled.items():
        _write(folder / f"{rule}.h", f'#include "{header}"\n')
    command = [*find_ninja(), "-C", str(folder), *(["-j", str(jobs)] if jobs else [])]
    if say is not None:
        announce(command, plan, say)
    result = subprocess.run(command, capture_output=quiet, text=True, check=False)
    if result.returncode:
        raise BuildError(
            f"the {flavor} build failed" + (f":\n{result.stdout}{result.stderr}" if quiet else " (see above)")
        )
    return output


def _write(path: Path, text: str) -> None:
    """Leaves a file alone that says this already: ninja looks at its age."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python csrc/build.py", description="Builds the CUDA extension, or its emulated flavors."
    )
    parser.add_argument("--flavor", choices=FLAVORS, default="cuda")
    parser.add_argument("--archs", help='e.g. "80 90"; "all"; default: the GPUs here, else all')
    parser.add_argument("--define", action="append", default=[], metavar="NAME[=VALUE]")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--jobs", type=int)
    arguments = parser.parse_args(argv)
    try:
        path = build(
            arguments.flavor,
            output=arguments.output,
            folder=arguments.folder,
            archs=arguments.archs,
            defines=arguments.define,
            jobs=arguments.jobs,
            say=lambda text: print(text, file=sys.stderr, flush=True) if arguments.flavor == "cuda" else None,
        )
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
