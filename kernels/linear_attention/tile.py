"""What the kernels of linear attention share: features, powers of the decay, and products whose operands could leave float16's range.

A state is kept flat, S row by row and z behind it: head_dim · value_dim + head_dim numbers in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..attention.tile import row_offset


class Traits(NamedTuple):
    """The constants that say what a call is, constexprs all of them.

    ELU: features are elu(x) + 1, else x itself. SCALED: operands are float16, whose range products of features leave. PRECISION: of
    float32 products. PARTS: how many 16-bit numbers make up a feature times a power of the decay. ALIGNMENT: divides the strides of rows.
    Triton looks no further than whether 16 does, but rows of 40 values of 16 bits still begin at multiples of 16 bytes.
    """

    HEADS_PER_KV: Any
    HEAD_DIM: Any
    VALUE_DIM: Any
    ELU: Any
    CAUSAL: Any
    NORMALIZE: Any
    HAS_DECAY: Any
    SCALED: Any
    PRECISION: Any
    PARTS: Any
    ALIGNMENT: Any


class Head(NamedTuple):
    """Where a program works: a sequence, the heads of its rows and of the keys, and the state's place among all heads of keys."""

    batch: Any
    row_head: Any
    kv_head: Any
    slot: Any


@triton.jit
def locate(slot, num_row_heads, ROWS_ARE_KEYS: tl.constexpr, traits):
    """The place of a program that owns rows of one head, which is one of the keys' or one of the queries'."""
    batch = slot // num_row_heads
    head = slot % num_row_heads
    kv_head = head
    num_kv_heads = num_row_heads
    if not ROWS_ARE_KEYS:
        kv_head = head // traits.HEADS_PER_KV
        num_kv_heads = num_row_heads // traits.HEADS_PER_KV
    return Head(
        batch.to(tl.int64), head.to(tl.int64), kv_head.to(tl.int64), (batch * num_kv_heads + kv_head).to(tl.int64)
    )


@triton.jit
def log2_of_decay(decay_ptr, stride_decay, kv_head):
    """0 without decay; -inf for a decay of 0."""
    result = 0.0
    if decay_ptr is not None:
        result = tl.log2(tl.load(decay_ptr + kv_head * stride_decay).to(tl.float32))
    return result


@triton.jit
def power(log2_decay, exponent, traits):
    """decay to an integer of at least 0; also 0⁰ = 1. Exponents below 0 count as 0."""
    exponent = tl.maximum(exponent, 0)
    if traits.HAS_DECAY:
        result = tl.where(exponent == 0, 1.0, tl.exp2(exponent.to(tl.float32) * log2_decay))
    else:
        result = (exponent * 0).to(tl.float32) + 1.0
    return result


@triton.jit
def slope(log2_decay, exponent, traits):
    """The derivative of :func:`power` by the decay: exponent · decay^(exponent - 1)."""
    return tl.maximum(exponent, 0).to(tl.float32) * power(log2_decay, exponent - 1, traits)


@triton.jit
def row_begin(strides, batch, row, head, traits):
    """Where a row of a head begins."""
    return tl.multiple_of(row_offset(strides, batch, row, head), traits.ALIGNMENT)


@triton.jit
def load_features(ptr, stride, rows_left, offs_row, offs_dim, DIM: tl.constexpr, IS_MAPPED: tl.constexpr, traits):
    """Rows in their dtype from ``ptr`` on, IS_MAPPED those of their features; 0 for features from DIM on, whatever φ(0) is."""
    inside = (offs_row[:, None] < rows_left) & (offs_dim[None, :] < DIM)
    offsets = tl.multiple_of(offs_row * stride, traits.ALIGNMENT)
    x = tl.load(ptr + (offsets[:, None] + offs_dim[None, :]), mask=inside, other=0.0)
    if IS_MAPPED and traits.ELU:
        wide = x.to(tl.float32)
        # Not exp(x) - 1 + 1, of which a feature far below 1 would keep few digits.
        x = tl.where(inside, tl.where(wide > 0.0, wide + 1.0, tl.exp(wide)), 0.0).to(x.dtype)
    return x


@triton.jit
def store_rows(ptr, stride, rows_left, offs_row, offs_dim, value, DIM: tl.constexpr, traits):
    """Rows in the tensor's dtype from ``ptr`` on, less the features from DIM on."""
    inside = (offs_row[:, None] < rows_left) & (offs_dim[None, :] < DIM)
    offsets = tl.multiple_of(offs_row * stride, traits.ALIGNMENT)
    tl.store(ptr + (offsets[:, None] + offs_dim[None, :]), value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def power_of_two_below(top):
    """What numbers up to ``top`` are divided by to be near 1, without rounding them; 1 for 0."""
    return tl.where(top == 0.0, 1.0, tl.exp2(tl.floor(tl.log2(top))))


@triton.jit
def multiply(rows, others, acc, PARTS: tl.constexpr, traits):
    """acc + rows @ others; rows in float32, taken apart into so many numbers of the other factor's dtype, and each of them brought near 1
    where float16 might not hold it."""
    top = 1.0
    if traits.SCALED:
        top = power_of_two_below(tl.max(tl.abs(rows), 1))[:, None]
        rows = rows / top
    for _ in tl.static_range(PARTS):
        part = rows.to(others.dtype)
        if traits.SCALED:
            acc += tl.dot(part, others) * top
        else:
            acc = tl.dot(part, others, acc, input_precision=traits.PRECISION)
        rows = rows - part.to(tl.float32)
    return acc


@triton.jit
def multiply_by_state(rows, state, acc, traits):
    """acc + rows @ state; a state in float32, all of it brought near 1 where float16 might not hold it."""
    if traits.SCALED:
        top = power_of_two_below(tl.max(tl.max(tl.abs(state), 1), 0))
        acc += tl.dot(rows, (state / top).to(rows.dtype)) * top
    else:
        acc = tl.dot(rows, state.to(rows.dtype), acc, input_precision=traits.PRECISION)
    return acc


@triton.jit
def outer_products(weighted, others, acc, PARTS: tl.constexpr, traits):
    """acc + weightedᵀ @ others; weighted features in float32, taken apart into so many numbers of the other factor's dtype."""
    top = 1.0
    if traits.SCALED:
        top = power_of_two_below(tl.max(tl.max(tl.abs(weighted), 1), 0))
        weighted = weighted / top
    for _ in tl.static_range(PARTS):
        part = weighted.to(others.dtype)
        if traits.SCALED:
            acc += tl.dot(tl.trans(part), others) * top
        else:
            acc = tl.dot(tl.trans(part), others, acc, input_precision=traits.PRECISION)
        weighted = weighted - part.to(tl.float32)
    return acc
