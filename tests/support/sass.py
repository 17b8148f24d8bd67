"""Compiles recorded launches and reads from the result what a performance gate wants to know.

Registers, spills and warnings come from ptxas; instruction counts from disassembling the cubin with the nvdisasm that Triton brings along.
For one Triton, one source and one architecture they are always the same, so they are kept in Triton's cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from tests.support.hot_loop import Loop, hot_loops
from tests.support.launch_recorder import Launch

# Raised when what is recorded changes, so that older records are not read.
_RECORD_VERSION = "2"
_RECORD_FILE = "sass_statistics.json"

INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
# "Potential Performance Loss": wgmma instructions are serialised, and why.
_WARNING = re.compile(r"^.*\bC751[0-8]\b.*$", re.MULTILINE)

# Matrix instructions of a single warp, of a warp group (wgmma, sm_90) and on tensor memory (tcgen05, sm_100).
WARP_GROUP_MMA = re.compile(r"HGMMA|IGMMA|QGMMA")
TENSOR_MEMORY_MMA = re.compile(r"UTC\w*MMA")
MATRIX_INSTRUCTION = re.compile(r"[DHIQO]MMA|[HIQ]GMMA|UTC\w*MMA")
# Loads and stores of global memory by registers (not cp.async or TMA).
GLOBAL_ACCESS = re.compile(r"(LDG|STG)\.")
GLOBAL_128_BIT = re.compile(r"(LDG|STG)\..*\.128")


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What came of compiling one launch.

    Attributes:
        error: why it does not compile; None if it does, and then the rest is filled in.
        registers: per thread.
        spill_bytes: the larger of the bytes stored and loaded because registers ran out, per thread.
        stack_bytes: local memory per thread; more than the spills if an array is indexed at run time.
        shared_memory: bytes per block.
        num_warps: warps per block that Triton launches.
        warnings: of ptxas, about serialised warp-group instructions.
        instructions: how often each SASS instruction occurs, by its name with modifiers (``LDG.E.128``).
        loops: those that do the work, in the order of the code; see :func:`tests.support.hot_loop.hot_loops`.
        seconds: that compiling took when it was done.
    """

    error: str | None = None
    registers: int = 0
    spill_bytes: int = 0
    stack_bytes: int = 0
    shared_memory: int = 0
    num_warps: int = 0
    warnings: tuple[str, ...] = ()
    instructions: dict[str, int] = dataclasses.field(default_factory=dict)
    loops: tuple[Loop, ...] = ()
    seconds: float = 0.0

    def count(self, pattern: str | re.Pattern[str]) -> int:
        """Instructions whose name starts with the pattern."""
        return sum(number for name, number in self.instructions.items() if re.match(pattern, name))


def compile_launch(launch: Launch) -> Statistics:
    """Compiles the launch for its architecture, or finds in Triton's cache what came of it before."""
    cache = get_cache_manager(hashlib.sha256(f"{_RECORD_VERSION}-{launch.key}".encode()).hexdigest())
    path = cache.get_file(_RECORD_FILE)
    if path is not None:
        record = json.loads(Path(path).read_text())
        loops = tuple(Loop(**loop) for loop in record["loops"])
        return Statistics(**{**record, "warnings": tuple(record["warnings"]), "loops": loops})
    statistics = _compile(launch)
    if statistics.error is None:
        cache.put(json.dumps(dataclasses.asdict(statistics)), _RECORD_FILE, binary=False)
    return statistics


def _compile(launch: Launch) -> Statistics:
    begin = time.perf_counter()
    output = io.StringIO()
    knobs = triton.knobs
    try:
        # ptxas is heard only when it runs, so the cubin must not come from the cache.
        with contextlib.redirect_stdout(output), knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.always_compile = True
            compiled = triton.compile(launch.source(), target=launch.target, options=launch.options.__dict__)
    except Exception as error:  # whatever stops the compiler is a finding, not a failure of this program
        return Statistics(error=_first_lines(error), seconds=time.perf_counter() - begin)
    try:
        registers, spills, stack, warnings = parse_ptxas_log(output.getvalue())
    except ValueError as error:
        return Statistics(error=str(error))
    listing = disassemble(compiled.asm["cubin"])
    return Statistics(
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        shared_memory=int(compiled.metadata.shared),
        num_warps=int(compiled.metadata.num_warps),
        warnings=warnings,
        instructions=count_instructions(listing),
        loops=tuple(hot_loops(listing)),
        seconds=time.perf_counter() - begin,
    )


def parse_ptxas_log(log: str) -> tuple[int, int, int, tuple[str, ...]]:
    """Registers, bytes of spills and of stack, and warnings, as ``ptxas -v`` reports them (the largest of all functions).

    Raises:
        ValueError: there is no such report.
    """
    frames = [tuple(map(int, numbers)) for numbers in _FRAME.findall(log)]
    registers = [int(number) for number in _REGISTERS.findall(log)]
    if not frames or not registers:
        raise ValueError(f"ptxas did not report registers and spills: {log[:500]!r}")
    spills = max(max(stores, loads) for _, stores, loads in frames)
    stack = max(stack for stack, _, _ in frames)
    return max(registers), spills, stack, tuple(line.strip() for line in _WARNING.findall(log))


def _first_lines(error: BaseException, number: int = 12) -> str:
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return "\n".join(lines[:number])


def disassemble(cubin: bytes) -> str:
    """The machine code as nvdisasm prints it."""
    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([nvdisasm, "-c", path], capture_output=True, text=True, check=True).stdout


def count_instructions(listing: str) -> dict[str, int]:
    """How often each instruction occurs in a listing, by name."""
    return dict(sorted(Counter(INSTRUCTION.findall(listing)).items()))


# Launches hold functions, which do not travel between processes: the workers are forked and find them here.
_pending: Sequence[Launch] = ()


def _compile_pending(index: int) -> Statistics:
    return compile_launch(_pending[index])


def compile_launches(launches: Sequence[Launch], processes: int | None = None) -> dict[str, Statistics]:
    """Statistics of the launches by their key; equal launches are compiled once, several at a time."""
    global _pending
    different = {launch.key: launch for launch in launches}
    _pending = list(different.values())
    processes = min(processes or len(os.sched_getaffinity(0)), len(_pending))
    try:
        if processes <= 1:
            results: list[Statistics] = [compile_launch(launch) for launch in _pending]
        else:
            context: Any = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(processes, mp_context=context) as pool:
                results = list(pool.map(_compile_pending, range(len(_pending))))
    finally:
        _pending = ()
    return dict(zip(different, results, strict=True))
