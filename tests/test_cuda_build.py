"""How the CUDA extension is built and found: what is missing, too old or left out is said in one clear sentence."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from pytransformer import extension
from tests.support.emulator import ROOT, builder

BuildError = builder().BuildError


@pytest.fixture
def nvcc(monkeypatch, tmp_path) -> Path:
    """A stand-in for nvcc that knows sm_75 to sm_120."""
    program = tmp_path / "bin/nvcc"
    program.parent.mkdir()
    codes = "\\n".join(f"sm_{arch}" for arch in (75, 80, 86, 89, 90, 100, 120))
    program.write_text(
        f"#!/bin/sh\ncase $1 in --version) echo 'release 13.0, V13.0.88';; --list-gpu-code) printf '{codes}\\n';; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("PYTRANSFORMER_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(builder(), "local_architectures", lambda: [])
    return program


# --- what is compiled -------------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_everything_known_is_compiled(nvcc):
    assert builder().chosen_architectures(nvcc) == ["80", "90", "100", "120"]


def test_with_a_gpu_only_its_own_architecture_is_compiled(nvcc, monkeypatch):
    monkeypatch.setattr(builder(), "local_architectures", lambda: ["89"])
    assert builder().chosen_architectures(nvcc) == ["89"]
    assert len(builder().chosen_architectures(nvcc, "all")) == 4


@pytest.mark.parametrize(
    "capability",
    [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)],
)
def test_what_is_compiled_for_all_serves_every_gpu(capability, nvcc, monkeypatch):
    plan = builder().cuda_plan(builder().find_torch(), "all", ())
    assert extension._covers(" ".join(plan.architectures), capability)
    binaries = [name for name in plan.architectures if name.startswith("sm_")]
    # Without the driver's compiler, but for generations that are made in small numbers or do not exist yet.
    assert extension._covers(" ".join(binaries), capability) == (capability[0] in (8, 9, 10, 12))


def test_every_binary_comes_from_the_front_end_that_suits_it(nvcc):
    flags = builder().cuda_plan(builder().find_torch(), "all", ()).kernel_flags
    codes = [flag.partition("arch=")[2] for flag in flags if flag.startswith("-gencode")]
    assert codes == [
        "compute_80,code=sm_80",
        "compute_80,code=sm_90",
        "compute_100,code=sm_100",
        "compute_100,code=sm_120",
        "compute_80,code=compute_80",
    ]


def test_a_unit_may_list_its_front_ends():
    """What reads float8 by an instruction is compiled by one that has it, from sm_89 on; everything else as ever."""
    build = builder()
    source = build.CSRC / "decode_attention/split_instances.cu"
    of = {name: build.front_ends(source, macros) for name, macros in build.units(source).items()}
    assert {archs for name, archs in of.items() if "plain" in name} == {build.FRONT_ENDS}
    (listed,) = {archs for name, archs in of.items() if "widened" in name}
    flags = [
        "-O3",
        *(f"-gencode=arch=compute_{build.front_end(f'sm_{arch}')},code=sm_{arch}" for arch in (80, 86, 89, 90, 100)),
    ]
    assert build.with_front_ends(flags, build.FRONT_ENDS) == flags
    found = [flag.removeprefix("-gencode=arch=") for flag in build.with_front_ends(flags, listed)]
    assert found == [
        "-O3",
        "compute_80,code=sm_80",
        "compute_80,code=sm_86",
        "compute_89,code=sm_89",
        "compute_89,code=sm_90",
        "compute_100,code=sm_100",
    ]


@pytest.mark.parametrize("asked", ["8.0 9.0", "80,90", "sm_80 sm_90a", "8.0 9.0a"])
def test_architectures_may_be_asked_for_in_many_spellings(asked, nvcc, monkeypatch):
    monkeypatch.setenv("PYTRANSFORMER_CUDA_ARCHS", asked)
    assert builder().chosen_architectures(nvcc) == ["80", "90"]


@pytest.mark.parametrize("asked", ["75", "130", "hopper"])
def test_an_architecture_that_cannot_be_compiled_is_refused(asked, nvcc):
    with pytest.raises(BuildError, match=f"'{asked}' is not one of those that .* compiles for: 80 86 89 90 100 120$"):
        builder().chosen_architectures(nvcc, asked)


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    with pytest.raises(BuildError, match="CUDA_HOME is /nonexistent, which has no bin/nvcc; install the CUDA toolkit"):
        builder().find_nvcc()


def test_the_source_id_follows_the_sources(monkeypatch, tmp_path):
    before = builder().source_id()
    (tmp_path / "norm").mkdir()
    (tmp_path / "norm/forward.cu").write_text("// nothing\n")
    monkeypatch.setattr(builder(), "CSRC", tmp_path)
    empty = builder().source_id()
    (tmp_path / "norm/forward.cu").write_text("// something\n")
    assert len({before, empty, builder().source_id()}) == 3


# --- what is compiled several times -------------------------------------------------------------------------------------------------------


def test_a_source_is_compiled_once_for_each_combination_it_lists(monkeypatch, tmp_path):
    monkeypatch.setattr(builder(), "ROOT", tmp_path)
    (tmp_path / "csrc/op").mkdir(parents=True)
    plain, several = tmp_path / "csrc/op/launch.cu", tmp_path / "csrc/op/split_instances.cu"
    plain.write_text("// Nothing is listed.\n")
    several.write_text("// PYT_TYPE = float16 bfloat16\n// PYT_WIDTH = 64 128\n")
    assert builder().units(plain) == {"csrc_op_launch.cu.o": []}
    assert builder().units(several) == {
        f"csrc_op_split_{element}_{width}.cu.o": [f"-DPYT_TYPE={element}", f"-DPYT_WIDTH={width}"]
        for element in ("float16", "bfloat16")
        for width in ("64", "128")
    }


def test_ninja_compiles_each_unit_with_its_macros_and_again_when_a_header_changes(monkeypatch, tmp_path):
    build = builder()
    sources = tmp_path / "csrc"
    (sources / "op").mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "CSRC", sources)
    (sources / "op/kernel.cuh").write_text("template <class T> int run(T) { return PYT_WIDTH; }\n")
    (sources / "op/other.cpp").write_text("int other() { return 0; }\n")
    (sources / "op/kernel_instances.cu").write_text(
        '// PYT_TYPE = float double\n// PYT_WIDTH = 1 2\n#include "kernel.cuh"\ntemplate int run<PYT_TYPE>(PYT_TYPE);\n'
    )
    compiler = build.find_compiler()
    plan = build.Plan(compiler, ["-fPIC"], compiler, ["-fPIC", "-x", "c++"], [], [])
    (tmp_path / "build.ninja").write_text(build.ninja_file(plan, tmp_path / "all.so"))

    def compiled() -> set[str]:
        command = [*build.find_ninja(), "-C", str(tmp_path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"kernel csrc_op_(\S+)\.cu\.o|C\+\+ \S+/(\S+)\.cpp", text))

    kernels = {(f"kernel_{element}_{width}", "") for element in ("float", "double") for width in (1, 2)}
    assert compiled() == kernels | {("", "other")}
    assert compiled() == set()
    (sources / "op/kernel.cuh").write_text("template <class T> int run(T) { return PYT_WIDTH + 1; }\n")
    assert compiled() == kernels


# --- what an installation does ----------------------------------------------------------------------------------------------------------


def _copy(folder: Path) -> Path:
    """A copy of the tree: a build leaves files in its folder, and tests run side by side."""
    tree = folder / "tree"
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if (
            not name.startswith(("tests/", "benchmarks/results/", "docs/"))
            and (ROOT / name).is_file()
            and not (ROOT / name).is_symlink()
        ):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


def _wheel(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    tree = _copy(folder)
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", str(folder)]
    return subprocess.run(command, cwd=tree, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_without_nvcc_the_wheel_is_pure_python_and_remembers_why(tmp_path):
    result = _wheel(tmp_path, CUDA_HOME="/nonexistent", PYTRANSFORMER_CUDA="")
    assert result.returncode == 0, result.stderr
    assert "installing without the CUDA backend: no CUDA compiler" in result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as files:
        assert "no CUDA compiler" in files.read("pytransformer/_cuda_absent.txt").decode()
        names = set(files.namelist())
    assert {
        "pytransformer/kernels/norm/forward.py",
        "pytransformer/benchmarks/harness/worker.py",
        "pytransformer/benchmarks/suites/norm.py",
        "pytransformer/benchmarks/peers/base.py",
        "pytransformer/benchmarks/harness/schema.json",
    } <= names
    assert not [name for name in names if "test_ops" in name or "conftest" in name or "/results/" in name]


def test_without_nvcc_an_extension_that_was_asked_for_is_an_error(tmp_path):
    result = _wheel(tmp_path, CUDA_HOME="/nonexistent", PYTRANSFORMER_CUDA="1")
    assert result.returncode != 0
    assert "PYTRANSFORMER_CUDA=1: no CUDA compiler" in result.stderr and "install the CUDA toolkit" in result.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_zero_never_builds_and_nonsense_is_refused(tmp_path):
    assert _wheel(tmp_path / "0", PYTRANSFORMER_CUDA="0").returncode == 0
    (wheel,) = (tmp_path / "0").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        assert not [name for name in files.namelist() if name.startswith("pytransformer/_cuda")]
    result = _wheel(tmp_path / "yes", PYTRANSFORMER_CUDA="yes")
    assert result.returncode != 0 and "PYTRANSFORMER_CUDA must be 0 or 1, or not be set, got 'yes'" in result.stderr


def test_pip_install_says_on_the_terminal_what_it_compiles(nvcc, tmp_path):
    """pip hides what a build backend prints, the terminal it has not: neither compiler makes anything, so only the sentence is seen."""
    tree, shown = _copy(tmp_path), b""
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", "target", "."]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tree)
        os.execve(sys.executable, install, os.environ | {"PYTRANSFORMER_CUDA": "", "CXX": "/bin/false"})
    with contextlib.suppress(OSError):  # what reading from a terminal ends with
        while piece := os.read(terminal, 4096):
            shown += piece
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, shown.decode()
    says = r"pytransformer: compiling \d+ CUDA files for sm_80 sm_90 sm_100 sm_120 compute_80 with nvcc, about (a minute|\d+ minutes) on"
    assert re.search(says, shown.decode()), shown.decode()


# --- what is loaded ---------------------------------------------------------------------------------------------------------------------


def _reason(monkeypatch, device_type: str = "cuda", **facts) -> str | None:
    """What extension.why_not says where the loaded library has these facts."""
    defaults = {
        "path": Path("_cuda.so"),
        "version": extension.__version__,
        "source_id": builder().source_id(),
        "architectures": "sm_80 sm_90a",
        "cuda_version": "13.0",
        "emulated": False,
    }
    found = extension.Extension(**(defaults | facts))
    monkeypatch.setattr(extension, "_load", lambda: extension._mismatch(found) or found)
    extension._gpu_problem.cache_clear()
    return extension.why_not(device_type)


def test_a_library_that_was_not_built_is_said_with_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTRANSFORMER_CUDA_LIBRARY", raising=False)
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(extension, "ABSENT", tmp_path / "_cuda_absent.txt")
    assert "was not built; to get it, install where nvcc is with PYTRANSFORMER_CUDA=1" in extension._load.__wrapped__()
    extension.ABSENT.write_text("no CUDA compiler\n")
    assert "was not built (no CUDA compiler); to get it" in extension._load.__wrapped__()


def test_a_named_library_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PYTRANSFORMER_CUDA_LIBRARY", "/nonexistent.so")
    assert extension._load.__wrapped__() == "PYTRANSFORMER_CUDA_LIBRARY names /nonexistent.so, which is not there"


def test_a_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "_cuda.so").write_bytes(b"not a library")
    monkeypatch.setenv("PYTRANSFORMER_CUDA_LIBRARY", str(tmp_path / "_cuda.so"))
    assert "does not load: " in extension._load.__wrapped__()


def test_a_torch_that_is_too_old(monkeypatch, tmp_path):
    (tmp_path / "_cuda.so").write_bytes(b"")
    monkeypatch.setenv("PYTRANSFORMER_CUDA_LIBRARY", str(tmp_path / "_cuda.so"))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert extension._load.__wrapped__() == "the CUDA extension needs torch >= 2.10, and this is torch 2.9.1+cu128"


def test_a_library_of_another_version(monkeypatch):
    assert "was built for version 0.0.9 and this is" in _reason(monkeypatch, version="0.0.9")


def test_a_library_built_from_other_sources(monkeypatch):
    assert "built from other sources than those in csrc/: run `make cuda` again" in _reason(monkeypatch, source_id="0")


def test_tensors_on_another_kind_of_device(monkeypatch):
    assert "runs on a GPU, and the tensors are on device type 'cpu'" in _reason(monkeypatch, "cpu")
    assert "runs on the CPU, in the host emulator" in _reason(monkeypatch, "cuda", emulated=True)


@pytest.mark.parametrize(
    ("capability", "architectures", "reason"),
    [
        ((7, 5), "sm_80", "need a GPU of compute capability 8.0 or newer, and this one has 7.5"),
        ((8, 0), "sm_80", None),
        ((8, 9), "sm_80", None),
        ((8, 0), "sm_86", "leaves out this GPU (sm_80): rebuild it with PYTRANSFORMER_CUDA_ARCHS=80"),
        ((9, 0), "sm_80", "leaves out this GPU (sm_90)"),
        ((9, 0), "sm_80 compute_80", None),
        ((9, 0), "sm_90", None),
        ((9, 0), "sm_90a", None),
        ((10, 3), "sm_100", None),
        ((10, 0), "sm_90a", "leaves out this GPU (sm_100)"),
        ((8, 0), "compute_90", "leaves out this GPU"),
    ],
)
def test_a_gpu_that_the_library_does_not_serve(capability, architectures, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = _reason(monkeypatch, architectures=architectures)
    assert (found is None) if reason is None else (reason in found)


def test_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _reason(monkeypatch) == "torch sees no GPU"


# --- a launch that CUDA refuses ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def launch_failure(tmp_path_factory) -> Path:
    """A program that reports a failed launch with the error number it is given."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "main.cpp").write_text(
        """
        #include <cstdio>
        #include <cstdlib>
        #include "launch_error.h"
        int main(int, char** argv) {
          try {
            if (std::atoi(argv[1]) < 0) pytransformer::throw_runtime_error("cudaGetDevice", -std::atoi(argv[1]), "refused");
            pytransformer::throw_launch_error("norm_kernel", {8, 2, 1}, {128, 1, 1}, 4096, std::atoi(argv[1]), "refused");
          } catch (const pytransformer::LaunchError& error) {
            std::puts(error.what());
          }
        }
        """
    )
    build = builder()
    sources = [
        str(folder / "main.cpp"),
        *(str(build.CSRC / f"common/{name}.cpp") for name in ("launch_error", "build_info")),
    ]
    defines = build.info_defines("sm_80 sm_90a", "13.0")
    command = [
        build.find_compiler(),
        "-std=c++20",
        f"-I{build.CSRC}/common",
        *defines,
        *sources,
        "-o",
        str(folder / "main"),
    ]
    subprocess.run(command, check=True)
    return folder / "main"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (1, ""),
        (35, "the NVIDIA driver is too old for a binary built with CUDA 13.0 (CUDA 13 needs driver 580 or newer)"),
        (209, "this binary was built for sm_80 sm_90a, which leaves this GPU out"),
    ],
)
def test_a_failed_launch_names_the_kernel_its_sizes_and_the_remedy(error, remedy, launch_failure):
    message = subprocess.run([str(launch_failure), str(error)], capture_output=True, text=True, check=True).stdout
    sizes = "norm_kernel: launch failed: refused (grid 8x2x1, block 128x1x1, 4096 bytes of dynamic shared memory)"
    assert message.startswith(sizes) and remedy in message
    message = subprocess.run([str(launch_failure), str(-error)], capture_output=True, text=True, check=True).stdout
    assert message.startswith("cudaGetDevice failed: refused") and remedy in message
