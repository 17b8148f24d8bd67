"""Compiles the cases of one op and prints what came of it: registers and bytes of spills per thread, bytes of shared memory per
block, warps, matrix instructions, how many of the loads and stores of global memory move 128 bits, instructions of its hot loops (in
brackets the whole kernel's where it has none) with their issue ratios, and seconds.

python -m tests.support.compile_module norm
python -m tests.support.compile_module attention --arch 90 --match forward-bfloat16-d128
"""

from __future__ import annotations

import argparse
import functools
import sys
import time

from tests.support.compile_gate import ARCHITECTURES, cases, ops, run_cases
from tests.support.hot_loop import Loop
from tests.support.sass import GLOBAL_128_BIT, GLOBAL_ACCESS, MATRIX_INSTRUCTION


def _loop(loop: Loop, arch: int) -> str:
    """E.g. "558" for a loop of attention, "[276]:0.35" for a kernel without loops, "330+2L" for two accesses of local memory."""
    text = str(loop.instructions) if loop.is_loop else f"[{loop.instructions}]"
    if loop.classes.get("local"):
        text += f"+{loop.classes['local']}L"
    ratio = loop.issue_ratio(arch)
    return text if ratio is None else f"{text}:{ratio:.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Prints a line per case, architecture and kernel; returns 1 if any has a complaint."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.compile_module", description="Compiles the cases of one op."
    )
    parser.add_argument("op", choices=ops(), help="folder or file in kernels/")
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), help="compute capabilities")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--processes", type=int, default=None, help="compile this many at a time (default: all cores)")
    options = parser.parse_args(arguments)

    chosen = [case for case in cases(options.op, options.arch) if options.match in case.name]
    begin = time.perf_counter()
    reports = run_cases(chosen, options.processes)
    width = max((len(name) for name in reports), default=0)
    print(
        f"{'case':{width}}  {'kernel':32} {'regs':>4} {'spill':>5} {'shared':>6} {'warps':>5} {'mma':>5} {'128-bit':>8} {'s':>5}  hot loops"
    )
    for name, report in reports.items():
        for outcome in report.outcomes:
            got = outcome.statistics
            matrix = got.count(MATRIX_INSTRUCTION)
            wide = f"{got.count(GLOBAL_128_BIT)}/{got.count(GLOBAL_ACCESS)}"
            numbers = (
                f"{got.registers:4} {got.spill_bytes:5} {got.shared_memory:6} {got.num_warps:5} {matrix:5} {wide:>8}"
            )
            loops = " ".join(map(functools.partial(_loop, arch=report.case.arch), got.loops))
            print(f"{name:{width}}  {outcome.launch.name:32} {numbers} {got.seconds:5.1f}  {loops}")
        for complaint in report.complaints:
            print(f"{name:{width}}  FAIL: {complaint}")
    failed = sum(bool(report.complaints) for report in reports.values())
    print(f"{len(chosen)} cases, {failed} failed, {time.perf_counter() - begin:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
