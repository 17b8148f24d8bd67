"""The gradient of a broadcast attention bias: ``ds`` summed over the batches, heads, queries or keys that share an element.

Where every score has a bias of its own, the dq kernel writes ``ds`` as it goes. Where an element is shared, as in T5's (1, heads, Lq, Lk),
a program owns a tile of the *bias* and forms ``ds`` again for everything that shares it, in a fixed order: no partial buffers, no atomics,
the same bits every run. Cost: 2 more matrix products than the 7 of the other backward kernels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ..launch import cdiv
from ..prepared import PreparedLaunch
from . import block_lists
from . import tile as common
from .options import (
    OPTIONAL_ARGUMENTS,
    UNSPECIALISED,
    CallTensors,
    Geometry,
    ScoreOptions,
    new_score_strides,
)

if TYPE_CHECKING:
    from pytransformer.ops.attention.call import AttentionCall


def is_broadcast(bias: torch.Tensor, shape: Geometry) -> tuple[bool, bool, bool, bool]:
    """For (batch, heads, rows, columns), whether one element of the bias may serve several."""
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    full = (shape.batch, shape.num_heads, *((None, None) if shape.packed else (shape.seqlen_q, shape.seqlen_k)))
    return tuple(size == 1 and size != extent for size, extent in zip(sizes, full, strict=True))  # type: ignore[return-value]


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_bias_gradient_kernel(
    dout_ptr, dout_strides, q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides,
    delta_ptr, shift_ptr, norm_ptr, stride_lse_batch, stride_lse_head,
    dbias_ptr, dbias_strides, dbias_rows, dbias_cols, tiles_m, tiles_n,
    lists_ptr, list_strides,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, mask_ptr, padding_ptr, alibi_ptr, sinks_ptr, dropout_seed_ptr, option_strides,
    batch, num_heads, seqlen_q, seqlen_k,
    softmax_scale, softcap, window_left, window_right, dropout_last_out, dropout_scale,
    traits, SUM_BATCH: tl.constexpr, SUM_HEADS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
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
    offs_d = tl.arange(0, traits.BLOCK_D)
    offs_dv = tl.arange(0, traits.BLOCK_DV)
    options = common.Options(bias_ptr, mask_ptr, padding_ptr, alibi_ptr, option_strides)
    dropout = common.load_dropout(dropout_seed_ptr, dropout_last_out, dropout_scale)

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
        edges = common.Edges(rows_here, keys_here, window_left, window_right)
        begin_m = own_m
        end_m = own_m + 1
        if SUM_ROWS:
            begin_m = tl.zeros([], tl.int32)
            end_m = (rows_here + BLOCK_M - 1) // BLOCK_M
        for head_32 in range(first_head, last_head):
            head = tl.cast(head_32, tl.int64)
            kv_head = head // traits.HEADS_PER_KV
            here = common.head_options(options, sequence, head)
            for tile_m in range(begin_m, end_m):
                start_m = tile_m * BLOCK_M
                first_row = (first_q + start_m).to(tl.int64)
                rows_left = rows_here - start_m
                statistic = sequence * stride_lse_batch + head * stride_lse_head + first_row
                shift = common.load_statistic(shift_ptr + statistic, rows_left, offs_m, float("inf"), True)
                norm = common.load_statistic(norm_ptr + statistic, rows_left, offs_m, 0.0, True)
                delta = common.load_statistic(delta_ptr + statistic, rows_left, offs_m, 0.0, True)
                q_tile_ptr = q_ptr + common.row_offset(q_strides, sequence, first_row, head)
                q = common.load_tile(
                    q_tile_ptr, q_strides.seq, rows_left, offs_m, offs_d, traits.HEAD_DIM, traits.BLOCK_D, True
                )
                dout_tile_ptr = dout_ptr + common.row_offset(dout_strides, sequence, first_row, head)
                dout = common.load_tile(
                    dout_tile_ptr, dout_strides.seq, rows_left, offs_m, offs_dv, traits.VALUE_DIM, traits.BLOCK_DV, True
                )
                _, _, _, end_n, begin_n, _ = common.key_ranges(start_m, edges, traits, BLOCK_M, BLOCK_N)
                if not SUM_COLS:
                    begin_n = tl.maximum(own_n, begin_n)
                    end_n = tl.minimum(own_n + 1, end_n)
                row_ptr = lists_ptr
                if lists_ptr is not None:
                    row_ptr = block_lists.list_row(lists_ptr, list_strides, sequence, head, start_m)
                    begin_n = block_lists.entries_before(row_ptr, list_strides, begin_n)
                    end_n = block_lists.entries_before(row_ptr, list_strides, end_n)
                    row_ptr = block_lists.first_entry(row_ptr, list_strides)
                for step in range(begin_n, end_n):
                    tile_n = step
                    if lists_ptr is not None:
                        tile_n = tl.load(row_ptr + step)
                    start_n = tile_n * BLOCK_N
                    first_key = (first_k + start_n).to(tl.int64)
                    keys_left = keys_here - start_n
                    k_tile_ptr = k_ptr + common.row_offset(k_strides, sequence, first_key, kv_head)
                    k = common.load_tile(
                        k_tile_ptr, k_strides.seq, keys_left, offs_n, offs_d, traits.HEAD_DIM, traits.BLOCK_D, True
                    )
                    v_tile_ptr = v_ptr + common.row_offset(v_strides, sequence, first_key, kv_head)
                    v = common.load_tile(
                        v_tile_ptr, v_strides.seq, keys_left, offs_n, offs_dv, traits.VALUE_DIM, traits.BLOCK_DV, True
                    )
                    scores = common.row_products(q, k, traits.HEAD_DIM, traits.PRECISION, traits.STREAMED)
                    scores = common.scaled_scores(scores, softmax_scale, softcap, traits)
                    rows, keys = (start_m + offs_m)[:, None], offs_n[None, :]
                    scores = common.score_terms(scores, rows, start_n, keys, options, here, edges, traits, True)
                    p = common.weights(scores, shift[:, None], norm[:, None], 1.0, traits.SCALE_FIRST)
                    dp = common.row_products(dout, v, traits.VALUE_DIM, traits.PRECISION, traits.STREAMED)
                    if dropout_seed_ptr is not None:
                        stream = sequence * num_heads + head
                        keep = common.dropout_keep(dropout, stream, start_m, start_n, BLOCK_M, BLOCK_N)
                        dp = tl.where(keep, dp * dropout.scale, 0.0)
                    total += p * (dp - delta[:, None])

    own_rows = own_m * BLOCK_M + offs_m[:, None]
    own_cols = own_n * BLOCK_N + offs_n[None, :]
    if SUM_ROWS:
        total = tl.sum(total, 0)[None, :]
        own_rows = tl.zeros([1, 1], tl.int32)
    if SUM_COLS:
        total = tl.sum(total, 1)[:, None]
        own_cols = tl.zeros([1, 1], tl.int32)
    dbias_ptr += (
        tl.cast(first_sequence, tl.int64) * dbias_strides.batch + tl.cast(first_head, tl.int64) * dbias_strides.head
    )
    dbias_ptrs = dbias_ptr + (own_rows.to(tl.int64) * dbias_strides.row + own_cols)
    inside = (own_rows < dbias_rows) & (own_cols < dbias_cols)
    tl.store(dbias_ptrs, total.to(dbias_ptr.dtype.element_ty), mask=inside)


def prepare_bias_gradient(
    call: AttentionCall,
    shape: Geometry,
    options: ScoreOptions,
    inputs: tuple[Any, ...],
    tensors: CallTensors,
    constants: dict[str, Any],
    lists: dict[str, block_lists.BlockLists],
) -> PreparedLaunch | None:
    """The launch for a bias like the call's, whose gradient is a new tensor of its shape; None where that is empty.

    Args:
        inputs: arguments of dout, q, k and v; ``tensors`` and ``constants`` are those of the other backward kernels too.
        lists: of a block mask, by the names of their tensors; those of this kernel are added.
    """
    bias = call.bias
    assert bias is not None
    sizes = (1,) * (4 - bias.dim()) + tuple(bias.shape)
    sum_batch, sum_heads, sum_rows, sum_cols = is_broadcast(bias, shape)
    block_m, block_n, num_warps = (16, 16, 4) if options.traits.EXACT else (64, 32, 8)
    own_lists = None
    if call.block_mask is not None:
        block_m, block_n, num_warps = math.gcd(block_m, call.block_size[0]), math.gcd(block_n, call.block_size[1]), 4
        lists["bias_lists"] = own_lists = block_lists.BlockLists(call, block_n)
    tiles_m, tiles_n = cdiv(sizes[2], block_m), cdiv(sizes[3], block_n)
    programs = tiles_m * tiles_n * sizes[0] * sizes[1]
    if programs == 0:
        return None
    arguments = (
        *inputs,
        None, None, None, *shape.lse_strides,
        None, new_score_strides(bias), *sizes[2:], tiles_m, tiles_n,
        *block_lists.arguments(own_lists),
        *OPTIONAL_ARGUMENTS, options.strides,
        *shape.sizes, *options.scalars, options.traits,
    )  # fmt: skip
    constants = {
        "SUM_BATCH": sum_batch,
        "SUM_HEADS": sum_heads,
        "SUM_ROWS": sum_rows,
        "SUM_COLS": sum_cols,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "num_warps": num_warps,
        "num_stages": 1,
        **constants,
    }
    order = tensors.order(
        "dout", "q", "k", "v", "delta", "shift", "norm", "dbias", *block_lists.pointers(own_lists, "bias_lists")
    )
    return PreparedLaunch(attention_bias_gradient_kernel, (programs,), arguments, constants, order)
