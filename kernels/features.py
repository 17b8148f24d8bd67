"""Rows of features on their way into a cache: loads and stores, QK-norm, RoPE and codes of 8 bits. A row is a line of one tile or of three.

A row is one part, or, where its halves rotate (HALF > 0), three: the first half, the second, and the rest that does not rotate, so that the
two features of a pair are in one thread. Parts that a row does not have are the first again.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_part(rows_ptr, mask, FIRST: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    return tl.load(
        rows_ptr[:, None] + (FIRST + dims)[None, :], mask=mask[:, None] & (dims < NUMBER)[None, :], other=0.0
    )


@triton.jit
def store_part(rows_ptr, x, mask, FIRST: tl.constexpr, NUMBER: tl.constexpr, BLOCK: tl.constexpr):
    dims = tl.arange(0, BLOCK)
    tl.store(rows_ptr[:, None] + (FIRST + dims)[None, :], x, mask=mask[:, None] & (dims < NUMBER)[None, :])


@triton.jit
def load_parts(
    rows_ptr, mask, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr
):  # fmt: skip
    if HALF == 0:
        first = load_part(rows_ptr, mask, 0, DIM, BLOCK_DIM)
        second = first
    else:
        first = load_part(rows_ptr, mask, 0, HALF, BLOCK_HALF)
        second = load_part(rows_ptr, mask, HALF, HALF, BLOCK_HALF)
    rest = first
    if HALF > 0 and 2 * HALF < DIM:
        rest = load_part(rows_ptr, mask, 2 * HALF, DIM - 2 * HALF, BLOCK_REST)
    return first, second, rest


@triton.jit
def store_parts(
    rows_ptr, first, second, rest, mask,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    if HALF == 0:
        store_part(rows_ptr, first, mask, 0, DIM, BLOCK_DIM)
    else:
        store_part(rows_ptr, first, mask, 0, HALF, BLOCK_HALF)
        store_part(rows_ptr, second, mask, HALF, HALF, BLOCK_HALF)
        if 2 * HALF < DIM:
            store_part(rows_ptr, rest, mask, 2 * HALF, DIM - 2 * HALF, BLOCK_REST)


@triton.jit
def _squares(x):
    wide = x.to(tl.float32)
    return wide * wide


@triton.jit
def _scaled(x, rstd, weight, weight_offset):
    # Rounded to x's dtype before the rotation, as the two operations one after the other would.
    return (x.to(tl.float32) * rstd[:, None] * (weight.to(tl.float32) + weight_offset)).to(x.dtype)


@triton.jit
def normalise_parts(
    first, second, rest, weight_first, weight_second, weight_rest, eps, weight_offset, DIM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """The parts after QK-norm, in their own dtype."""
    squares = _squares(first)
    if HALF > 0:
        squares += _squares(second)  # in each thread, so that threads add up once
    total = tl.sum(squares, 1)
    if HALF > 0 and 2 * HALF < DIM:
        total += tl.sum(_squares(rest), 1)
    rstd = 1.0 / tl.sqrt_rn(total / DIM + eps)
    first = _scaled(first, rstd, weight_first, weight_offset)
    if HALF > 0:
        second = _scaled(second, rstd, weight_second, weight_offset)
        if 2 * HALF < DIM:
            rest = _scaled(rest, rstd, weight_rest, weight_offset)
    return first, second, rest


@triton.jit
def rotate_halves(first, second, cos, sin):
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    return (wide_first * cos - wide_second * sin).to(first.dtype), (wide_second * cos + wide_first * sin).to(
        first.dtype
    )


@triton.jit
def rotate_neighbours(x, cos, sin, HALF: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Features 2i and 2i + 1 of the first ROTARY_DIM, i < HALF."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], BLOCK_DIM // 2, 2]))
    new_first, new_second = rotate_halves(first, second, cos, sin)
    if 2 * HALF < BLOCK_DIM:
        # Features that do not rotate are chosen, not multiplied by 1 and 0, which would turn an infinity into NaN.
        rotates = (tl.arange(0, BLOCK_DIM // 2) < HALF)[None, :]
        new_first, new_second = tl.where(rotates, new_first, first), tl.where(rotates, new_second, second)
    return tl.reshape(tl.join(new_first, new_second), [x.shape[0], BLOCK_DIM])


@triton.jit
def encode(x, scale, FORMAT: tl.constexpr):
    """Codes of x / scale: int8, or the bits of float8_e4m3fn (by hand: only parts from sm_89 on convert). Both round half to even."""
    # Adding 1.5 · 2^23 leaves no bits below 1: the sum is the number rounded to an integer.
    INTEGER: tl.constexpr = 12582912.0
    scaled = tl.div_rn(x.to(tl.float32), tl.broadcast_to(scale[:, None], x.shape))
    if FORMAT == "int8":
        scaled = tl.minimum(tl.maximum(scaled, -128.0), 127.0)
        codes = ((scaled + INTEGER) - INTEGER).to(tl.int8)
    else:
        magnitude = tl.minimum(tl.abs(scaled), 448.0)
        # Normal numbers keep 3 bits of mantissa, and the exponent's bias changes from 127 to 7; a carry moves into the exponent.
        bits = magnitude.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        subnormal = ((magnitude * 512.0 + INTEGER) - INTEGER).to(tl.int32)
        code = tl.where(magnitude < 0.015625, subnormal, normal)
        code = tl.where(scaled != scaled, 0x7F, code)
        sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 0x80
        codes = (code | sign).to(tl.uint8)
    return codes
