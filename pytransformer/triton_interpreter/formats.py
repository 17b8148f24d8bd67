"""The bits of the floating formats that NumPy has not, and the roundings of a GPU: pure functions of arrays.

bfloat16 is held as ``uint16``, the 8-bit formats as ``uint8``, tf32 as float32. What is done here is what Triton 3.9 compiles for compute
capability 8.9 and newer (``cvt.rn.satfinite.e4m3x2.f32`` and its like); where its code for 8.0 gives other results, that is said.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_BFLOAT16_NAN = np.uint16(0x7FFF)
_FLOAT8_NAN = np.uint8(0x7F)
_TF32_MASK = np.uint32(0xFFFFE000)


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


def float64_to_bfloat16(values: Array) -> Array:
    """bfloat16 bit patterns of float64 values, rounded once (``cvt.rn.bf16.f64``; before 9.0 instructions to the same end)."""
    return float32_to_bfloat16(_odd_float32(np.asarray(values, dtype=np.float64)))


def integer_to_bfloat16(values: Array) -> Array:
    """bfloat16 bit patterns of integers or booleans, rounded once (``cvt.rn.bf16.s32``).

    Triton's code for 8.0 rounds to float32 first, so that one in 2^17 or so of the integers above 2^24 differs there.
    """
    if values.dtype.itemsize == 8:
        # The lowest 12 bits of a large number only decide whether it is exact, which one bit can say; the rest fits into float64.
        sticky = (values & ~values.dtype.type(0xFFF)) | ((values & 0xFFF != 0).astype(values.dtype) << 12)
        small = values < 2**52 if values.dtype == np.uint64 else (values < 2**52) & (values > -(2**52))
        values = np.where(small, values, sticky)
    return float64_to_bfloat16(values.astype(np.float64))


def _odd_float32(values: Array) -> Array:
    """float64 to float32, cut toward zero and the last bit set where anything was lost: rounding that to fewer bits is as rounding once."""
    nearest = np.ascontiguousarray(values.astype(np.float32))
    bits = nearest.view(np.uint32).copy()
    bits -= np.abs(nearest).astype(np.float64) > np.abs(values)
    bits |= (nearest.astype(np.float64) != values) & ~np.isnan(values)
    return bits.view(np.float32)


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, where it is not exact the neighbour with the odd last bit: rounding that to 16 bits is as rounding once."""
    total = np.ascontiguousarray(a + b)
    of_b = total - a
    error = (a - (total - of_b)) + (b - of_b)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    away = np.signbit(error) == np.signbit(total)
    return (bits + np.where(inexact, np.where(away, 1, -1), 0)).view(np.float64)


def float32_to_float16_toward_zero(values: Array) -> Array:
    """float32 to float16 as ``cvt.rz.f16.f32``: what is finite stays finite."""
    nearest = np.ascontiguousarray(values.astype(np.float16))
    beyond = np.abs(nearest).astype(np.float32) > np.abs(values)
    return (nearest.view(np.uint16) - beyond.astype(np.uint16)).view(np.float16)


