"""What a loop of Hopper's attention asks of each unit of an SM sub-partition (sm_90), in clocks: the largest is the least that it takes.

An SM has four sub-partitions, and a warpgroup a warp in each, so clocks of one warp there are clocks of the warpgroup on the SM. Rates are
those of the CUDA programming guide (arithmetic instructions, throughput of native ones), a quarter of an SM's; of the tensor cores 4096
floating-point operations a clock and SM; of shared memory 128 bytes. What no unit is named for takes issue alone, an instruction a clock.

python -m tests.support.budget
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import triton

from tests.support.hot_loop import MATRIX, Instruction, innermost, read
from tests.support.launch_recorder import Launch
from tests.support.sass import disassemble

# Clocks for which an instruction of a warp holds its unit: 32 lanes by the lanes a clock.
UNITS: dict[str, tuple[re.Pattern[str], int]] = {
    "exponentials": (re.compile(r"MUFU"), 8),
    "multiply-adds": (re.compile(r"F(FMA|MUL|ADD)|IMAD"), 1),
    "comparisons, integers, conversions": (
        re.compile(r"F(MNMX|SEL|SETP)|F2FP|I(ADD|SETP|MNMX)|VI(ADD|MNMX)|LOP3|SHF|LEA|SEL|PRMT|MOV"),
        2,
    ),
    "shuffles": (re.compile(r"SHFL"), 4),
}
_OPERATIONS, _BYTES = 4096, 128
_ROWS = 64
_SHAPE = re.compile(r"^64x(\d+)x(\d+)\.\S+\s+R\d+,\s*(R\d+|gdesc)")


def product(instruction: Instruction) -> tuple[float, float]:
    """(clocks of the tensor cores, clocks of shared memory) of a product of 64 rows: it reads its second operand there, and the first
    one too where that does not come in registers.

    Raises:
        ValueError: it is no such product.
    """
    # The name ends where small letters begin: "HGMMA.64" and "x128x16.F32.BF16 R24, …".
    found = _SHAPE.match(instruction.name.rpartition(".")[2] + instruction.operands)
    if found is None:
        raise ValueError(f"no product of 64 rows: {instruction}")
    columns, depth = int(found.group(1)), int(found.group(2))
    rows = columns + (_ROWS if found.group(3) == "gdesc" else 0)
    return 2 * _ROWS * columns * depth / _OPERATIONS, 2 * rows * depth / _BYTES


def clocks(loop: Sequence[Instruction]) -> dict[str, float]:
    """Of each unit, for one pass of a warpgroup through the loop."""
    found: Counter[str] = Counter({"issue": len(loop), "tensor cores": 0, "shared memory": 0})
    for instruction in loop:
        if MATRIX.match(instruction.name):
            cores, memory = product(instruction)
            found["tensor cores"] += cores  # type: ignore[assignment]
            found["shared memory"] += memory  # type: ignore[assignment]
        for unit, (pattern, held) in UNITS.items():
            if pattern.match(instruction.name):
                found[unit] += held
    return dict(found)


def loops_of(launch: Launch) -> list[list[Instruction]]:
    """The loops of a launch that have a tile's products, in the order of its code."""
    compiled = triton.compile(launch.source(), target=launch.target, options=launch.options.__dict__)
    instructions, loops = read(disassemble(compiled.asm["cubin"]))
    found = [instructions[first : last + 1] for first, last in innermost(loops)]
    return [loop for loop in found if sum(bool(MATRIX.match(one.name)) for one in loop) >= 12]


def main() -> None:
    """Prints the budget of the loops of both passes."""
    from pytransformer.kernels.hopper.launch import HopperForward
    from tests.compile import test_hopper, test_hopper_backward
    from tests.support.launch_recorder import record

    for dim in (64, 128):
        call = test_hopper.call(dim, dim)
        passes = {
            test_hopper.NAME: record(lambda call=call: HopperForward(call)(call), 90),
            test_hopper_backward.NAME: record(lambda dim=dim: test_hopper_backward.launch(dim), 90),
        }
        for name, launches in passes.items():
            (launch,) = [one for one in launches if one.name == name]
            for loop in loops_of(launch):
                listed = ", ".join(f"{unit} {held:.0f}" for unit, held in clocks(loop).items())
                print(f"{name}, head_dim {dim}: {listed}")


if __name__ == "__main__":
    main()
