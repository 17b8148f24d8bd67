"""Appending new keys and values to a KV cache, in plain PyTorch.

The order is QK-norm, RoPE, quantise, write. The first two round to the dtype of k (or q), exactly as if ``rms_norm`` and ``rope``
had been called one after the other: so a cached decode step sees the very keys that a forward pass without a cache computes.

**Quantisation.** A cache of int8 or float8_e4m3fn holds codes; a key is ``code · scale``. All arithmetic is float32 (x is widened)::

    code = round(clamp(x / scale, lowest, highest))      round half to even;  int8: -128 … 127;  float8_e4m3fn: -448 … 448

* Scales of shape (num_kv_heads) are read: fixed beforehand, one per head; values beyond the range saturate.
* Scales of shape ``cache.shape[:-1]`` are written: each new token and head gets ``amax(|x|) / highest`` with highest 127 or 448,
  and 1 where amax is 0 (or so small that the quotient underflows to 0), so that no division by zero follows.

Both divisions are IEEE float32 divisions, not multiplications by a reciprocal: codes are compared bit by bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .norm import rms_norm
from .rope import rope, token_positions

HIGHEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LOWEST_CODE = {torch.int8: -128.0, torch.float8_e4m3fn: -448.0}


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
) -> Tensor | None:
    """Writes new keys and values into the caches, in place.

    Args:
        k: (batch, seqlen_new, num_kv_heads, head_dim), or packed (total, num_kv_heads, head_dim) with ``cu_seqlens`` or ``slot_mapping``.
        v: like k, with a head_dim of its own.
        k_cache: (batch, capacity, num_kv_heads, head_dim) or (pages, page_size, num_kv_heads, head_dim).
        v_cache: like k_cache, with v's head_dim.
        cache_seqlens: int32 (batch), the length of each sequence before appending: token t of sequence b is written at position
            ``cache_seqlens[b] + t``, in row b (or ``cache_batch_idx[b]``), or in the page that ``block_table`` gives.
        slot_mapping: int64, one per token: ``page · page_size + offset``; negative = do not write. Instead of cache_seqlens.
        block_table: int32 (batch, max_pages): position p is at ``cache[block_table[b, p // page_size], p % page_size]``.
        cu_seqlens: int32 (batch + 1), starts of the packed sequences in k, v and q.
        cache_batch_idx: int32 (batch), the cache row of each sequence; contiguous caches only.
        positions: integer, one per token, flat or in the shape of k's first dimensions, or (seqlen_new) for all sequences; for RoPE. If
            None, the positions written to; required with slot_mapping and cos.
        cos, sin: (length, rotary_dim / 2) from ``rope_tables``; None = no rotation.
        interleaved: pairing of features, see ``rope``.
        q: queries of the same tokens, (batch, seqlen_new, num_heads, head_dim) or packed: normalised and rotated like k.
        q_norm_weight, k_norm_weight: (head_dim), RMSNorm over each head; None = no norm.
        norm_eps, norm_weight_offset: of those norms.
        k_scale, v_scale: float32, for int8 and float8_e4m3fn caches: (num_kv_heads) is read, ``cache.shape[:-1]`` is written.

    Returns:
        The new q in a new tensor, or None if q is None. Only the caches and per-token scales are changed. A write outside the
        cache (a position, row, page or slot that does not exist) is dropped.

    Raises:
        ValueError: neither cache_seqlens nor slot_mapping, or both; cos with slot_mapping but without positions.
    """
    if (cache_seqlens is None) == (slot_mapping is None):
        raise ValueError("give either cache_seqlens or slot_mapping: they say where to write")
    if cos is not None and positions is None and slot_mapping is not None:
        raise ValueError(
            "positions are required when cos is given with slot_mapping: slots say nothing about positions"
        )

    if k_norm_weight is not None:
        k = _plain_rms_norm(k, k_norm_weight, norm_eps, norm_weight_offset)
    if q is not None and q_norm_weight is not None:
        q = _plain_rms_norm(q, q_norm_weight, norm_eps, norm_weight_offset)
    if cos is not None and sin is not None:
        if positions is not None and positions.numel() == math.prod(k.shape[:-2]):
            positions = positions.reshape(k.shape[:-2])
        if positions is None and cache_seqlens is not None:
            positions = token_positions(k.shape[:-2], cache_seqlens, cu_seqlens, k.device)
        # Tokens whose write is dropped may lie beyond the table; they take its last row, and nobody reads the result.
        positions = None if positions is None else positions.clamp(0, len(cos) - 1)
        k, _ = rope(k, None, cos, sin, positions=positions, interleaved=interleaved)
        q = None if q is None else rope(q, None, cos, sin, positions=positions, interleaved=interleaved)[0]

    if slot_mapping is not None:
        rows, slots = _places_of_slots(slot_mapping, k_cache)
    elif cache_seqlens is not None:
        rows, slots = _places_of_positions(k, k_cache, cache_seqlens, block_table, cu_seqlens, cache_batch_idx)
    _write(k, k_cache, k_scale, rows, slots)
    _write(v, v_cache, v_scale, rows, slots)
    return None if q is None else q.clone()


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes of x for the given scales (broadcastable to x): see the head of this file."""
    scaled = (x.to(scale.dtype) / scale).clamp(LOWEST_CODE[dtype], HIGHEST_CODE[dtype])
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)  # both roundings are half to even


def per_token_scale(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x.shape[:-1]: the scale with which the largest feature of each token and head gets the highest code."""
    scale = x.abs().amax(dim=-1).to(torch.float32) / HIGHEST_CODE[dtype]
    return torch.where(scale > 0, scale, 1.0)


def _plain_rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    y = rms_norm(x, weight, eps=eps, weight_offset=weight_offset)
    assert isinstance(y, Tensor)
    return y


def _places_of_slots(slot_mapping: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    """(page, offset) of each token; page -1 for the slots that are to be skipped or do not exist."""
    page_size = max(cache.shape[1], 1)  # of pages without slots none is written
    slots = slot_mapping.flatten().long()
    exists = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    return torch.where(exists, slots // page_size, -1), torch.where(exists, slots % page_size, 0)


def _places_of_positions(
    k: Tensor,
    cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(row or page, offset) of each token of k, -1 for row where there is no such place."""
    rows = torch.full(k.shape[:-2], -1, device=k.device)
    slots = torch.zeros_like(rows)
    for sequence, length_before in enumerate(cache_seqlens.tolist()):
        new = sequence if cu_seqlens is None else slice(int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1]))
        position = length_before + torch.arange(len(k[new]), device=k.device)
        if block_table is not None:
            page_size, max_pages = max(cache.shape[1], 1), block_table.shape[1]
            exists = (position >= 0) & (position < max_pages * cache.shape[1])
            page = torch.full_like(position, -1)
            page[exists] = block_table[sequence, position[exists] // page_size].long()
            exists = exists & (page >= 0) & (page < cache.shape[0])
            rows[new], slots[new] = torch.where(exists, page, -1), position % page_size
        else:
            row = sequence if cache_batch_idx is None else int(cache_batch_idx[sequence])
            exists = (position >= 0) & (position < cache.shape[1]) & (0 <= row < cache.shape[0])
            rows[new], slots[new] = torch.where(exists, row, -1), position
    return rows.flatten(), slots.flatten()


def _write(x: Tensor, cache: Tensor, scale: Tensor | None, rows: Tensor, slots: Tensor) -> None:
    """Quantises the tokens of x if the cache holds codes, and writes those that have a place."""
    tokens = x.reshape(-1, *x.shape[-2:])[rows >= 0]  # (written tokens, num_kv_heads, head_dim)
    rows, slots = rows[rows >= 0], slots[rows >= 0]
    if cache.dtype not in HIGHEST_CODE:
        cache[rows, slots] = tokens.to(cache.dtype)
        return
    if scale is None:
        scale_of_token = torch.ones(x.shape[-2], device=x.device)
    elif scale.dim() == 1:
        scale_of_token = scale
    else:
        scale_of_token = per_token_scale(tokens, cache.dtype)
        scale[rows, slots] = scale_of_token
    codes = quantize(tokens, scale_of_token[..., None], cache.dtype)
    # Indexing is not defined on float8, but on its bytes.
    cache.view(torch.uint8)[rows, slots] = codes.view(torch.uint8)
