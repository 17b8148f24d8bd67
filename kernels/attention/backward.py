"""Attention backward: dq, dk, dv (and the gradients of bias and sinks) from the saved output and log-sum-exp, scores recomputed.

Two kernels, each looping over what its own tile meets, so nothing is added atomically and every run gives the same bits:

1. per query tile: ``delta = rowsum(dout ∘ out) - dlse`` and what to subtract from the scores, both kept for the other kernels;
   ``ds = p ∘ (dp - delta)`` with ``dp = dout vᵀ``; ``dq = scale · ds k``;
2. per key tile, for every query head of its GQA group: ``dv = pᵀ dout``, ``dk = scale · dsᵀ q``.

Cost: 7 matrix products against the forward's 2 (s and dp are formed in both kernels), 14 · batch · heads · Lq · Lk · d FLOP, half of it
if causal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..launch import COMMON_OPTIONS, device_limits, on_device
from ..mathematics import LOG2E
from . import tile as common
from .bias_gradient import attention_bias_gradient, is_broadcast
from .forward import slots_per_group
from .options import (
    UNSPECIALISED,
    block_dim,
    geometry,
    needs_wide_offsets,
    row_strides,
    score_options,
    statistic_strides,
    strides_of,
)

# |lse| from which on rows are normalised again: float32's rounding of it is then felt in the weights of float32 and of 16-bit inputs.
LARGE_LSE_FLOAT32 = 64.0
LARGE_LSE_16_BIT = 8192.0


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of the dq kernel (``q_*``: owns q_block_m queries) and of the dk/dv kernel (``kv_*``: owns kv_block_n keys)."""

    q_block_m: int
    q_block_n: int
    q_num_warps: int
    q_num_stages: int
    kv_block_m: int
    kv_block_n: int
    kv_num_warps: int
    kv_num_stages: int


