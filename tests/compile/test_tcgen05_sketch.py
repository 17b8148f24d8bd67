"""The sketch for sm_100 goes on compiling to the figures that docs/tcgen05.md names."""

from __future__ import annotations

import pytest
from triton import compile as compile_kernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import blackwell

from tests.support.hot_loop import read
from tests.support.launch_recorder import Launch, request
from tests.support.sass import count_instructions, disassemble

HEAD_DIM, BLOCK = 64, 128


pytestmark = [
    pytest.mark.skipif(not hasattr(blackwell, "fma2"), reason="this Triton's Gluon has no packed arithmetic"),
    pytest.mark.compiles,
]


def _launch() -> Launch:
    from tests.compile.tcgen05_sketch import ROWS, attention

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows = {"q_desc": ROWS.value, "k_desc": BLOCK, "v_desc": BLOCK, "out_desc": ROWS.value}
    signature = {name: f"tensordesc<bf16[{count},{HEAD_DIM}],{layout!r}>" for name, count in rows.items()}
    signature |= {"factor": "fp32", "seqlen": "i32", "num_tiles": "i32", "D": "constexpr", "BLOCK": "constexpr"}
    constants, aligned = {"D": HEAD_DIM, "BLOCK": BLOCK}, {(5,): [["tt.divisibility", 16]]}
    return request(attention, 100, signature, constants, aligned, num_warps=4, enable_fp_fusion=True)


def decided_by() -> list[str]:
    return [_launch().key]


def test_the_softmax_of_a_tile_takes_431_instructions_and_no_spill() -> None:
    launch = _launch()
    compiled = compile_kernel(launch.source(), target=launch.target, options=launch.options.__dict__)
    assert compiled.metadata.tmem_size == 512, "of 384 columns, as a power of two is allocated"
    listing = disassemble(compiled.asm["cubin"])
    names = count_instructions(listing)
    assert not [name for name in names if name.startswith(("LDL", "STL"))], "spills"
    instructions, loops = read(listing)
    # A wait's slow path branches back into the loop that it left, and looks like a longer one.
    found = [instructions[first : last + 1] for first, last in loops]
    lengths = [len(body) for body in found if 128 <= sum("MUFU.EX2" in each.name for each in body) < 256]
    assert sorted(lengths)[1] <= 435, "one loop for each tile of queries"
