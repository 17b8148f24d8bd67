"""Keys and values of several sequences taken out of a cache at once, from pages and codes, as one dense tensor each."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer.ops.decode_attention.call import DecodeCall

Span = tuple[int, int]
_LARGEST_FLOAT8 = torch.finfo(torch.float8_e4m3fn).max


def gather(call: DecodeCall, start: int, spans: list[Span]) -> tuple[Tensor, Tensor]:
    """Keys and values ``first .. last - 1`` of the sequences from ``start`` on, in q's dtype.

    Returns:
        (len(spans), longest, num_kv_heads, head_dim) and with the values' head_dim, each sequence's from 0 on. Behind its last key stands
        that key again: nothing is read that no query may see, for it may be anything.
    """
    slots = _slots(call, start, spans)
    scales = (None, None) if call.k_scale is None else (call.k_scale, call.v_scale)
    k, v = (_take(cache, scale, slots, call.q.dtype) for cache, scale in zip((call.k_cache, call.v_cache), scales))
    return k, v


def widen(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``code · scale`` in at least float32, rounded to ``dtype``; codes (…, heads, dim), scale (heads) or (…, heads)."""
    wide = torch.promote_types(dtype, torch.float32)
    if codes.dtype == torch.float8_e4m3fn and codes.device.type == "cpu":
        found = _float8_values(codes).to(wide)
    else:
        found = codes.to(wide)
    return found.mul_(scale.to(wide)[..., None]).to(dtype)


def _float8_values(codes: Tensor) -> Tensor:
    """float8_e4m3fn as float32: torch converts one after another on a CPU, these passes run in vectors.

    Moved by seven bits a code is a float16 whose exponent is smaller by 8, subnormal numbers included; the sign, which widening to 16 bits
    has copied into the exponent too, is taken out there. Only the two codes for NaN become numbers, beyond all others.
    """
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values = bits.view(torch.float16).float().mul_(256.0)
    if values.numel():
        low, high = values.aminmax()
        if bool(high > _LARGEST_FLOAT8) or bool(low < -_LARGEST_FLOAT8):
            values.masked_fill_(values.abs() > _LARGEST_FLOAT8, torch.nan)
    return values


def _slots(call: DecodeCall, start: int, spans: list[Span]) -> Tensor:
    """Where each key lies in the cache with its first two dimensions as one: int64 (len(spans), longest)."""
    device, stop = call.q.device, start + len(spans)
    firsts, lasts = torch.tensor(spans, device=device).T
    longest = max(last - first for first, last in spans)
    keys = firsts[:, None] + torch.arange(longest, device=device)
    # Of a sequence without keys nothing is used; its place must exist nevertheless.
    keys = keys.minimum((lasts - 1)[:, None]).clamp(min=0)
    if call.cache_leftpad is not None:
        keys = keys + call.cache_leftpad[start:stop, None]
    size = call.k_cache.shape[1]
    if call.block_table is not None:
        page = call.block_table[start:stop].gather(1, keys // size)
        slots = page.long() * size + keys % size
    else:
        rows = (
            torch.arange(start, stop, device=device)
            if call.cache_batch_idx is None
            else call.cache_batch_idx[start:stop]
        )
        slots = rows.long()[:, None] * size + keys
    return torch.where((firsts >= lasts)[:, None], 0, slots)


def _take(cache: Tensor, scale: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a cache (rows, size, heads, dim), widened: (*slots.shape, heads, dim)."""
    shape = (*slots.shape, *cache.shape[2:])
    # float8 cannot be indexed, but its bytes can.
    raw = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    found = raw.flatten(0, 1).index_select(0, slots.flatten()).view(shape)
    if scale is None:
        return found
    if scale.ndim > 1:
        scale = scale.flatten(0, 1).index_select(0, slots.flatten()).view(shape[:-1])
    return widen(found.view(cache.dtype), scale, dtype)
