"""Rules of barriers: each broken by a small kernel, whose twin keeps it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from pytransformer.gluon_interpreter import (
    BarrierStateError,
    ByteCountError,
    DeadlockError,
    NamedBarrierError,
    OverArrivalError,
    PhaseError,
    SharedRaceError,
)
from pytransformer.kernels.hopper.names import async_load
from tests.gluon_interpreter.names import needs_inline_asm
from tests.gluon_interpreter.rules import check


@gluon.jit
def _meet(mine, other, BROKEN: gl.constexpr):
    if BROKEN:
        mbarrier.wait(mine, 0)  # deadlock
        mbarrier.arrive(other)
    else:
        mbarrier.arrive(other)
        mbarrier.wait(mine, 0)


@gluon.jit
def _deadlock(source, result, BROKEN: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    first, second = bars.index(0), bars.index(1)
    gl.warp_specialize([(_meet, (first, second, BROKEN)), (_meet, (second, first, BROKEN))], [4])


@gluon.jit
def _over_arrival(source, result, BROKEN: gl.constexpr):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=2)
    mbarrier.arrive(bar, count=1)
    mbarrier.arrive(bar, count=2 if BROKEN else 1)  # over arrival
    mbarrier.wait(bar, 0)


@gluon.jit
def _bytes(source, result, NUMERATOR: gl.constexpr, DENOMINATOR: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.bfloat16, [64, 64], source.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.expect(bar, source.block_type.nbytes * NUMERATOR // DENOMINATOR)
    async_load(source, [0, 0], bar, memory)  # too few bytes
    mbarrier.wait(bar, 0)  # too many bytes


@gluon.jit
def _too_few_bytes(source, result, BROKEN: gl.constexpr):
    _bytes(source, result, 1, 2 if BROKEN else 1)


@gluon.jit
def _too_many_bytes(source, result, BROKEN: gl.constexpr):
    _bytes(source, result, 2 if BROKEN else 1, 1)


@gluon.jit
def _not_initialised(source, result, BROKEN: gl.constexpr):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    if not BROKEN:
        mbarrier.init(bar, count=1)
    mbarrier.arrive(bar)  # not initialised


@gluon.jit
def _initialised_twice(source, result, BROKEN: gl.constexpr):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    if not BROKEN:
        mbarrier.invalidate(bar)
    mbarrier.init(bar, count=1)  # initialised twice


@gluon.jit
def _invalidated(source, result, BROKEN: gl.constexpr):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    if BROKEN:
        mbarrier.invalidate(bar)
    mbarrier.arrive(bar)  # invalidated


@gluon.jit
def _phase_of_two(source, result, BROKEN: gl.constexpr):
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    for i in range(3):
        mbarrier.arrive(bar)
        mbarrier.wait(bar, i if BROKEN else i & 1)  # no phase


@gluon.jit
def _arrive_twice(bar, seen, BROKEN: gl.constexpr):
    mbarrier.arrive(bar)
    if not BROKEN:
        mbarrier.wait(seen, 0)
    mbarrier.arrive(bar)  # lapped


@gluon.jit
def _wait_twice(bar, seen):
    mbarrier.wait(bar, 0)
    mbarrier.arrive(seen)
    mbarrier.wait(bar, 1)


@gluon.jit
def _lapped(source, result, BROKEN: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    gl.warp_specialize(
        [(_wait_twice, (bars.index(0), bars.index(1))), (_arrive_twice, (bars.index(0), bars.index(1), BROKEN))], [1]
    )


@gluon.jit
def _turn(memory, FIRST: gl.constexpr, NUMBER: gl.constexpr, THREADS: gl.constexpr):
    """The first stores and lets the second, which stores over it."""
    tile = gl.full([64, 64], 1.0, gl.bfloat16, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    if FIRST:
        memory.store(tile)
        if NUMBER == 1:
            gl.inline_asm("bar.arrive 1, 256;")  # reserved
        else:
            gl.inline_asm("bar.arrive 8, 256;")
    else:
        if NUMBER == 1:
            gl.inline_asm("bar.sync 1, 256;")  # reserved
        elif THREADS == 128:
            gl.inline_asm("bar.sync 8, 128;")  # threads
        else:
            gl.inline_asm("bar.sync 8, 256;")  # threads
        memory.store(tile)


@gluon.jit
def _turns(source, NUMBER: gl.constexpr, THREADS: gl.constexpr):
    memory = gl.allocate_shared_memory(gl.bfloat16, [64, 64], source.layout)
    gl.warp_specialize([(_turn, (memory, True, NUMBER, THREADS)), (_turn, (memory, False, NUMBER, THREADS))], [4])


@gluon.jit
def _reserved(source, result, BROKEN: gl.constexpr):
    _turns(source, 1 if BROKEN else 8, 256)


@gluon.jit
def _other_count(source, result, BROKEN: gl.constexpr):
    _turns(source, 8, 128 if BROKEN else 256)


def test_deadlock_names_each_waiter_with_barrier_phase_and_line() -> None:
    message = str(check(_deadlock, "deadlock", DeadlockError)[0])
    assert message.count("waits at test_barrier_faults.py:") == 2
    assert "partition 0 (_meet)" in message and "partition 1 (_meet)" in message
    assert message.count("for phase 0 of the barriers of test_barrier_faults.py:") == 2
    assert message.count("1 of 1 arrivals and 0 of 0 bytes are missing") == 2


def test_fault_is_reported_over_arrival() -> None:
    check(_over_arrival, "over arrival", OverArrivalError)


def test_fault_is_reported_too_few_bytes() -> None:
    check(_too_few_bytes, "too few bytes", ByteCountError)


def test_fault_is_reported_too_many_bytes() -> None:
    check(_too_many_bytes, "too many bytes", ByteCountError)


def test_fault_is_reported_not_initialised() -> None:
    check(_not_initialised, "not initialised", BarrierStateError)


def test_fault_is_reported_initialised_twice() -> None:
    check(_initialised_twice, "initialised twice", BarrierStateError)


def test_fault_is_reported_invalidated() -> None:
    check(_invalidated, "invalidated", BarrierStateError)


def test_fault_is_reported_no_such_phase() -> None:
    check(_phase_of_two, "no phase", PhaseError)


def test_fault_is_reported_a_phase_that_ends_before_its_waiter_looks() -> None:
    # If the waiter comes after both phases it waits for a third one, which is a deadlock.
    check(_lapped, "lapped", PhaseError, DeadlockError)


@needs_inline_asm
def test_fault_is_reported_reserved_named_barrier() -> None:
    check(_reserved, "reserved", NamedBarrierError)


@needs_inline_asm
def test_fault_is_reported_named_barrier_of_two_counts() -> None:
    # Where the one with the smaller count comes first it does not wait for the other.
    check(_other_count, "threads", NamedBarrierError, SharedRaceError)