def round_to_tf32(values: Array) -> Array:
    """float32 values with their mantissa rounded to the 10 bits of tf32, ties away from zero (``cvt.rna.tf32``)."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    rounded = ((values.view(np.uint32) + np.uint32(0x1000)) & _TF32_MASK).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def truncate_to_tf32(values: Array) -> Array:
    """float32 values without the 13 bits that a tensor core does not read of a tf32 operand: up to 2^-10 of the value lost, toward zero."""
    return (np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) & _TF32_MASK).view(np.float32)


@functools.cache
def _float8_values(name: str) -> Array:
    """The float32 value of each of the 256 codes of format ``name`` (Triton's name)."""
    codes = np.arange(256, dtype=np.uint16)
    if name == "fp8e5":
        return (codes << 8).view(np.float16).astype(np.float32)
    if name == "fp8e4b15":  # float16 with less exponent; has neither infinities nor NaN
        return (((codes & 0x80) << 8) | ((codes & 0x7F) << 7)).view(np.float16).astype(np.float32)
    assert name == "fp8e4nv", name
    magnitude, exponent = (codes & 7).astype(np.float32), ((codes >> 3) & 15).astype(np.int32)
    values = np.ldexp(magnitude + np.where(exponent > 0, 8, 0).astype(np.float32), np.maximum(exponent, 1) - 10)
    values[magnitude + exponent == 22] = np.nan
    signed: Array = np.where(codes & 0x80, -values, values).astype(np.float32)
    return signed


def float8_to_float32(codes: Array, name: str) -> Array:
    """The float32 values of codes (``uint8``) of "fp8e4nv", "fp8e5" or "fp8e4b15"; exact, infinities and NaN as what they are."""
    return np.take(_float8_values(name), codes)


@functools.cache
def _float8_ladder(name: str) -> tuple[Array, Array]:
    """(the finite values ≥ 0 in the order of their codes, the middles between them), in float64, where all are exact."""
    values = _float8_values(name)[:128].astype(np.float64)
    values = values[np.isfinite(values)]
    return values, (values[1:] + values[:-1]) / 2


def float32_to_float8(values: Array, name: str) -> Array:
    """Codes (``uint8``) of float32 values in "fp8e4nv" or "fp8e5": to nearest, ties to even, infinities and what is too large to the
    largest finite number, NaN to 0x7f (``cvt.rn.satfinite``; Triton's code for 8.0 keeps the sign of a NaN).
    """
    ladder, middles = _float8_ladder(name)
    magnitude = np.abs(values).astype(np.float64)
    codes = np.searchsorted(middles, magnitude, side="left")  # a middle itself belongs to the number below
    tie = (codes < len(middles)) & (magnitude == middles[np.minimum(codes, len(middles) - 1)])
    codes = np.minimum(codes + (tie & (codes % 2 == 1)), len(ladder) - 1)
    signed = codes.astype(np.uint8) | (np.signbit(values).astype(np.uint8) << 7)
    return np.where(np.isnan(values), _FLOAT8_NAN, signed)


def float32_to_float8e5_toward_zero(values: Array) -> Array:
    """Codes of float32 values in "fp8e5", cut toward zero; infinities and NaN stay."""
    return (float32_to_float16_toward_zero(values).view(np.uint16) >> 8).astype(np.uint8)


def float16_to_float8e4b15(values: Array) -> Array:
    """Codes of float16 values in "fp8e4b15" as Triton's code makes them: ties away from zero; at most 1.875, as for NaN."""
    bits = np.ascontiguousarray(values).view(np.uint16)
    magnitude = np.where(np.isnan(values), np.uint16(0x3F00), np.minimum(bits & 0x7FFF, 0x3F00))
    return (((magnitude * np.uint16(2) + np.uint16(0x80)) | (bits & 0x8000)) >> 8).astype(np.uint8)


def float_to_integer(values: Array, dtype: np.dtype[Any], *, from_float64: bool) -> Array:
    """Floats as integers of ``dtype``, as ``cvt.rzi`` does: toward zero, what is out of range to the nearest that is in it.

    8 bits are the low ones of 16. NaN is 0; of or to 64 bits it is the number of which only the highest bit is set.
    """
    converted = np.dtype(f"{dtype.kind}2") if dtype.itemsize == 1 else dtype
    limits = np.iinfo(converted)
    whole = np.trunc(np.asarray(values, dtype=np.float64))
    too_large, too_small = whole >= float(limits.max) + (dtype.itemsize < 8), whole < float(limits.min)
    nan = np.isnan(whole)
    result = np.where(nan | too_large | too_small, 0.0, whole).astype(converted)
    result = np.where(too_large, converted.type(limits.max), np.where(too_small, converted.type(limits.min), result))
    if from_float64 or dtype.itemsize == 8:
        bits = np.full((), 1 << (8 * converted.itemsize - 1), np.dtype(f"u{converted.itemsize}")).view(converted)
        result = np.where(nan, bits, result)
    return result.astype(dtype)
