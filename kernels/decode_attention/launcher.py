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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..attention.options import block_dim, dot_precision, row_strides, window_limits
from ..launch import COMMON_OPTIONS, NewTensor, cdiv, device_limits, on_device
from ..plans import Plans
from ..prepared import PreparedLaunch
from .merge import MERGE_SPLITS, _decode_merge_kernel
from .policy import DecodeConfig, decode_configs, row_classes
from .split import _decode_split_kernel


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
        "EXACT_TANH": q.dtype == torch.float32,
        "PRECISION": dot_precision(q.dtype, allow_tf32),
        "DIM": head_dim,
        "BLOCK_DIM": block_dim(head_dim),
    }
    if configs is None:
        masked = mask is not None or bias is not None
        configs = decode_configs(head_dim, value_dim, k_view.element_size(), q.device, block_table is not None, masked)
    classes = []
    for config in row_classes(configs, seqlen_q * call.group, packed, capacity, num_splits):
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
