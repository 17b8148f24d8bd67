"""What flash_attn's documentation says its functions compute, written out densely: nothing here comes from this package.

Everything is computed in the dtype of the inputs, except that scores of 16-bit inputs are widened for the softmax and rotation happens in
float32 with one rounding, as any plain implementation has it; float64 stays float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one sequence: q (seqlen_q, heads, dim), k and v (seqlen_k, kv_heads, dim); alibi_slopes (heads)."""
    seqlen_q, seqlen_k = q.shape[0], k.shape[0]
    outs, lses = [], []
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        scores = q[:, head] @ k[:, kv_head].T * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        # "Query at position i will only attend to keys between
        # [i + seqlen_k - seqlen_q - window_size[0], i + seqlen_k - seqlen_q + window_size[1]] inclusive"
        stands_at = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
        key = torch.arange(seqlen_k, device=q.device)[None, :]
        hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        if window_size[0] >= 0:
            hidden |= key < stands_at - window_size[0]
        if window_size[1] >= 0:
            hidden |= key > stands_at + window_size[1]
        if causal:
            hidden |= key > stands_at
        if alibi_slopes is not None:
            # "A bias of (-alibi_slope * |i + seqlen_k - seqlen_q - j|)"
            scores = scores - alibi_slopes[head].to(scores.dtype) * (stands_at - key).abs()
        scores = scores.masked_fill(hidden, -math.inf)
        lse = scores.logsumexp(-1) if seqlen_k else scores.new_full((seqlen_q,), -math.inf)
        # "If the row of the mask is all zero, the output will be zero."
        empty = hidden.all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
        outs.append(weights.to(v.dtype) @ v[:, kv_head])
        lses.append(lse)
    return torch.stack(outs, 1), torch.stack(lses)


def dense(q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """(out (batch, seqlen_q, heads, dim), lse (batch, heads, seqlen_q)) of ``flash_attn_func``."""
    rows = [
        softmax_attention(q[row], k[row], v[row], alibi_slopes=slopes_of(alibi_slopes, row), **options)
        for row in range(len(q))
    ]
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


def varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out (total_q, heads, dim), lse (heads, total_q)) of ``flash_attn_varlen_func``."""
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k))
    rows = [
        softmax_attention(*part, alibi_slopes=slopes_of(alibi_slopes, row), **options) for row, part in enumerate(parts)
    ]
    return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows], dim=-1)


def slopes_of(alibi_slopes: Tensor | None, row: int) -> Tensor | None:
    """The slopes (heads) of one sequence, from (heads) or (batch, heads)."""
    return alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[row]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (seqlen, heads, dim) with the first rotary_dim features turned by the angles of ``positions`` (seqlen)."""
    half = cos.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos[positions].to(wide.dtype), sin[positions].to(wide.dtype)
    turned = wide.clone()
    for feature in range(half):
        # "combine dimensions 0 & 1, 2 & 3, etc." or "dimensions 0 & rotary_dim / 2, 1 & rotary_dim / 2 + 1"
        one, other = (2 * feature, 2 * feature + 1) if interleaved else (feature, feature + half)
        c, s = cos[:, feature, None], sin[:, feature, None]
        turned[..., one] = wide[..., one] * c - wide[..., other] * s
        turned[..., other] = wide[..., one] * s + wide[..., other] * c
    return turned.to(x.dtype)


def with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None, rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None, cache_seqlens: Tensor | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, list[tuple[int, int, int, int]]]:  # fmt: skip
    """(out, lse) of ``flash_attn_with_kvcache``, and what was written: (row or page, slot, sequence, new token). Changes the caches."""
    outs, lses, written = [], [], []
    for sequence in range(len(q)):
        length = int(cache_seqlens[sequence])

        def place(slot: int, sequence: int = sequence) -> tuple[int, int]:
            if block_table is not None:
                page_size = k_cache.shape[1]
                return int(block_table[sequence, slot // page_size]), slot % page_size
            return sequence if cache_batch_idx is None else int(cache_batch_idx[sequence]), slot

        q_new, end = q[sequence], length
        if k is not None:
            k_new = k[sequence]
            end = length + len(k_new)
            if rotary_cos is not None:
                tables = rotary_cos, rotary_sin
                ahead = torch.arange(len(q_new), device=q.device)
                # "If not causal and not local, the query @q will be rotated by rotary_cos and rotary_sin at indices cache_seqlens only"
                ahead = ahead if causal or window_size != (-1, -1) else torch.zeros_like(ahead)
                q_new = rotate(q_new, *tables, length + ahead, rotary_interleaved)
                k_new = rotate(k_new, *tables, torch.arange(length, end, device=q.device), rotary_interleaved)
            for token in range(len(k_new)):
                row, slot = place(length + token)
                k_cache[row, slot], v_cache[row, slot] = k_new[token], v[sequence, token]
                written.append((row, slot, sequence, token))
        places = [place(slot) for slot in range(0 if cache_leftpad is None else int(cache_leftpad[sequence]), end)]
        rows, slots = (torch.tensor([each[axis] for each in places], dtype=torch.long) for axis in (0, 1))
        out, lse = softmax_attention(
            q_new, k_cache[rows, slots], v_cache[rows, slots], causal=causal, window_size=window_size,
            alibi_slopes=slopes_of(alibi_slopes, sequence), **options,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses), written