def backward_config(head_dim: int, value_dim: int, dtype: torch.dtype, arch: int, options: int = 0) -> BackwardConfig:
    """Launch policy; ``options`` as for the forward kernel.

    Registers decide: at 8 warps a thread of the dk/dv kernel holds kv_block_n · (d + dv) / 256 gradients, two score tiles and two
    statistics of each query; of the dq kernel one gradient tile and two score tiles. Figures are for sm_90.
    """
    width = max(block_dim(head_dim), block_dim(value_dim))
    if dtype == torch.float32:
        # Exact products run on the FMA units from registers; two accumulators of 32 · 256, or an option's values too, are too many of them.
        kv_block_m = 32 if width <= 128 and options == 0 else 16
        return BackwardConfig(32, 32, 8 if width <= 64 else 4, 1, kv_block_m, 32, 8, 1)
    if arch < 90:
        if width <= 64 and options < 2:
            return BackwardConfig(64, 64, 8, 2, 32, 64, 4, 2)
        if width <= 64:
            return BackwardConfig(32, 32, 4, 2, 16, 64, 4, 2)
        if width <= 128 and options < 2:
            return BackwardConfig(64, 32, 8, 2, 32, 64, 8, 2)
        return BackwardConfig(32, 32, 8, 2, 16, 32, 8, 2)
    if width <= 64:
        if options == 0:
            return BackwardConfig(128, 64, 8, 2, 64, 128, 8, 2)  # dq 185 registers, dk/dv 230
        if options == 1:
            return BackwardConfig(128, 64, 8, 2, 32, 128, 8, 2)
        return BackwardConfig(128, 32, 8, 2, 32 if options < 4 else 16, 64, 8, 2)
    if width <= 128:
        if options == 0:
            return BackwardConfig(
                128, 64, 8, 2, 32, 128, 8, 2
            )  # dq 251 registers, dk/dv 248; 64 queries at a time spill
        return (
            BackwardConfig(128, 32, 8, 2, 32, 64, 8, 2) if options == 1 else BackwardConfig(64, 32, 8, 2, 16, 64, 8, 2)
        )
    if options == 0:
        # dq 220 registers on sm_90, where 32 keys spill; for dk/dv wgmma's 64 rows would spill, so mma.sync.
        return BackwardConfig(64, 16 if arch == 90 else 32, 8, 2, 32, 32, 8, 2)
    return BackwardConfig(32, 32, 8, 2, 16, 32, 8, 2)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_backward_dq_kernel(
    dout_ptr, stride_dout_batch, stride_dout_seq, stride_dout_head,
    q_ptr, stride_q_batch, stride_q_seq, stride_q_head,
    k_ptr, stride_k_batch, stride_k_seq, stride_k_head,
    v_ptr, stride_v_batch, stride_v_seq, stride_v_head,
    out_ptr, stride_out_batch, stride_out_seq, stride_out_head,
    dq_ptr, stride_dq_batch, stride_dq_seq, stride_dq_head,
    lse_ptr, dlse_ptr, delta_ptr, shift_ptr, norm_ptr, stride_lse_batch, stride_lse_head,
    dbias_ptr, stride_dbias_batch, stride_dbias_head, stride_dbias_row,
    dsinks_ptr, large_lse,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_col,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    padding_ptr, stride_padding_batch, stride_padding_col,
    alibi_ptr, stride_alibi_batch, stride_alibi_head,
    sinks_ptr, dropout_seed_ptr,
    batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    softmax_scale, softcap, window_left, window_right, dropout_last_out, dropout_scale,
    HEADS_PER_KV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SCALE_FIRST: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32

    # Which queries, of which head, of which sequence.
    tile_m, slot = common.program_tile(num_tiles, num_slots, slots_per_group, HAS_RIGHT)
    if sinks_ptr is not None:
        dsinks_ptr += slot.to(tl.int64) * num_tiles + tile_m
    if cu_seqlens_q_ptr is not None:
        head = slot
        sequence, tile_m, first_q, seqlen_q, first_k, seqlen_k = common.packed_tile(
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, seqlen_q, seqlen_k, tile_m, BLOCK_M
        )
    else:
        head = slot % num_heads
        sequence = slot // num_heads
        first_q = 0
        first_k = 0
    start_m = tile_m * BLOCK_M
    if start_m >= seqlen_q:
        return
    sequence = sequence.to(tl.int64)
    head = head.to(tl.int64)
    kv_head = head // HEADS_PER_KV
    first_row = (first_q + start_m).to(tl.int64)
    dout_ptr += sequence * stride_dout_batch + first_row * stride_dout_seq + head * stride_dout_head
    q_ptr += sequence * stride_q_batch + first_row * stride_q_seq + head * stride_q_head
    out_ptr += sequence * stride_out_batch + first_row * stride_out_seq + head * stride_out_head
    dq_ptr += sequence * stride_dq_batch + first_row * stride_dq_seq + head * stride_dq_head
    first_statistic = sequence * stride_lse_batch + head * stride_lse_head + first_row
    first_key = tl.cast(first_k, tl.int64)
    k_ptr += sequence * stride_k_batch + first_key * stride_k_seq + kv_head * stride_k_head
    v_ptr += sequence * stride_v_batch + first_key * stride_v_seq + kv_head * stride_v_head
    sequence = tl.minimum(sequence, batch - 1)  # rows of no sequence see nothing, but must not read past the options
    alibi_slope = None
    if bias_ptr is not None:
        bias_ptr += sequence * stride_bias_batch + head * stride_bias_head
    if dbias_ptr is not None:
        dbias_ptr += sequence * stride_dbias_batch + head * stride_dbias_head
    if mask_ptr is not None:
        mask_ptr += sequence * stride_mask_batch + head * stride_mask_head
    if padding_ptr is not None:
        padding_ptr += sequence * stride_padding_batch
    if alibi_ptr is not None:
        alibi_slope = tl.load(alibi_ptr + sequence * stride_alibi_batch + head * stride_alibi_head).to(tl.float32)
    if dropout_seed_ptr is not None:
        seed = tl.load(dropout_seed_ptr)
        offset = tl.load(dropout_seed_ptr + 1)

    # A row that saw nothing gets p = 0 from a shift of inf, and no gradient whatever flows into its lse (a merge of two partial results
    # may well send NaN).
    offs_m = common.tile_offsets(BLOCK_M, WIDE)
    offs_n = common.tile_offsets(BLOCK_N, WIDE)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    rows_left = seqlen_q - start_m
    row_exists = offs_m < rows_left
    dout = common.load_tile(dout_ptr, stride_dout_seq, rows_left, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True)
    out = common.load_tile(out_ptr, stride_out_seq, rows_left, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True)
    if EXACT:
        # By the same sum as dp: where a key has all the weight, out = v and their difference is 0, as it should be.
        delta = common.row_products(
            dout, dout_ptr, stride_dout_seq, rows_left, offs_m, out, out_ptr, stride_out_seq, rows_left, offs_m,
            VALUE_DIM, PRECISION, STREAMED,
        )  # fmt: skip
        delta = tl.sum(tl.where(offs_m[:, None] == offs_m[None, :], delta, 0.0), 1)
    else:
        delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + first_statistic + offs_m, mask=row_exists, other=float("-inf"))
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + first_statistic + offs_m, mask=row_exists, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    q = common.load_tile(q_ptr, stride_q_seq, rows_left, offs_m, offs_d, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = softmax_scale * LOG2E
    bounds = common.tile_ranges(
        start_m, tl.minimum(start_m + BLOCK_M, seqlen_q) - 1, seqlen_k - seqlen_q - window_left, seqlen_k - seqlen_q + window_right,
        seqlen_k, BLOCK_N, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    shift = tl.where(lse == float("-inf"), float("inf"), lse)
    norm = tl.zeros([BLOCK_M], tl.float32)
    if SCALE_FIRST:
        # Far from 0 a float32 lse loses the logarithm of the sum: a row whose scores are all -1e9 would weigh each key 1. Such rows (rare:
        # masks made of large finite numbers; float32 with very large logits) are normalised again.
        if tl.max(tl.where(lse == float("-inf"), 0.0, tl.abs(lse)), 0) > large_lse:
            row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            if sinks_ptr is not None:
                row_max = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32)
                row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
            for tile_n in range(bounds[4], bounds[3]):
                start_n = tile_n * BLOCK_N
                k_tile_ptr = k_ptr + tl.cast(start_n, tl.int64) * stride_k_seq
                keys_left = seqlen_k - start_n
                k = common.load_tile(k_tile_ptr, stride_k_seq, keys_left, offs_n, offs_d, HEAD_DIM, BLOCK_D, True)
                scores = common.row_products(
                    q, q_ptr, stride_q_seq, rows_left, offs_m, k, k_tile_ptr, stride_k_seq, keys_left, offs_n, HEAD_DIM, PRECISION, STREAMED
                )  # fmt: skip
                scores = common.scaled_scores(scores, softmax_scale, softcap, SCALE_FIRST, HAS_SOFTCAP, EXACT)
                scores = common.score_terms(
                    scores, (start_m + offs_m)[:, None], (start_n + offs_n)[None, :], seqlen_q, seqlen_k,
                    bias_ptr, stride_bias_row, stride_bias_col, mask_ptr, stride_mask_row, stride_mask_col,
                    padding_ptr, stride_padding_col, alibi_slope, window_left, window_right, True, HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                origin = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = common.exponentials(scores, origin[:, None], factor, SCALE_FIRST)
                row_sum = row_sum * common.exponentials(row_max, origin, factor, SCALE_FIRST) + tl.sum(p, 1)
                row_max = new_max
            shift = tl.where(row_sum == 0.0, float("inf"), row_max)
            norm = tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))
        tl.store(norm_ptr + first_statistic + offs_m, norm, mask=row_exists)
    else:
        shift = shift * LOG2E
    tl.store(delta_ptr + first_statistic + offs_m, delta, mask=row_exists)
    tl.store(shift_ptr + first_statistic + offs_m, shift, mask=row_exists)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        tl.store(dsinks_ptr, -tl.sum(common.weights(sink, shift, norm, LOG2E, SCALE_FIRST) * delta, 0))

    for run in tl.static_range(3 if HAS_LEFT else 2):
        for tile_n in range(bounds[2 * run], bounds[2 * run + 1]):
            start_n = tile_n * BLOCK_N
            first_key = tl.cast(start_n, tl.int64)
            keys_left = seqlen_k - start_n
            k_tile_ptr = k_ptr + first_key * stride_k_seq
            v_tile_ptr = v_ptr + first_key * stride_v_seq
            k = common.load_tile(k_tile_ptr, stride_k_seq, keys_left, offs_n, offs_d, HEAD_DIM, BLOCK_D, run > 0)
            v = common.load_tile(v_tile_ptr, stride_v_seq, keys_left, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, run > 0)
            capped = common.row_products(
                q, q_ptr, stride_q_seq, rows_left, offs_m, k, k_tile_ptr, stride_k_seq, keys_left, offs_n, HEAD_DIM, PRECISION, STREAMED
            )  # fmt: skip
            capped = common.scaled_scores(capped, softmax_scale, softcap, SCALE_FIRST, HAS_SOFTCAP, EXACT)
            scores = common.score_terms(
                capped, (start_m + offs_m)[:, None], (start_n + offs_n)[None, :], seqlen_q, seqlen_k,
                bias_ptr, stride_bias_row, stride_bias_col, mask_ptr, stride_mask_row, stride_mask_col,
                padding_ptr, stride_padding_col, alibi_slope, window_left, window_right, run > 0, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            p = common.weights(scores, shift[:, None], norm[:, None], factor, SCALE_FIRST)
            dp = common.row_products(
                dout, dout_ptr, stride_dout_seq, rows_left, offs_m, v, v_tile_ptr, stride_v_seq, keys_left, offs_n,
                VALUE_DIM, PRECISION, STREAMED,
            )  # fmt: skip
            if dropout_seed_ptr is not None:
                place = sequence * num_heads + head
                keep = common.dropout_keep(seed, offset, place, start_m, start_n, dropout_last_out, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            ds = p * (dp - delta[:, None])
            if dbias_ptr is not None:
                dbias_rows_ptr = dbias_ptr + (start_m + offs_m)[:, None].to(tl.int64) * stride_dbias_row
                inside = row_exists[:, None] & (offs_n[None, :] < keys_left)
                tl.store(dbias_rows_ptr + (start_n + offs_n)[None, :], ds.to(dbias_ptr.dtype.element_ty), mask=inside)
            if HAS_SOFTCAP:
                ds = ds * common.softcap_slope(capped, softcap)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    common.store_tile(dq_ptr, stride_dq_seq, rows_left, offs_m, offs_d, dq * softmax_scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_backward_dkv_kernel(
    dout_ptr, stride_dout_batch, stride_dout_seq, stride_dout_head,
    q_ptr, stride_q_batch, stride_q_seq, stride_q_head,
    k_ptr, stride_k_batch, stride_k_seq, stride_k_head,
    v_ptr, stride_v_batch, stride_v_seq, stride_v_head,
    dk_ptr, stride_dk_batch, stride_dk_seq, stride_dk_head,
    dv_ptr, stride_dv_batch, stride_dv_seq, stride_dv_head,
    delta_ptr, shift_ptr, norm_ptr, stride_lse_batch, stride_lse_head,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_col,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    padding_ptr, stride_padding_batch, stride_padding_col,
    alibi_ptr, stride_alibi_batch, stride_alibi_head,
    sinks_ptr, dropout_seed_ptr,
    batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    softmax_scale, softcap, window_left, window_right, dropout_last_out, dropout_scale,
    HEADS_PER_KV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SCALE_FIRST: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32

    # Which keys, of which key head, of which sequence. The first tile of a causal call meets most queries and goes first.
    tile_n, slot = common.program_tile(num_tiles, num_slots, slots_per_group, False)
    if cu_seqlens_q_ptr is not None:
        kv_head = slot
        sequence, tile_n, first_k, seqlen_k, first_q, seqlen_q = common.packed_tile(
            cu_seqlens_k_ptr, cu_seqlens_q_ptr, batch, seqlen_k, seqlen_q, tile_n, BLOCK_N
        )
    else:
        kv_head = slot % (num_heads // HEADS_PER_KV)
        sequence = slot // (num_heads // HEADS_PER_KV)
        first_q = 0
        first_k = 0
    start_n = tile_n * BLOCK_N
    if start_n >= seqlen_k:
        return
    sequence = sequence.to(tl.int64)
    kv_head = kv_head.to(tl.int64)
    first_key = (first_k + start_n).to(tl.int64)
    first_row = tl.cast(first_q, tl.int64)
    k_ptr += sequence * stride_k_batch + first_key * stride_k_seq + kv_head * stride_k_head
    v_ptr += sequence * stride_v_batch + first_key * stride_v_seq + kv_head * stride_v_head
    dk_ptr += sequence * stride_dk_batch + first_key * stride_dk_seq + kv_head * stride_dk_head
    dv_ptr += sequence * stride_dv_batch + first_key * stride_dv_seq + kv_head * stride_dv_head
    dout_ptr += sequence * stride_dout_batch + first_row * stride_dout_seq
    q_ptr += sequence * stride_q_batch + first_row * stride_q_seq
    first_statistic = sequence * stride_lse_batch + first_row
    sequence = tl.minimum(sequence, batch - 1)  # keys of no sequence meet no query, but must not read past the options
    if dropout_seed_ptr is not None:
        seed = tl.load(dropout_seed_ptr)
        offset = tl.load(dropout_seed_ptr + 1)

    offs_m = common.tile_offsets(BLOCK_M, WIDE)
    offs_n = common.tile_offsets(BLOCK_N, WIDE)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    keys_left = seqlen_k - start_n
    k = common.load_tile(k_ptr, stride_k_seq, keys_left, offs_n, offs_d, HEAD_DIM, BLOCK_D, True)
    v = common.load_tile(v_ptr, stride_v_seq, keys_left, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    factor = softmax_scale * LOG2E
    bounds = common.tile_ranges(
        start_n, tl.minimum(start_n + BLOCK_N, seqlen_k) - 1, seqlen_q - seqlen_k - window_right, seqlen_q - seqlen_k + window_left,
        seqlen_q, BLOCK_M, HAS_RIGHT, HAS_LEFT,
    )  # fmt: skip
    for run in tl.static_range(3 if HAS_RIGHT else 2):
        # One loop over (head of the group, query tile), so that loads run ahead across heads too.
        tiles = bounds[2 * run + 1] - bounds[2 * run]
        for step in tl.range(0, tiles * HEADS_PER_KV, num_stages=None if run == 0 else 1):
            head = kv_head * HEADS_PER_KV + step // tiles
            start_m = (bounds[2 * run] + step % tiles) * BLOCK_M
            first_row = tl.cast(start_m, tl.int64)
            rows_left = seqlen_q - start_m
            q_tile_ptr = q_ptr + head * stride_q_head + first_row * stride_q_seq
            q = common.load_tile(q_tile_ptr, stride_q_seq, rows_left, offs_m, offs_d, HEAD_DIM, BLOCK_D, run > 0)
            dout_tile_ptr = dout_ptr + head * stride_dout_head + first_row * stride_dout_seq
            dout = common.load_tile(
                dout_tile_ptr, stride_dout_seq, rows_left, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, run > 0
            )
            statistic = first_statistic + head * stride_lse_head + first_row
            shift = common.load_statistic(shift_ptr + statistic, rows_left, offs_m, float("inf"), run > 0)
            norm = shift
            if SCALE_FIRST:
                norm = common.load_statistic(norm_ptr + statistic, rows_left, offs_m, 0.0, run > 0)
            delta = common.load_statistic(delta_ptr + statistic, rows_left, offs_m, 0.0, run > 0)
            bias_head_ptr = None
            mask_head_ptr = None
            padding_row_ptr = None
            alibi_slope = None
            if bias_ptr is not None:
                bias_head_ptr = bias_ptr + sequence * stride_bias_batch + head * stride_bias_head
            if mask_ptr is not None:
                mask_head_ptr = mask_ptr + sequence * stride_mask_batch + head * stride_mask_head
            if padding_ptr is not None:
                padding_row_ptr = padding_ptr + sequence * stride_padding_batch
            if alibi_ptr is not None:
                alibi_slope = tl.load(alibi_ptr + sequence * stride_alibi_batch + head * stride_alibi_head).to(
                    tl.float32
                )
            # Transposed, (BLOCK_N, BLOCK_M). float32 forms it as the dq kernel does, for the same bits: one more or less in the last place
            # of a large logit is felt in its weight.
            if EXACT:
                capped = common.row_products(
                    q, q_tile_ptr, stride_q_seq, rows_left, offs_m, k, k_ptr, stride_k_seq, keys_left, offs_n, HEAD_DIM, PRECISION, STREAMED
                )  # fmt: skip
                capped = tl.trans(capped)
            else:
                capped = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            capped = common.scaled_scores(capped, softmax_scale, softcap, SCALE_FIRST, HAS_SOFTCAP, EXACT)
            scores = common.score_terms(
                capped, (start_m + offs_m)[None, :], (start_n + offs_n)[:, None], seqlen_q, seqlen_k,
                bias_head_ptr, stride_bias_row, stride_bias_col, mask_head_ptr, stride_mask_row, stride_mask_col,
                padding_row_ptr, stride_padding_col, alibi_slope, window_left, window_right, run > 0, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            p = common.weights(scores, shift[None, :], norm[None, :], factor, SCALE_FIRST)
            if EXACT:
                dp = common.row_products(
                    dout, dout_tile_ptr, stride_dout_seq, rows_left, offs_m, v, v_ptr, stride_v_seq, keys_left, offs_n,
                    VALUE_DIM, PRECISION, STREAMED,
                )  # fmt: skip
                dp = tl.trans(dp)
            else:
                dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            kept = p
            if dropout_seed_ptr is not None:
                place = sequence * num_heads + head
                keep = common.dropout_keep(seed, offset, place, start_m, start_n, dropout_last_out, BLOCK_M, BLOCK_N)
                keep = tl.trans(keep)
                kept = tl.where(keep, p * dropout_scale, 0.0)
                dp = tl.where(keep, dp * dropout_scale, 0.0)
            dv = tl.dot(kept.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            if HAS_SOFTCAP:
                ds = ds * common.softcap_slope(capped, softcap)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    common.store_tile(dk_ptr, stride_dk_seq, keys_left, offs_n, offs_d, dk * softmax_scale, HEAD_DIM, BLOCK_D)
    common.store_tile(dv_ptr, stride_dv_seq, keys_left, offs_n, offs_dv, dv, VALUE_DIM, BLOCK_DV)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    softmax_scale: float,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    allow_tf32: bool = False,
    want_dbias: bool = True,
    config: BackwardConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Runs both kernels on checked tensors: the arguments of ``attention_forward``, what it returned, and the gradients of that.

    Args:
        dout: gradient of out, any strides.
        out, lse: what ``attention_forward`` returned for the same arguments.
        dlse: gradient of lse, or None for 0.
        want_dbias: False where the bias needs no gradient.

    Returns:
        dq, dk, dv, contiguous, in the dtypes of q, k, v; dbias shaped like bias, or None where there is none or it is not wanted;
        dsinks, or None without sinks.
    """
    shape = geometry(q, k, v, cu_seqlens_q)
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    options = score_options(
        shape,
        causal,
        window,
        softmax_scale,
        softcap,
        mask,
        bias,
        key_padding_mask,
        alibi_slopes,
        sinks,
        dropout_p,
        dropout_seed,
        q.dtype,
        allow_tf32,
    )
    if config is None:
        arch = device_limits(q.device).arch
        config = backward_config(shape.head_dim, shape.value_dim, q.dtype, arch, options.pressure + (bias is not None))
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    out = out if out.stride(-1) == 1 else out.contiguous()
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    delta, lse_shift = torch.empty_like(lse), torch.empty_like(lse)
    lse_norm = torch.empty_like(lse) if options.constexprs["SCALE_FIRST"] else None
    row_statistics = (delta, lse_shift, lse_norm, *statistic_strides(lse))
    num_tiles_q, num_slots_q = shape.tiles(shape.seqlen_q, config.q_block_m), shape.slots(shape.num_heads)
    num_tiles_k, num_slots_k = shape.tiles(shape.seqlen_k, config.kv_block_n), shape.slots(shape.num_kv_heads)
    shared_bias = bias is not None and want_dbias and any(is_broadcast(bias, shape))
    # Tiles that nothing sees are not visited: their scores have no gradient.
    dbias = (
        None
        if bias is None or shared_bias or not want_dbias
        else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    )
    dsinks = None if sinks is None else torch.zeros(num_slots_q, num_tiles_q, dtype=torch.float32, device=q.device)
    inputs = (
        dout,
        *row_strides(dout),
        q,
        *row_strides(q),
        k,
        *row_strides(k),
        v,
        *row_strides(v),
    )
    packing = (cu_seqlens_q, cu_seqlens_k if cu_seqlens_k is not None else cu_seqlens_q)
    sizes = (shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_k)
    wide = needs_wide_offsets(256, dout, q, k, v, out, dq, dk, dv)
    with on_device(q):
        if dq.numel() > 0:
            attention_backward_dq_kernel[(num_tiles_q * num_slots_q,)](
                *inputs,
                out, *row_strides(out),
                dq, *row_strides(dq),
                lse, dlse, *row_statistics,
                dbias, *strides_of(dbias, 4)[:3],
                dsinks, LARGE_LSE_FLOAT32 if q.dtype == torch.float32 else LARGE_LSE_16_BIT,
                *packing, *options.tensors,
                *sizes, num_tiles_q, num_slots_q, slots_per_group(shape, k),
                *options.scalars, **options.constexprs,
                BLOCK_M=config.q_block_m, BLOCK_N=config.q_block_n, WIDE=wide,
                num_warps=config.q_num_warps, num_stages=config.q_num_stages, **COMMON_OPTIONS,
            )  # fmt: skip
        if dk.numel() + dv.numel() > 0:
            attention_backward_dkv_kernel[(num_tiles_k * num_slots_k,)](
                *inputs,
                dk, *row_strides(dk),
                dv, *row_strides(dv),
                *row_statistics,
                *packing, *options.tensors,
                *sizes, num_tiles_k, num_slots_k, num_slots_k,
                *options.scalars, **options.constexprs,
                BLOCK_M=config.kv_block_m, BLOCK_N=config.kv_block_n, WIDE=wide,
                num_warps=config.kv_num_warps, num_stages=config.kv_num_stages, **COMMON_OPTIONS,
            )  # fmt: skip
        if bias is not None and shared_bias:
            dbias = attention_bias_gradient(bias, inputs, row_statistics, packing, options, shape, wide)
    if dsinks is not None and sinks is not None:
        dsinks = dsinks.view(-1, shape.num_heads, num_tiles_q).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, dbias, dsinks
