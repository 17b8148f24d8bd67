"""Rules of products: each broken by a small kernel, whose twin keeps it."""

from __future__ import annotations

import pytest
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from pytransformer.gluon_interpreter import (
    EARLY,
    LayoutError,
    MissingFenceError,
    MissingWaitError,
    OperandReuseError,
    OverwriteError,
    UnfinishedError,
    UninitialisedReadError,
)
from pytransformer.kernels.hopper.names import async_load, async_store
from tests.gluon_interpreter.rules import check, run

ACC = gl.constexpr(gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, ACC.value, 2))


@gluon.jit
def _operands(source):
    """Two tiles that are there, and a barrier for what else is loaded."""
    memory = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], source.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    mbarrier.init(bars.index(1), count=1)
    mbarrier.expect(bars.index(0), 2 * source.block_type.nbytes)
    for i in gl.static_range(2):
        async_load(source, [i * 64, 0], bars.index(0), memory.index(i))
    mbarrier.wait(bars.index(0), 0)
    return memory, bars.index(1)


@gluon.jit
def _finish(result, memory, product):
    memory.index(0).store(product.to(gl.bfloat16))
    fence_async_shared()
    async_store(result, [0, 0], memory.index(0))
    tma.store_wait(0)


@gluon.jit
def _accumulator_too_early(source, result, BROKEN: gl.constexpr):
    memory, _bar = _operands(source)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    a, b = memory.index(0), memory.index(1)
    product = warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(1 if BROKEN else 0, deps=[product])
    product = product * 2.0  # too early
    warpgroup_mma_wait(0, deps=[product])
    _finish(result, memory, product)


@gluon.jit
def _not_out_of_the_wait(source, result, BROKEN: gl.constexpr):
    memory, _bar = _operands(source)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    product = warpgroup_mma(memory.index(0), memory.index(1), zero, use_acc=False, is_async=True)
    waited = warpgroup_mma_wait(0, deps=[product])
    if BROKEN:
        _finish(result, memory, product * 2.0)  # not out of the wait
    else:
        _finish(result, memory, waited * 2.0)


@gluon.jit
def _chain(source, result, BROKEN: gl.constexpr):
    """A product may go on from an accumulator that is not there yet."""
    memory, _bar = _operands(source)
    a, b = memory.index(0), memory.index(1)
    product = warpgroup_mma(a, b, gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True)
    product = warpgroup_mma_wait(1, deps=[product])
    product = warpgroup_mma(b, a, product, is_async=True)
    product = warpgroup_mma_wait(1 if BROKEN else 0, deps=[product])
    total = product + 1.0  # chain
    warpgroup_mma_wait(0, deps=[product])
    _finish(result, memory, total)


@gluon.jit
def _overwritten_while_read(source, result, BROKEN: gl.constexpr):
    memory, bar = _operands(source)
    a, b = memory.index(0), memory.index(1)
    product = warpgroup_mma(a, b, gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True)
    if not BROKEN:
        product = warpgroup_mma_wait(0, deps=[product])
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [128, 0], bar, b)  # overwritten while read
    mbarrier.wait(bar, 0)
    product = warpgroup_mma_wait(0, deps=[product])
    _finish(result, memory, product)


@gluon.jit
def _no_fence_before_a_product(source, result, BROKEN: gl.constexpr):
    memory, _bar = _operands(source)
    memory.index(0).store(memory.index(1).load(ACC))
    if not BROKEN:
        fence_async_shared()
    zero = gl.zeros([64, 64], gl.float32, ACC)
    product = warpgroup_mma(memory.index(0), memory.index(1), zero, use_acc=False)  # no fence before a product
    _finish(result, memory, product)


@gluon.jit
def _registers_reused(source, result, BROKEN: gl.constexpr):
    memory, _bar = _operands(source)
    left = memory.index(0).load(LEFT)
    product = warpgroup_mma(left, memory.index(1), gl.zeros([64, 64], gl.float32, ACC), use_acc=False, is_async=True)
    if BROKEN:
        left = memory.index(1).load(LEFT)
    product = warpgroup_mma_wait(0, deps=[product])  # registers reused
    _finish(result, memory, product)


