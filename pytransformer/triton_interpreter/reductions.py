"""Reductions and scans of Triton's interpreter as compiled code does them.

A GPU combines elements in an order that the compiler chooses. Where the combination is a proper one (associative and
commutative) no order is better than another. With NaN that is often not so: ``a > b`` is false for both operands'
places, so that which element is kept depends on who was compared with whom.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.language as tl

from .arithmetic import narrow, refuse_float8, widen
from .casts import is_bfloat16
from .errors import OrderDependentWarning
from .formats import Array

_LARGEST = (tl.standard._elementwise_max,)
_SMALLEST = (tl.standard._elementwise_min,)
_INDEX_OF_LARGEST = (tl.standard._argmax_combine_tie_break_left, tl.standard._argmax_combine_tie_break_fast)
_INDEX_OF_SMALLEST = (tl.standard._argmin_combine_tie_break_left, tl.standard._argmin_combine_tie_break_fast)
_SELECTIONS = (*_LARGEST, *_SMALLEST, *_INDEX_OF_LARGEST, *_INDEX_OF_SMALLEST)


def reduce_apply_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """``ReduceOps.apply_impl``: minima and maxima with NaN as on a GPU, sums of float16 rounded at each step; any other
    reduction of bfloat16 is refused.
    """

    @functools.wraps(original)
    def method(operation: Any, tensors: tuple[Any, ...]) -> Any:
        refuse_float8([tensor.handle for tensor in tensors], "reduction")
        combine = operation.combine_fn
        if any(is_bfloat16(tensor.handle) for tensor in tensors):
            if combine not in _SELECTIONS:
                raise NotImplementedError(
                    "a reduction of bfloat16 rounds after every step, in an order that the hardware chooses: "
                    "cast to float32 before reducing"
                )
            results = method(operation, tuple(_widen_tensor(tensor) for tensor in tensors))
            return tuple(_narrow_tensor(result) for result in results)
        data = tensors[0].handle.data
        if combine in _LARGEST or combine in _SMALLEST:
            return (_extreme(operation, tensors[0], combine in _LARGEST),)
        if combine in _INDEX_OF_LARGEST or combine in _INDEX_OF_SMALLEST:
            if not np.isnan(data).any():
                return _extreme_and_index(operation, tensors, combine in _INDEX_OF_LARGEST)
        elif combine is tl.standard._sum_combine:
            if data.dtype == np.float16:
                return (_finished(operation, tensors[0], _sum_of_float16(*_along_axis(operation, data))),)
            return original(operation, tensors)
        results = operation.generic_reduce(tensors)
        _warn_if_nan_makes_order_matter(operation, tensors)
        return results

    return method


def _along_axis(operation: Any, data: Array) -> tuple[Array, int]:
    """(the data, the axis to reduce): without an axis all elements in one row."""
    return (data.reshape(-1), 0) if operation.axis is None else (data, operation.axis)


def _finished(operation: Any, tensor: Any, reduced: Array) -> Any:
    """What was reduced along one axis, in the shape that was asked for."""
    if operation.keep_dims:
        shape = [1] * tensor.handle.data.ndim
        if operation.axis is not None:
            shape = list(tensor.handle.data.shape)
            shape[operation.axis] = 1
        reduced = reduced.reshape(shape)
    return operation.to_tensor(reduced if reduced.ndim else reduced.item(), tensor.dtype)


def _extreme(operation: Any, tensor: Any, largest: bool) -> Any:
    """NaN counts only where there is nothing else; +0 is larger than -0."""
    data, axis = _along_axis(operation, tensor.handle.data)
    reduced = np.asarray((np.fmax if largest else np.fmin).reduce(data, axis=axis))
    if data.dtype.kind == "f" and (reduced == 0).any():
        preferred = ((data == 0) & (np.signbit(data) != largest)).any(axis=axis)
        sign = np.where(preferred == largest, 1, -1).astype(reduced.dtype)
        reduced = np.where(reduced == 0, np.copysign(reduced, sign), reduced)
    return _finished(operation, tensor, reduced)


def _extreme_and_index(operation: Any, tensors: tuple[Any, ...], largest: bool) -> tuple[Any, Any]:
    """Without NaN; of equal elements the one with the smallest index, which is one of those that "fast" may take."""
    values, axis = _along_axis(operation, tensors[0].handle.data)
    indices, _ = _along_axis(operation, tensors[1].handle.data)
    best = (np.max if largest else np.min)(values, axis=axis, keepdims=True)
    candidates = np.where(values == best, indices, np.iinfo(indices.dtype).max)
    place = np.argmin(candidates, axis=axis, keepdims=True)
    taken = (np.take_along_axis(array, place, axis).squeeze(axis) for array in (values, indices))
    value, index = (_finished(operation, tensor, result) for tensor, result in zip(tensors, taken))
    return value, index


def _sum_of_float16(data: Array, axis: int) -> Array:
    """Halves added to halves, each sum rounded, as the lanes of a warp do it."""
    data = np.moveaxis(data, axis, 0)
    while len(data) > 1:
        half = len(data) // 2
        data = data[:half] + data[half:]
    return np.asarray(data[0])


def _warn_if_nan_makes_order_matter(operation: Any, tensors: tuple[Any, ...]) -> None:
    """Combines the first row that holds NaN in other orders too, and warns if that gives something else."""
    data = [_along_axis(operation, tensor.handle.data) for tensor in tensors]
    rows = [np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis]) for array, axis in data]
    nan = np.any(
        [np.isnan(array) for array in rows if array.dtype.kind == "f"] or [np.zeros(rows[0].shape, bool)], axis=0
    )
    if not nan.any():
        return
    row = int(nan.any(axis=1).argmax())
    place = int(nan[row].argmax())
    rest = np.delete(np.arange(nan.shape[1]), place)
    outcomes = [
        [np.asarray(result.handle.data) for result in _reduced_in_order(operation, tensors, rows, row, order)]
        for order in (np.arange(nan.shape[1]), np.append(place, rest), np.append(rest, place))
    ]
    if any(
        not np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        for other in outcomes[1:]
        for a, b in zip(outcomes[0], other)
    ):
        name = getattr(operation.combine_fn, "__name__", "the function")
        warnings.warn(
            f"a reduction with {name} meets NaN, and its result then depends on the order of its steps, which the compiler "
            "chooses: a GPU may give another one",
            OrderDependentWarning,
            stacklevel=2,
        )


def _reduced_in_order(
    operation: Any, tensors: tuple[Any, ...], rows: list[Array], row: int, order: Array
) -> Iterator[Any]:
    one_row = type(operation)(0, operation.combine_fn, False)
    given = tuple(one_row.to_tensor(array[row][order], tensor.dtype) for array, tensor in zip(rows, tensors))
    yield from one_row.generic_reduce(given)


def _widen_tensor(tensor: Any) -> Any:
    if not is_bfloat16(tensor.handle):
        return tensor
    return tl.tensor(widen(tensor.handle), _with_scalar(tensor.type, tl.float32))


def _narrow_tensor(tensor: Any) -> Any:
    if tensor.handle.data.dtype != np.float32:
        return tensor
    return tl.tensor(narrow(tensor.handle), _with_scalar(tensor.type, tl.bfloat16))


def _with_scalar(tensor_type: Any, scalar: Any) -> Any:
    return tl.block_type(scalar, tensor_type.shape) if tensor_type.is_block() else scalar


def scan_apply_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """``ScanOps.apply_impl``, which refuses bfloat16 for the reason above."""

    @functools.wraps(original)
    def method(operation: Any, tensors: tuple[Any, ...]) -> Any:
        refuse_float8([tensor.handle for tensor in tensors], "scan")
        if any(is_bfloat16(tensor.handle) for tensor in tensors):
            raise NotImplementedError("a scan of bfloat16 rounds after every step: cast to float32 before scanning")
        return original(operation, tensors)

    return method
