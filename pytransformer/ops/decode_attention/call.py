"""A call of decode attention, and the checks of every argument on the host, each error naming what is allowed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.cache_checks import (
    CACHE_DTYPES,
    CACHE_LAYOUT,
    QUANTISED_DTYPES,
    capacity_of,
    check_cache_dtype,
    check_index,
    check_pages,
    check_rows,
    check_scales,
)
from pytransformer.ops.precision import autocast_to_lower, is_autocasting
from pytransformer.ops.score_checks import (
    Extent,
    Scores,
    check_length_hint,
    check_score_terms,
    check_softmax_scale,
    four_dims,
    longest,
)


class DecodeCall(NamedTuple):
    """The arguments of one call. Checked: masks boolean, softmax_scale a number, mask and bias of four dimensions."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    cu_seqlens_q: Tensor | None
    block_table: Tensor | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None
    max_seqlen_q: int | None
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


def check_decode_attention(call: DecodeCall) -> DecodeCall:
    """Checks a call as the user gave it and returns it normalised; see ``decode_attention`` for the errors."""
    call = _check_q_and_caches(call)
    call = _check_places(call)
    check_scales(call)
    call = call._replace(
        causal=checks.check_bool("causal", call.causal),
        window=checks.check_window("window", call.window),
        softmax_scale=check_softmax_scale(call.softmax_scale, call.q.shape[-1]),
        softcap=checks.check_float("softcap", call.softcap, minimum=0.0),
        num_splits=checks.check_int("num_splits", call.num_splits, minimum=0),
        return_lse=checks.check_bool("return_lse", call.return_lse),
    )
    if not (call.mask is call.bias is call.alibi_slopes is call.sinks is None):
        call = _check_score_terms(call)
    if checks.readable(call.cache_seqlens):
        check_lengths(call)
    return call


def _check_q_and_caches(call: DecodeCall) -> DecodeCall:
    rank, layout = (4, "(batch, seqlen_q, num_heads, head_dim)")
    if is_packed(call):
        rank, layout = (3, "(total_q, num_heads, head_dim)")
    q = checks.check_tensor("q", call.q, ndim=rank, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE, layout=layout)
    k_cache, v_cache = (
        checks.check_tensor(name, cache, ndim=4, dtypes=CACHE_DTYPES, device=q.device, layout=CACHE_LAYOUT)
        for name, cache in (("k_cache", call.k_cache), ("v_cache", call.v_cache))
    )
    checks.check_same_dtype("v_cache", v_cache, "k_cache", k_cache)
    if is_autocasting(q.device.type):
        # A cache is as it is; q is brought to it.
        q = autocast_to_lower(q) if k_cache.dtype in QUANTISED_DTYPES else q.to(k_cache.dtype)
    check_cache_dtype("k_cache", k_cache, "q", q)
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


def _check_places(call: DecodeCall) -> DecodeCall:
    """cache_seqlens, cu_seqlens_q, block_table, cache_batch_idx, cache_leftpad: shapes, dtypes and how they go together."""
    device = call.q.device
    checks.check_tensor(
        "cache_seqlens", call.cache_seqlens, ndim=1, dtypes=(torch.int32,), device=device, layout="(batch)"
    )
    batch = batch_size(call)
    if call.cu_seqlens_q is not None:
        checks.check_cu_seqlens("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[0], device, batch)
    elif call.q.shape[0] != batch:
        raise ValueError(f"cache_seqlens must have shape (batch) = ({call.q.shape[0]}), got {(batch,)}")
    check_index("cache_seqlens", call.cache_seqlens, batch, device)
    hint = check_length_hint("q", call.max_seqlen_q, call.cu_seqlens_q, "queries")
    if call.cache_leftpad is not None:
        check_index("cache_leftpad", call.cache_leftpad, batch, device)
    check_rows(call, batch, hint="block_table or cache_batch_idx")
    return call._replace(max_seqlen_q=hint)


def _check_score_terms(call: DecodeCall) -> DecodeCall:
    """mask, bias, alibi_slopes, sinks; mask and bias get four dimensions, with rows and keys for the longest sequences."""
    rows = Extent(call.q.shape[1]) if call.cu_seqlens_q is None else Extent(longest(call.cu_seqlens_q), True)
    keys = None
    if checks.readable(call.cache_seqlens):
        keys = max(call.cache_seqlens.tolist(), default=0)
    layout = "(batch, num_heads, seqlen_q, longest cache_seqlens)"
    scores = Scores(batch_size(call), call.q.shape[-2], rows, Extent(keys, True), layout)
    call = check_score_terms(call, scores)
    for name, slopes in (("alibi_slopes", call.alibi_slopes), ("sinks", call.sinks)):
        if slopes is not None:
            checks.check_last_dim_contiguous(name, slopes)
    mask, bias = (None if tensor is None else four_dims(tensor) for tensor in (call.mask, call.bias))
    return call._replace(mask=mask, bias=bias)


def check_lengths(call: DecodeCall) -> None:
    """Values of cache_seqlens, cache_leftpad and the pages that hold visible keys."""
    if call.cache_batch_idx is not None:
        checks.check_values("cache_batch_idx", call.cache_batch_idx, 0, call.k_cache.shape[0] - 1, "rows of the cache")
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
        firsts = (first_visible_key(call, sequence, length) for sequence, length in enumerate(lengths))
        spans = (
            (pad + first, pad + length) if length else (0, 0) for first, length, pad in zip(firsts, lengths, leftpads)
        )
        check_pages(call, spans, "cache_seqlens reaches")


def first_visible_key(call: DecodeCall, sequence: int, length: int) -> int:
    """The first key that some query of a sequence sees: what lies before the window may have been freed."""
    seqlen_q = call.q.shape[-3]
    if call.cu_seqlens_q is not None:
        seqlen_q = int(call.cu_seqlens_q[sequence + 1] - call.cu_seqlens_q[sequence])
    if seqlen_q == 0:
        return length
    if call.window[0] < 0:
        return 0
    return min(length, max(0, length - seqlen_q - call.window[0]))