@gluon.jit
def _not_loaded(source, result, BROKEN: gl.constexpr):
    memory, _bar = _operands(source)
    other = gl.allocate_shared_memory(gl.bfloat16, [64, 64], source.layout)
    if not BROKEN:
        other.store(memory.index(1).load(ACC))
        fence_async_shared()
    zero = gl.zeros([64, 64], gl.float32, ACC)
    product = warpgroup_mma(memory.index(0), other, zero, use_acc=False)  # not loaded
    _finish(result, memory, product)


@gluon.jit
def _unfinished_product(source, result, BROKEN: gl.constexpr):
    memory, _bar = _operands(source)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    product = warpgroup_mma(memory.index(0), memory.index(1), zero, use_acc=False, is_async=True)  # unfinished product
    if not BROKEN:
        warpgroup_mma_wait(0, deps=[product])


@gluon.jit
def _release(memory, full, empty, BROKEN: gl.constexpr):
    product = gl.zeros([64, 64], gl.float32, ACC)
    for i in range(4):
        mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        tile = memory.index(i % 2)
        product = warpgroup_mma(tile, tile.permute((1, 0)), product, is_async=True)
        if BROKEN:
            mbarrier.arrive(empty.index(i % 2))
            product = warpgroup_mma_wait(0, deps=[product])
        else:
            product = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(i % 2))


@gluon.jit
def _fill(source, memory, full, empty):
    for i in range(4):
        mbarrier.wait(empty.index(i % 2), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full.index(i % 2), source.block_type.nbytes)
        async_load(source, [i * 64, 0], full.index(i % 2), memory.index(i % 2))  # released too early


@gluon.jit
def _released_too_early(source, result, BROKEN: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], source.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize([(_release, (memory, full, empty, BROKEN)), (_fill, (source, memory, full, empty))], [1], [24])


@gluon.jit
def _warps(source, result, BROKEN: gl.constexpr):
    EIGHT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 64, 16])
    memory, _bar = _operands(source)
    zero = gl.zeros([64, 64], gl.float32, EIGHT if BROKEN else ACC)
    _finish(result, memory, warpgroup_mma(memory.index(0), memory.index(1), zero, use_acc=False))  # warps


@gluon.jit
def _width(source, result, BROKEN: gl.constexpr):
    NARROW: gl.constexpr = gl.DotOperandLayout(0, ACC, 4 if BROKEN else 2)
    memory, _bar = _operands(source)
    left = memory.index(0).load(NARROW)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    _finish(result, memory, warpgroup_mma(left, memory.index(1), zero, use_acc=False))  # width


def test_fault_is_reported_accumulator_read_before_its_wait() -> None:
    check(_accumulator_too_early, "too early", MissingWaitError)


def test_fault_is_reported_accumulator_that_is_not_what_its_wait_returned() -> None:
    check(_not_out_of_the_wait, "not out of the wait", MissingWaitError)


def test_fault_is_reported_accumulator_of_a_chain_read_before_its_wait() -> None:
    check(_chain, "chain", MissingWaitError)


def test_a_chain_adds_both_products() -> None:
    source, result = run(_chain, False, EARLY)
    a, b = source[:64].double(), source[64:128].double()
    expected = a @ b + b @ a + 1
    assert (result[:64].double() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_fault_is_reported_operand_overwritten_while_it_may_be_read() -> None:
    check(_overwritten_while_read, "overwritten while read", OverwriteError)


def test_fault_is_reported_no_fence_before_a_product() -> None:
    check(_no_fence_before_a_product, "no fence before a product", MissingFenceError)


def test_fault_is_reported_registers_of_an_operand_reused_before_the_wait() -> None:
    check(_registers_reused, "registers reused", OperandReuseError)


def test_fault_is_reported_operand_never_loaded() -> None:
    check(_not_loaded, "not loaded", UninitialisedReadError)


def test_fault_is_reported_product_that_nothing_waits_for() -> None:
    check(_unfinished_product, "unfinished product", UnfinishedError)


def test_fault_is_reported_stage_released_before_the_products_wait() -> None:
    check(_released_too_early, "released too early", OverwriteError)


@pytest.mark.parametrize(("kernel", "mark"), [(_warps, "warps"), (_width, "width")], ids=["warps", "k_width"])
def test_fault_is_reported_layout(kernel, mark) -> None:
    check(kernel, mark, LayoutError)
