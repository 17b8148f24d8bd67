"""Attention backward: dq, dk, dv (and the gradients of bias, sinks and ALiBi slopes) from the saved output and lse, scores recomputed.

Two kernels, each looping over what its own tile meets, so nothing is added atomically and every run gives the same bits:

1. per query tile: ``delta = rowsum(dout ∘ out) - dlse`` and what to subtract from the scores, both kept for the other kernels;
   ``ds = p ∘ (dp - delta)`` with ``dp = dout vᵀ``; ``dq = scale · ds k``;
2. per key tile, for every query head of its GQA group: ``dv = pᵀ dout``, ``dk = scale · dsᵀ q``.

Cost: 7 matrix products against the forward's 2 (s and dp are formed in both kernels), 14 · batch · heads · Lq · Lk · d FLOP, half of it
if causal.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from ..launch import COMMON_OPTIONS, NewTensor, device_limits
from ..mathematics import LOG2E
from ..prepared import PreparedLaunch
from . import block_lists
from . import tile as common
from .bias_gradient import is_broadcast, prepare_bias_gradient
from .normalisation import normalised_again
from .options import (
    OPTIONAL_ARGUMENTS,
    UNSPECIALISED,
    CallTensors,
    geometry,
    needs_wide_offsets,
    new_row_strides,
    new_score_strides,
    row_strides,
    score_options,
)
from .policy import BackwardConfig, backward_config, backward_config_of_blocks, slots_per_group
from .slope_gradient import prepare_slope_gradient

if TYPE_CHECKING:
    from pytransformer.ops.attention.call import AttentionCall

# |lse| from which on rows are normalised again: float32's rounding of it is then felt in the weights of float32 and of 16-bit inputs.
LARGE_LSE_FLOAT32 = 64.0
LARGE_LSE_16_BIT = 8192.0

# dq, dk, dv, dbias, dsinks, dslopes.
Gradients = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None
]


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_backward_dq_kernel(
    dout_ptr, dout_strides, q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides,
    out_ptr, out_strides, dq_ptr, dq_strides,
    lse_ptr, dlse_ptr, delta_ptr, shift_ptr, norm_ptr, stride_lse_batch, stride_lse_head,
    dbias_ptr, dbias_strides, dsinks_ptr, dslopes_ptr, large_lse,
    lists_ptr, list_strides,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, mask_ptr, padding_ptr, alibi_ptr, sinks_ptr, dropout_seed_ptr, option_strides,
    batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    softmax_scale, softcap, window_left, window_right, dropout_last_out, dropout_scale,
    traits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Which queries, of which head, of which sequence.
    tile_m, slot = common.program_tile(num_tiles, num_slots, slots_per_group, traits.HAS_RIGHT)
    if sinks_ptr is not None:
        dsinks_ptr += slot.to(tl.int64) * num_tiles + tile_m
    place = common.locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, slot, tile_m, batch, num_heads, seqlen_q, seqlen_k, BLOCK_M
    )
    start_m = place.start
    if start_m >= place.length:
        return
    place = common.in_64_bits(place, batch)
    edges = common.Edges(place.length, place.other_length, window_left, window_right)
    kv_head = place.head // traits.HEADS_PER_KV
    dout_ptr += common.row_offset(dout_strides, place.sequence, place.row, place.head)
    q_ptr += common.row_offset(q_strides, place.sequence, place.row, place.head)
    out_ptr += common.row_offset(out_strides, place.sequence, place.row, place.head)
    dq_ptr += common.row_offset(dq_strides, place.sequence, place.row, place.head)
    first_statistic = place.sequence * stride_lse_batch + place.head * stride_lse_head + place.row
    k_ptr += common.row_offset(k_strides, place.sequence, place.other_row, kv_head)
    v_ptr += common.row_offset(v_strides, place.sequence, place.other_row, kv_head)
    options = common.Options(bias_ptr, mask_ptr, padding_ptr, alibi_ptr, option_strides)
    here = common.head_options(options, place.option_sequence, place.head)
    if dbias_ptr is not None:
        dbias_ptr += place.option_sequence * dbias_strides.batch + place.head * dbias_strides.head
    dropout = common.load_dropout(dropout_seed_ptr, dropout_last_out, dropout_scale)

    # A row that saw nothing gets p = 0 from a shift of inf, and no gradient whatever flows into its lse (a merge of two partial results
    # may well send NaN).
    offs_m = common.tile_offsets(BLOCK_M, WIDE)
    offs_n = common.tile_offsets(BLOCK_N, WIDE)
    offs_d = tl.arange(0, traits.BLOCK_D)
    offs_dv = tl.arange(0, traits.BLOCK_DV)
    rows_left = place.length - start_m
    row_exists = offs_m < rows_left
    dout = common.load_tile(
        dout_ptr, dout_strides.seq, rows_left, offs_m, offs_dv, traits.VALUE_DIM, traits.BLOCK_DV, True
    )
    out = common.load_tile(
        out_ptr, out_strides.seq, rows_left, offs_m, offs_dv, traits.VALUE_DIM, traits.BLOCK_DV, True
    )
    if traits.EXACT:
        # By the same sum as dp: where a key has all the weight, out = v and their difference is 0, as it should be.
        delta = common.row_products(dout, out, traits.VALUE_DIM, traits.PRECISION, traits.STREAMED)
        delta = tl.sum(tl.where(offs_m[:, None] == offs_m[None, :], delta, 0.0), 1)
    else:
        delta = tl.sum(dout.data.to(tl.float32) * out.data.to(tl.float32), 1)
    from_out = delta
    lse = tl.load(lse_ptr + first_statistic + offs_m, mask=row_exists, other=float("-inf"))
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + first_statistic + offs_m, mask=row_exists, other=0.0)
    delta = tl.where(lse == float("-inf"), 0.0, delta)
    q = common.load_tile(q_ptr, q_strides.seq, rows_left, offs_m, offs_d, traits.HEAD_DIM, traits.BLOCK_D, True)
    dq = tl.zeros([BLOCK_M, traits.BLOCK_D], tl.float32)
    factor = softmax_scale * LOG2E
    bounds = common.key_ranges(start_m, edges, traits, BLOCK_M, BLOCK_N)
    if lists_ptr is not None:
        lists_ptr = block_lists.list_row(lists_ptr, list_strides, place.option_sequence, place.head, start_m)
        bounds = block_lists.listed_ranges(lists_ptr, list_strides, bounds)
        lists_ptr = block_lists.first_entry(lists_ptr, list_strides)
    shift = tl.where(lse == float("-inf"), float("inf"), lse)
    norm = tl.zeros([BLOCK_M], tl.float32)
    if traits.SCALE_FIRST:
        # Far from 0 a float32 lse loses the logarithm of the sum: a row whose scores are all -1e9 would weigh each key 1. Such rows (rare:
        # masks made of large finite numbers; float32 with very large logits) are normalised again.
        if tl.max(tl.where(lse == float("-inf"), 0.0, tl.abs(lse)), 0) > large_lse:
            shift, norm = normalised_again(
                q, k_ptr, k_strides.seq, sinks_ptr, start_m, bounds[4], bounds[3], lists_ptr, place, options, here,
                edges, softmax_scale, softcap, traits, BLOCK_M, BLOCK_N, WIDE,
            )  # fmt: skip
        tl.store(norm_ptr + first_statistic + offs_m, norm, mask=row_exists)
    else:
        shift = shift * LOG2E
    tl.store(delta_ptr + first_statistic + offs_m, delta, mask=row_exists)
    tl.store(shift_ptr + first_statistic + offs_m, shift, mask=row_exists)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + place.head).to(tl.float32)
        tl.store(dsinks_ptr, -tl.sum(common.weights(sink, shift, norm, LOG2E, traits.SCALE_FIRST) * delta, 0))

    # delta is a sum over a rounded out, and what it is off by counts for a slope as much as keys are far away: its difference to the sum
    # over dp, times the mean distance, is put right at the end.
    dslopes = tl.zeros([BLOCK_M], tl.float32)
    from_dp = tl.zeros([BLOCK_M], tl.float32)
    mean_distance = tl.zeros([BLOCK_M], tl.float32)
    for run in tl.static_range(3 if traits.HAS_LEFT else 2):
        # Loads at places that are loaded themselves run ahead in whole tiles only: in both runs they serialise wgmma.
        for step in tl.range(
            bounds[2 * run], bounds[2 * run + 1], num_stages=None if run == 0 or lists_ptr is None else 1
        ):
            tile_n = step
            if lists_ptr is not None:
                tile_n = tl.load(lists_ptr + step)
            start_n = tile_n * BLOCK_N
            first_key = tl.cast(start_n, tl.int64)
            keys_left = edges.seqlen_k - start_n
            k_tile_ptr = k_ptr + first_key * k_strides.seq
            v_tile_ptr = v_ptr + first_key * v_strides.seq
            k = common.load_tile(
                k_tile_ptr, k_strides.seq, keys_left, offs_n, offs_d, traits.HEAD_DIM, traits.BLOCK_D, run > 0
            )
            v = common.load_tile(
                v_tile_ptr, v_strides.seq, keys_left, offs_n, offs_dv, traits.VALUE_DIM, traits.BLOCK_DV, run > 0
            )
            capped = common.row_products(q, k, traits.HEAD_DIM, traits.PRECISION, traits.STREAMED)
            capped = common.scaled_scores(capped, softmax_scale, softcap, traits)
            rows, keys = (start_m + offs_m)[:, None], offs_n[None, :]
            scores = common.score_terms(capped, rows, start_n, keys, options, here, edges, traits, run > 0)
            p = common.weights(scores, shift[:, None], norm[:, None], factor, traits.SCALE_FIRST)
            dp = common.row_products(dout, v, traits.VALUE_DIM, traits.PRECISION, traits.STREAMED)
            if dropout_seed_ptr is not None:
                stream = place.option_sequence * num_heads + place.head
                keep = common.dropout_keep(dropout, stream, start_m, start_n, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * dropout.scale, 0.0)
            ds = p * (dp - delta[:, None])
            if dbias_ptr is not None:
                dbias_rows_ptr = dbias_ptr + rows.to(tl.int64) * dbias_strides.row
                inside = row_exists[:, None] & (offs_n[None, :] < keys_left)
                tl.store(dbias_rows_ptr + (start_n + keys), ds.to(dbias_ptr.dtype.element_ty), mask=inside)
            if dslopes_ptr is not None:
                distances = common.distances(rows, start_n + keys, edges)
                dslopes -= tl.sum(ds * distances, 1)
                from_dp += tl.sum(p * dp, 1)
                mean_distance += tl.sum(p * distances, 1)
            if traits.HAS_SOFTCAP:
                ds = ds * common.softcap_slope(capped, softcap)
            dq = tl.dot(ds.to(k.data.dtype), k.data, dq, input_precision=traits.PRECISION)
    common.store_tile(
        dq_ptr, dq_strides.seq, rows_left, offs_m, offs_d, dq * softmax_scale, traits.HEAD_DIM, traits.BLOCK_D
    )
    if dslopes_ptr is not None:
        dslopes += tl.where(lse == float("-inf"), 0.0, (from_dp - from_out) * mean_distance)
        tl.store(dslopes_ptr + first_statistic + offs_m, dslopes, mask=row_exists)


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_backward_dkv_kernel(
    dout_ptr, dout_strides, q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides,
    dk_ptr, dk_strides, dv_ptr, dv_strides,
    delta_ptr, shift_ptr, norm_ptr, stride_lse_batch, stride_lse_head,
    lists_ptr, list_strides,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, mask_ptr, padding_ptr, alibi_ptr, sinks_ptr, dropout_seed_ptr, option_strides,
    batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    softmax_scale, softcap, window_left, window_right, dropout_last_out, dropout_scale,
    traits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Which keys, of which key head, of which sequence. The first tile of a causal call meets most queries and goes first.
    tile_n, slot = common.program_tile(num_tiles, num_slots, slots_per_group, False)
    place = common.locate(
        cu_seqlens_k_ptr, cu_seqlens_q_ptr, slot, tile_n, batch, num_heads // traits.HEADS_PER_KV, seqlen_k, seqlen_q, BLOCK_N
    )  # fmt: skip
    start_n = place.start
    if start_n >= place.length:
        return
    place = common.in_64_bits(place, batch)
    edges = common.Edges(place.other_length, place.length, window_left, window_right)
    k_ptr += common.row_offset(k_strides, place.sequence, place.row, place.head)
    v_ptr += common.row_offset(v_strides, place.sequence, place.row, place.head)
    dk_ptr += common.row_offset(dk_strides, place.sequence, place.row, place.head)
    dv_ptr += common.row_offset(dv_strides, place.sequence, place.row, place.head)
    dout_ptr += place.sequence * dout_strides.batch + place.other_row * dout_strides.seq
    q_ptr += place.sequence * q_strides.batch + place.other_row * q_strides.seq
    first_statistic = place.sequence * stride_lse_batch + place.other_row
    options = common.Options(bias_ptr, mask_ptr, padding_ptr, alibi_ptr, option_strides)
    dropout = common.load_dropout(dropout_seed_ptr, dropout_last_out, dropout_scale)

    offs_m = common.tile_offsets(BLOCK_M, WIDE)
    offs_n = common.tile_offsets(BLOCK_N, WIDE)
    offs_d = tl.arange(0, traits.BLOCK_D)
    offs_dv = tl.arange(0, traits.BLOCK_DV)
    keys_left = place.length - start_n
    k = common.load_tile(k_ptr, k_strides.seq, keys_left, offs_n, offs_d, traits.HEAD_DIM, traits.BLOCK_D, True)
    v = common.load_tile(v_ptr, v_strides.seq, keys_left, offs_n, offs_dv, traits.VALUE_DIM, traits.BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, traits.BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, traits.BLOCK_DV], tl.float32)
    factor = softmax_scale * LOG2E
    bounds = common.query_ranges(start_n, edges, traits, BLOCK_M, BLOCK_N)
    if lists_ptr is not None:
        lists_ptr = block_lists.list_row(lists_ptr, list_strides, place.option_sequence, place.head, start_n)
        bounds = block_lists.listed_ranges(lists_ptr, list_strides, bounds)
        lists_ptr = block_lists.first_entry(lists_ptr, list_strides)
    for run in tl.static_range(3 if traits.HAS_RIGHT else 2):
        # One loop over (head of the group, query tile), so that loads run ahead across heads too. Two counters: dividing a step costs a
        # tenth of the loop's instructions.
        tiles = bounds[2 * run + 1] - bounds[2 * run]
        head_32 = place.head.to(tl.int32) * traits.HEADS_PER_KV
        tile_m = bounds[2 * run]
        first, last = 0, tiles * traits.HEADS_PER_KV
        if lists_ptr is not None:  # whose entries name a head each
            first, last = bounds[2 * run], bounds[2 * run + 1]
        for step in tl.range(first, last, num_stages=None if run == 0 else 1):
            if lists_ptr is not None:
                entry = tl.load(lists_ptr + step)
                tile_m = entry // traits.HEADS_PER_KV
                head_32 = place.head.to(tl.int32) * traits.HEADS_PER_KV + entry % traits.HEADS_PER_KV
            head = tl.cast(head_32, tl.int64)  # of 32 bits: its products with strides are one instruction
            start_m = tile_m * BLOCK_M
            first_row = tl.cast(start_m, tl.int64)
            rows_left = edges.seqlen_q - start_m
            q_tile_ptr = q_ptr + head * q_strides.head + first_row * q_strides.seq
            q = common.load_tile(
                q_tile_ptr, q_strides.seq, rows_left, offs_m, offs_d, traits.HEAD_DIM, traits.BLOCK_D, run > 0
            )
            dout_tile_ptr = dout_ptr + head * dout_strides.head + first_row * dout_strides.seq
            dout = common.load_tile(
                dout_tile_ptr, dout_strides.seq, rows_left, offs_m, offs_dv, traits.VALUE_DIM, traits.BLOCK_DV, run > 0
            )
            statistic = first_statistic + head * stride_lse_head + first_row
            shift = common.load_statistic(shift_ptr + statistic, rows_left, offs_m, float("inf"), run > 0)
            norm = shift
            if traits.SCALE_FIRST:
                norm = common.load_statistic(norm_ptr + statistic, rows_left, offs_m, 0.0, run > 0)
            delta = common.load_statistic(delta_ptr + statistic, rows_left, offs_m, 0.0, run > 0)
            here = common.head_options(options, place.option_sequence, head)
            # Transposed, (BLOCK_N, BLOCK_M). float32 forms it as the dq kernel does, for the same bits: one more or less in the last place
            # of a large logit is felt in its weight.
            if traits.EXACT:
                capped = tl.trans(common.row_products(q, k, traits.HEAD_DIM, traits.PRECISION, traits.STREAMED))
            else:
                capped = tl.dot(k.data, tl.trans(q.data), input_precision=traits.PRECISION)
            capped = common.scaled_scores(capped, softmax_scale, softcap, traits)
            rows, keys = (start_m + offs_m)[None, :], offs_n[:, None]
            scores = common.score_terms(capped, rows, start_n, keys, options, here, edges, traits, run > 0)
            p = common.weights(scores, shift[None, :], norm[None, :], factor, traits.SCALE_FIRST)
            if traits.EXACT:
                dp = tl.trans(common.row_products(dout, v, traits.VALUE_DIM, traits.PRECISION, traits.STREAMED))
            else:
                dp = tl.dot(v.data, tl.trans(dout.data), input_precision=traits.PRECISION)
            kept = p
            if dropout_seed_ptr is not None:
                stream = place.option_sequence * num_heads + head
                keep = tl.trans(common.dropout_keep(dropout, stream, start_m, start_n, BLOCK_M, BLOCK_N))
                kept = tl.where(keep, p * dropout.scale, 0.0)
                dp = tl.where(keep, dp * dropout.scale, 0.0)
            dv = tl.dot(kept.to(dout.data.dtype), dout.data, dv, input_precision=traits.PRECISION)
            ds = p * (dp - delta[None, :])
            if traits.HAS_SOFTCAP:
                ds = ds * common.softcap_slope(capped, softcap)
            dk = tl.dot(ds.to(q.data.dtype), q.data, dk, input_precision=traits.PRECISION)
            if lists_ptr is None:
                was_last = tile_m + 1 == bounds[2 * run + 1]
                head_32 += was_last
                tile_m = tl.where(was_last, bounds[2 * run], tile_m + 1)
    common.store_tile(
        dk_ptr, dk_strides.seq, keys_left, offs_n, offs_d, dk * softmax_scale, traits.HEAD_DIM, traits.BLOCK_D
    )
    common.store_tile(dv_ptr, dv_strides.seq, keys_left, offs_n, offs_dv, dv, traits.VALUE_DIM, traits.BLOCK_DV)


class BackwardLaunch:
    """The backward launches for calls that are alike, to be made any number of times.

    Args:
        call, allow_tf32: as for the forward pass.
        dout: gradient of out, any strides.
        out, lse: what the forward pass returned.
        dlse: gradient of lse, or None for 0.
        want_dbias: False where the bias needs no gradient.
        want_dslopes: whether the ALiBi slopes need one.
        config: replaces the launch policy.

    Of all tensors only shapes, strides, dtypes and device count. Where the kernels cannot walk dout, out, lse or dlse, each call copies it.
    """

    __slots__ = (
        "_copied", "_launches", "_lists", "_new_dbias", "_new_dk", "_new_dq", "_new_dsinks", "_new_dv", "_new_statistic", "_scale_first",
        "_sum_of_slopes", "_sums_of_sinks", "_take",
    )  # fmt: skip

    def __init__(
        self,
        call: AttentionCall,
        dout: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dlse: torch.Tensor | None,
        *,
        want_dbias: bool = True,
        want_dslopes: bool = False,
        allow_tf32: bool = False,
        config: BackwardConfig | None = None,
    ) -> None:
        shape = geometry(call)
        q, k, v, bias = call.q, call.k, call.v, call.bias
        options = score_options(call, shape, allow_tf32)
        if config is None:
            pressure = options.pressure + (bias is not None) + want_dslopes
            arch = device_limits(q.device).arch
            config = backward_config(shape.head_dim, shape.value_dim, q.dtype, arch, pressure)
        self._lists: dict[str, block_lists.BlockLists] = {}  # by their names among the tensors
        key_lists = query_lists = None
        if call.block_mask is not None:
            config = backward_config_of_blocks(config, call.block_size, shape)
            self._lists["key_lists"] = key_lists = block_lists.BlockLists(call, config.q_block_n)
            self._lists["query_lists"] = query_lists = block_lists.BlockLists(call, config.kv_block_m, of_keys=True)
        tiles_q, slots_q = shape.tiles(shape.seqlen_q, config.q_block_m), shape.slots(shape.num_heads)
        tiles_k, slots_k = shape.tiles(shape.seqlen_k, config.kv_block_n), shape.slots(shape.num_kv_heads)
        shared_bias = bias is not None and want_dbias and any(is_broadcast(bias, shape))

        own = ("dout", "out", "lse", "dlse", "delta", "shift", "norm", "dq", "dk", "dv", "dbias", "dsinks", "dslopes")
        tensors = CallTensors(call, *own, "key_lists", "query_lists", "bias_lists")
        self._take = tensors.take
        walked = [tensor.stride(-1) == 1 for tensor in (dout, out)]
        walked += [tensor is None or tensor.is_contiguous() for tensor in (lse, dlse)]
        self._copied = [index for index, walks in enumerate(walked) if not walks]
        self._new_dq, self._new_dk, self._new_dv = NewTensor(q), NewTensor(k), NewTensor(v)
        self._new_statistic = NewTensor(lse)
        self._scale_first = bool(options.traits.SCALE_FIRST)
        self._new_dbias = self._new_dsinks = None
        if bias is not None and want_dbias:
            # Tiles that nothing sees are not visited by the dq kernel: their scores have no gradient.
            new = torch.empty if shared_bias else torch.zeros
            self._new_dbias = functools.partial(new, bias.shape, dtype=bias.dtype, device=bias.device)
        if call.sinks is not None:
            self._new_dsinks = functools.partial(torch.zeros, slots_q, tiles_q, dtype=torch.float32, device=q.device)
        self._sums_of_sinks = (-1, shape.num_heads, tiles_q)
        want_dslopes = want_dslopes and call.alibi_slopes is not None
        self._sum_of_slopes = prepare_slope_gradient(call, shape) if want_dslopes else None

        rows = [
            row_strides(tensor) if walks else new_row_strides(tensor.shape)
            for tensor, walks in zip((dout, q, k, v, out), (walked[0], True, True, True, walked[1]))
        ]
        gradient_rows = [new_row_strides(tensor.shape) for tensor in (q, k, v)]
        inputs = (None, rows[0], None, rows[1], None, rows[2], None, rows[3])
        scores = (*options.scalars, options.traits)
        constants = {"WIDE": needs_wide_offsets(256, *rows, *gradient_rows), **COMMON_OPTIONS}
        self._launches = []
        if q.numel() > 0:
            arguments = (
                *inputs, None, rows[4], None, gradient_rows[0],
                *(None,) * 5, *shape.lse_strides,
                None, new_score_strides(None if shared_bias or not want_dbias else bias), None, None,
                LARGE_LSE_FLOAT32 if q.dtype == torch.float32 else LARGE_LSE_16_BIT,
                *block_lists.arguments(key_lists),
                *OPTIONAL_ARGUMENTS, options.strides,
                *shape.sizes, tiles_q, slots_q, slots_per_group(shape, k), *scores,
            )  # fmt: skip
            own_constants = {
                "BLOCK_M": config.q_block_m,
                "BLOCK_N": config.q_block_n,
                "num_warps": config.q_num_warps,
                "num_stages": config.q_num_stages,
                **constants,
            }
            dbias = None if shared_bias else "dbias"
            dslopes = "dslopes" if want_dslopes else None
            order = tensors.order(
                "dout", "q", "k", "v", "out", "dq", "lse", "dlse", "delta", "shift", "norm", dbias, "dsinks", dslopes,
                *block_lists.pointers(key_lists, "key_lists"),
            )  # fmt: skip
            self._launches.append(
                PreparedLaunch(attention_backward_dq_kernel, (tiles_q * slots_q,), arguments, own_constants, order)
            )  # fmt: skip
        if k.numel() + v.numel() > 0:
            arguments = (
                *inputs, None, gradient_rows[1], None, gradient_rows[2],
                None, None, None, *shape.lse_strides,
                *block_lists.arguments(query_lists),
                *OPTIONAL_ARGUMENTS, options.strides,
                *shape.sizes, tiles_k, slots_k, slots_k, *scores,
            )  # fmt: skip
            own_constants = {
                "BLOCK_M": config.kv_block_m,
                "BLOCK_N": config.kv_block_n,
                "num_warps": config.kv_num_warps,
                "num_stages": config.kv_num_stages,
                **constants,
            }
            lists = block_lists.pointers(query_lists, "query_lists")
            order = tensors.order("dout", "q", "k", "v", "dk", "dv", "delta", "shift", "norm", *lists)
            self._launches.append(
                PreparedLaunch(attention_backward_dkv_kernel, (tiles_k * slots_k,), arguments, own_constants, order)
            )  # fmt: skip
        if bias is not None and shared_bias:
            launch = prepare_bias_gradient(call, shape, options, inputs, tensors, constants, self._lists)
            if launch is not None:
                self._launches.append(launch)

    def __call__(
        self,
        call: AttentionCall,
        dout: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        dlse: torch.Tensor | None,
    ) -> Gradients:
        """Results as :func:`attention_backward` returns them, of a call that is like the first."""
        if self._copied:
            given: list[Any] = [dout, out, lse, dlse]
            for index in self._copied:
                given[index] = given[index].contiguous()
            dout, out, lse, dlse = given
        new_statistic = self._new_statistic
        dq, dk, dv = self._new_dq(call.q), self._new_dk(call.k), self._new_dv(call.v)
        delta, shift, norm = new_statistic(lse), new_statistic(lse), new_statistic(lse) if self._scale_first else None
        dbias = None if self._new_dbias is None else self._new_dbias()
        dsinks = None if self._new_dsinks is None else self._new_dsinks()
        dslopes = None if self._sum_of_slopes is None else new_statistic(lse)
        tensors = (*self._take(call), dout, out, lse, dlse, delta, shift, norm, dq, dk, dv, dbias, dsinks, dslopes)
        if self._lists:
            tensors += tuple(make(call) for make in self._lists.values())
        for launch in self._launches:
            launch(tensors)
        if dsinks is not None:
            assert call.sinks is not None
            dsinks = dsinks.view(self._sums_of_sinks).sum((0, 2)).to(call.sinks.dtype)
        if self._sum_of_slopes is not None and dslopes is not None:
            dslopes = self._sum_of_slopes(call, dslopes)
        return dq, dk, dv, dbias, dsinks, dslopes


def attention_backward(
    call: AttentionCall,
    dout: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    *,
    want_dbias: bool = True,
    want_dslopes: bool = False,
    allow_tf32: bool = False,
    config: BackwardConfig | None = None,
) -> Gradients:
    """Prepares the launches of a checked call's gradients and makes them once; see :class:`BackwardLaunch`.

    Returns:
        dq, dk, dv, contiguous, in the dtypes of q, k, v; dbias shaped like bias, or None where there is none or it is not wanted;
        dsinks, or None without sinks; dslopes shaped like alibi_slopes, or None where there are none or it is not wanted.
    """
    options = {"want_dbias": want_dbias, "want_dslopes": want_dslopes, "allow_tf32": allow_tf32}
    launch = BackwardLaunch(call, dout, out, lse, dlse, **options, config=config)
    return launch(call, dout, out, lse, dlse)
