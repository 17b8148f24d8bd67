"""Rules of shared memory, copies and fences: each broken by a small kernel, whose twin keeps it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from pytransformer.gluon_interpreter import (
    DeadlockError,
    DescriptorError,
    MissingFenceError,
    MissingWaitError,
    OverArrivalError,
    OverwriteError,
    SharedMemoryLimitError,
    SharedRaceError,
    UnfinishedError,
    UninitialisedReadError,
)
from pytransformer.kernels.hopper.names import async_load, async_store
from pytransformer.triton_interpreter import OutOfBoundsError, RaceError
from tests.gluon_interpreter.rules import check

BLOCKED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _stages(source, COUNT: gl.constexpr):
    """Shared memory for tiles, and a barrier."""
    memory = gl.allocate_shared_memory(gl.bfloat16, [COUNT, 64, 64], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    return memory, bar


@gluon.jit
def _fetch(source, memory, bar):
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [0, 0], bar, memory)


@gluon.jit
def _write(result, memory):
    fence_async_shared()
    async_store(result, [0, 0], memory)
    tma.store_wait(0)


@gluon.jit
def _no_wait(source, result, BROKEN: gl.constexpr):
    memory, bar = _stages(source, 1)
    _fetch(source, memory.index(0), bar)
    if not BROKEN:
        mbarrier.wait(bar, 0)
    tile = memory.index(0).load(BLOCKED)  # no wait
    mbarrier.wait(bar, 0)
    memory.index(0).store(tile)
    _write(result, memory.index(0))


@gluon.jit
def _other_phase(source, result, BROKEN: gl.constexpr):
    memory, bar = _stages(source, 1)
    _fetch(source, memory.index(0), bar)
    mbarrier.wait(bar, 1 if BROKEN else 0)
    tile = memory.index(0).load(BLOCKED)  # other phase
    mbarrier.wait(bar, 0)
    memory.index(0).store(tile)
    _write(result, memory.index(0))


@gluon.jit
def _no_fence(source, result, BROKEN: gl.constexpr):
    memory, _bar = _stages(source, 1)
    memory.index(0).store(gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED))
    if not BROKEN:
        fence_async_shared()
    async_store(result, [0, 0], memory.index(0))  # no fence
    tma.store_wait(0)


@gluon.jit
def _no_fence_before_a_load(source, result, BROKEN: gl.constexpr):
    memory, bar = _stages(source, 1)
    memory.index(0).store(gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED))
    if not BROKEN:
        fence_async_shared()
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [0, 0], bar, memory.index(0))  # no fence before a load
    mbarrier.wait(bar, 0)


@gluon.jit
def _stored_over(source, result, BROKEN: gl.constexpr):
    memory, _bar = _stages(source, 1)
    tile = gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED)
    memory.index(0).store(tile)
    fence_async_shared()
    async_store(result, [0, 0], memory.index(0))
    if not BROKEN:
        tma.store_wait(0)
    memory.index(0).store(tile)  # stored over
    tma.store_wait(0)


@gluon.jit
def _too_many_pending(source, result, BROKEN: gl.constexpr):
    """Of two groups the wait lets one be under way: the later one."""
    memory, _bar = _stages(source, 2)
    tile = gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED)
    memory.index(0).store(tile)
    memory.index(1).store(tile)
    fence_async_shared()
    async_store(result, [0, 0], memory.index(0))
    async_store(result, [64, 0], memory.index(1))
    tma.store_wait(1)
    if BROKEN:
        memory.index(1).store(tile)  # too many pending
    else:
        memory.index(0).store(tile)
    tma.store_wait(0)


@gluon.jit
def _unfinished_store(source, result, BROKEN: gl.constexpr):
    memory, _bar = _stages(source, 1)
    memory.index(0).store(gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED))
    fence_async_shared()
    async_store(result, [0, 0], memory.index(0))  # unfinished store
    if not BROKEN:
        tma.store_wait(0)


@gluon.jit
def _unfinished_load(source, result, BROKEN: gl.constexpr):
    memory, bar = _stages(source, 1)
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [0, 0], bar, memory.index(0))  # unfinished load
    if not BROKEN:
        mbarrier.wait(bar, 0)


@gluon.jit
def _never_written(source, result, BROKEN: gl.constexpr):
    memory, _bar = _stages(source, 2)
    memory.index(0).store(gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED))
    tile = memory.index(1 if BROKEN else 0).load(BLOCKED)  # never written
    memory.index(0).store(tile)


@gluon.jit
def _partly_written(source, result, BROKEN: gl.constexpr):
    memory, _bar = _stages(source, 1)
    rows = gl.full([32, 64], 1.0, gl.bfloat16, BLOCKED)
    memory.index(0).slice(0, 32).store(rows)
    if not BROKEN:
        memory.index(0).slice(32, 32).store(rows)
    memory.index(0).load(BLOCKED)  # partly written


@gluon.jit
def _store_ones(memory, W: gl.constexpr):
    memory.index(W).store(gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED))  # race


@gluon.jit
def _race(source, result, BROKEN: gl.constexpr):
    memory, _bar = _stages(source, 2)
    gl.warp_specialize([(_store_ones, (memory, 0)), (_store_ones, (memory, 0 if BROKEN else 1))], [4])


@gluon.jit
def _produce(source, memory, full, empty, WAIT: gl.constexpr):
    for i in range(4):
        if WAIT:
            mbarrier.wait(empty.index(i % 2), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full.index(i % 2), source.block_type.nbytes)
        async_load(source, [i * 64, 0], full.index(i % 2), memory.index(i % 2))  # overwritten


@gluon.jit
def _consume(memory, full, empty, WAIT: gl.constexpr):
    total = gl.zeros([64, 64], gl.float32, BLOCKED)
    for i in range(4):
        if WAIT:
            mbarrier.wait(full.index(i % 2), (i // 2) & 1)
        total += memory.index(i % 2).load(BLOCKED).to(gl.float32)  # not there
        mbarrier.arrive(empty.index(i % 2))


@gluon.jit
def _ring(source, FULL: gl.constexpr, EMPTY: gl.constexpr):
    memory, _bar = _stages(source, 2)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [(_consume, (memory, full, empty, FULL)), (_produce, (source, memory, full, empty, EMPTY))], [1], [24]
    )


@gluon.jit
def _empty_not_awaited(source, result, BROKEN: gl.constexpr):
    _ring(source, True, not BROKEN)


@gluon.jit
def _full_not_awaited(source, result, BROKEN: gl.constexpr):
    _ring(source, not BROKEN, True)


@gluon.jit
def _box(source, result, BROKEN: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.bfloat16, [32 if BROKEN else 64, 64], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [0, 0], bar, memory)  # box
    mbarrier.wait(bar, 0)


@gluon.jit
def _swizzle(source, result, BROKEN: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(64 if BROKEN else 128, 16, 2)
    memory = gl.allocate_shared_memory(gl.bfloat16, [64, 64], LAYOUT)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, source.block_type.nbytes)
    async_load(source, [0, 0], bar, memory)  # swizzle
    mbarrier.wait(bar, 0)


@gluon.jit
def _limit(source, result, BROKEN: gl.constexpr):
    gl.allocate_shared_memory(gl.bfloat16, [29 if BROKEN else 28, 64, 64], source.layout)  # limit


@gluon.jit
def _stage_outside(source, result, BROKEN: gl.constexpr):
    memory, _bar = _stages(source, 2)
    stage = gl.program_id(0) + (2 if BROKEN else 1)
    memory.index(stage).store(gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED))  # outside


@gluon.jit
def _same_rows(source, result, BROKEN: gl.constexpr):
    memory, _bar = _stages(source, 1)
    memory.index(0).store(gl.full([64, 64], 1.0, gl.bfloat16, BLOCKED))
    fence_async_shared()
    async_store(result, [0 if BROKEN else gl.program_id(0) * 64, 0], memory.index(0))  # same rows
    tma.store_wait(0)


def test_fault_is_reported_no_wait_for_a_load() -> None:
    message = str(check(_no_wait, "no wait", MissingWaitError)[0])
    assert "in _fetch" in message, "the load's own line is named too"


def test_fault_is_reported_wait_for_another_phase() -> None:
    # Where the copy is there already the wait is for the phase after it.
    check(_other_phase, "other phase", MissingWaitError, DeadlockError)


def test_fault_is_reported_no_fence_before_a_store() -> None:
    check(_no_fence, "no fence", MissingFenceError)


def test_fault_is_reported_no_fence_before_a_load() -> None:
    check(_no_fence_before_a_load, "no fence before a load", MissingFenceError)


def test_fault_is_reported_source_of_a_store_stored_over() -> None:
    check(_stored_over, "stored over", OverwriteError)


def test_fault_is_reported_wait_that_leaves_too_many_stores() -> None:
    check(_too_many_pending, "too many pending", OverwriteError)


def test_fault_is_reported_store_that_nothing_waits_for() -> None:
    check(_unfinished_store, "unfinished store", UnfinishedError)


def test_fault_is_reported_load_that_nothing_waits_for() -> None:
    check(_unfinished_load, "unfinished load", UnfinishedError)


def test_fault_is_reported_memory_never_written() -> None:
    check(_never_written, "never written", UninitialisedReadError)


def test_fault_is_reported_memory_partly_written() -> None:
    message = str(check(_partly_written, "partly written", UninitialisedReadError)[0])
    assert "2048 of 4096 elements were never written" in message


def test_fault_is_reported_two_tasks_store_in_no_order() -> None:
    check(_race, "race", SharedRaceError)


def test_fault_is_reported_stage_overwritten_before_it_is_released() -> None:
    # Where the first load of a stage is still under way its barrier is the first to notice.
    check(_empty_not_awaited, "overwritten", OverwriteError, OverArrivalError)


def test_fault_is_reported_stage_read_before_it_is_full() -> None:
    # Where the reader comes first nothing has been loaded yet, or the producer notices that the reader has not known of its load.
    check(_full_not_awaited, "not there", MissingWaitError, UninitialisedReadError, OverwriteError)


def test_fault_is_reported_box_of_another_shape() -> None:
    check(_box, "box", DescriptorError)


def test_fault_is_reported_box_of_another_swizzle() -> None:
    check(_swizzle, "swizzle", DescriptorError)


def test_fault_is_reported_too_much_shared_memory() -> None:
    check(_limit, "limit", SharedMemoryLimitError)


def test_fault_is_reported_stage_outside_of_the_allocation() -> None:
    check(_stage_outside, "outside", OutOfBoundsError)


def test_race_is_reported_programs_that_store_the_same_rows() -> None:
    check(_same_rows, "same rows", RaceError, grid=(2,))
