"""bfloat16 and tf32 as a GPU computes them, for Triton's interpreter.

NumPy has no bfloat16, so the interpreter keeps its bits in ``uint16`` arrays; the stock one then adds, compares and
multiplies those bits as integers, and casts from float32 by cutting bits off. Here every operation on bfloat16 is done
in float32, which holds each bfloat16 exactly, and its result is rounded once, to nearest even. float16 and float32 are
right in the stock interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

Array = npt.NDArray[Any]

_BFLOAT16_NAN = np.uint16(0x7FFF)


def bfloat16_to_float32(bits: Array) -> Array:
    """The float32 values of bfloat16 bit patterns (``uint16``); exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: Array, *, toward_zero: bool = False) -> Array:
    """bfloat16 bit patterns (``uint16``) of float32 values: to nearest, ties to even; overflow gives infinity, NaN
    the GPU's 0x7fff.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    if toward_zero:
        rounded = bits >> 16
    else:
        # Adding just under one half of the last kept bit, plus that bit, carries exactly when round-to-nearest-even
        # rounds up.
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(values), _BFLOAT16_NAN, rounded.astype(np.uint16))


def round_to_tf32(values: Array) -> Array:
    """float32 values with their mantissa rounded to the 10 bits of tf32, ties away from zero (PTX ``cvt.rna.tf32``)."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    rounded = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def is_bfloat16(value: Any) -> bool:
    """Whether ``value`` is an interpreter's tensor that holds bfloat16 bits (and not, say, the outcome of comparing
    two of them).
    """
    return (
        isinstance(value, interpreter.TensorHandle)
        and value.dtype.scalar == tl.bfloat16
        and value.data.dtype == np.uint16
    )


def widen(value: Any) -> Any:
    """bfloat16 tensors as float32 ones; everything else (also lists, for ``create_print``) as it is."""
    if isinstance(value, list):
        return [widen(item) for item in value]
    return interpreter.TensorHandle(bfloat16_to_float32(value.data), tl.float32) if is_bfloat16(value) else value


def narrow(value: Any) -> Any:
    """The result of an operation on widened tensors: float32 back to bfloat16, the outcome of a comparison as a
    boolean.
    """
    if not isinstance(value, interpreter.TensorHandle):
        return value
    if value.data.dtype == np.bool_:
        return interpreter.TensorHandle(value.data, tl.int1)
    return interpreter.TensorHandle(float32_to_bfloat16(value.data), tl.bfloat16)


# These move or combine bits without reading them as numbers, so bfloat16 needs no detour.
_BITWISE = (np.where, np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def through_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """A builder method that does bfloat16 arithmetic in float32 and rounds once at the end."""

    @functools.wraps(original)
    def method(builder: Any, *args: Any) -> Any:
        if not any(is_bfloat16(arg) for arg in args) or any(args[-1] is op for op in _BITWISE):
            return original(builder, *args)
        return narrow(original(builder, *[widen(arg) for arg in args]))

    return method


def widening(original: Callable[..., Any]) -> Callable[..., Any]:
    """A builder method that sees float32 in place of bfloat16; its result is left alone (``create_dot``,
    ``create_print``).
    """

    @functools.wraps(original)
    def method(builder: Any, *args: Any) -> Any:
        return original(builder, *[widen(arg) for arg in args])

    return method


def _cast_to_or_from_bfloat16(source: Any, target_type: Any, *, toward_zero: bool = False) -> Any:
    """The cast, or None where bfloat16 has no part in it or the stock interpreter does it right (8-bit floats)."""
    target = target_type.scalar
    source_type = source.dtype.scalar
    if is_bfloat16(source):
        if target == tl.bfloat16:
            return interpreter.TensorHandle(source.data, target)
        if target.is_floating() and target.primitive_bitwidth < 16:
            return None
        values = bfloat16_to_float32(source.data).astype(interpreter._get_np_dtype(target))
        return interpreter.TensorHandle(values, target)
    if target == tl.bfloat16 and not (source_type.is_floating() and source_type.primitive_bitwidth < 16):
        # As on a GPU, float64 and integers take the way through float32.
        bits = float32_to_bfloat16(source.data.astype(np.float32), toward_zero=toward_zero)
        return interpreter.TensorHandle(bits, tl.bfloat16)
    return None


def cast_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InterpreterBuilder.cast_impl`` with right casts to and from bfloat16."""

    @functools.wraps(original)
    def method(builder: Any, source: Any, target_type: Any) -> Any:
        cast = _cast_to_or_from_bfloat16(source, target_type)
        return original(builder, source, target_type) if cast is None else cast

    return method


def create_fp_to_fp(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InterpreterBuilder.create_fp_to_fp`` (casts with a chosen rounding) with right casts to and from bfloat16."""

    @functools.wraps(original)
    def method(builder: Any, source: Any, target_type: Any, rounding_mode: Any) -> Any:
        toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        cast = _cast_to_or_from_bfloat16(source, target_type, toward_zero=toward_zero)
        return original(builder, source, target_type, rounding_mode) if cast is None else cast

    return method


def get_bf16(builder: Any, value: float) -> Any:
    """A bfloat16 constant (Triton 3.6 has no such method at all)."""
    return interpreter.TensorHandle(float32_to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)


def create_dot(original: Callable[..., Any], *, tf32: bool) -> Callable[..., Any]:
    """``tl.dot`` with exact bfloat16 products accumulated in float32 and, if ``tf32``, tf32 products where they are
    asked for.
    """

    @functools.wraps(original)
    def method(builder: Any, lhs: Any, rhs: Any, accumulator: Any, input_precision: Any, *args: Any) -> Any:
        lhs, rhs = widen_operand(lhs, input_precision), widen_operand(rhs, input_precision)
        return original(builder, lhs, rhs, accumulator, input_precision, *args)

    def widen_operand(operand: Any, input_precision: Any) -> Any:
        if is_bfloat16(operand):
            return widen(operand)
        if tf32 and operand.data.dtype == np.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
            return interpreter.TensorHandle(round_to_tf32(operand.data), operand.dtype)
        return operand

    return method


def reduce_apply_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """``ReduceOps.apply_impl``: minima and maxima of bfloat16 through float32 (exact); any other reduction of
    bfloat16 is refused.
    """
    selections = {
        getattr(tl.standard, name)
        for name in (
            "_elementwise_max",
            "_elementwise_min",
            "_argmax_combine_tie_break_left",
            "_argmax_combine_tie_break_fast",
            "_argmin_combine_tie_break_left",
            "_argmin_combine_tie_break_fast",
        )
    }

    @functools.wraps(original)
    def method(operation: Any, tensors: tuple[Any, ...]) -> Any:
        if not any(is_bfloat16(tensor.handle) for tensor in tensors):
            return original(operation, tensors)
        if operation.combine_fn not in selections:
            raise NotImplementedError(
                "a reduction of bfloat16 rounds after every step, in an order that the hardware chooses: "
                "cast to float32 before reducing"
            )
        results = original(operation, tuple(_widen_tensor(tensor) for tensor in tensors))
        results = results if isinstance(results, (list, tuple)) else (results,)
        return tuple(_narrow_tensor(result) for result in results)

    return method


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
        if any(is_bfloat16(tensor.handle) for tensor in tensors):
            raise NotImplementedError("a scan of bfloat16 rounds after every step: cast to float32 before scanning")
        return original(operation, tensors)

    return method
