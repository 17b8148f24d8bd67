"""The gradient of a broadcast attention bias: ``ds`` summed over the batches, heads, queries or keys that share an element.

Where every score has a bias of its own, the dq kernel writes ``ds`` as it goes. Where an element is shared, as in T5's (1, heads, Lq, Lk),
a program owns a tile of the *bias* and forms ``ds`` again for everything that shares it, in a fixed order: no partial buffers, no atomics,
the same bits every run. Cost: 2 more matrix products than the 7 of the other backward kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..launch import COMMON_OPTIONS, cdiv
from . import tile as common
from .options import UNSPECIALISED, Geometry, ScoreOptions


def is_broadcast(bias: torch.Tensor, shape: Geometry) -> tuple[bool, bool, bool, bool]:
    """For (batch, heads, rows, columns), whether one element of the bias may serve several."""
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    full = (shape.batch, shape.num_heads, *((None, None) if shape.packed else (shape.seqlen_q, shape.seqlen_k)))
    return tuple(size == 1 and size != extent for size, extent in zip(sizes, full, strict=True))  # type: ignore[return-value]


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_bias_gradient_kernel(
    dout_ptr, stride_dout_batch, stride_dout_seq, stride_dout_head,
    q_ptr, stride_q_batch, stride_q_seq, stride_q_head,
    k_ptr, stride_k_batch, stride_k_seq, stride_k_head,
    v_ptr, stride_v_batch, stride_v_seq, stride_v_head,
    delta_ptr, shift_ptr, norm_ptr, stride_lse_batch, stride_lse_head,
    dbias_ptr, stride_dbias_batch, stride_dbias_head, stride_dbias_row, dbias_rows, dbias_cols, tiles_m, tiles_n,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, stride_bias_batch, stride_bias_head, stride_bias_row, stride_bias_col,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_row, stride_mask_col,
    padding_ptr, stride_padding_batch, stride_padding_col,
    alibi_ptr, stride_alibi_batch, stride_alibi_head,
    sinks_ptr, dropout_seed_ptr,
    batch, num_heads, seqlen_q, seqlen_k,
    softmax_scale, softcap, window_left, window_right, dropout_last_out, dropout_scale,
    SUM_BATCH: tl.constexpr, SUM_HEADS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLS: tl.constexpr,
    HEADS_PER_KV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SCALE_FIRST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    # Which tile of the bias, and all that shares it.
    pid = tl.program_id(0)
    own_n = pid % tiles_n
    own_m = pid // tiles_n % tiles_m
    slot = pid // (tiles_n * tiles_m)
    first_head, last_head = 0, num_heads
    if not SUM_HEADS:
        first_head = slot % num_heads
        last_head = first_head + 1
        slot = slot // num_heads
    first_sequence, last_sequence = 0, batch
    if not SUM_BATCH:
        first_sequence = slot
        last_sequence = slot + 1
    offs_m = common.tile_offsets(BLOCK_M, WIDE)
    offs_n = common.tile_offsets(BLOCK_N, WIDE)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    if dropout_seed_ptr is not None:
        seed = tl.load(dropout_seed_ptr)
        offset = tl.load(dropout_seed_ptr + 1)

    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sequence_32 in range(first_sequence, last_sequence):
        sequence = tl.cast(sequence_32, tl.int64)
        first_q = tl.zeros([], tl.int32)
        first_k = tl.zeros([], tl.int32)
        rows_here = seqlen_q
        keys_here = seqlen_k
        if cu_seqlens_q_ptr is not None:
            first_q = tl.load(cu_seqlens_q_ptr + sequence)
            first_k = tl.load(cu_seqlens_k_ptr + sequence)
            rows_here = tl.load(cu_seqlens_q_ptr + sequence + 1) - first_q
            keys_here = tl.load(cu_seqlens_k_ptr + sequence + 1) - first_k
        begin_m = own_m
        end_m = own_m + 1
        if SUM_ROWS:
            begin_m = tl.zeros([], tl.int32)
            end_m = (rows_here + BLOCK_M - 1) // BLOCK_M
        for head_32 in range(first_head, last_head):
            head = tl.cast(head_32, tl.int64)
            kv_head = head // HEADS_PER_KV
            bias_head_ptr = bias_ptr + sequence * stride_bias_batch + head * stride_bias_head
            mask_head_ptr = None
            padding_row_ptr = None
            alibi_slope = None
            if mask_ptr is not None:
                mask_head_ptr = mask_ptr + sequence * stride_mask_batch + head * stride_mask_head
            if padding_ptr is not None:
                padding_row_ptr = padding_ptr + sequence * stride_padding_batch
            if alibi_ptr is not None:
                alibi_slope = tl.load(alibi_ptr + sequence * stride_alibi_batch + head * stride_alibi_head).to(
                    tl.float32
                )
            for tile_m in range(begin_m, end_m):
                start_m = tile_m * BLOCK_M
                first_row = (first_q + start_m).to(tl.int64)
                rows_left = rows_here - start_m
                statistic = sequence * stride_lse_batch + head * stride_lse_head + first_row + offs_m
                shift = tl.load(shift_ptr + statistic, mask=offs_m < rows_left, other=float("inf"))
                norm = tl.load(norm_ptr + statistic, mask=offs_m < rows_left, other=0.0)
                delta = tl.load(delta_ptr + statistic, mask=offs_m < rows_left, other=0.0)
                q_tile_ptr = q_ptr + sequence * stride_q_batch + first_row * stride_q_seq + head * stride_q_head
                q = common.load_tile(q_tile_ptr, stride_q_seq, rows_left, offs_m, offs_d, HEAD_DIM, BLOCK_D, True)
                dout_tile_ptr = (
                    dout_ptr + sequence * stride_dout_batch + first_row * stride_dout_seq + head * stride_dout_head
                )
                dout = common.load_tile(
                    dout_tile_ptr, stride_dout_seq, rows_left, offs_m, offs_dv, VALUE_DIM, BLOCK_DV, True
                )
                _, _, _, end_n, begin_n, _ = common.tile_ranges(
                    start_m, tl.minimum(start_m + BLOCK_M, rows_here) - 1, keys_here - rows_here - window_left,
                    keys_here - rows_here + window_right, keys_here, BLOCK_N, HAS_LEFT, HAS_RIGHT,
                )  # fmt: skip
                if not SUM_COLS:
                    begin_n = tl.maximum(own_n, begin_n)
                    end_n = tl.minimum(own_n + 1, end_n)
                for tile_n in range(begin_n, end_n):
                    start_n = tile_n * BLOCK_N
                    first_key = (first_k + start_n).to(tl.int64)
                    keys_left = keys_here - start_n
                    k_tile_ptr = k_ptr + sequence * stride_k_batch + first_key * stride_k_seq + kv_head * stride_k_head
                    k = common.load_tile(k_tile_ptr, stride_k_seq, keys_left, offs_n, offs_d, HEAD_DIM, BLOCK_D, True)
                    v_tile_ptr = v_ptr + sequence * stride_v_batch + first_key * stride_v_seq + kv_head * stride_v_head
                    v = common.load_tile(
                        v_tile_ptr, stride_v_seq, keys_left, offs_n, offs_dv, VALUE_DIM, BLOCK_DV, True
                    )
                    scores = common.row_products(
                        q, q_tile_ptr, stride_q_seq, rows_left, offs_m, k, k_tile_ptr, stride_k_seq, keys_left, offs_n,
                        HEAD_DIM, PRECISION, STREAMED,
                    )  # fmt: skip
                    scores = common.scaled_scores(scores, softmax_scale, softcap, SCALE_FIRST, HAS_SOFTCAP, EXACT)
                    scores = common.score_terms(
                        scores, (start_m + offs_m)[:, None], (start_n + offs_n)[None, :], rows_here, keys_here,
                        bias_head_ptr, stride_bias_row, stride_bias_col, mask_head_ptr, stride_mask_row, stride_mask_col,
                        padding_row_ptr, stride_padding_col, alibi_slope, window_left, window_right, True, HAS_LEFT, HAS_RIGHT,
                    )  # fmt: skip
                    p = common.weights(scores, shift[:, None], norm[:, None], 1.0, SCALE_FIRST)
                    dp = common.row_products(
                        dout, dout_tile_ptr, stride_dout_seq, rows_left, offs_m, v, v_tile_ptr, stride_v_seq, keys_left, offs_n,
                        VALUE_DIM, PRECISION, STREAMED,
                    )  # fmt: skip
                    if dropout_seed_ptr is not None:
                        place = sequence * num_heads + head
                        keep = common.dropout_keep(
                            seed, offset, place, start_m, start_n, dropout_last_out, BLOCK_M, BLOCK_N
                        )
                        dp = tl.where(keep, dp * dropout_scale, 0.0)
                    total += p * (dp - delta[:, None])

    rows = own_m * BLOCK_M + offs_m[:, None]
    cols = own_n * BLOCK_N + offs_n[None, :]
    if SUM_ROWS:
        total = tl.sum(total, 0)[None, :]
        rows = tl.zeros([1, 1], tl.int32)
    if SUM_COLS:
        total = tl.sum(total, 1)[:, None]
        cols = tl.zeros([1, 1], tl.int32)
    dbias_ptr += (
        tl.cast(first_sequence, tl.int64) * stride_dbias_batch + tl.cast(first_head, tl.int64) * stride_dbias_head
    )
    dbias_ptrs = dbias_ptr + (rows.to(tl.int64) * stride_dbias_row + cols)
    tl.store(dbias_ptrs, total.to(dbias_ptr.dtype.element_ty), mask=(rows < dbias_rows) & (cols < dbias_cols))


def attention_bias_gradient(
    bias: torch.Tensor,
    inputs: tuple[Any, ...],
    statistics: tuple[Any, ...],
    packing: tuple[Any, ...],
    options: ScoreOptions,
    shape: Geometry,
    wide: bool,
) -> torch.Tensor:
    """Runs the kernel with arguments that the other backward kernels get too. Returns the gradient, shaped like ``bias``."""
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    dbias_4d = dbias.view((1,) * (4 - bias.dim()) + tuple(bias.shape))
    sum_batch, sum_heads, sum_rows, sum_cols = is_broadcast(bias, shape)
    block_m, block_n, num_warps = (16, 16, 4) if inputs[4].dtype == torch.float32 else (64, 32, 8)
    tiles_m, tiles_n = (cdiv(size, block) for size, block in zip(dbias_4d.shape[2:], (block_m, block_n), strict=True))
    programs = tiles_m * tiles_n * dbias_4d.shape[0] * dbias_4d.shape[1]
    if programs == 0:
        return dbias
    attention_bias_gradient_kernel[(programs,)](
        *inputs, *statistics,
        dbias_4d, *dbias_4d.stride()[:3], *dbias_4d.shape[2:], tiles_m, tiles_n,
        *packing, *options.tensors,
        shape.batch, shape.num_heads, shape.seqlen_q, shape.seqlen_k,
        *options.scalars, **options.constexprs,
        SUM_BATCH=sum_batch, SUM_HEADS=sum_heads, SUM_ROWS=sum_rows, SUM_COLS=sum_cols,
        BLOCK_M=block_m, BLOCK_N=block_n, WIDE=wide, num_warps=num_warps, num_stages=1, **COMMON_OPTIONS,
    )  # fmt: skip
    return dbias
