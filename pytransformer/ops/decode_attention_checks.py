"""The host-side checks of decode attention: every argument, before anything is launched, each error naming what is allowed."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.attention_checks import MASK_DTYPES, autocast_to_lower, is_autocasting

QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn)
CACHE_LAYOUT = "(batch, capacity, num_kv_heads, head_dim) or (pages, page_size, num_kv_heads, head_dim)"


class DecodeCall(NamedTuple):
    """The arguments of one call after the checks: masks boolean, softmax_scale a number, mask and bias of four dimensions."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | None
    block_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    softmax_scale: float
    causal: bool
    window: tuple[int, int]
    softcap: float
    num_splits: int
    return_lse: bool


# Functions rather than properties: the tracer of torch 2.10 follows no property of a NamedTuple.
def is_packed(call: DecodeCall) -> bool:
    """Whether q is packed sequences."""
    return call.cu_seqlens_q is not None


def batch_size(call: DecodeCall) -> int:
    """The number of sequences."""
    return call.cache_seqlens.shape[0]


def capacity_of(call: DecodeCall) -> int:
    """Keys that one sequence can have."""
    pages = 1 if call.block_table is None else call.block_table.shape[1]
    return pages * call.k_cache.shape[1]


def tensors_of(call: DecodeCall) -> tuple[Tensor, ...]:
    """All tensors of the call."""
    return tuple(value for value in call if isinstance(value, Tensor))


def check_decode_attention(call: DecodeCall, softmax_scale: float | None) -> DecodeCall:
    """Checks a call as the user gave it and returns it normalised; see ``decode_attention`` for the errors."""
    call = _check_q_and_caches(call)
    _check_places(call)
    _check_scales(call)
    call = call._replace(
        causal=checks.check_bool("causal", call.causal),
        window=checks.check_window("window", call.window),
        softmax_scale=_softmax_scale(softmax_scale, call.q.shape[-1]),
        softcap=checks.check_float("softcap", call.softcap, minimum=0.0),
        num_splits=checks.check_int("num_splits", call.num_splits, minimum=0),
        return_lse=checks.check_bool("return_lse", call.return_lse),
    )
    if call.mask is not None or call.bias is not None or call.alibi_slopes is not None or call.sinks is not None:
        call = _check_score_terms(call)
    if checks.readable(call.cache_seqlens):
        _check_lengths(call)
    return call


def _softmax_scale(value: float | None, head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim) if value is None else checks.check_float("softmax_scale", value)


def _check_q_and_caches(call: DecodeCall) -> DecodeCall:
    rank, layout = (4, "(batch, seqlen_q, num_heads, head_dim)")
    if is_packed(call):
        rank, layout = (3, "(total_q, num_heads, head_dim)")
    q = checks.check_tensor("q", call.q, ndim=rank, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, layout=layout)
    allowed = (*checks.FLOAT_DTYPES_AND_DOUBLE, *QUANTISED_DTYPES)
    k_cache = checks.check_tensor("k_cache", call.k_cache, ndim=4, dtypes=allowed, device=q.device, layout=CACHE_LAYOUT)
    v_cache = checks.check_tensor("v_cache", call.v_cache, ndim=4, dtypes=allowed, device=q.device, layout=CACHE_LAYOUT)
    checks.check_same_dtype("v_cache", v_cache, "k_cache", k_cache)
    if is_autocasting(q.device.type):
        # A cache is as it is; q is brought to it.
        q = autocast_to_lower(q) if k_cache.dtype in QUANTISED_DTYPES else q.to(k_cache.dtype)
    if k_cache.dtype != q.dtype and k_cache.dtype not in QUANTISED_DTYPES:
        raise TypeError(
            f"k_cache must have the dtype of q ({checks.short(q.dtype)}), or be quantised (int8, float8_e4m3fn), "
            f"got {checks.short(k_cache.dtype)}"
        )
    if k_cache.shape[-1] != q.shape[-1]:
        raise ValueError(f"k_cache must have the head_dim of q ({q.shape[-1]}), got shape {tuple(k_cache.shape)}")
    checks.check_shape("v_cache", v_cache, (*k_cache.shape[:3], None), "(first three sizes of k_cache, value head_dim)")
    if q.shape[-2] == 0:
        raise ValueError(f"q must have at least one head, got shape {tuple(q.shape)}")
    checks.check_gqa(q.shape[-2], k_cache.shape[-2], "q", "k_cache")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_head_dim(name, tensor.shape[-1])
        checks.check_last_dim_contiguous(name, tensor)
    return call._replace(q=q, k_cache=k_cache, v_cache=v_cache)


