"""What operations compute and leave behind, beside the rules that they hold to."""

from __future__ import annotations

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pytransformer.gluon_interpreter import EARLY, LATE, SCHEDULES, DescriptorError, Schedule, launch
from pytransformer.kernels.hopper.names import OLD, async_load, async_store
from pytransformer.triton_interpreter import OutOfBoundsError
from tests.gluon_interpreter.names import needs_inline_asm, needs_reductions
from tests.gluon_interpreter.rules import LAYOUT, SIDE, descriptor, run, tiles

BLOCKED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
FLOATS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)


@gluon.jit
def _copy(source, result, row, column, REDUCE: gl.constexpr):
    memory = gl.allocate_shared_memory(source.dtype, source.block_type.shape, source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [row, column], bar, memory)
    mbarrier.wait(bar, 0)
    if REDUCE == "add":
        tma.async_atomic_add(result, [row, column], memory)
    elif REDUCE == "max":
        tma.async_atomic_max(result, [row, column], memory)
    else:
        async_store(result, [0, 0], memory)
    tma.store_wait(0)


@pytest.mark.parametrize("padding", ["zero"] if OLD else ["zero", "nan"])
@pytest.mark.parametrize(("row", "column"), [(-10, 0), (40, 24), (200, 0), (-64, -64)])
def test_a_load_fills_what_is_outside_of_the_tensor(row: int, column: int, padding: str) -> None:
    source = tiles(2)
    result = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    launch(_copy, (1,), descriptor(source, padding=padding), descriptor(result), row, column, "", schedule=LATE)
    outside = float("nan") if padding == "nan" else 0.0
    around = torch.full((2 * SIDE + 400, SIDE + 400), outside, dtype=torch.bfloat16)
    around[200 : 200 + 2 * SIDE, 200 : 200 + SIDE] = source
    expected = around[200 + row :, 200 + column :][:SIDE, :SIDE]
    assert torch.equal(result.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@gluon.jit
def _copy_of_ragged(source, result, end, length):
    memory = gl.allocate_shared_memory(source.dtype, [1, 1, 64, 64], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [2**30, end, 2**30 - length, 0], bar, memory)
    mbarrier.wait(bar, 0)
    async_store(result, [2**30, end, 2**30 - length, 0], memory)
    tma.store_wait(0)


def test_the_offset_of_a_box_wraps_around_64_bits() -> None:
    """Triton's ragged_tma: the first dimension steps 2^64 elements less the rows that the third one is too many."""
    source, result = tiles(2), torch.zeros(2 * SIDE, SIDE, dtype=torch.bfloat16)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape, strides = [2**31 - 2**16] * 2 + [2**30, SIDE], [2**34 - SIDE, SIDE, SIDE, 1]
    ragged = [TensorDescriptor(x, shape, strides, [1, 1, SIDE, SIDE], layout) for x in (source, result)]
    launch(_copy_of_ragged, (1,), *ragged, 100, 30, schedule=LATE)
    expected = torch.zeros_like(result)
    expected[70:100] = source[70:100]
    assert torch.equal(result, expected)


@needs_reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reduction", ["add", "max"])
def test_a_reduction_changes_only_what_is_inside_of_the_tensor(reduction: str, dtype: torch.dtype) -> None:
    source, result = torch.randn(100, SIDE).to(dtype), torch.randn(100, SIDE).to(dtype)
    layout = FLOATS if dtype == torch.float32 else LAYOUT
    boxes = [TensorDescriptor.from_tensor(x, [SIDE, SIDE], layout) for x in (source, result)]
    combine = torch.add if reduction == "add" else torch.maximum
    expected = torch.cat((result[:64], combine(result[64:], source[64:])))
    launch(_copy, (1,), *boxes, 64, 0, reduction)
    assert torch.equal(result, expected)


@gluon.jit
def _numbers(out, n):
    place = 0
    for i in range(-1, n):
        gl.store(out + place, i % 2)
        gl.store(out + place + 1, i // 2)
        place += 2


def test_numbers_of_a_loop_are_computed_as_a_gpu_does() -> None:
    out = torch.full((4,), 9, dtype=torch.int32)
    launch(_numbers, (1,), out, 1)
    assert out.tolist() == [-1, 0, 0, 0], "not Python's 1 and -1 for -1"


@gluon.jit
def _overflow(out, n):
    gl.store(out, n * 65536 + n)


def test_integers_that_overflow_are_reported() -> None:
    with pytest.raises(OverflowError, match=r"int32 overflows in mul at test_operations.py:\d+ in _overflow"):
        launch(_overflow, (1,), torch.zeros(1, dtype=torch.int32), 65536)


@gluon.jit
def _tensors(x, out):
    COLUMNS: gl.constexpr = gl.SliceLayout(0, BLOCKED)
    ROWS: gl.constexpr = gl.SliceLayout(1, BLOCKED)
    rows, columns = gl.arange(0, 16, layout=ROWS), gl.arange(0, 32, layout=COLUMNS)
    tile = gl.load(x + rows[:, None] * 32 + columns[None, :])
    largest, total = gl.max(tile, 1), gl.sum(tile, axis=1)
    gl.store(out + rows, largest)
    gl.store(out + 16 + rows, total)
    gl.store(out + 32 + columns, gl.min(gl.where(tile > 0, tile, 1.0), 0))
    gl.store(out + 64, gl.max(largest, 0))


def test_tensors_are_reduced_along_each_axis() -> None:
    x, out = torch.randn(16, 32), torch.zeros(65)
    launch(_tensors, (1,), x, out)
    expected = torch.cat((x.amax(1), x.sum(1), torch.where(x > 0, x, 1.0).amin(0), x.max().view(1)))
    torch.testing.assert_close(out, expected)


@gluon.jit
def _mixed_layouts(x, out):
    other: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    a = gl.full([16, 32], 1.0, gl.float32, BLOCKED)
    b = gl.full([16, 32], 1.0, gl.float32, other)
    gl.store(out, gl.sum(gl.sum(a + b, 1), 0))


def test_layouts_must_match_as_where_it_compiles() -> None:
    with pytest.raises(ValueError, match="Layout mismatch"):
        launch(_mixed_layouts, (1,), torch.zeros(1), torch.zeros(1))


@gluon.jit
def _beyond(out):
    gl.store(out + gl.arange(0, 32, layout=gl.SliceLayout(0, BLOCKED)), 1.0)


def test_a_store_outside_of_a_tensor_is_reported_with_its_line() -> None:
    with pytest.raises(OutOfBoundsError, match=r"'out'.* at test_operations.py:\d+ in _beyond"):
        launch(_beyond, (1,), torch.zeros(31))


@gluon.jit
def _make_descriptor(x, result, rows, stride):
    source = tma.make_tensor_descriptor(x, [rows, 64], [stride, 1], [64, 64], result.layout)
    memory = gl.allocate_shared_memory(gl.bfloat16, [64, 64], result.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, 64 * 64 * 2)
    async_load(source, [0, 0], bar, memory)
    mbarrier.wait(bar, 0)
    async_store(result, [0, 0], memory)
    tma.store_wait(0)


def test_a_descriptor_made_by_the_kernel_is_held_to_the_same_rules() -> None:
    x, result = torch.randn(100, 80).to(torch.bfloat16), torch.zeros(SIDE, SIDE, dtype=torch.bfloat16)
    launch(_make_descriptor, (1,), x, descriptor(result), 30, 80)
    assert torch.equal(result[:30], x[:30, :64]) and not result[30:].any()
    with pytest.raises(DescriptorError, match="multiples of 16 bytes"):
        launch(_make_descriptor, (1,), x, descriptor(result), 30, 77)
    with pytest.raises(OutOfBoundsError):
        launch(_make_descriptor, (1,), x, descriptor(result), 64, 160)


@gluon.jit
def _twice(source, result, BROKEN: gl.constexpr):
    """Each step of a schedule is seen in the trace."""
    memory = gl.allocate_shared_memory(gl.bfloat16, [64, 64], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [0, 0], bar, memory)
    mbarrier.wait(bar, 0)
    memory.store(memory.load(BLOCKED) + memory.load(BLOCKED))
    fence_async_shared()
    async_store(result, [0, 0], memory)
    tma.store_wait(0)


@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=["early", "late"])
def test_a_trace_shows_when_a_copy_is_done(schedule: Schedule) -> None:
    source, result = tiles(1), torch.zeros(SIDE, SIDE, dtype=torch.bfloat16)
    (trace,) = launch(_twice, (1,), descriptor(source), descriptor(result), False, schedule=schedule)
    assert torch.equal(result, source + source)
    kinds = [event.kind for event in trace.events]
    load = ["copied", "copy", "wait"] if schedule is EARLY else ["copy", "blocked", "copied", "wait"]
    store = ["copied", "copy", "store_wait"] if schedule is EARLY else ["copy", "copied", "store_wait"]
    assert kinds == ["init", "expect", *load, "load", "load", "store", "fence", *store, "end"]
    assert [event.step for event in trace.events] == list(range(len(kinds)))
    assert all(event.where.startswith("test_operations.py:") for event in trace.events[:-1])


@gluon.jit
def _unknown(source, result, BROKEN: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.bfloat16, [64, 64], source.layout)
    if BROKEN:
        gl.inline_asm("mov.u32 $0, 1;")
    memory.reinterpret(gl.float16)


def test_what_it_does_not_know_it_refuses() -> None:
    with pytest.raises(NotImplementedError, match=r"reinterpret of shared memory, at test_operations.py:\d+"):
        run(_unknown, False, EARLY)


@needs_inline_asm
def test_assembly_that_it_does_not_know_it_refuses() -> None:
    with pytest.raises(NotImplementedError, match="only named barriers in assembly"):
        run(_unknown, True, EARLY)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"grid must be one to three positive numbers, got \(0,\)"):
        launch(_beyond, (0,), torch.zeros(32))
    with pytest.raises(TypeError, match="argument out is a str"):
        launch(_beyond, (1,), "x")
    with pytest.raises(ValueError, match="order must be one of next, first, last, same, random, got 'any'"):
        Schedule(order="any")  # type: ignore[arg-type]


@gluon.jit
def _compares_without_sign(out, limit):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    x = gl.arange(0, 128, layout=layout)
    gl.store(out + x, ((x - 64).to(gl.uint32) <= limit.to(gl.uint32)).to(gl.int32))


def test_an_unsigned_integer_has_no_sign_when_it_is_compared() -> None:
    out = torch.zeros(128, dtype=torch.int32)
    launch(_compares_without_sign, (1,), out, 10)
    assert out.tolist() == [0] * 64 + [1] * 11 + [0] * 53
