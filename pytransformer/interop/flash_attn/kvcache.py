"""``flash_attn_with_kvcache``: append to a cache in place and attend to it, on kv_append, rope and decode_attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.interop.flash_attn.checks import (
    check_alibi_slopes,
    check_dimensions,
    raises_as_flash_attn,
    softcap_of,
    window_of,
    with_contiguous_rows,
)
from pytransformer.ops import checks
from pytransformer.ops.decode_attention import decode_attention
from pytransformer.ops.kv_append import kv_append
from pytransformer.ops.rope import rope

MAX_SPLITS = 128


class Rotary(NamedTuple):
    """Tables in float32, as the ops want them, and how they apply."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


class Cache(NamedTuple):
    """The caches, where each sequence lies in them, and its length before anything is appended, left padding included."""

    k: Tensor
    v: Tensor
    seqlens: Tensor
    batch_idx: Tensor | None
    leftpad: Tensor | None
    block_table: Tensor | None


# A function rather than a property: the tracer of torch 2.10 follows no property of a NamedTuple.
def capacity_of(cache: Cache) -> int:
    """Slots that one sequence can have."""
    pages = 1 if cache.block_table is None else cache.block_table.shape[1]
    return pages * cache.k.shape[1]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the caches, in place, rotates q and k where tables are given, and attends q to all that is then cached.

    The new keys go to the slots cache_seqlens, cache_seqlens + 1, …; the keys of a sequence are the slots from cache_leftpad to there.
    Masks are aligned bottom-right: the last query stands at the last key. The caches are the only arguments that change, which the ops
    declare, so the function compiles with ``fullgraph=True``. Not differentiable.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), dtype of the caches; float16 or bfloat16, here also float32. Any head_dim.
        k_cache, v_cache: (rows, capacity, num_kv_heads, head_dim), or (pages, page_size, num_kv_heads, head_dim) with ``block_table``,
            here any page_size from 1.
        k, v: (batch, seqlen_new, num_kv_heads, head_dim), both or neither; ``cache_seqlens`` is then required.
        rotary_cos, rotary_sin: (length, rotary_dim / 2) in q's dtype, here also float32; length at least the capacity. Only with k and v.
            k is rotated at the positions it is written to. q is rotated at cache_seqlens + i if causal or with a window, else all of q
            at cache_seqlens.
        cache_seqlens: int32 (batch), or an int for all: length of each sequence before appending, the left padding **included**. None =
            the whole cache.
        cache_batch_idx: int32 (batch), the row of each sequence, for caches without ``block_table``.
        cache_leftpad: int32 (batch), the first slot of each sequence (0 if None); here also with ``block_table``.
        block_table: int32 (batch, max_pages): slot p of sequence b is ``cache[block_table[b, p // page_size], p % page_size]``.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in :func:`flash_attn_func`.
        rotary_interleaved: True rotates adjacent pairs of features, False (Llama, GPT-NeoX) pairs i with i + rotary_dim / 2.
        num_splits: how many programs share a sequence's keys, at most 128; 0 leaves it to the launch policy.
        return_softmax_lse: return the log-sum-exp too.

    Returns:
        out (batch, seqlen_q, num_heads, value head_dim) in q's dtype; with ``return_softmax_lse`` also float32 (batch, num_heads,
        seqlen_q), the natural logarithm of each row's softmax denominator.

    Raises:
        AssertionError: a cache whose last dimension is not contiguous.
        TypeError: q or a cache is not a tensor.
        IndexError: too few dimensions.
        RuntimeError: any other argument that does not fit; grad is enabled and an input requires it (flash_attn would give a result
            without gradient). Lengths, rows and pages that live on a GPU are not read back: writes out of range are dropped there, and
            PYTRANSFORMER_DEBUG=1 makes them raise.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_dimensions(name, cache, "(rows or pages, slots, num_kv_heads, head_dim)")
        if cache.stride(-1) != 1:
            raise AssertionError(f"{name} must have a contiguous last dimension, got strides {tuple(cache.stride())}")
    check_dimensions("q", q, "(batch, seqlen_q, num_heads, head_dim)")
    return _append_and_attend(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table, softmax_scale,
        causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits, return_softmax_lse,
    )  # fmt: skip


@raises_as_flash_attn
def _append_and_attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any, rotary_cos: Any, rotary_sin: Any, cache_seqlens: Any,
    cache_batch_idx: Any, cache_leftpad: Any, block_table: Any, softmax_scale: float | None, causal: bool, window_size: Any, softcap: Any,
    rotary_interleaved: bool, alibi_slopes: Any, num_splits: int, return_softmax_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    # Everything is checked before anything is written.
    options: dict[str, Any] = {
        "causal": checks.check_bool("causal", causal),
        "window": window_of(window_size),
        "softmax_scale": None if softmax_scale is None else checks.check_float("softmax_scale", softmax_scale),
        "softcap": softcap_of(softcap),
        "alibi_slopes": alibi_slopes,
        "num_splits": max(checks.check_int("num_splits", num_splits, maximum=MAX_SPLITS), 0),
        "return_lse": checks.check_bool("return_softmax_lse", return_softmax_lse),
    }
    _check_tensors(q, k_cache, v_cache, k, v, cache_seqlens)
    check_alibi_slopes(alibi_slopes, q.shape[0], q.shape[2])
    cache = _cache(q, k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    new_tokens = 0 if k is None else k.shape[1]
    _check_lengths(q, cache, new_tokens)
    rotary = _rotary(q, k, cache, rotary_cos, rotary_sin, rotary_interleaved)
    q = with_contiguous_rows(q)
    if k is not None:
        new = with_contiguous_rows(k), with_contiguous_rows(v)
        q = _append(q, *new, cache, rotary, options["causal"] or options["window"] != (-1, -1))
    seqlens = cache.seqlens + new_tokens
    return decode_attention(
        q,
        cache.k,
        cache.v,
        # The op counts the keys, flash_attn the slots.
        seqlens if cache.leftpad is None else seqlens - cache.leftpad,
        block_table=cache.block_table,
        cache_batch_idx=cache.batch_idx,
        cache_leftpad=cache.leftpad,
        **options,
    )


def _append(q: Tensor, k: Tensor, v: Tensor, cache: Cache, rotary: Rotary | None, in_order: bool) -> Tensor:
    """Writes k and v; returns q, rotated where there are tables: query i at its own position if ``in_order``, else all at the first."""
    where: dict[str, Any] = {
        "cache_seqlens": cache.seqlens, "block_table": cache.block_table, "cache_batch_idx": cache.batch_idx,
    }  # fmt: skip
    if rotary is None:
        kv_append(k, v, cache.k, cache.v, **where)
        return q
    same_tokens = q.shape[1] == k.shape[1] and (in_order or q.shape[1] == 1)
    rotated = kv_append(
        k, v, cache.k, cache.v, cos=rotary.cos, sin=rotary.sin, interleaved=rotary.interleaved, q=q if same_tokens else None, **where
    )  # fmt: skip
    if rotated is not None:
        return rotated
    if in_order:
        return rope(q, None, rotary.cos, rotary.sin, offsets=cache.seqlens, interleaved=rotary.interleaved)[0]
    positions = cache.seqlens[:, None].expand(q.shape[:2])
    return rope(q, None, rotary.cos, rotary.sin, positions=positions, interleaved=rotary.interleaved)[0]


def _check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any, v: Any, cache_seqlens: Any) -> None:
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    if (k is None) != (v is None):
        given, missing = ("v", "k") if k is None else ("k", "v")
        raise RuntimeError(f"k and v go together: {given} is given, {missing} is None")
    if k is not None:
        if cache_seqlens is None:
            raise RuntimeError("cache_seqlens must be given with k and v: it says where they go")
        layout = "(batch, seqlen_new, num_kv_heads, head_dim)"
        tensors["k"] = checks.check_tensor("k", k, ndim=4, layout=layout)
        tensors["v"] = checks.check_tensor("v", v, ndim=4, layout=layout)
    for name, tensor in tensors.items():
        if tensor.dtype != q.dtype:
            hint = ""
            if name.endswith("cache") and tensor.dtype in (torch.int8, torch.float8_e4m3fn):
                hint = "; pytransformer.decode_attention serves quantised caches, with k_scale and v_scale"
            raise RuntimeError(
                f"{name} must have the dtype of q ({checks.short(q.dtype)}), got {checks.short(tensor.dtype)}{hint}"
            )
    num_kv_heads, head_dim = k_cache.shape[2:]
    checks.check_gqa(q.shape[2], num_kv_heads, "q", "k_cache")
    checks.check_shape("q", q, (None, None, None, head_dim), "(batch, seqlen_q, num_heads, head_dim of k_cache)")
    checks.check_shape("v_cache", v_cache, (*k_cache.shape[:3], None), "(first three sizes of k_cache, value head_dim)")
    if k is not None:
        checks.check_shape("k", k, (q.shape[0], None, num_kv_heads, head_dim), layout)
        checks.check_shape("v", v, (*k.shape[:3], v_cache.shape[3]), "(first three sizes of k, head_dim of v_cache)")
    checks.refuse_grad("flash_attn_with_kvcache", **tensors)


def _cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Any, cache_batch_idx: Any, cache_leftpad: Any, block_table: Any
) -> Cache:  # fmt: skip
    batch = q.shape[0]
    if block_table is not None:
        if cache_batch_idx is not None:
            raise RuntimeError("cache_batch_idx is for contiguous caches: block_table lists each sequence's pages")
        checks.check_tensor("block_table", block_table, ndim=2, dtypes=(torch.int32,), layout="(batch, max_pages)")
        checks.check_shape("block_table", block_table, (batch, None), "(batch, max_pages)")
        block_table = with_contiguous_rows(block_table)
    elif cache_batch_idx is None:
        # A cache may have more rows than the batch has sequences, which are then its first.
        if k_cache.shape[0] < batch:
            raise RuntimeError(
                f"k_cache must have a row for each of {batch} sequences, got shape {tuple(k_cache.shape)}"
            )
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    indices = {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    cache = Cache(k_cache, v_cache, q, None, None, block_table)  # q only until the lengths are known
    if cache_seqlens is None or not isinstance(cache_seqlens, Tensor):
        length = (
            capacity_of(cache) if cache_seqlens is None else checks.check_int("cache_seqlens", cache_seqlens, minimum=0)
        )
        indices["cache_seqlens"] = torch.full((batch,), length, dtype=torch.int32, device=k_cache.device)
    for name, value in indices.items():
        if value is not None:
            checks.check_tensor(name, value, ndim=1, dtypes=(torch.int32,), device=q.device, layout="(batch)")
            checks.check_shape(name, value, (batch,), "(batch)")
            indices[name] = value.contiguous()
    return cache._replace(
        seqlens=indices["cache_seqlens"], batch_idx=indices["cache_batch_idx"], leftpad=indices["cache_leftpad"]
    )


def _check_lengths(q: Tensor, cache: Cache, new_tokens: int) -> None:
    """Room for the queries and, where values may be read, for the new tokens, and no left padding longer than the sequence."""
    capacity = capacity_of(cache)
    if new_tokens and q.shape[1] > capacity:
        raise RuntimeError(f"q must have at most as many rows as the cache has slots ({capacity}), got {q.shape[1]}")
    meaning = f"lengths that leave room for {new_tokens} new tokens" if new_tokens else "lengths"
    checks.check_values("cache_seqlens", cache.seqlens, 0, capacity - new_tokens, meaning)
    if cache.leftpad is not None:
        checks.check_values("cache_leftpad", cache.leftpad, 0, capacity, "slots to skip")
        checks.check_values("cache_seqlens - cache_leftpad", cache.seqlens - cache.leftpad, 0, capacity, "keys")


def _rotary(q: Tensor, k: Any, cache: Cache, cos: Any, sin: Any, interleaved: bool) -> Rotary | None:
    checks.check_bool("rotary_interleaved", interleaved)
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        given, missing = ("sin", "cos") if cos is None else ("cos", "sin")
        raise RuntimeError(f"rotary_cos and rotary_sin go together: rotary_{given} is given, rotary_{missing} is None")
    if k is None:
        raise RuntimeError("rotary_cos and rotary_sin rotate what is appended: k and v must be given with them")
    layout = "(length, rotary_dim / 2)"
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.check_tensor(name, table, ndim=2, dtypes=(q.dtype, torch.float32), device=q.device, layout=layout)
    checks.check_shape("rotary_sin", sin, tuple(cos.shape), "of rotary_cos")
    if 2 * cos.shape[1] > q.shape[-1]:
        raise RuntimeError(f"rotary_cos: rotary_dim must be at most head_dim ({q.shape[-1]}), got {2 * cos.shape[1]}")
    if cos.shape[0] < capacity_of(cache):
        raise RuntimeError(
            f"rotary_cos must have a row for each slot of the cache ({capacity_of(cache)}), got shape {tuple(cos.shape)}"
        )
    return Rotary(cos.detach().float().contiguous(), sin.detach().float().contiguous(), interleaved)
