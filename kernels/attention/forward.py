"""Attention forward: ``out = softmax(q kᵀ · softmax_scale + …) v`` and the log-sum-exp of each row, the score matrix never in memory.

One program owns BLOCK_M queries of one head and walks over the key tiles they may see, keeping the running maximum, the running sum and the
unnormalised output of each row (Milakov & Gimelshein 2018; Dao et al. 2022). Cost: 4 · batch · heads · Lq · Lk · d FLOP (half if causal),
q, k, v read and out, lse written once as far as L2 serves the other programs' reads of k and v.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..launch import COMMON_OPTIONS, device_limits
from ..mathematics import LN2, LOG2E
from ..prepared import PreparedLaunch
from . import block_lists
from . import tile as common
from .options import (
    OPTIONAL_ARGUMENTS,
    UNSPECIALISED,
    CallTensors,
    geometry,
    maker,
    needs_wide_offsets,
    new_row_strides,
    row_strides,
    score_options,
)
from .policy import ForwardConfig, forward_config, forward_config_of_blocks, slots_per_group

if TYPE_CHECKING:
    from pytransformer.ops.attention.call import AttentionCall


@triton.jit(do_not_specialize=UNSPECIALISED)
def attention_forward_kernel(
    q_ptr, q_strides, k_ptr, k_strides, v_ptr, v_strides, out_ptr, out_strides,
    lse_ptr, stride_lse_batch, stride_lse_head,
    lists_ptr, list_strides,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    bias_ptr, mask_ptr, padding_ptr, alibi_ptr, sinks_ptr, dropout_seed_ptr, option_strides,
    batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    softmax_scale, softcap, window_left, window_right, dropout_last_out, dropout_scale,
    traits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    HAS_DATA_MASK: tl.constexpr = (bias_ptr is not None) or (mask_ptr is not None) or (padding_ptr is not None)

    # Which queries, of which head, of which sequence.
    tile_m, slot = common.program_tile(num_tiles, num_slots, slots_per_group, traits.HAS_RIGHT)
    place = common.locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, slot, tile_m, batch, num_heads, seqlen_q, seqlen_k, BLOCK_M
    )
    start_m = place.start
    if start_m >= place.length:
        return
    place = common.in_64_bits(place, batch)
    edges = common.Edges(place.length, place.other_length, window_left, window_right)
    kv_head = place.head // traits.HEADS_PER_KV
    q_ptr += common.row_offset(q_strides, place.sequence, place.row, place.head)
    out_ptr += common.row_offset(out_strides, place.sequence, place.row, place.head)
    lse_ptr += place.sequence * stride_lse_batch + place.head * stride_lse_head + place.row
    k_ptr += common.row_offset(k_strides, place.sequence, place.other_row, kv_head)
    v_ptr += common.row_offset(v_strides, place.sequence, place.other_row, kv_head)
    options = common.Options(bias_ptr, mask_ptr, padding_ptr, alibi_ptr, option_strides)
    here = common.head_options(options, place.option_sequence, place.head)
    dropout = common.load_dropout(dropout_seed_ptr, dropout_last_out, dropout_scale)

    offs_m = common.tile_offsets(BLOCK_M, WIDE)
    offs_n = common.tile_offsets(BLOCK_N, WIDE)
    offs_d = tl.arange(0, traits.BLOCK_D)
    offs_dv = tl.arange(0, traits.BLOCK_DV)
    rows_left = place.length - start_m
    q = common.load_tile(q_ptr, q_strides.seq, rows_left, offs_m, offs_d, traits.HEAD_DIM, traits.BLOCK_D, True)
    factor = softmax_scale * LOG2E
    acc = tl.zeros([BLOCK_M, traits.BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:  # a logit that every row has seen already
        sink = tl.load(sinks_ptr + place.head).to(tl.float32)
        if not traits.SCALE_FIRST:
            sink = sink * LOG2E
        row_max = tl.zeros([BLOCK_M], tl.float32) + sink
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)

    bounds = common.key_ranges(start_m, edges, traits, BLOCK_M, BLOCK_N)
    if lists_ptr is not None:
        lists_ptr = block_lists.list_row(lists_ptr, list_strides, place.option_sequence, place.head, start_m)
        bounds = block_lists.listed_ranges(lists_ptr, list_strides, bounds)
        lists_ptr = block_lists.first_entry(lists_ptr, list_strides)
    # Whole tiles come first, and only their loads run ahead: the buffers and addresses of all three runs together would spill, and a run
    # without look-ahead that comes first makes ptxas serialise the wgmma of the others.
    for run in tl.static_range(3 if traits.HAS_LEFT else 2):
        for step in tl.range(bounds[2 * run], bounds[2 * run + 1], num_stages=None if run == 0 else 1):
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
            scores = common.row_products(q, k, traits.HEAD_DIM, traits.PRECISION, traits.STREAMED)
            scores = common.scaled_scores(scores, softmax_scale, softcap, traits)
            rows, keys = (start_m + offs_m)[:, None], offs_n[None, :]
            scores = common.score_terms(scores, rows, start_n, keys, options, here, edges, traits, run > 0)
            tile_max = tl.max(scores, 1)
            if not traits.SCALE_FIRST:
                tile_max = tile_max * factor
            new_max = tl.maximum(row_max, tile_max)
            shift = new_max
            if HAS_DATA_MASK or run > 0:  # a row may have seen nothing yet
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = common.exponentials(scores, shift[:, None], factor, traits.SCALE_FIRST)
            rescale = common.exponentials(row_max, shift, 1.0, traits.SCALE_FIRST)
            row_sum = row_sum * rescale + tl.sum(p, 1)
            if dropout_seed_ptr is not None:
                stream = place.option_sequence * num_heads + place.head
                keep = common.dropout_keep(dropout, stream, start_m, start_n, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)
            v = common.load_tile(
                v_tile_ptr, v_strides.seq, keys_left, offs_n, offs_dv, traits.VALUE_DIM, traits.BLOCK_DV, run > 0
            ).data
            acc = acc * rescale[:, None]
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=traits.PRECISION)
            row_max = new_max

    empty = row_sum == 0.0
    row_sum = tl.where(empty, 1.0, row_sum)
    if traits.SCALE_FIRST:
        lse = row_max + tl.log2(row_sum) * LN2
    else:
        lse = (row_max + tl.log2(row_sum)) * LN2
    lse = tl.where(empty, float("-inf"), lse)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < rows_left)
    acc = acc / row_sum[:, None]
    if dropout_seed_ptr is not None:
        acc = acc * dropout.scale
    common.store_tile(out_ptr, out_strides.seq, rows_left, offs_m, offs_dv, acc, traits.VALUE_DIM, traits.BLOCK_DV)


class ForwardLaunch:
    """The forward launch for calls that are alike, to be made any number of times.

    Args:
        call: of its tensors only shapes, strides, dtypes and device count. q, k, v: (batch, seqlen, heads, head_dim), or packed (total,
            heads, head_dim) with cu_seqlens; last dimension contiguous. mask, bias: broadcastable to (batch, num_heads, seqlen_q,
            seqlen_k), of four dimensions or fewer; never expanded in memory.
        allow_tf32: whether float32 products may be of tf32, whose operands lack the low 13 bits: they are cut, not rounded.
        config: replaces the launch policy (tests use small tiles).

    Raises:
        ValueError: dropout without a tensor of its seed.
    """

    __slots__ = ("_launch", "_lists", "_new_lse", "_new_out", "_take")

    def __init__(self, call: AttentionCall, *, allow_tf32: bool = False, config: ForwardConfig | None = None) -> None:
        shape = geometry(call)
        out_shape = (*call.q.shape[:-1], shape.value_dim)
        tensors = CallTensors(call, "out", "lse", "lists")
        self._take = tensors.take
        self._new_out, self._new_lse = maker(call.q, out_shape), maker(call.q, shape.lse_shape, torch.float32)
        options = score_options(call, shape, allow_tf32)
        self._launch: PreparedLaunch | None = None
        self._lists: block_lists.BlockLists | None = None
        if shape.slots(shape.num_heads) * shape.seqlen_q == 0:
            return
        if config is None:
            arch = device_limits(call.q.device).arch
            config = forward_config(shape.head_dim, shape.value_dim, call.q.dtype, arch, options.pressure)
        if call.block_mask is not None:
            config = forward_config_of_blocks(config, call.block_size, shape)
            self._lists = block_lists.BlockLists(call, config.block_n)
        num_tiles, num_slots = shape.tiles(shape.seqlen_q, config.block_m), shape.slots(shape.num_heads)
        rows = [row_strides(tensor) for tensor in (call.q, call.k, call.v)] + [new_row_strides(out_shape)]
        arguments = (
            None, rows[0], None, rows[1], None, rows[2], None, rows[3],
            None, *shape.lse_strides,
            *block_lists.arguments(self._lists),
            *OPTIONAL_ARGUMENTS, options.strides,
            *shape.sizes, num_tiles, num_slots, slots_per_group(shape, call.k),
            *options.scalars, options.traits,
        )  # fmt: skip
        constants = {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "WIDE": needs_wide_offsets(max(config.block_m, config.block_n), *rows),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **COMMON_OPTIONS,
        }
        order = tensors.order("q", "k", "v", "out", "lse", *block_lists.pointers(self._lists, "lists"))
        self._launch = PreparedLaunch(attention_forward_kernel, (num_tiles * num_slots,), arguments, constants, order)

    def __call__(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Results as :func:`attention_forward` returns them, of a call that is like the first."""
        q = call.q
        out, lse = self._new_out(q), self._new_lse(q)
        if self._launch is not None:
            tensors = (*self._take(call), out, lse)
            self._launch(tensors if self._lists is None else (*tensors, self._lists(call)))
        return out, lse


def attention_forward(
    call: AttentionCall, *, allow_tf32: bool = False, config: ForwardConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepares the launch of a checked call and makes it once; see :class:`ForwardLaunch`.

    Returns:
        out like q with v's head_dim, and lse, float32, (batch, num_heads, seqlen_q) or packed (num_heads, total_q).
    """
    return ForwardLaunch(call, allow_tf32=allow_tf32, config=config)(call)
