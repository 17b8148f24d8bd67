"""The merge kernel of decode attention: the partial results of a row's splits, in ascending order."""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import UNSPECIALISED, join_sink, row_pointers, sequence_extent, split_of, tile_keys

# Splits merged per step: 16 rows of partial results are one or two 128-bit loads per thread.
MERGE_SPLITS = 16


@triton.jit(do_not_specialize=UNSPECIALISED)
def _decode_merge_kernel(
    partial_out_ptr, partial_stats_ptr,
    out_ptr, stride_out_batch, stride_out_token, stride_out_head,
    lse_ptr, stride_lse_batch, stride_lse_head,
    cache_seqlens_ptr, cu_seqlens_q_ptr, cache_leftpad_ptr, sinks_ptr,
    max_rows, num_splits, seqlen_q, capacity, window_left, window_right,
    fine_keys, fine_splits, coarse_keys, scratch_rows,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS_ABOVE: tl.constexpr, ROWS_UP_TO: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid % max_rows
    pid = pid // max_rows
    kv_head = (pid % NUM_KV_HEADS).to(tl.int64)
    sequence = (pid // NUM_KV_HEADS).to(tl.int64)

    first_token, seqlen_q, seqlen_k, leftpad = sequence_extent(
        cache_seqlens_ptr, cu_seqlens_q_ptr, cache_leftpad_ptr, sequence, seqlen_q
    )
    num_rows = seqlen_q * GROUP
    if (num_rows <= ROWS_ABOVE) | (num_rows > ROWS_UP_TO) | (row >= num_rows):
        return
    low, high = tile_keys(
        row // BLOCK_M, seqlen_q, seqlen_k, capacity, leftpad, window_left, window_right, GROUP, BLOCK_M
    )
    first_split = 0
    last_split = 0
    if low < high:
        first_split = split_of(low, fine_keys, fine_splits, coarse_keys)
        last_split = split_of(high - 1, fine_keys, fine_splits, coarse_keys) + 1

    offs_split = tl.arange(0, BLOCK_SPLITS)
    offs_dim = tl.arange(0, BLOCK_VALUE_DIM)
    scratch = (sequence * NUM_KV_HEADS + kv_head) * num_splits * scratch_rows
    row_max = tl.full([], float("-inf"), tl.float32)
    row_sum = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_VALUE_DIM], tl.float32)
    for first in range(first_split, last_split, BLOCK_SPLITS):
        written = first + offs_split < last_split
        places = scratch + (first + offs_split).to(tl.int64) * scratch_rows
        split_max = tl.load(partial_stats_ptr + places * 2 + row, mask=written, other=float("-inf"))
        split_sum = tl.load(partial_stats_ptr + places * 2 + scratch_rows + row, mask=written, other=0.0)
        mask = written[:, None]
        if VALUE_DIM != BLOCK_VALUE_DIM:
            mask = mask & (offs_dim[None, :] < VALUE_DIM)
        split_out = tl.load(
            partial_out_ptr + (places + row)[:, None] * VALUE_DIM + offs_dim[None, :], mask=mask, other=0.0
        )
        new_max = tl.maximum(row_max, tl.max(split_max, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp(split_max - shift)
        rescale = tl.exp(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(weight * split_sum, 0)
        acc = acc * rescale + tl.sum(weight[:, None] * split_out, 0)
        row_max = new_max

    head = kv_head * GROUP + row % GROUP
    if sinks_ptr is not None:
        row_max, row_sum, factor = join_sink(row_max, row_sum, tl.load(sinks_ptr + head).to(tl.float32))
        acc *= factor
    token = first_token + row // GROUP
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)
    out_row_ptr = row_pointers(out_ptr, stride_out_batch, stride_out_token, stride_out_head, sequence, token, head)
    tl.store(out_row_ptr + offs_dim, out.to(out_ptr.dtype.element_ty), mask=offs_dim < VALUE_DIM)
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum))
    tl.store(lse_ptr + sequence * stride_lse_batch + head * stride_lse_head + token, lse)
