"""Decode attention: new queries over keys and values in a cache. It has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.ops.backend import Outputs
from pytransformer.ops.decode_attention import by_cuda, by_torch, by_triton
from pytransformer.ops.decode_attention.call import DecodeCall, check_decode_attention, check_lengths, is_packed
from pytransformer.ops.op import Op
from pytransformer.ops.registered import RegisteredOp


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(softcap(q kᵀ · softmax_scale) + bias + alibi) v`` of new queries over keys and values that lie in a cache.

    Sequence b has ``cache_seqlens[b]`` keys, the newest included, and its query t of seqlen_q sits at position
    ``cache_seqlens[b] - seqlen_q + t`` among them; with d = position - key, it sees the key iff every given condition holds: causal:
    d >= 0; window: -right <= d <= left; ``mask``; ``bias`` is not -inf. A query that sees no key gives output 0 and lse -inf. Any seqlen_q
    serves: one token, a few (speculation), a chunk of a prompt. The result for a sequence has the same bits whatever else is in the
    batch, whatever the capacity, paged or not (Triton, CUDA). Not differentiable.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with ``cu_seqlens_q``. float32, float16,
            bfloat16 (float64: torch and reference only); last dimension contiguous. Any head_dim: above 256 by torch, and what is no
            multiple of 8 not by CUDA. Cast to the dtype of the cache under autocast.
        k_cache: (batch, capacity, num_kv_heads, head_dim), or (pages, page_size, num_kv_heads, head_dim) with ``block_table``, any
            page_size from 1. Dtype of q, or int8 / float8_e4m3fn with scales. num_kv_heads divides num_heads; query head h reads key
            head ``h // (num_heads // num_kv_heads)``.
        v_cache: like k_cache, with a head_dim of its own.
        cache_seqlens: int32 (batch), keys of each sequence, from 0 to the capacity.
        causal: see above; with one query per sequence it changes nothing.
        cu_seqlens_q: int32 (batch + 1), starts of the packed queries of each sequence.
        max_seqlen_q: hint for packed queries: no sequence has more. Without it nothing is read back, and more programs are launched.
        block_table: int32 (batch, max_pages): key p of sequence b is ``cache[block_table[b, p // page_size], p % page_size]``. Entries
            behind the last key, and before the window, are never used.
        cache_batch_idx: int32 (batch), the row of a contiguous cache that holds each sequence; its own index if None.
        cache_leftpad: int32 (batch): the keys of a sequence lie from this slot on (0 if None).
        softmax_scale: finite; 1 / sqrt(head_dim) if None.
        window: (left, right), inclusive, -1 = unlimited.
        softcap: c > 0 replaces a scaled score s by c · tanh(s / c).
        mask: boolean (True = attend) or integer (nonzero = attend), broadcast to (batch, num_heads, seqlen_q, longest cache_seqlens), keys
            counted from each sequence's first. Packed: max_seqlen_q for seqlen_q.
        bias: floating, broadcast likewise, added to the scores; -inf hides.
        alibi_slopes: floating (num_heads) or (batch, num_heads): -slope · |d| is added to the scores.
        sinks: floating (num_heads): a logit that joins each row's denominator and brings no value.
        k_scale, v_scale: float32, for quantised caches and required there: key = code · scale; (num_kv_heads), or per token
            ``cache.shape[:-1]``, both alike.
        num_splits: how many programs share a sequence's keys; 0 leaves it to the launch policy. A fixed number changes the order of
            summation, never the meaning.
        return_lse: return the log-sum-exp too.
        backend: "triton", "cuda", "torch" or "reference"; None takes what was set by ``use_backend`` or PYTRANSFORMER_BACKEND, else the
            first that can serve the call. The reference serves by name only.

    Returns:
        (batch, seqlen_q, num_heads, value head_dim) or (total_q, num_heads, value head_dim) in q's dtype. With ``return_lse`` also the
        natural logarithm of each row's softmax denominator, sinks included: (batch, num_heads, seqlen_q) or (num_heads, total_q),
        float32 (float64 for float64 inputs).

    Raises:
        TypeError: a wrong type or dtype, such as a floating-point ``mask`` (additive masks are
            passed as ``bias``, those of ones and zeros as ``mask.bool()``).
        ValueError: shapes, devices, strides, head counts, head_dim that do not fit; lengths past the cache's end and pages that do not
            exist (values on a GPU are read under PYTRANSFORMER_DEBUG=1 only; without it lengths are cut to the cache there).
        RuntimeError: grad is enabled and an input requires it.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    Sources: Dao et al. 2023 (Flash-Decoding); Kwon et al. 2023 (paged caches); Ainslie et al. 2023 (GQA).
    """
    given = (
        q, k_cache, v_cache, cache_seqlens, cu_seqlens_q, block_table, cache_batch_idx, cache_leftpad, mask, bias, alibi_slopes, sinks,
        k_scale, v_scale, max_seqlen_q, softmax_scale, causal, window, softcap, num_splits, return_lse,
    )  # fmt: skip
    return _DECODE(given, backend)  # type: ignore[no-any-return]


def _outputs(call: DecodeCall, backend: str) -> tuple[Any, ...]:
    """(out, lse) as (shape, dtype)."""
    out = (*call.q.shape[:-1], call.v_cache.shape[-1]), call.q.dtype
    if backend == "torch" and not call.return_lse:
        return out, None
    q = call.q.shape
    lse = (q[1], q[0]) if is_packed(call) else (q[0], q[2], q[1])
    return out, (lse, torch.promote_types(call.q.dtype, torch.float32))


def _result(call: DecodeCall, outputs: Outputs) -> Tensor | tuple[Tensor, Tensor]:
    return outputs if call.return_lse else outputs[0]  # type: ignore[return-value]


# CUDA stands behind Triton until it has been measured on a GPU.
_BACKENDS = (by_triton.BACKEND, by_cuda.BACKEND, by_torch.BACKEND, by_torch.REFERENCE)
_DECODE = Op(
    "decode_attention",
    RegisteredOp("decode_attention", DecodeCall, _BACKENDS, _outputs, 2),
    check_decode_attention,
    _BACKENDS,
    result=_result,
    grads=("q", "k_cache", "v_cache", "bias", "alibi_slopes", "sinks", "k_scale", "v_scale"),
    values=("cu_seqlens_q", "mask", "bias", "k_scale", "v_scale"),
    lengths=("cache_seqlens", "block_table", "cache_batch_idx", "cache_leftpad"),
    check_lengths=check_lengths,
    casts=True,
)
CHOICE = _DECODE.choice
