"""Casts between Triton's types in its interpreter, as compiled code does them.

The stock interpreter lets NumPy cast, which wraps floats that no integer holds, cuts float32 to bfloat16, and makes 8-bit floats by
shifting bits: without a carry, without saturation, NaN and infinities as numbers. What Triton does not compile raises here too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from . import formats
from .errors import UnsupportedTritonError
from .formats import Array

# Asked in every operation: numbers of types compare faster than types.
_UINT8, _UINT16 = np.dtype(np.uint8).num, np.dtype(np.uint16).num
_FLOAT32_TO_FLOAT8 = ("fp8e4nv", "fp8e5")
_FLOAT8 = (*_FLOAT32_TO_FLOAT8, "fp8e4b15")


def is_bfloat16(value: Any) -> bool:
    """Whether ``value`` is an interpreter's tensor that holds bfloat16 bits (and not, say, the outcome of comparing
    two of them).
    """
    return (
        isinstance(value, interpreter.TensorHandle)
        and value.data.dtype.num == _UINT16
        and value.dtype.scalar == tl.bfloat16
    )


def is_float8(value: Any) -> bool:
    """Whether ``value`` is an interpreter's tensor of an 8-bit float type."""
    return (
        isinstance(value, interpreter.TensorHandle) and value.data.dtype.num == _UINT8 and value.dtype.scalar.is_fp8()
    )


def float32_values(value: Any) -> Array:
    """The elements of a tensor of bfloat16 or of an 8-bit float type, as float32; exact.

    Raises:
        UnsupportedTritonError: a type that only GPUs of other makers have.
    """
    if is_bfloat16(value):
        return formats.bfloat16_to_float32(value.data)
    name = value.dtype.scalar.name
    if name not in _FLOAT8:
        raise UnsupportedTritonError(f"{name} is a type that Triton compiles for no NVIDIA GPU")
    return formats.float8_to_float32(value.data, name)


def _handle(values: Array, dtype: Any) -> Any:
    return interpreter.TensorHandle(values, dtype)


def _to_bfloat16(source: Any, values: Array) -> Array:
    if values.dtype.kind in "iub":
        return formats.integer_to_bfloat16(values)
    if values.dtype == np.float64:
        return formats.float64_to_bfloat16(values)
    return formats.float32_to_bfloat16(values.astype(np.float32))


def _cast(source: Any, target: Any) -> Any:
    """The cast, or None where the stock interpreter does it right.

    A comparison's outcome is of booleans, whatever type its handle claims to have.
    """
    source_type = source.dtype.scalar
    if is_bfloat16(source) and target == tl.bfloat16:
        return _handle(source.data, target)
    if is_float8(source) or target.is_fp8():
        raise UnsupportedTritonError(f"Triton compiles no cast of {source_type} to {target}")
    values = formats.bfloat16_to_float32(source.data) if is_bfloat16(source) else source.data
    if target == tl.bfloat16:
        return _handle(_to_bfloat16(source, values), target)
    dtype = interpreter._get_np_dtype(target)
    if source_type.is_floating() and values.dtype.kind == "f" and dtype.kind in "iu":
        return _handle(formats.float_to_integer(values, dtype, from_float64=values.dtype == np.float64), target)
    return _handle(values.astype(dtype), target) if is_bfloat16(source) else None


def cast_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InterpreterBuilder.cast_impl`` with bfloat16 rounded once, and floats to integers as a GPU converts them."""
    # (type, NumPy's type, type that is wanted) that the stock interpreter does right: what the elements become.
    plain: dict[tuple[str, int, str], np.dtype[Any]] = {}

    @functools.wraps(original)
    def method(builder: Any, source: Any, target_type: Any) -> Any:
        target, data = target_type.scalar, source.data
        key = (source.dtype.name, data.dtype.num, target.name)
        dtype = plain.get(key)
        if dtype is not None:
            return _handle(data.astype(dtype), target)
        cast = _cast(source, target)
        if cast is not None:
            return cast
        cast = original(builder, source, target_type)
        if key[0] != "bf16":
            plain[key] = cast.data.dtype
        return cast

    return method


def create_fp_to_fp(original: Callable[..., Any]) -> Callable[..., Any]:
    """``InterpreterBuilder.create_fp_to_fp``: casts with a chosen rounding, and all of 8-bit floats."""

    @functools.wraps(original)
    def method(builder: Any, source: Any, target_type: Any, rounding_mode: Any) -> Any:
        target, source_type = target_type.scalar, source.dtype.scalar
        toward_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if is_float8(source):
            return _handle(_from_float8(source, target), target)
        if target.is_fp8():
            return _handle(_to_float8(source, target.name, toward_zero), target)
        if not toward_zero:
            return builder.cast_impl(source, target_type)
        if source_type == tl.float32 and target == tl.bfloat16:
            return _handle(formats.float32_to_bfloat16(source.data, toward_zero=True), target)
        if source_type == tl.float32 and target == tl.float16:
            return _handle(formats.float32_to_float16_toward_zero(source.data), target)
        raise _not_compiled(source_type, target, toward_zero)

    return method


def _not_compiled(source: Any, target: Any, toward_zero: bool = False) -> UnsupportedTritonError:
    rounding = ' with fp_downcast_rounding="rtz"' if toward_zero else ""
    return UnsupportedTritonError(f"Triton compiles no cast of {source} to {target}{rounding}: cast to float32 first")


def _from_float8(source: Any, target: Any) -> Array:
    name = source.dtype.scalar.name
    values = float32_values(source)
    if target == tl.bfloat16:
        # Triton multiplies the shifted bits by 2^112 on every GPU, in which the highest exponent is one like the others.
        if name == "fp8e5" and not np.isfinite(values).all():
            raise UnsupportedTritonError(
                "a cast of fp8e5 to bf16, as Triton compiles it, makes 65536 of infinity and 81920 to 114688 of NaN: "
                "cast to float32 first"
            )
        return formats.float32_to_bfloat16(values)
    if target in (tl.float16, tl.float32) or (target == tl.float64 and name == "fp8e4b15"):
        return values.astype(interpreter._get_np_dtype(target))
    raise _not_compiled(name, target)


def _to_float8(source: Any, name: str, toward_zero: bool) -> Array:
    source_type = source.dtype.scalar
    if name == "fp8e4b15":  # its one rounding serves both names
        if source_type == tl.float32:
            return formats.float16_to_float8e4b15(formats.float32_to_float16_toward_zero(source.data))
        if source_type == tl.float16:
            return formats.float16_to_float8e4b15(source.data)
    elif toward_zero:
        if name == "fp8e5" and source_type == tl.float32:
            return formats.float32_to_float8e5_toward_zero(source.data)
    elif name in _FLOAT32_TO_FLOAT8 and source_type in (tl.float32, tl.bfloat16, tl.float16):
        values = formats.bfloat16_to_float32(source.data) if is_bfloat16(source) else source.data
        return formats.float32_to_float8(values.astype(np.float32), name)
    raise _not_compiled(source_type, name, toward_zero)
