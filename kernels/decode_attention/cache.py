"""What the two decode-attention kernels agree on: launch policy, where splits begin, which keys a tile sees, where a key lies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..attention.options import block_dim
from ..launch import cdiv, device_limits

UNLIMITED = 2**30  # more keys than a cache can hold, small enough to be added to in 32 bits


# ---------------------------------------------------------------------------------------------------------------------------------------
# Launch policy.


@dataclass(frozen=True)
class SplitPlan:
    """Where splits begin: ``fine_splits`` of ``fine_keys`` keys, then ``coarse_keys`` each; multiples of ``DecodeConfig.block_n``."""

    fine_keys: int
    fine_splits: int
    coarse_keys: int

    def count(self, capacity: int) -> int:
        """Splits that cover ``capacity`` keys, at least 1."""
        fine_total = self.fine_keys * self.fine_splits
        if capacity <= fine_total:
            return max(1, cdiv(capacity, self.fine_keys))
        return self.fine_splits + cdiv(capacity - fine_total, self.coarse_keys)


# A few rows: 256 keys of one head are 128 KB in bf16 at head_dim 128. Shorter splits write too many partial results (3 % of the
# bytes here), longer ones leave SMs idle: batch 1 with 8 key heads and 4k keys gives 128 programs. Beyond 8k keys there are enough.
FINE_SPLITS = SplitPlan(256, 32, 512)
# Some tens of rows: a partial result is as long as its rows are many, so splits are longer and fewer.
COARSE_SPLITS = SplitPlan(1024, 8, 4096)
# More rows fill the GPU by themselves, and partial results would outgrow the cache.
NO_SPLITS = SplitPlan(UNLIMITED, 1, UNLIMITED)


@dataclass(frozen=True)
class DecodeConfig:
    """Tile and launch of the sequences with more than ``rows_above`` and up to ``rows_up_to`` query rows (tokens · heads per key head).

    Attributes:
        block_m: query rows of a tile; at least 16 for the tensor cores.
        block_n: keys per step.
        splits: where splits begin.
    """

    rows_above: int
    rows_up_to: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: SplitPlan


def decode_configs(
    head_dim: int, value_dim: int, itemsize: int, device: torch.device, paged: bool = False, masked: bool = False
) -> tuple[DecodeConfig, ...]:
    """The three row classes, narrow to wide. Which class serves a sequence depends on its own rows only; likewise every tile size.

    Args:
        itemsize: bytes of an element of the cache.
        paged: a step first loads page numbers, so the pipeline is one stage deeper. Stages do not change results.
        masked: a mask or bias is read for every score.
    """
    limits = device_limits(device)
    row_bytes = (block_dim(head_dim) + block_dim(value_dim)) * itemsize
    # 32 KB per stage (64 keys at head_dim 128, 16-bit) on two blocks per SM: HBM3's latency asks for ~40 KB per SM in flight.
    block_n = 64 if row_bytes <= 512 else 32
    stages = max(1, min(3, (limits.shared_memory // 2 - 8192) // (block_n * row_bytes)))
    # float32 products without tensor cores keep their operands in registers, and a mask or bias its 64-bit addresses: 64 rows spill.
    block_m = 64
    if masked or (itemsize == 4 and row_bytes > 512):
        block_m = 16 if itemsize == 4 and row_bytes >= 1024 else 32
    # 4 warps hold 64 rows of 128 features in 249 registers, and with options on top they spill. Triton 3.6 needs more registers for float32
    # than later releases: there 4 warps spill with 16 rows of 256 features, and 8 warps with 32 rows of 128.
    wide = (block_m, block_n, 4 if row_bytes <= 256 else 8, min(stages, 2) + paged)
    return (
        DecodeConfig(0, 16, 16, block_n, 8 if itemsize == 4 and row_bytes >= 1024 else 4, stages + paged, FINE_SPLITS),
        DecodeConfig(16, 128, *wide, COARSE_SPLITS),
        DecodeConfig(128, UNLIMITED, *wide, NO_SPLITS),
    )


def fixed_splits(capacity: int, num_splits: int, block_n: int) -> SplitPlan:
    """``num_splits`` equal splits of a cache of ``capacity`` keys, in whole tiles."""
    num_splits = max(1, min(num_splits, cdiv(capacity, block_n)))  # also keeps key positions within 32 bits
    keys = max(block_n, cdiv(cdiv(capacity, num_splits), block_n) * block_n)
    return SplitPlan(keys, num_splits, keys)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Device side.


@triton.jit
def tanh(x):
    # exp alone cancels near 0, where attention scores are; the polynomial is good to float32 rounding below 0.25.
    square = x * x
    series = -17.0 / 315 + square * (62.0 / 2835 - square * (1382.0 / 155925))
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * series)))
    e = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def split_start(split, fine_keys, fine_splits, coarse_keys):
    return tl.minimum(split, fine_splits) * fine_keys + tl.maximum(split - fine_splits, 0) * coarse_keys


@triton.jit
def split_of(position, fine_keys, fine_splits, coarse_keys):
    fine_total = fine_keys * fine_splits
    return tl.minimum(position, fine_total) // fine_keys + tl.maximum(position - fine_total, 0) // coarse_keys


@triton.jit
def sequence_extent(cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, sequence, seqlen_q):
    """(first token in q, query tokens, keys, cache slot of the first key) of a sequence."""
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
    """[low, high): the keys that some row of a tile sees; empty if high <= low. Both kernels must agree on it."""
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
def load_cache(
    rows_ptr, keep, offs_dim, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FORMAT: tl.constexpr, dtype: tl.constexpr
):
    """Keys or values at rows_ptr as ``dtype``; 0 where not ``keep``: cells that no query sees may hold anything, NaN too."""
    mask = keep[:, None]
    if DIM != BLOCK_DIM:
        mask = mask & (offs_dim[None, :] < DIM)
    tile = tl.load(rows_ptr[:, None] + offs_dim[None, :], mask=mask, other=0)
    if FORMAT == "e4m3":
        # Sign, then exponent and mantissa moved to float16's places; the exponent's bias differs by 8. Exact, subnormals too; 0x7f is NaN.
        bits = tile.to(tl.uint16)
        magnitude = bits & 0x7F
        value = (((bits & 0x80) << 8) | (magnitude << 7)).to(tl.float16, bitcast=True) * 256.0
        tile = tl.where(magnitude == 0x7F, float("nan"), value)
    return tile.to(dtype)


@triton.jit
def join_sink(row_max, row_sum, sink):
    """The sink joins the denominator: (new maximum, new sum, factor of the output so far)."""
    new_max = tl.maximum(row_max, sink)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    factor = tl.exp(row_max - shift)
    return new_max, row_sum * factor + tl.exp(sink - shift), factor
