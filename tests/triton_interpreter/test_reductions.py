"""NaN, zeros and rounding in reductions: as compiled code has them, whoever wrote the function that combines."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton
import triton.language as tl

from pytransformer.triton_interpreter import OrderDependentWarning

NAN, INFINITY = float("nan"), float("inf")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _compared(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _larger_with_index(value1, index1, value2, index2):
    first = (value1 > value2) | ((value1 == value2) & (index1 < index2))
    return tl.where(first, value1, value2), tl.where(first, index1, index2)


@triton.jit
def _smaller_with_index(value1, index1, value2, index2):
    first = (value1 < value2) | ((value1 == value2) & (index1 < index2))
    return tl.where(first, value1, value2), tl.where(first, index1, index2)


@triton.jit
def _added(a, b):
    return a + b


@triton.jit
def _kernel(x_ptr, out_ptr, index_ptr, OPERATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + rows[:, None] * COLUMNS + columns[None, :])
    places = tl.broadcast_to(columns[None, :] * 10, (ROWS, COLUMNS))
    index = tl.zeros((ROWS,), tl.int32)
    if OPERATION == "max":
        result = tl.max(x, axis=1)
    elif OPERATION == "min":
        result = tl.min(x, axis=1)
    elif OPERATION == "max_index":
        result, index = tl.max(x, axis=1, return_indices=True)
    elif OPERATION == "min_index":
        result, index = tl.min(x, axis=1, return_indices=True)
    elif OPERATION == "max_index_fast":
        result, index = tl.max(x, axis=1, return_indices=True, return_indices_tie_break_left=False)
    elif OPERATION == "max_place":
        result, index = tl.reduce((x, places), 1, tl.standard._argmax_combine_tie_break_left)
    elif OPERATION == "own_max_index":
        result, index = tl.reduce((x, places // 10), 1, _larger_with_index)
    elif OPERATION == "own_min_index":
        result, index = tl.reduce((x, places // 10), 1, _smaller_with_index)
    elif OPERATION == "own_max":
        result = tl.reduce(x, 1, _larger)
    elif OPERATION == "own_max_nan":
        result = tl.reduce(x, 1, _larger_or_nan)
    elif OPERATION == "compared":
        result = tl.reduce(x, 1, _compared)
    elif OPERATION == "added":
        result = tl.reduce(x, 1, _added)
    elif OPERATION == "sum":
        result = tl.sum(x, axis=1)
    elif OPERATION == "all":
        result = tl.max(x, axis=None) + tl.zeros((ROWS,), tl.float32)
    elif OPERATION == "kept":
        result = tl.max(x, axis=1, keep_dims=True).reshape(ROWS)
    tl.store(out_ptr + rows, result)
    tl.store(index_ptr + rows, index)


def _reduce(operation: str, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    out, index = torch.empty(len(x), dtype=x.dtype), torch.empty(len(x), dtype=torch.int32)
    _kernel[(1,)](x, out, index, OPERATION=operation, ROWS=x.shape[0], COLUMNS=x.shape[1])
    return out, index.tolist()


def _same(actual: torch.Tensor, expected: list[float]) -> None:
    wanted = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit()[~wanted.isnan()], wanted.signbit()[~wanted.isnan()])


ROWS = [
    [1.0, NAN, 3.0, 2.0],
    [NAN] * 4,
    [-0.0, 0.0, -0.0, NAN],
    [-0.0, -0.0, -1.0, -0.0],
    [NAN, -INFINITY, NAN, NAN],
    [2.0, 5.0, 5.0, 1.0],
    [0.0, -0.0, 0.0, 1.0],
    [4.0] * 4,
]


@pytest.mark.parametrize("operation", ["max", "kept"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_is_nan_only_where_there_is_nothing_else(operation, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, _ = _reduce(operation, torch.tensor(ROWS, dtype=dtype))
    _same(out, [3.0, NAN, 0.0, -0.0, -INFINITY, 5.0, 1.0, 4.0])


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_smallest_is_nan_only_where_there_is_nothing_else(dtype):
    _same(_reduce("min", torch.tensor(ROWS, dtype=dtype))[0], [1.0, NAN, -0.0, -1.0, -INFINITY, 1.0, -0.0, 4.0])


def test_the_largest_of_a_whole_block():
    _same(_reduce("all", torch.tensor(ROWS))[0], [5.0] * 8)
    _same(_reduce("all", torch.full((2, 4), NAN))[0], [NAN, NAN])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_written_out_treats_nan_as_it_says(dtype):
    x = torch.tensor(ROWS, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _same(_reduce("own_max", x)[0], [3.0, NAN, 0.0, -0.0, -INFINITY, 5.0, 1.0, 4.0])
        _same(_reduce("own_max_nan", x)[0], [NAN, NAN, NAN, -0.0, NAN, 5.0, 1.0, 4.0])
        _same(_reduce("added", x)[0], [NAN, NAN, NAN, -1.0, NAN, 13.0, 1.0, 16.0])


@pytest.mark.parametrize(("operation", "own"), [("max_index", "own_max_index"), ("min_index", "own_min_index")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_argmax_does_what_the_same_function_written_out_does(operation, own, dtype):
    """Of a pair with NaN the second is kept, as neither comparison holds; a row of NaN raises nothing."""
    rows = [
        [1.0, NAN, 3.0, 2.0],
        [NAN, NAN, NAN, NAN],
        [5.0, 7.0, 5.0, NAN],
        [NAN, 7.0, 7.0, -7.0],
        [2.0, 1.0, 2.0, 1.0],
    ]
    rows += [[0.0, 1.0, 2.0, 3.0]] * 3
    x = torch.tensor(rows, dtype=dtype)
    with pytest.warns(OrderDependentWarning, match="the order of its steps"):
        value, index = _reduce(operation, x)
    with pytest.warns(OrderDependentWarning, match=f"_{'larg' if operation == 'max_index' else 'small'}er_with_index"):
        own_value, own_index = _reduce(own, x)
    torch.testing.assert_close(value, own_value, rtol=0, atol=0, equal_nan=True)
    assert index == own_index
    largest = operation == "max_index"
    assert index == ([2, 3, 3, 1, 0, 3, 3, 3] if largest else [3, 3, 3, 3, 1, 0, 0, 0])
    assert value[1].isnan() and value[2].isnan() and value[0] == (3.0 if largest else 2.0)


@pytest.mark.parametrize("operation", ["max_index", "compared", "own_max_index"])
@pytest.mark.parametrize("row", [[1.0, NAN, 3.0, 2.0], [NAN, 1.0, 3.0, 2.0], [1.0, 2.0, 3.0, NAN]])
def test_a_result_that_nan_makes_depend_on_the_order_is_warned_of(operation, row):
    with pytest.warns(OrderDependentWarning, match="a GPU may give another one"):
        _reduce(operation, torch.tensor([[1.0, 2.0, 3.0, 4.0], row]))


@pytest.mark.parametrize("operation", ["max", "own_max", "own_max_nan", "added", "sum"])
def test_a_result_that_no_order_changes_is_not_warned_of(operation):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _reduce(operation, torch.tensor(ROWS))
        for other in ("max_index", "compared", "own_max_index"):
            _reduce(other, torch.tensor(ROWS[5:7]))


def test_an_index_that_is_no_position_is_the_one_that_was_given():
    value, index = _reduce("max_place", torch.tensor([[1.0, 7.0, 7.0, 2.0], [4.0, 4.0, 4.0, 4.0]]))
    assert value.tolist() == [7.0, 4.0] and index == [10, 0]


@pytest.mark.parametrize("operation", ["max_index", "max_index_fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_value_and_index_without_nan(operation, dtype):
    x = (torch.randn(8, 64) * 1000).to(dtype)
    value, index = _reduce(operation, x)
    assert torch.equal(value, x.amax(1)) and torch.equal(x[range(8), index], value)


def test_a_sum_of_float16_rounds_at_each_step():
    x = torch.zeros(2, 4, dtype=torch.float16)
    x[0] = torch.tensor([2048.0, 0.0, 1.0, 0.0])  # a lane and the one half a row further: 2049 is none
    x[1] = torch.tensor([2048.0, 0.5, 0.5, 0.5])
    assert _reduce("sum", x)[0].tolist() == [2048.0, 2048.0]
    assert _reduce("sum", torch.full((1, 1024), 0.1).half())[0].item() == pytest.approx(102.4, rel=2**-9)
