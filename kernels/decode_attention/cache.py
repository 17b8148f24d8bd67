"""Which keys a sequence and a tile of its rows see, where a key lies and how it is read."""

from __future__ import annotations

import triton
import triton.language as tl

from .widen import widen

# Sizes that change from call to call must not compile a kernel each.
UNSPECIALISED = [
    "batch", "num_tiles", "max_splits", "seqlen_q", "capacity", "window_left", "window_right", "scratch_rows",
]  # fmt: skip
# Strides of what is read one by one, which change with the lengths.
UNSPECIALISED += [
    "stride_lse_batch",
    "stride_lse_head",
    "stride_block_table_batch",
    "stride_k_scale_page",
    "stride_v_scale_page",
]


@triton.jit
def tanh(x):
    # Not that of mathematics.py, which has 2 to 6 % fewer instructions in the loop but a register more: with every option at once, 32 rows
    # of 128 features spill on sm_80.
    # exp alone cancels near 0, where attention scores are; the polynomial is good to float32 rounding below 0.25.
    square = x * x
    series = -17.0 / 315 + square * (62.0 / 2835 - square * (1382.0 / 155925))
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * series)))
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def sequence_extent(cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, sequence, seqlen_q):
    """(first token in q, query tokens, keys, cache slot of the first key) of a sequence, or of several."""
    leftpad = 0
    if leftpad_ptr is not None:
        leftpad = tl.maximum(tl.load(leftpad_ptr + sequence), 0)
    first_token = 0
    if cu_seqlens_q_ptr is not None:
        first_token = tl.load(cu_seqlens_q_ptr + sequence)
        seqlen_q = tl.load(cu_seqlens_q_ptr + sequence + 1) - first_token
    return first_token, seqlen_q, tl.load(cache_seqlens_ptr + sequence), leftpad


@triton.jit
def tile_keys(
    tile, seqlen_q, seqlen_k, capacity, leftpad, window_left, window_right, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """[low, high): the keys that some row of a tile sees; empty if high <= low."""
    low = 0
    high = tl.minimum(seqlen_k, capacity - leftpad)
    first_position = seqlen_k - seqlen_q + tile * BLOCK_M // GROUP
    last_position = seqlen_k - seqlen_q + tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    if window_left >= 0:
        low = tl.maximum(low, first_position - window_left)
    if window_right >= 0:
        high = tl.minimum(high, last_position + window_right + 1)
    return low, high


@triton.jit
def row_pointers(ptr, stride_batch, stride_token, stride_head, sequence, token, head):
    """Pointers to the rows of (token, head) pairs of a sequence."""
    return ptr + sequence * stride_batch + head * stride_head + token.to(tl.int64) * stride_token


@triton.jit
def cache_places(
    slots, first_slot, keep, cache_row, block_table_row_ptr, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr
):
    """(row of the cache, offset in it), 64-bit, of a sequence's slots: pages of PAGE_SIZE, or one row if there is no table."""
    if block_table_row_ptr is None:
        page = cache_row
        offset = slots
    else:
        if ONE_PAGE:
            # A tile lies in one page, and holds a visible key, so the page is one of the sequence's.
            page = tl.load(block_table_row_ptr + first_slot // PAGE_SIZE).to(tl.int64)
        else:
            page = tl.load(block_table_row_ptr + slots // PAGE_SIZE, mask=keep, other=0).to(tl.int64)
        offset = slots % PAGE_SIZE
    return page, offset.to(tl.int64)


@triton.jit
def load_rows(rows_ptr, keep, offs_dim, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The features of rows; 0 where not ``keep``."""
    mask = keep[:, None]
    if DIM != BLOCK_DIM:
        mask = mask & (offs_dim[None, :] < DIM)
    return tl.load(rows_ptr[:, None] + offs_dim[None, :], mask=mask, other=0)


@triton.jit
def load_cache(
    rows_ptr, keep, offs_dim, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FORMAT: tl.constexpr, IS_PURE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Keys or values at rows_ptr as ``dtype``; 0 where not ``keep``: cells that no query sees may hold anything, NaN too."""
    tile = load_rows(rows_ptr, keep, offs_dim, DIM, BLOCK_DIM)
    if FORMAT != "native":
        tile = widen(tile, FORMAT, IS_PURE)
    return tile.to(dtype)
