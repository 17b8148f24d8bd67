"""The CUDA kernels on the CPU: builds the extension for the host emulator, and the environment a process needs to load it.

    python -m tests.support.emulator --flavor address [pytest arguments]

runs tests/cuda, or what the arguments name, with that flavor: "address" (AddressSanitizer and UndefinedBehaviorSanitizer), "thread"
(ThreadSanitizer) or "emulated" (neither). tests/ops/test_norm.py, too, tests the extension where it finds itself so run.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
# In order, in reverse, and four random interleavings of threads, warps and blocks.
SCHEDULES = range(6)
# Bytes of dynamic shared memory of a block: on sm_90, which is the emulator's own limit, and on sm_86, sm_89 and sm_120.
MOST_SHARED_MEMORY, LEAST_SHARED_MEMORY = 232448, 99 * 1024


@functools.cache
def builder() -> ModuleType:
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("pytransformer_cuda_build", ROOT / "csrc/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def environment(flavor: str, library: Path) -> dict[str, str]:
    """Variables under which a Python process loads ``library``, built in that flavor."""
    variables = {
        "PYTRANSFORMER_CUDA_LIBRARY": str(library),
        "PYTRANSFORMER_TEST_CUDA": flavor,
        "OMP_NUM_THREADS": "1",
    }
    # A sanitizer's runtime must be there before Python is, and with it the C++ library whose exceptions it intercepts.
    preload = {"address": ("libasan.so", "libstdc++.so.6"), "thread": ("libtsan.so", "libstdc++.so.6")}.get(flavor, ())
    if preload:
        variables["LD_PRELOAD"] = " ".join(_runtime(name) for name in preload)
    # Python and torch free little at exit; what torch.empty gives a kernel is NaN, so that what it leaves unwritten is seen.
    variables["ASAN_OPTIONS"] = (
        "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255:redzone=256:handle_segv=1"
    )
    variables["UBSAN_OPTIONS"] = "print_stacktrace=1"
    variables["TSAN_OPTIONS"] = "halt_on_error=1:exitcode=66:report_signal_unsafe=0"
    return variables


def _runtime(name: str) -> str:
    path = subprocess.run(
        [builder().find_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(path):
        raise RuntimeError(f"the C++ compiler has no {name}: install its sanitizer libraries (Debian: libgcc-12-dev)")
    return os.path.realpath(path)


def build_program(source: Path, flavor: str, folder: Path, *, optimise: str | None = None) -> Path:
    """A program of one source, linked with the emulator. Built by the first test process that wants it in ``folder``.

    Args:
        optimise: in place of the flavor's own -O.

    Raises:
        BuildError: something needed is missing.
        RuntimeError: the source does not compile.
    """
    plan = builder().emulated_plan(builder().find_torch(), flavor, ())
    flags = [flag for flag in plan.kernel_flags if optimise is None or not flag.startswith("-O")]
    engine, program = folder / f"emulator-{flavor}.o", folder / f"{source.stem}-{flavor}"
    commands = [
        [plan.cxx, *plan.engine_flags, "-c", str(plan.engine), "-o", str(engine)],
        [plan.kernel_compiler, *([optimise] if optimise else []), *flags, str(source), "-x", "none", str(engine), "-o", str(program)],
    ]  # fmt: skip
    with (folder / f"{program.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in commands if not program.exists() else ():
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise RuntimeError(f"{source.name} does not compile:\n{result.stderr}")
    return program


def prefix(flavor: str) -> list[str]:
    """What a command must begin with: ThreadSanitizer cannot live with a randomised address space."""
    return ["setarch", "-R"] if flavor == "thread" and shutil.which("setarch") else []


@functools.cache
def _control() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["PYTRANSFORMER_CUDA_LIBRARY"])


def configure(
    schedule: int = 0, *, stub_launches: bool = False, num_sms: int = 4, shared_memory: int = MOST_SHARED_MEMORY
) -> None:
    """Sets how the emulator of this process runs what is launched next.

    Args:
        schedule: out of :data:`SCHEDULES`.
        stub_launches: launches return at once.
        num_sms: what launch policy is told.
        shared_memory: bytes of dynamic shared memory that a block may have; launch policy is told, and a launch that asks for more fails.

    Raises:
        ValueError: more shared memory than the emulator has.
    """
    if not 0 <= shared_memory <= MOST_SHARED_MEMORY:
        raise ValueError(f"shared_memory must be from 0 to {MOST_SHARED_MEMORY}, got {shared_memory}")
    _control().pytransformer_emulator_configure(schedule, int(stub_launches), num_sms, shared_memory)


def runtime_calls() -> tuple[int, int]:
    """How often CUDA's runtime was asked so far: for the limits of a device, and to allow a kernel more dynamic shared memory."""
    limits, allowances = map(_control().pytransformer_emulator_runtime_calls, range(2))
    return limits, allowances


def blocks_of_last_launch() -> int:
    """How many blocks the emulator's last launch had."""
    return int(_control().pytransformer_emulator_blocks())


def in_every_schedule(
    function: Callable[[], Sequence[Tensor | None]], *, num_sms: int = 4, shared_memory: int = MOST_SHARED_MEMORY
) -> list[Tensor | None]:
    """Calls ``function`` under each schedule of the emulator (on a GPU: as often), and compares all results bit by bit.

    Args:
        function: launches, and returns what is to be compared.
        num_sms, shared_memory: what launch policy is told in the emulator, as of :func:`configure`.

    Returns:
        The results of the first call.
    """
    emulated = "PYTRANSFORMER_CUDA_LIBRARY" in os.environ
    first: list[Tensor | None] | None = None
    for schedule in SCHEDULES:
        if emulated:
            configure(schedule, num_sms=num_sms, shared_memory=shared_memory)
        results = list(function())
        if first is None:
            first = results
            continue
        for index, (result, expected) in enumerate(zip(results, first, strict=True)):
            if (result is None) != (expected is None) or (
                result is not None and expected is not None and not _same_bits(result, expected)
            ):
                raise AssertionError(f"result {index} differs between schedules 0 and {schedule}")
    if emulated:
        configure(0)
    assert first is not None
    return first


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.emulator", description=__doc__)
    parser.add_argument("--flavor", choices=("emulated", "address", "thread"), default="address")
    arguments, pytest_arguments = parser.parse_known_args(argv)
    try:
        library = builder().build(arguments.flavor)
    except builder().BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    command = [*prefix(arguments.flavor), sys.executable, "-m", "pytest", *(pytest_arguments or ["tests/cuda"])]
    return subprocess.run(
        command, env=os.environ | environment(arguments.flavor, library), cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
