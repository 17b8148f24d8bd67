"""Decode attention: one or a few new queries per sequence against a KV cache, split over the keys (flash-decoding).

    out = softmax(softcap(q·k · softmax_scale) + bias + alibi) v            over the keys that a query sees, found in a cache

Reading the cache is the whole cost: ``seqlen · num_kv_heads · (head_dim + value_dim)`` elements per sequence, once, against
``2 · seqlen · num_heads · seqlen_q · (head_dim + value_dim)`` FLOP. So the queries of all heads that share a key head are packed
into the rows of one tile (row = query token · group + head in the group) and a key is read once per tile.

To let one sequence fill a GPU its keys are cut into splits. A program computes one split's unnormalised output with its row maximum
and sum, in float32; a second kernel merges the splits in ascending order. Where a split begins depends on nothing but the key's
position and the number of the sequence's *own* query rows, so the result for a sequence has the same bits whatever else is in the
batch, however large the cache is and whether it is paged. Splits that no query sees end at once, and the merge, which knows the same
bounds, never looks at them.

Distances: query token t of a sequence sits at position ``cache_seqlen - seqlen_q + t`` and sees key n iff
``position - window_left <= n <= position + window_right`` (negative = unlimited; a causal call is window_right = 0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..attention.options import block_dim, dot_precision, row_strides, window_limits
from ..launch import COMMON_OPTIONS, NewTensor, cdiv, device_limits, on_device
from ..plans import Plans
from ..prepared import PreparedLaunch
from .cache import (
    DecodeConfig,
    cache_places,
    decode_configs,
    fixed_splits,
    join_sink,
    load_cache,
    sequence_extent,
    split_of,
    split_start,
    tanh,
    tile_keys,
)

# Splits merged per step: 16 rows of partial results are one or two 128-bit loads per thread.
MERGE_SPLITS = 16

# Sizes that change from call to call must not compile a kernel each.
_SIZES = ["num_splits", "seqlen_q", "capacity", "window_left", "window_right"]
_SIZES += ["fine_keys", "fine_splits", "coarse_keys", "scratch_rows"]
# Strides of what is read one by one, which change with the lengths.
_SIZES += ["stride_lse_batch", "stride_lse_head", "stride_table_batch", "stride_k_scale_page", "stride_v_scale_page"]


@triton.jit(do_not_specialize=[*_SIZES, "batch", "num_tiles"])
def _decode_split_kernel(
    q_ptr, stride_q_batch, stride_q_token, stride_q_head,
    k_ptr, stride_k_page, stride_k_token, stride_k_head,
    v_ptr, stride_v_page, stride_v_token, stride_v_head,
    out_ptr, stride_out_batch, stride_out_token, stride_out_head,
    lse_ptr, stride_lse_batch, stride_lse_head,
    partial_out_ptr, partial_stats_ptr,
    cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, cache_batch_idx_ptr,
    block_table_ptr, stride_table_batch,
    mask_ptr, stride_mask_batch, stride_mask_head, stride_mask_token, stride_mask_key,
    bias_ptr, stride_bias_batch, stride_bias_head, stride_bias_token, stride_bias_key,
    alibi_ptr, stride_alibi_batch,
    sinks_ptr,
    k_scale_ptr, stride_k_scale_page, stride_k_scale_token, stride_k_scale_head,
    v_scale_ptr, stride_v_scale_page, stride_v_scale_token, stride_v_scale_head,
    batch, num_tiles, num_splits, seqlen_q, capacity, window_left, window_right, softmax_scale, softcap,
    fine_keys, fine_splits, coarse_keys, scratch_rows,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS_ABOVE: tl.constexpr, ROWS_UP_TO: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr, ROW_LEFT: tl.constexpr, ROW_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Heads run fastest (neighbours in memory), then sequences; low splits first, as every sequence has those.
    pid = tl.program_id(0)
    kv_head = (pid % NUM_KV_HEADS).to(tl.int64)
    pid = pid // NUM_KV_HEADS
    sequence = (pid % batch).to(tl.int64)
    pid = pid // batch
    tile = num_tiles - 1 - pid % num_tiles
    split = pid // num_tiles

    first_token, seqlen_q, seqlen_k, leftpad = sequence_extent(
        cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, sequence, seqlen_q
    )
    num_rows = seqlen_q * GROUP
    if (num_rows <= ROWS_ABOVE) | (num_rows > ROWS_UP_TO) | (tile * BLOCK_M >= num_rows):
        return
    low, high = tile_keys(tile, seqlen_q, seqlen_k, capacity, leftpad, window_left, window_right, GROUP, BLOCK_M)
    first_key = split_start(split, fine_keys, fine_splits, coarse_keys)
    end = tl.minimum(high, split_start(split + 1, fine_keys, fine_splits, coarse_keys))
    begin = tl.maximum(first_key, low // BLOCK_N * BLOCK_N)
    # A None test and a run-time test do not mix in Triton's `and`.
    if partial_out_ptr is not None:  # noqa: SIM102
        if begin >= end:
            return

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = rows < num_rows
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    position = seqlen_k - seqlen_q + token
    offs_dim = tl.arange(0, BLOCK_DIM)
    offs_value_dim = tl.arange(0, BLOCK_VALUE_DIM)

    q_rows_ptr = (
        q_ptr + sequence * stride_q_batch + (first_token + token).to(tl.int64) * stride_q_token + head * stride_q_head
    )
    q_mask = row_exists[:, None]
    if DIM != BLOCK_DIM:
        q_mask = q_mask & (offs_dim[None, :] < DIM)
    q = tl.load(q_rows_ptr[:, None] + offs_dim[None, :], mask=q_mask, other=0.0)

    cache_row = sequence
    if cache_batch_idx_ptr is not None:
        cache_row = tl.load(cache_batch_idx_ptr + sequence).to(tl.int64)
    block_table_row_ptr = None
    if block_table_ptr is not None:
        block_table_row_ptr = block_table_ptr + sequence * stride_table_batch
    k_ptr += kv_head * stride_k_head
    v_ptr += kv_head * stride_v_head
    score_scale = softmax_scale
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head * stride_k_scale_head
        v_scale_ptr += kv_head * stride_v_scale_head
        if not SCALE_PER_TOKEN:
            score_scale = softmax_scale * tl.load(k_scale_ptr)
    if mask_ptr is not None:
        mask_rows_ptr = (
            mask_ptr + sequence * stride_mask_batch + head * stride_mask_head + token.to(tl.int64) * stride_mask_token
        )
    if bias_ptr is not None:
        bias_rows_ptr = (
            bias_ptr + sequence * stride_bias_batch + head * stride_bias_head + token.to(tl.int64) * stride_bias_token
        )
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + sequence * stride_alibi_batch + head, mask=row_exists, other=0.0).to(tl.float32)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_VALUE_DIM], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keep = (n >= low) & (n < end)
        page, slot = cache_places(
            leftpad + n, leftpad + start, keep, cache_row, block_table_row_ptr, PAGE_SIZE, ONE_PAGE
        )
        k = load_cache(
            k_ptr + page * stride_k_page + slot * stride_k_token, keep, offs_dim, DIM, BLOCK_DIM, FORMAT, q.dtype
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * score_scale
        if SCALE_PER_TOKEN:
            scores *= tl.load(
                k_scale_ptr + page * stride_k_scale_page + slot * stride_k_scale_token, mask=keep, other=0.0
            )[None, :]
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        visible = keep[None, :]
        if ROW_LEFT:
            visible = visible & (n[None, :] >= position[:, None] - window_left)
        if ROW_RIGHT:
            visible = visible & (n[None, :] <= position[:, None] + window_right)
        present = row_exists[:, None] & keep[None, :]
        if bias_ptr is not None:
            bias = tl.load(bias_rows_ptr[:, None] + n[None, :].to(tl.int64) * stride_bias_key, mask=present, other=0.0)
            scores += bias.to(tl.float32)
        if alibi_ptr is not None:
            scores -= slope[:, None] * tl.abs(position[:, None] - n[None, :]).to(tl.float32)
        if mask_ptr is not None:
            visible = visible & (
                tl.load(mask_rows_ptr[:, None] + n[None, :].to(tl.int64) * stride_mask_key, mask=present, other=0) != 0
            )
        scores = tl.where(visible, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen nothing yet keeps -inf as its maximum; subtracting that would give NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp(scores - shift[:, None])
        rescale = tl.exp(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        v = load_cache(
            v_ptr + page * stride_v_page + slot * stride_v_token,
            keep,
            offs_value_dim,
            VALUE_DIM,
            BLOCK_VALUE_DIM,
            FORMAT,
            q.dtype,
        )
        if SCALE_PER_TOKEN:
            v_scale = tl.load(
                v_scale_ptr + page * stride_v_scale_page + slot * stride_v_scale_token, mask=keep, other=0.0
            )
            v = (v.to(tl.float32) * v_scale[:, None]).to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * rescale[:, None], input_precision=PRECISION)

    if k_scale_ptr is not None and not SCALE_PER_TOKEN:
        acc *= tl.load(v_scale_ptr)
    value_mask = row_exists[:, None]
    if VALUE_DIM != BLOCK_VALUE_DIM:
        value_mask = value_mask & (offs_value_dim[None, :] < VALUE_DIM)
    if partial_out_ptr is not None:
        scratch = ((sequence * NUM_KV_HEADS + kv_head) * num_splits + split) * scratch_rows
        tl.store(partial_stats_ptr + scratch * 2 + rows, row_max, mask=row_exists)
        tl.store(partial_stats_ptr + scratch * 2 + scratch_rows + rows, row_sum, mask=row_exists)
        tl.store(
            partial_out_ptr + (scratch + rows)[:, None] * VALUE_DIM + offs_value_dim[None, :], acc, mask=value_mask
        )
    else:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=row_exists, other=0.0).to(tl.float32)
            row_max, row_sum, factor = join_sink(row_max, row_sum, sink)
            acc *= factor[:, None]
        out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
        out_rows_ptr = (
            out_ptr
            + sequence * stride_out_batch
            + (first_token + token).to(tl.int64) * stride_out_token
            + head * stride_out_head
        )
        tl.store(out_rows_ptr[:, None] + offs_value_dim[None, :], out.to(out_ptr.dtype.element_ty), mask=value_mask)
        lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum))
        tl.store(
            lse_ptr + sequence * stride_lse_batch + head * stride_lse_head + first_token + token, lse, mask=row_exists
        )


@triton.jit(do_not_specialize=[*_SIZES, "max_rows"])
def _decode_merge_kernel(
    partial_out_ptr, partial_stats_ptr,
    out_ptr, stride_out_batch, stride_out_token, stride_out_head,
    lse_ptr, stride_lse_batch, stride_lse_head,
    cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, sinks_ptr,
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
        cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, sequence, seqlen_q
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
    out_row_ptr = out_ptr + sequence * stride_out_batch + token.to(tl.int64) * stride_out_token + head * stride_out_head
    tl.store(out_row_ptr + offs_dim, out.to(out_ptr.dtype.element_ty), mask=offs_dim < VALUE_DIM)
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum))
    tl.store(lse_ptr + sequence * stride_lse_batch + head * stride_lse_head + token, lse)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Launcher.


@dataclass(frozen=True)
class _Call:
    """A call's tensors and numbers in the order of the kernels' arguments; what differs between row classes is in :class:`_ClassLaunch`."""

    cache_seqlens: torch.Tensor
    cu_seqlens_q: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    sinks: torch.Tensor | None
    batch: int
    seqlen_q: int
    capacity: int
    window: tuple[int, int]
    num_kv_heads: int
    group: int
    packed: bool


def _optional(tensor: torch.Tensor | None, strides: int) -> tuple[torch.Tensor | int | None, ...]:
    """The pointer and its first strides, or None and zeros."""
    return (None, *[0] * strides) if tensor is None else (tensor, *tensor.stride()[:strides])


def _cache_view(cache: torch.Tensor) -> tuple[torch.Tensor, str]:
    """What the kernel loads, and how it decodes it: fp8 is taken apart by hand, as parts before sm_89 cannot convert e4m3."""
    return (cache.view(torch.uint8), "e4m3") if cache.dtype == torch.float8_e4m3fn else (cache, "native")


def _scale_view(scale: torch.Tensor | None) -> torch.Tensor | None:
    """Per-head scales as (1, 1, heads) with no stride to the first two."""
    return scale.expand(1, 1, -1) if scale is not None and scale.dim() == 1 else scale


def _row_classes(
    configs: tuple[DecodeConfig, ...], rows: int, packed: bool, capacity: int, num_splits: int
) -> Iterator[DecodeConfig]:
    """The classes to launch: the one of a dense call, every one that a packed sequence of up to ``rows`` rows can be in."""
    for config in configs:
        if rows <= config.rows_above or (not packed and rows > config.rows_up_to):
            continue
        if num_splits > 0:
            config = replace(config, splits=fixed_splits(capacity, num_splits, config.block_n))
        yield config


def decode_attention_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    softmax_scale: float,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    block_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    num_splits: int = 0,
    allow_tf32: bool = False,
    configs: tuple[DecodeConfig, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of checked arguments; meanings and shapes as in :func:`pytransformer.decode_attention`.

    Args:
        mask: boolean or uint8, expanded to (batch, num_heads, seqlen_q, keys), keys up to capacity; packed: max_q for seqlen_q.
        bias: floating, expanded likewise.
        configs: replaces the launch policy (tests shrink tiles and splits with it).
    """
    alike = None
    unusual = (cu_seqlens_q, cache_leftpad, mask, bias, alibi_slopes, k_scale, v_scale, configs)
    if all(option is None for option in unusual) and k_cache.dtype == v_cache.dtype == q.dtype:
        given = (q, k_cache, v_cache, cache_seqlens, block_table, cache_batch_idx, sinks)
        policy = device_limits(q.device)
        alike = (*given, softmax_scale, causal, window, softcap, num_splits, allow_tf32, policy)
        plain = _PLANS.find(alike)
        if plain is not None:
            return plain.launch(*given)
    packed = cu_seqlens_q is not None
    num_heads, num_kv_heads = q.shape[-2], k_cache.shape[-2]
    head_dim, value_dim = q.shape[-1], v_cache.shape[-1]
    page_size = k_cache.shape[1]
    capacity = page_size if block_table is None else block_table.shape[1] * page_size
    for keys_of in (mask, bias):
        if keys_of is not None and cache_leftpad is None:
            capacity = min(capacity, keys_of.shape[-1])
        elif keys_of is not None and keys_of.shape[-1] < capacity:
            # Behind padding, slots and keys are counted from different places: the width bounds the keys, the capacity the slots.
            cache_seqlens = cache_seqlens.clamp(max=keys_of.shape[-1])
    seqlen_q = q.shape[-3] if max_seqlen_q is None or not packed else min(max_seqlen_q, q.shape[-3])
    call = _Call(
        cache_seqlens, cu_seqlens_q, cache_leftpad, sinks,
        batch=cache_seqlens.shape[0], seqlen_q=seqlen_q, capacity=capacity, window=window_limits(causal, window),
        num_kv_heads=num_kv_heads, group=num_heads // num_kv_heads, packed=packed,
    )  # fmt: skip
    if packed:
        # Rows past the last sequence belong to none, and no program visits them.
        out = q.new_zeros((*q.shape[:-1], value_dim))
        lse = q.new_full((num_heads, q.shape[0]), -math.inf, dtype=torch.float32)
    else:
        out = q.new_empty((*q.shape[:-1], value_dim))
        lse = q.new_empty((q.shape[0], num_heads, q.shape[1]), dtype=torch.float32)
    if out.numel() == 0 or call.batch == 0:
        return out, lse

    k_view, cache_format = _cache_view(k_cache)
    v_view, _ = _cache_view(v_cache)
    mask = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
    alibi_slopes = None if alibi_slopes is None else alibi_slopes.expand(call.batch, num_heads)
    several_queries = packed or seqlen_q > 1
    tensors = (
        q, *row_strides(q), k_view, *k_view.stride()[:3], v_view, *v_view.stride()[:3],
        out, *row_strides(out), lse, *((0, lse.stride(0)) if packed else lse.stride()[:2]),
    )  # fmt: skip
    options = (
        cache_seqlens, cu_seqlens_q, cache_leftpad, cache_batch_idx, *_optional(block_table, 1), *_optional(mask, 4), *_optional(bias, 4),
        *_optional(alibi_slopes, 1), sinks, *_optional(_scale_view(k_scale), 3), *_optional(_scale_view(v_scale), 3),
    )  # fmt: skip
    constants = {
        "PAGE_SIZE": page_size if block_table is not None else 1,
        "ROW_LEFT": several_queries and call.window[0] >= 0,
        "ROW_RIGHT": several_queries and call.window[1] >= 0,
        "HAS_SOFTCAP": softcap > 0.0,
        "SCALE_PER_TOKEN": k_scale is not None and k_scale.dim() > 1,
        "FORMAT": cache_format,
        "PRECISION": dot_precision(q.dtype, allow_tf32),
        "DIM": head_dim,
        "BLOCK_DIM": block_dim(head_dim),
    }
    if configs is None:
        masked = mask is not None or bias is not None
        configs = decode_configs(head_dim, value_dim, k_view.element_size(), q.device, block_table is not None, masked)
    classes = []
    for config in _row_classes(configs, seqlen_q * call.group, packed, capacity, num_splits):
        one_page = block_table is not None and page_size % config.block_n == 0 and cache_leftpad is None
        flags, scales = {**constants, "ONE_PAGE": one_page}, (softmax_scale, softcap)
        classes.append(_ClassLaunch(call, config, tensors, options, scales, flags, value_dim))
        classes[-1].launch()
    if alike is not None:
        new_out = NewTensor(q) if out.shape == q.shape else None
        prepared = [row_class.prepare() for row_class in classes]
        _PLANS.add(alike, _PlainLaunch(new_out, out.shape, lse.shape, prepared))
    return out, lse


