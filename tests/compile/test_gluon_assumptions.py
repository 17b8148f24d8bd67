"""What the Gluon interpreter takes for granted of compiled code, read in the PTX of one kernel: see pytransformer/gluon_interpreter."""

from __future__ import annotations

import re

import pytest
from triton import compile as compile_kernel
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pytransformer.kernels.hopper.names import async_load, async_store
from tests.support.launch_recorder import Launch, request

pytestmark = pytest.mark.compiles

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

# What is looked for, and the letter that stands for it in the kernel's order.
_INSTRUCTIONS = {
    r"mbarrier\.init": "i",
    r"mbarrier\.arrive\.expect_tx\S* _, \[%\w+\], 32768": "x",
    r"mbarrier\.arrive\.shared\S* _, \[%\w+\], 3": "a",
    r"mbarrier\.try_wait\.parity": "w",
    r"cp\.async\.bulk\.tensor\S*mbarrier::complete_tx": "l",
    r"st\.shared|stmatrix": "s",
    r"ld\.shared": "r",
    r"bar\.sync": "|",
    r"fence\.proxy\.async": "f",
    r"wgmma\.mma_async": "m",
    r"wgmma\.commit_group": "c",
    r"wgmma\.wait_group\S*\s+1;": "1",
    r"wgmma\.wait_group\S*\s+0;": "0",
    r"cp\.async\.bulk\.tensor\S*bulk_group": "t",
    r"cp\.async\.bulk\.commit_group": "C",
    r"cp\.async\.bulk\.wait_group\.read\s+0;": "W",
}


@gluon.jit
def _kernel(source, result, x, out):
    """Everything once, by two warpgroups, with no barrier between warps."""
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, 64, 16])
    B: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    tiles = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 128], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=4)
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [0, 0], bar, tiles.index(0))
    mbarrier.arrive(bar, count=3)
    mbarrier.wait(bar, 0)
    rows = gl.arange(0, 128, layout=gl.SliceLayout(1, B))
    columns = gl.arange(0, 128, layout=gl.SliceLayout(0, B))
    places = rows[:, None] * 128 + columns[None, :]
    tiles.index(1).store(gl.load(x + places))
    fence_async_shared()
    zero = gl.zeros([128, 128], gl.float32, A)
    first = warpgroup_mma(tiles.index(0), tiles.index(1), zero, use_acc=False, is_async=True)
    second = warpgroup_mma(tiles.index(1), tiles.index(0), zero, use_acc=False, is_async=True)
    first = warpgroup_mma_wait(1, deps=[first])
    second = warpgroup_mma_wait(0, deps=[second])
    tiles.index(0).store((first + second).to(gl.bfloat16))
    fence_async_shared()
    async_store(result, [0, 0], tiles.index(0))
    tma.store_wait(0)
    tiles.index(0).store(gl.load(x + places))
    gl.store(out + places, tiles.index(0).load(B))


def _launch() -> Launch:
    descriptor = f"tensordesc<bf16[128,128],{SWIZZLED!r}>"
    signature = {"source": descriptor, "result": descriptor, "x": "*bf16", "out": "*bf16"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in (2, 3)}
    return request(_kernel, 90, signature, {}, aligned, num_warps=8, enable_fp_fusion=True)


def decided_by() -> list[str]:
    return [_launch().key]


@pytest.fixture(scope="module")
def order() -> str:
    """The instructions of the kernel as letters, each run of one as one letter."""
    launch = _launch()
    ptx = compile_kernel(launch.source(), target=launch.target, options=launch.options.__dict__).asm["ptx"]
    letters = [
        next((letter for pattern, letter in _INSTRUCTIONS.items() if re.search(pattern, line)), "")
        for line in ptx.splitlines()
    ]
    return re.sub(r"(.)\1+", r"\1", "".join(letters))


def test_an_expectation_is_an_arrival_and_an_arrival_one_threads(order: str) -> None:
    assert order.startswith("i|x"), order
    assert re.search(r"x\|?l\|?a\|?w", order), order


def test_each_asynchronous_product_is_a_group(order: str) -> None:
    assert "mcmc10" in order, order


def test_warps_wait_for_each_other_between_a_store_and_what_reads_it(order: str) -> None:
    assert re.search(r"sf\|m", order), "a store to shared memory, a fence, a barrier, then a product"
    assert re.search(r"sf\|tCW", order), "the same before a copy, which is a group of its own"


def test_warps_wait_for_each_other_before_they_overwrite(order: str) -> None:
    assert re.search(r"0\|s", order), "a wait for products, a barrier, then a store over their operands"
    assert re.search(r"W\|s\|r", order), "one thread waits for a copy, a barrier, then a store over its source"
