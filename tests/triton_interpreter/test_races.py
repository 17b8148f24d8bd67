"""Programs that depend on each other's order are caught in whatever order they run; their correct twins pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pytransformer import triton_interpreter
from pytransformer.triton_interpreter import RaceError

ORDERS = [None, 0, 1]


@triton.jit
def _total_kernel(x_ptr, total_ptr, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    partial = tl.sum(tl.load(x_ptr + offsets), axis=0)
    if ATOMIC:
        tl.atomic_add(total_ptr, partial)
    else:
        tl.store(total_ptr, tl.load(total_ptr) + partial)


@triton.jit
def _tile_kernel(out_ptr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, offsets.to(tl.float32))


@triton.jit
def _neighbour_kernel(x_ptr, out_ptr, IN_PLACE: tl.constexpr):
    program = tl.program_id(0)
    neighbour = tl.load(x_ptr + program + 1)
    if IN_PLACE:
        tl.store(x_ptr + program, neighbour)
    else:
        tl.store(out_ptr + program, neighbour)


@triton.jit
def _mixed_kernel(out_ptr):
    if tl.program_id(0) == 0:
        tl.store(out_ptr, 1.0)
    else:
        tl.atomic_add(out_ptr, 1.0)


@triton.jit
def _atomic_then_load_kernel(count_ptr, out_ptr):
    program = tl.program_id(0)
    tl.atomic_add(count_ptr, 1.0)
    tl.store(out_ptr + program, tl.load(count_ptr))


@triton.jit
def _compare_and_swap_kernel(lock_ptr, out_ptr):
    program = tl.program_id(0)
    tl.store(out_ptr + program, tl.atomic_cas(lock_ptr, 0, 1))


@triton.jit
def _scatter_kernel(x_ptr, index_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    index = tl.load(index_ptr + offsets)
    tl.store(out_ptr + index, tl.load(x_ptr + offsets))


@triton.jit
def _halves_kernel(out_ptr, OVERLAP: tl.constexpr):
    """Each program writes one 16-bit half of a 32-bit element."""
    program = tl.program_id(0)
    halves = out_ptr.to(tl.pointer_type(tl.int16))
    tl.store(halves + (0 if OVERLAP else program), program.to(tl.int16))


@triton.jit
def _last_adds_kernel(
    parts_ptr, count_ptr, out_ptr, SEMANTICS: tl.constexpr, LATE: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr
):
    """The program that counts itself as the last one adds what all have stored; one may store too late, or add too early."""
    program = tl.program_id(0)
    if not LATE:
        tl.store(parts_ptr + program, 1.0)
    count = tl.atomic_add(count_ptr, 1, sem=SEMANTICS)
    if LATE:
        tl.store(parts_ptr + program, 1.0)
    if count == tl.num_programs(0) - 1 - EARLY:
        tl.store(out_ptr, tl.sum(tl.load(parts_ptr + tl.arange(0, BLOCK)), 0))


@pytest.fixture(params=ORDERS, ids=lambda seed: f"order={seed}")
def order(request):
    with triton_interpreter.program_order(request.param):
        yield request.param


def test_missing_atomic_is_caught(order):
    x, total = torch.randn(64), torch.zeros(1)
    _total_kernel[(4,)](x, total, ATOMIC=True, BLOCK=16)
    torch.testing.assert_close(total[0], x.sum())
    with pytest.raises(RaceError, match=r"race on 'total_ptr': load in program .* stored to"):
        _total_kernel[(4,)](x, total, ATOMIC=False, BLOCK=16)


def test_two_programs_writing_one_element_are_caught(order):
    out = torch.empty(64)
    _tile_kernel[(4,)](out, STEP=16, BLOCK=16)
    assert torch.equal(out, torch.arange(64.0))
    with pytest.raises(RaceError, match="race on 'out_ptr': store in program"):
        _tile_kernel[(4,)](out, STEP=15, BLOCK=16)


def test_reading_what_another_program_writes_is_caught(order):
    x, out = torch.randn(9), torch.empty(8)
    _neighbour_kernel[(8,)](x, out, IN_PLACE=False)
    assert torch.equal(out, x[1:])
    with pytest.raises(RaceError, match="race on 'x_ptr'"):
        _neighbour_kernel[(8,)](x, out, IN_PLACE=True)


def test_overlapping_arguments_are_one_memory(order):
    """Not in place by name, but the output is a view of the input."""
    buffer = torch.randn(9)
    with pytest.raises(RaceError, match=r"race on '(x_ptr|out_ptr)'"):
        _neighbour_kernel[(8,)](buffer, buffer[:8], IN_PLACE=False)


def test_store_and_atomic_of_two_programs_are_caught(order):
    with pytest.raises(RaceError, match="race on 'out_ptr'"):
        _mixed_kernel[(2,)](torch.zeros(1))
    _mixed_kernel[(1,)](torch.zeros(1))


def test_plain_load_of_what_others_update_atomically_is_caught(order):
    with pytest.raises(RaceError, match="race on 'count_ptr'"):
        _atomic_then_load_kernel[(3,)](torch.zeros(1), torch.empty(3))
    _atomic_then_load_kernel[(1,)](torch.zeros(1), torch.empty(1))


def test_compare_and_swap_is_an_atomic(order):
    out = torch.empty(4, dtype=torch.int32)
    _compare_and_swap_kernel[(4,)](torch.zeros(1, dtype=torch.int32), out)
    assert sorted(out.tolist()) == [0, 1, 1, 1]


def test_what_a_counter_puts_in_order_is_no_race(order):
    out = torch.empty(1)
    _last_adds_kernel[(4,)](torch.empty(4), torch.zeros(1, dtype=torch.int32), out, "acq_rel", False, 0, BLOCK=4)
    assert out.item() == 4.0


@pytest.mark.parametrize(
    ("semantics", "late", "early"),
    [("relaxed", False, 0), ("acquire", False, 0), ("release", False, 0), ("acq_rel", True, 0), ("acq_rel", False, 1)],
)
def test_what_no_counter_puts_in_order_is_caught(semantics, late, early, order):
    with pytest.raises(RaceError, match="race on 'parts_ptr'"):
        _last_adds_kernel[(4,)](
            torch.empty(4), torch.zeros(1, dtype=torch.int32), torch.empty(1), semantics, late, early, BLOCK=4
        )


def test_one_store_writing_an_element_twice_is_caught():
    x, out = torch.randn(16), torch.empty(16)
    index = torch.randperm(16).int()
    _scatter_kernel[(1,)](x, index, out, BLOCK=16)
    assert torch.equal(out[index.long()], x)
    index[3] = index[5]
    with pytest.raises(
        RaceError, match=r"one store in program \(0,0,0\) writes an element of 'out_ptr' more than once"
    ):
        _scatter_kernel[(1,)](x, index, out, BLOCK=16)


def test_parts_of_an_element_are_told_apart():
    out = torch.zeros(2, dtype=torch.int32)
    _halves_kernel[(4,)](out, OVERLAP=False)
    assert out.view(torch.int16).tolist() == [0, 1, 2, 3]
    with pytest.raises(RaceError):
        _halves_kernel[(4,)](out, OVERLAP=True)


def test_launches_do_not_race_with_each_other():
    out = torch.empty(64)
    for _ in range(2):
        _tile_kernel[(4,)](out, STEP=16, BLOCK=16)


def test_shuffled_order_exposes_what_order_decides(harden):
    """With race checks off, the order of programs shows in the result of a racy kernel, and not in that of a clean one."""
    harden(races=False)
    results, clean = set(), set()
    for seed in [None, 0, 1, 2]:
        with triton_interpreter.program_order(seed):
            out, tiles = torch.zeros(19), torch.zeros(64)
            _tile_kernel[(2,)](out[:], STEP=3, BLOCK=16)
            _order_kernel[(16,)](out)
            _tile_kernel[(4,)](tiles, STEP=16, BLOCK=16)
        results.add(out[0].item())
        clean.add(tuple(tiles.tolist()))
    assert len(results) > 1
    assert len(clean) == 1


@triton.jit
def _order_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


def test_races_can_be_turned_off(harden):
    harden(races=False)
    _tile_kernel[(4,)](torch.empty(64), STEP=15, BLOCK=16)