class _ClassLaunch:
    """The split kernel for one row class, and the merge if a sequence can have several splits."""

    def __init__(
        self,
        call: _Call,
        config: DecodeConfig,
        tensors: tuple[Any, ...],
        options: tuple[Any, ...],
        scales: tuple[float, float],
        constants: dict[str, object],
        value_dim: int,
    ) -> None:
        splits = config.splits.count(call.capacity)
        rows = min(call.seqlen_q * call.group, config.rows_up_to)
        tiles = cdiv(rows, config.block_m)
        split_plan = (config.splits.fine_keys, config.splits.fine_splits, config.splits.coarse_keys)
        scratch = (call.batch, call.num_kv_heads, splits)
        self.scratch = ((*scratch, rows, value_dim), (*scratch, 2, rows)) if splits > 1 else None
        shared: dict[str, object] = {
            "NUM_KV_HEADS": call.num_kv_heads, "GROUP": call.group, "ROWS_ABOVE": config.rows_above, "ROWS_UP_TO": config.rows_up_to,
            "VALUE_DIM": value_dim, "BLOCK_VALUE_DIM": block_dim(value_dim), "BLOCK_M": config.block_m, **COMMON_OPTIONS,
        }  # fmt: skip
        stages = {"BLOCK_N": config.block_n, "num_warps": config.num_warps, "num_stages": config.num_stages}
        # Grid, arguments before and behind the partial results, constants.
        self._split = (
            (call.batch * call.num_kv_heads * tiles * splits,),
            tensors,
            (
                *options,
                call.batch,
                tiles,
                splits,
                call.seqlen_q,
                call.capacity,
                *call.window,
                *scales,
                *split_plan,
                rows,
            ),
            {**constants, **shared, **stages},
        )
        # Grid, arguments behind the partial results, constants.
        self._merge = (
            (call.batch * call.num_kv_heads * rows,),
            (
                *tensors[12:19], call.cache_seqlens, call.cu_seqlens_q, call.cache_leftpad, call.sinks,
                rows, splits, call.seqlen_q, call.capacity, *call.window, *split_plan, rows,
            ),
            {**shared, "BLOCK_SPLITS": MERGE_SPLITS, "num_warps": 4},
        )  # fmt: skip

    def launch(self) -> None:
        """Launches with the tensors given, once."""
        grid, before, behind, constants = self._split
        partial = _partial(self.scratch, before[0].device)
        with on_device(before[0]):
            _decode_split_kernel[grid](*before, *partial, *behind, **constants)
            if self.scratch is not None:
                grid, behind, constants = self._merge
                _decode_merge_kernel[grid](*partial, *behind, **constants)

    def prepare(self) -> _PreparedClass:
        """The same for tensors that are alike, any number of times."""
        grid, before, behind, constants = self._split
        split = PreparedLaunch(_decode_split_kernel, grid, (*before, None, None, *behind), constants)
        grid, behind, constants = self._merge
        merge = PreparedLaunch(_decode_merge_kernel, grid, (None, None, *behind), constants)
        return _PreparedClass(split, merge, self.scratch)


