"""Appending to a KV cache in place. It has no gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pytransformer.ops.kv_append import by_cuda, by_torch, by_triton
from pytransformer.ops.kv_append.call import (
    WRITTEN,
    WRITTEN_SCALED,
    AppendCall,
    check_kv_append,
    check_values,
    refusal,
)
from pytransformer.ops.op import Op
from pytransformer.ops.registered import RegisteredOp, like


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    positions: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    q: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    norm_weight_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | None:
    """Writes new keys and values into the caches, in place: QK-norm, RoPE, quantise, write; in one launch (CUDA, Triton).

    Only the caches and per-token scales are changed, which may be views of one buffer but share no element with each other or with what
    is read; what is written without norm, RoPE or quantisation has the bits of k and v. The place of a token comes from
    ``slot_mapping``, or is position ``cache_seqlens[b] + t`` for token t of sequence b: in row b of a contiguous cache (or
    ``cache_batch_idx[b]``), or in the page that ``block_table`` gives. Not differentiable.

    Args:
        k: (batch, seqlen_new, num_kv_heads, head_dim), or packed (total, num_kv_heads, head_dim) with ``cu_seqlens`` or ``slot_mapping``.
            float32, float16, bfloat16 (float64: torch and reference only); any head_dim (CUDA: a multiple of 8 up to 256); last dimension
            contiguous. Under autocast k, v and q are cast to the dtype of floating caches.
        v: like k, with a head_dim of its own.
        k_cache: (batch, capacity, num_kv_heads, head_dim) or (pages, page_size, num_kv_heads, head_dim), any page_size from 1. Dtype of k,
            or int8 / float8_e4m3fn with scales.
        v_cache: like k_cache, with v's head_dim.
        cache_seqlens: int32 (batch), length of each sequence before appending, i.e. where writing starts. Either this or slot_mapping.
        slot_mapping: int64, one entry per token, ``page · page_size + offset``; negative = skip the token.
        block_table: int32 (batch, max_pages), with cache_seqlens: p goes to ``cache[block_table[b, p // page_size], p % page_size]``.
        cu_seqlens: int32 (batch + 1), starts of the packed sequences in k, v and q.
        cache_batch_idx: int32 (batch), with cache_seqlens and a contiguous cache: the row of each sequence.
        positions: int32 or int64, one entry per token (or (seqlen_new), the same for each sequence), for RoPE; None = the positions written
            to. Required with slot_mapping and cos.
        cos, sin: float32 (length, rotary_dim / 2) from :func:`rope_tables`; None = no rotation. Only the first rotary_dim features rotate.
        interleaved: True rotates adjacent pairs, False (Llama) pairs i with i + rotary_dim / 2.
        q: queries of the same tokens, like k with num_heads: normalised and rotated too, and returned.
        q_norm_weight, k_norm_weight: floating (head_dim), RMSNorm over each head of q and k; None = no norm.
        norm_eps: at least 0, added to the mean square.
        norm_weight_offset: added to the norm weights (1.0 for Gemma).
        k_scale, v_scale: float32, for quantised caches and required there: code = round(x / scale). Of shape (num_kv_heads) they are read;
            of shape ``cache.shape[:-1]`` they are written, one per token and head: amax(\\|x\\|) / highest code. Both alike.
        backend: "cuda", "triton", "torch" or "reference"; None takes what was set by ``use_backend`` or PYTRANSFORMER_BACKEND, else the
            first that can serve the call.

    Returns:
        The new q, in a new contiguous tensor; None if q is None.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices, strides or options that do not go together; what is written shares memory with another tensor;
            positions, slots, pages or rows that do not exist, or are written twice. Values on a GPU are not read back for this: there
            such writes are dropped, and PYTRANSFORMER_DEBUG=1 makes them raise.
        RuntimeError: grad is enabled and an input requires it.
        NotImplementedError: the named backend cannot serve this call; the message says why.

    Sources: Kwon et al. 2023 (paged caches); Su et al. 2021 (RoPE); Henry et al. 2020 (QK-norm).
    """
    given = (
        k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, slot_mapping, block_table, cu_seqlens, cache_batch_idx, positions, cos,
        sin, q, q_norm_weight, k_norm_weight, interleaved, norm_eps, norm_weight_offset,
    )  # fmt: skip
    makes_scales = isinstance(k_scale, Tensor) and k_scale.ndim > 1
    return (_APPEND_SCALED if makes_scales else _APPEND)(given, backend)  # type: ignore[no-any-return]


def _outputs(call: AppendCall, backend: str) -> tuple[Any, ...]:
    return (like(call.q),)


def _op(registered_name: str, written: tuple[str, ...]) -> Op:
    return Op(
        "kv_append",
        RegisteredOp(registered_name, AppendCall, _BACKENDS, _outputs, 1, written=written, refusal=refusal),
        check_kv_append,
        _BACKENDS,
        result=lambda call, outputs: None if call.q is None else outputs[0],
        grads=(
            "k",
            "v",
            "k_cache",
            "v_cache",
            "k_scale",
            "v_scale",
            "q",
            "q_norm_weight",
            "k_norm_weight",
            "cos",
            "sin",
        ),
        values=("cu_seqlens", "k_scale", "v_scale"),
        lengths=("cache_seqlens", "slot_mapping", "block_table", "cache_batch_idx", "positions"),
        check_lengths=check_values,
        casts=True,
    )


_BACKENDS = (by_cuda.BACKEND, by_triton.BACKEND, by_torch.BACKEND, by_torch.REFERENCE)
# Scales that are read (or absent), and scales that are written: each op declares what it changes.
_APPEND = _op("kv_append", WRITTEN)
_APPEND_SCALED = _op("kv_append_scaled", WRITTEN_SCALED)
CHOICE = _APPEND.choice
