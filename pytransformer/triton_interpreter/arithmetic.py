"""Arithmetic of Triton's interpreter as a GPU does it: bfloat16, products, minima and maxima, and the special values of functions.

NumPy has no bfloat16, so the interpreter keeps its bits in ``uint16`` arrays; the stock one then adds, compares and
multiplies those bits as integers. Here every operation on bfloat16 is done in float32, which holds each bfloat16
exactly, and its result is rounded once, to nearest even. Triton compiles no arithmetic of 8-bit floats, so there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from . import formats
from .casts import float32_values, is_bfloat16, is_float8
from .errors import UnsupportedTritonError
from .formats import Array

_TINY = np.finfo(np.float32).tiny
_LOG2_E = np.float32(1.4426950408889634)


def widen(value: Any) -> Any:
    """bfloat16 tensors as float32 ones; everything else as it is."""
    return interpreter.TensorHandle(float32_values(value), tl.float32) if is_bfloat16(value) else value


def narrow(value: Any) -> Any:
    """The result of an operation on widened tensors: float32 back to bfloat16, the outcome of a comparison as a
    boolean.
    """
    if not isinstance(value, interpreter.TensorHandle):
        return value
    if value.data.dtype == np.bool_:
        return interpreter.TensorHandle(value.data, tl.int1)
    return interpreter.TensorHandle(formats.float32_to_bfloat16(value.data), tl.bfloat16)


# What the interpreter keeps the bits of such floats in.
_BITS = frozenset((np.dtype(np.uint16).num, np.dtype(np.uint8).num))
# These move or combine bits without reading them as numbers, so bfloat16 needs no detour.
_BITWISE = (np.where, np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def through_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """A builder method that does bfloat16 arithmetic in float32 and rounds once at the end."""

    @functools.wraps(original)
    def method(builder: Any, *args: Any) -> Any:
        if not any(isinstance(arg, interpreter.TensorHandle) and arg.data.dtype.num in _BITS for arg in args):
            return original(builder, *args)  # most: this is asked in every operation
        if any(args[-1] is op for op in _BITWISE):
            return original(builder, *args)
        refuse_float8(args, "arithmetic")
        if not any(is_bfloat16(arg) for arg in args):
            return original(builder, *args)
        return narrow(original(builder, *[widen(arg) for arg in args]))

    return method


def binary_op(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InterpreterBuilder.binary_op``, at once for two arrays of one type that NumPy has, as most are."""
    general = through_float32(original)
    kinds = (np.float32, np.float64, np.float16, np.int8, np.int16, np.int32, np.int64, np.uint32, np.uint64)
    plain = frozenset(np.dtype(kind).num for kind in kinds)
    handle = interpreter.TensorHandle

    @functools.wraps(original)
    def method(builder: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        a, b, dtype = lhs.data, rhs.data, lhs.dtype
        if a.dtype.num != b.dtype.num or a.dtype.num not in plain:
            return general(builder, lhs, rhs, op)
        result = op(a, b)
        if result.itemsize > 1 and result.dtype.num != a.dtype.num:
            return general(builder, lhs, rhs, op)
        return handle(result, dtype.scalar)

    return method


def refuse_float8(values: Any, what: str) -> None:
    """Raises UnsupportedTritonError if one of the values is of an 8-bit float type."""
    for value in values:
        if is_float8(value):
            raise UnsupportedTritonError(f"Triton compiles no {what} of {value.dtype.scalar}: cast to float32 first")


def create_print(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InterpreterBuilder.create_print`` that shows bfloat16 and 8-bit floats as the numbers they are."""

    @functools.wraps(original)
    def method(builder: Any, prefix: Any, hex: Any, values: Any, *args: Any) -> Any:
        def shown(value: Any) -> Any:
            if is_bfloat16(value) or is_float8(value):
                return interpreter.TensorHandle(float32_values(value), tl.float32)
            return value

        return original(builder, prefix, hex, values if hex else [shown(value) for value in values], *args)

    return method


def get_bf16(builder: Any, value: float) -> Any:
    """A bfloat16 constant (Triton 3.6 has no such method at all)."""
    return interpreter.TensorHandle(formats.float32_to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)


# Minima and maxima: PTX holds +0 to be larger than -0, while NumPy takes either.


def maximum_number(a: Array, b: Array) -> Array:
    """``max``: the larger; of a NaN and a number the number."""
    return _with_sign_of_zero(np.fmax(a, b), a, b, np.logical_and)


def minimum_number(a: Array, b: Array) -> Array:
    """``min``: the smaller; of a NaN and a number the number."""
    return _with_sign_of_zero(np.fmin(a, b), a, b, np.logical_or)


def maximum(a: Array, b: Array) -> Array:
    """``max.NaN``: the larger, or NaN if there is one."""
    return _with_sign_of_zero(np.maximum(a, b), a, b, np.logical_and)


def minimum(a: Array, b: Array) -> Array:
    """``min.NaN``: the smaller, or NaN if there is one."""
    return _with_sign_of_zero(np.minimum(a, b), a, b, np.logical_or)


def _with_sign_of_zero(result: Array, a: Array, b: Array, negative: Any) -> Array:
    zero = result == 0
    if not zero.any():
        return result
    # The result is a zero and neither is beyond it. Where only one is zero (a NaN, or a number on the other side), it is that one.
    both = zero & (a == 0) & (b == 0)
    signed = np.copysign(result, np.where(negative(np.signbit(a), np.signbit(b)), -1, 1).astype(result.dtype))
    return np.where(both, signed, result)


def create_clampf(builder: Any, arg: Any, low: Any, high: Any, propagate_nans: Any) -> Any:
    """``tl.clamp``: a maximum and a minimum (Triton 3.6 lets every NaN through)."""
    none = propagate_nans == interpreter._ir.PROPAGATE_NAN.NONE
    larger = builder.binary_op(arg, low, maximum_number if none else maximum)
    return builder.binary_op(larger, high, minimum_number if none else minimum)


def create_fma(original: Callable[..., Any]) -> Callable[..., Any]:
    """``tl.fma``, which rounds once (with Triton 3.6 not in float64)."""

    @functools.wraps(original)
    def method(builder: Any, x: Any, y: Any, z: Any) -> Any:
        refuse_float8((x, y, z), "arithmetic")
        kind, dtype = z.dtype.scalar, z.data.dtype
        if dtype == np.float64:
            return original(builder, x, y, z)
        a, b, c = (widen(value).data.astype(np.float64) for value in (x, y, z))
        total = formats.odd_sum(a * b, c)
        bits = formats.float64_to_bfloat16(total) if is_bfloat16(z) else total.astype(dtype)
        return interpreter.TensorHandle(bits, kind)

    return method


def create_frem(builder: Any, lhs: Any, rhs: Any) -> Any:
    """``%`` of floats as compiled: a correctly rounded quotient, cut to an integer, and one fused step; of 16 bits in float32."""
    if is_bfloat16(lhs) or lhs.data.dtype == np.float16:
        x, y = (builder.cast_impl(value, tl.float32) for value in (lhs, rhs))
        return builder.cast_impl(create_frem(builder, x, y), lhs.dtype.scalar)
    quotient = interpreter.TensorHandle(-np.trunc(lhs.data / rhs.data), lhs.dtype.scalar)
    rest = builder.create_fma(quotient, rhs, lhs)
    return interpreter.TensorHandle(np.where(np.isinf(rhs.data), lhs.data, rest.data), lhs.dtype.scalar)


def integer_division(original: Callable[..., Any]) -> Callable[..., Any]:
    """Quotient or remainder of integers; by zero they are undefined on a GPU, so that all bits are set: no useful number."""

    @functools.wraps(original)
    def method(builder: Any, lhs: Any, rhs: Any) -> Any:
        zero = rhs.data == 0
        if not zero.any():
            return original(builder, lhs, rhs)
        result = original(
            builder, lhs, interpreter.TensorHandle(np.where(zero, 1, rhs.data).astype(rhs.data.dtype), rhs.dtype)
        )
        undefined = np.full((), -1, np.int64).astype(result.data.dtype)
        return interpreter.TensorHandle(np.where(zero, undefined, result.data), result.dtype)

    return method


# Functions of float32. Their approximate instructions are correctly rounded here, but what they do to subnormal numbers
# is theirs, as are the steps that Triton puts before them.


def _without_subnormals(values: Array) -> Array:
    return np.where(np.abs(values) < _TINY, np.copysign(np.float32(0), values), values)


def of_float32(
    function: Callable[[Array], Array], *, flush: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a builder method compute ``function`` in float64 for float32, and round once; all else is left to the original.

    Args:
        function: of a float64 array.
        flush: the instruction is an ``.ftz``: subnormal arguments and results are zeros of their sign.
    """

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(builder: Any, arg: Any) -> Any:
            if is_float8(arg) or arg.data.dtype != np.float32:
                return through_float32(original)(builder, arg)
            values = _without_subnormals(arg.data) if flush else arg.data
            result = function(values.astype(np.float64)).astype(np.float32)
            return interpreter.TensorHandle(_without_subnormals(result) if flush else result, arg.dtype.scalar)

        return method

    return wrap


def exponential(values: Array) -> Array:
    """``tl.exp``: 2 to the power of the float32 product with log2(e), of which the rounding is most of the error of a large argument."""
    return np.exp2((values.astype(np.float32) * _LOG2_E).astype(np.float64))


def reciprocal_root(values: Array) -> Array:
    """1 / √values."""
    return 1.0 / np.sqrt(values)


def create_erf(original: Callable[..., Any]) -> Callable[..., Any]:
    """``tl.math.erf``, whose code flushes subnormal numbers too."""

    @functools.wraps(original)
    def method(builder: Any, arg: Any) -> Any:
        if is_float8(arg) or arg.data.dtype != np.float32:
            return through_float32(original)(builder, arg)
        result = original(builder, interpreter.TensorHandle(_without_subnormals(arg.data), arg.dtype))
        return interpreter.TensorHandle(_without_subnormals(result.data), result.dtype)

    return method


FUNCTIONS = {
    "create_erf": create_erf,
    "create_exp": of_float32(exponential),
    "create_exp2": of_float32(np.exp2, flush=True),
    "create_sqrt": of_float32(np.sqrt, flush=True),
    "create_rsqrt": of_float32(reciprocal_root, flush=True),
    "create_floor": of_float32(np.floor, flush=True),
    "create_ceil": of_float32(np.ceil, flush=True),
    "create_sin": of_float32(np.sin, flush=True),
    "create_cos": of_float32(np.cos, flush=True),
}


# Products.


def create_dot(original: Callable[..., Any], *, tf32: bool) -> Callable[..., Any]:
    """``tl.dot`` with exact products of 8 and 16 bits, accumulated in float32, and, if ``tf32``, tf32 products where they
    are asked for.
    """

    @functools.wraps(original)
    def method(builder: Any, lhs: Any, rhs: Any, accumulator: Any, input_precision: Any, *args: Any) -> Any:
        a, b = _operand(lhs), _operand(rhs)
        precision = interpreter._ir.INPUT_PRECISION
        if a.dtype == np.float32 and accumulator.data.dtype == np.float16:
            step = 32 if is_float8(lhs) else 16
            return interpreter.TensorHandle(_sum_in_float16(a, b, accumulator.data, step), tl.float16)
        if tf32 and lhs.dtype.scalar == tl.float32:
            if input_precision == precision.TF32:
                a, b = formats.truncate_to_tf32(a), formats.truncate_to_tf32(b)
            elif input_precision == precision.TF32x3:
                result = _three_products(a, b) + accumulator.data
                return interpreter.TensorHandle(result, accumulator.dtype.scalar)
        types = (tl.float32 if x.dtype == np.float32 else handle.dtype for x, handle in ((a, lhs), (b, rhs)))
        operands = (interpreter.TensorHandle(x, dtype) for x, dtype in zip((a, b), types))
        return original(builder, *operands, accumulator, input_precision, *args)

    return method


def _operand(handle: Any) -> Array:
    if is_bfloat16(handle) or is_float8(handle):
        return float32_values(handle)
    data: Array = handle.data
    return data.astype(np.float32) if data.dtype == np.float16 else data


def _sum_in_float16(a: Array, b: Array, accumulator: Array, step: int) -> Array:
    """A product whose accumulator is float16: each instruction multiplies ``step`` columns with rows and rounds once."""
    for start in range(0, a.shape[-1], step):
        columns, rows = a[..., start : start + step], b[..., start : start + step, :]
        accumulator = (np.matmul(columns, rows) + accumulator.astype(np.float32)).astype(np.float16)
    return accumulator


def _three_products(a: Array, b: Array) -> Array:
    """``input_precision="tf32x3"``: operands in two parts, the large one rounded, the small one cut; the small products' NaN is dropped."""
    large_a, large_b = formats.round_to_tf32(a), formats.round_to_tf32(b)
    small_a, small_b = formats.truncate_to_tf32(a - large_a), formats.truncate_to_tf32(b - large_b)
    small = np.matmul(small_a, large_b) + np.matmul(large_a, small_b)
    result: Array = np.where(np.isnan(small), np.float32(0), small) + np.matmul(large_a, large_b)
    return result


def scaled_operand(original: Callable[..., Any]) -> Callable[..., Any]:
    """The numbers of an operand of ``tl.dot_scaled``; the stock interpreter takes all of them through float16."""

    @functools.wraps(original)
    def method(handle: Any) -> Any:
        if is_bfloat16(handle) or is_float8(handle):
            return float32_values(handle)
        return handle.data.astype(np.float32) if handle.data.dtype == np.float16 else original(handle)

    return method