class _PreparedClass(NamedTuple):
    split: PreparedLaunch
    merge: PreparedLaunch
    scratch: tuple[tuple[int, ...], ...] | None

    def launch(self, pointers: Sequence[Any]) -> None:
        """``pointers``: q, k, v, out, lse, cache_seqlens, cu_seqlens_q, leftpad, and the rest as the split kernel takes them."""
        partial = _partial(self.scratch, pointers[0].device)
        self.split((*pointers[:5], *partial, *pointers[5:]))
        if self.scratch is not None:
            self.merge((*partial, *pointers[3:8], pointers[13]))  # the last are the sinks


def _partial(scratch: tuple[tuple[int, ...], ...] | None, device: torch.device) -> list[torch.Tensor | None]:
    """New partial results and statistics, or None where there is one split."""
    if scratch is None:
        return [None, None]
    return [torch.empty(shape, dtype=torch.float32, device=device) for shape in scratch]


class _PlainLaunch(NamedTuple):
    """The launches of a dense call with none of the options that are read through a view."""

    new_out: NewTensor | None
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]
    classes: list[_PreparedClass]

    def launch(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache_seqlens: torch.Tensor,
        *others: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        block_table, cache_batch_idx, sinks = others
        out = q.new_empty(self.out_shape) if self.new_out is None else self.new_out(q)
        lse = q.new_empty(self.lse_shape, dtype=torch.float32)
        pointers = (
            q,
            k,
            v,
            out,
            lse,
            cache_seqlens,
            None,
            None,
            cache_batch_idx,
            block_table,
            None,
            None,
            None,
            sinks,
            None,
            None,
        )
        for row_class in self.classes:
            row_class.launch(pointers)
        return out, lse


_PLANS: Plans[_PlainLaunch] = Plans()