def _check_index(name: str, value: Tensor, call: DecodeCall) -> None:
    """int32 (batch), contiguous."""
    checks.check_tensor(name, value, ndim=1, dtypes=(torch.int32,), device=call.q.device, layout="(batch)")
    if value.shape[0] != batch_size(call) or not value.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, of shape (batch) = ({batch_size(call)}), got {tuple(value.shape)} with strides {value.stride()}"
        )


def _check_places(call: DecodeCall) -> None:
    """cache_seqlens, cu_seqlens_q, block_table, cache_batch_idx, cache_leftpad: shapes, dtypes and how they go together."""
    checks.check_tensor(
        "cache_seqlens", call.cache_seqlens, ndim=1, dtypes=(torch.int32,), device=call.q.device, layout="(batch)"
    )
    if call.cu_seqlens_q is not None:
        checks.check_cu_seqlens("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[0], call.q.device, batch_size(call))
    elif call.q.shape[0] != batch_size(call):
        raise ValueError(f"cache_seqlens must have shape (batch) = ({call.q.shape[0]}), got {(batch_size(call),)}")
    _check_index("cache_seqlens", call.cache_seqlens, call)
    _check_query_hint(call)
    if call.cache_leftpad is not None:
        _check_index("cache_leftpad", call.cache_leftpad, call)
    if call.block_table is not None:
        if call.cache_batch_idx is not None:
            raise ValueError(
                "cache_batch_idx is for contiguous caches: with block_table each sequence's pages are listed there"
            )
        table = checks.check_tensor(
            "block_table", call.block_table, ndim=2, dtypes=(torch.int32,), device=call.q.device, layout="(batch, max_pages)"
        )  # fmt: skip
        checks.check_shape("block_table", table, (batch_size(call), None), "(batch, max_pages)")
        checks.check_last_dim_contiguous("block_table", table)
        if call.k_cache.shape[1] == 0:
            raise ValueError(
                f"k_cache must have pages of at least 1 slot with block_table, got shape {tuple(call.k_cache.shape)}"
            )
    elif call.cache_batch_idx is not None:
        _check_index("cache_batch_idx", call.cache_batch_idx, call)
        checks.check_values("cache_batch_idx", call.cache_batch_idx, 0, call.k_cache.shape[0] - 1, "rows of the cache")
    elif call.k_cache.shape[0] != batch_size(call):
        raise ValueError(
            f"k_cache must have batch = {batch_size(call)} rows unless block_table or cache_batch_idx is given, "
            f"got shape {tuple(call.k_cache.shape)}"
        )


def _check_query_hint(call: DecodeCall) -> None:
    if call.max_seqlen_q is None:
        return
    checks.check_int("max_seqlen_q", call.max_seqlen_q, minimum=0)
    if call.cu_seqlens_q is None:
        raise ValueError(
            f"max_seqlen_q is for packed queries: pass cu_seqlens_q too, got {call.max_seqlen_q} without it"
        )
    longest = longest_query(call)
    if longest is not None and call.max_seqlen_q < longest:
        raise ValueError(f"max_seqlen_q must be at least the longest sequence ({longest}), got {call.max_seqlen_q}")


def longest_query(call: DecodeCall) -> int | None:
    """Queries of the longest sequence, where they may be read."""
    if call.cu_seqlens_q is None:
        return call.q.shape[1]
    if not checks.readable(call.cu_seqlens_q):
        return None
    return max((end - start for start, end in itertools.pairwise(call.cu_seqlens_q.tolist())), default=0)


def _check_scales(call: DecodeCall) -> None:
    if call.k_cache.dtype not in QUANTISED_DTYPES:
        for name, scale in (("k_scale", call.k_scale), ("v_scale", call.v_scale)):
            if scale is not None:
                raise ValueError(
                    f"{name} is for quantised caches (int8, float8_e4m3fn); k_cache is {checks.short(call.k_cache.dtype)}"
                )
        return
    if call.k_scale is None or call.v_scale is None:
        missing = "k_scale" if call.k_scale is None else "v_scale"
        raise ValueError(f"{missing} must be given with caches of {checks.short(call.k_cache.dtype)}")
    check_cache_scale("k_scale", call.k_scale, call.k_cache)
    check_cache_scale("v_scale", call.v_scale, call.v_cache)
    if call.k_scale.ndim != call.v_scale.ndim:
        raise ValueError(
            "k_scale and v_scale must both be per head or both per token, "
            f"got shapes {tuple(call.k_scale.shape)} and {tuple(call.v_scale.shape)}"
        )
    # Per-token scales of unused slots may hold anything.
    if call.k_scale.ndim == 1:
        checks.check_no_nan("k_scale", call.k_scale)
        checks.check_no_nan("v_scale", call.v_scale)


def check_cache_scale(name: str, scale: Tensor, cache: Tensor) -> None:
    """float32, (num_kv_heads) or ``cache.shape[:-1]``."""
    checks.check_tensor(name, scale, dtypes=(torch.float32,), device=cache.device)
    if tuple(scale.shape) not in ((cache.shape[2],), tuple(cache.shape[:3])):
        raise ValueError(
            f"{name} must have shape (num_kv_heads) = ({cache.shape[2]},) or that of the cache without its last "
            f"dimension, {tuple(cache.shape[:3])}, got {tuple(scale.shape)}"
        )


def _check_score_terms(call: DecodeCall) -> DecodeCall:
    """mask, bias, alibi_slopes, sinks; integer masks become boolean, mask and bias get four dimensions."""
    device, num_heads = call.q.device, call.q.shape[-2]
    mask, bias = call.mask, call.bias
    if mask is not None:
        if isinstance(mask, Tensor) and (mask.is_floating_point() or mask.is_complex()):
            raise TypeError(
                f"mask must be boolean or integer, got {checks.short(mask.dtype)}; pass an additive mask as bias"
            )
        mask = _score_shape("mask", checks.check_tensor("mask", mask, dtypes=MASK_DTYPES, device=device), call)
        mask = mask if mask.dtype == torch.bool else mask != 0
    floating = checks.FLOAT_DTYPES_AND_DOUBLE if call.q.dtype == torch.float64 else checks.FLOAT_DTYPES
    if bias is not None:
        if isinstance(bias, Tensor) and bias.dtype in MASK_DTYPES:
            raise TypeError(f"bias must be floating-point, got {checks.short(bias.dtype)}; pass a boolean mask as mask")
        bias = _score_shape("bias", checks.check_tensor("bias", bias, dtypes=floating, device=device), call)
    if call.alibi_slopes is not None:
        layout = "(num_heads) or (batch, num_heads)"
        slopes = checks.check_tensor(
            "alibi_slopes", call.alibi_slopes, ndim=(1, 2), dtypes=floating, device=device, layout=layout
        )
        expected = (num_heads,) if slopes.ndim == 1 else (batch_size(call), num_heads)
        checks.check_shape("alibi_slopes", slopes, expected, layout)
        checks.check_last_dim_contiguous("alibi_slopes", slopes)
    if call.sinks is not None:
        sinks = checks.check_tensor("sinks", call.sinks, ndim=1, dtypes=floating, device=device, layout="(num_heads)")
        checks.check_shape("sinks", sinks, (num_heads,), "(num_heads)")
        checks.check_last_dim_contiguous("sinks", sinks)
    return call._replace(mask=mask, bias=bias)


def _score_shape(name: str, tensor: Tensor, call: DecodeCall) -> Tensor:
    """Four dimensions that broadcast to (batch, num_heads, seqlen_q, keys), with rows and keys for the longest sequences."""
    longest_q = longest_query(call)
    longest_k = None
    if checks.readable(call.cache_seqlens):
        longest_k = max(call.cache_seqlens.tolist(), default=0)
    sizes = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    fits = len(sizes) == 4 and sizes[0] in (1, batch_size(call)) and sizes[1] in (1, call.q.shape[-2])
    if fits:
        rows_fit = (
            sizes[2] == 1 or longest_q is None or (sizes[2] >= longest_q if is_packed(call) else sizes[2] == longest_q)
        )
        fits = rows_fit and (sizes[3] == 1 or longest_k is None or sizes[3] >= longest_k)
    if not fits:
        rows = "any" if longest_q is None else f"at least {longest_q}" if is_packed(call) else str(longest_q)
        keys = "any" if longest_k is None else f"at least {longest_k}"
        raise ValueError(
            f"{name} must broadcast to (batch, num_heads, seqlen_q, longest cache_seqlens) = "
            f"({batch_size(call)}, {call.q.shape[-2]}, {rows}, {keys}), got shape {tuple(tensor.shape)}"
        )
    return tensor.reshape(sizes)


def _check_lengths(call: DecodeCall) -> None:
    """Values of cache_seqlens, cache_leftpad and the pages that hold visible keys."""
    lengths = call.cache_seqlens.tolist()
    leftpads = [0] * len(lengths)
    if call.cache_leftpad is not None:
        checks.check_values("cache_leftpad", call.cache_leftpad, 0, capacity_of(call), "slots to skip")
        leftpads = call.cache_leftpad.tolist()
    for sequence, (length, leftpad) in enumerate(zip(lengths, leftpads)):
        if not 0 <= length <= capacity_of(call) - leftpad:
            behind = f" minus its cache_leftpad of {leftpad}" if leftpad else ""
            raise ValueError(
                f"cache_seqlens must be from 0 to the capacity of the cache ({capacity_of(call)}{behind}), "
                f"got {length} for sequence {sequence}"
            )
    if call.block_table is not None:
        _check_pages(call, call.block_table, lengths, leftpads)


def _check_pages(call: DecodeCall, block_table: Tensor, lengths: list[int], leftpads: list[int]) -> None:
    num_pages, page_size = call.k_cache.shape[:2]
    table = block_table.tolist()
    for sequence, (length, leftpad) in enumerate(zip(lengths, leftpads)):
        if length == 0:  # a padding that ends inside a page would seem to reach into it
            continue
        first = leftpad + first_visible_key(call, sequence, length)
        for entry in range(first // page_size, -(-(leftpad + length) // page_size)):
            if not 0 <= table[sequence][entry] < num_pages:
                raise ValueError(
                    f"block_table must hold pages from 0 to {num_pages - 1} where cache_seqlens reaches, "
                    f"got {table[sequence][entry]} at index [{sequence}, {entry}]"
                )


def first_visible_key(call: DecodeCall, sequence: int, length: int) -> int:
    """The first key that some query of a sequence sees: what lies before the window may have been freed."""
    if call.window[0] < 0:
        return 0
    seqlen_q = call.q.shape[-3]
    if call.cu_seqlens_q is not None:
        seqlen_q = int(call.cu_seqlens_q[sequence + 1] - call.cu_seqlens_q[sequence])
    return min(length, max(0, length - seqlen_q - call.window[0]))
