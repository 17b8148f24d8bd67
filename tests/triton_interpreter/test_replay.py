"""What was recorded for some types and constants is replayed for the same ones only, and with all checks of elements."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pytransformer.triton_interpreter import OutOfBoundsError, replay


@triton.jit
def square_and_product(X, Y, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(OUT + at, x * x)
    tl.store(OUT + BLOCK + at, x * y)
    tl.store(OUT + 2 * BLOCK + at, y * x - x)


def test_a_tensor_twice_is_not_two_tensors() -> None:
    x, y = torch.randn(8), torch.randn(8)
    out = torch.empty(3, 8)
    square_and_product[(1,)](x, y, out, BLOCK=8)
    assert torch.equal(out, torch.stack([x * x, x * y, y * x - x]))


@triton.jit
def quotient(X, OUT, BY: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at)
    tl.store(OUT + at, x / BY)


NUMBERS = [(float("nan"), 1.0), (2, 2.0), (True, 1.5)]
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):  # earlier ones make 0 of -0 in constants
    NUMBERS += [(0.0, -0.0), (-0.0, 0.0)]


@pytest.mark.parametrize("by", NUMBERS)
def test_equal_numbers_of_python_are_not_one_constant(by: tuple[float, float]) -> None:
    x = torch.tensor([1.0, -1.0, 3.0, 0.5])
    for divisor in (*by, *by):
        out = torch.empty(4)
        quotient[(1,)](x, out, BY=divisor, BLOCK=4)
        torch.testing.assert_close(out, x / torch.tensor(float(divisor)), rtol=0, atol=0, equal_nan=True)


@triton.jit
def running_sum(X, OUT, TRIPS, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for trip in range(TRIPS):
        total += tl.load(X + trip * BLOCK + at) * trip
    tl.store(OUT + at, total)


def test_counters_of_loops_are_not_remembered() -> None:
    x = torch.randint(-9, 9, (12, 4)).float()
    for trips in (3, 12, 5, 0):
        out = torch.empty(4)
        running_sum[(1,)](x, out, trips, BLOCK=4)
        assert torch.equal(out, (x[:trips] * torch.arange(trips)[:, None]).sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int8])
def test_types_have_plans_of_their_own(dtype: torch.dtype) -> None:
    x, y = torch.randint(-9, 9, (16,)).to(dtype), torch.randint(-9, 9, (16,)).to(dtype)
    out = torch.empty(3, 16, dtype=dtype)
    square_and_product[(1,)](x, y, out, BLOCK=16)
    assert torch.equal(out, torch.stack([x * x, x * y, y * x - x]))


@triton.jit
def added(X, OUT, BY, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(X + at) + BY)


def test_overflow_is_found_in_a_replay() -> None:
    x, out = torch.full((4,), 2**31 - 10, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    for by in (5, 9):
        added[(1,)](x, out, by, BLOCK=4)
        assert torch.equal(out, x + by)
    with pytest.raises(Exception, match="int32 overflow detected for operation add"):
        added[(1,)](x, out, 10, BLOCK=4)
    added[(1,)](x, out, 9, BLOCK=4)
    assert torch.equal(out, x + 9)


def test_access_is_checked_in_a_replay() -> None:
    out = torch.empty(8)
    added[(1,)](torch.ones(8), out, 1.0, BLOCK=8)
    with pytest.raises(OutOfBoundsError, match="load out of bounds"):
        added[(1,)](torch.ones(7), out, 1.0, BLOCK=8)


@triton.jit
def row_or_zero(X, OUT, ROWS):
    row = tl.program_id(0)
    tl.store(OUT + row, tl.load(X + row, mask=row < ROWS, other=0.0))


def test_other_of_a_scalar_counts_where_it_is_zero() -> None:
    """As when it compiles, where Triton asks only whether there is a tensor."""
    out = torch.empty(4)
    row_or_zero[(4,)](torch.ones(2), out, 2)
    assert out.tolist() == [1, 1, 0, 0]


def test_a_known_combination_is_not_walked_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, out = torch.randn(8), torch.empty(8)
    added[(1,)](x, out, 1.0, BLOCK=8)

    def recorded(*args: object) -> None:
        raise AssertionError(f"recorded again: {args[1]}")

    monkeypatch.setattr(replay.REPLAY, "_record", recorded)
    added[(1,)](-x, out, 1.0, BLOCK=8)
    assert torch.equal(out, 1 - x)
