"""Rotary position embedding in plain PyTorch, and the frequency tables of its context-extension variants.

Pair i of the features of q and k at position p is rotated by the angle p · base^(-2i / rotary_dim), so that the inner product
of a rotated query and key depends on their contents and on the distance of their positions only.

Sources: Su et al. 2021 (RoFormer); Chen et al. 2023 (linear interpolation); bloc97 and emozilla 2023 (NTK-aware, dynamic);
Peng et al. 2023 (YaRN); Llama 3.1; Ding et al. 2024 (LongRoPE). The keys of ``scaling`` are those of Hugging Face's
``rope_scaling`` / ``rope_parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotates the first rotary_dim features of q and k by position-dependent angles.

    Args:
        q: (batch, seqlen, num_heads, head_dim), or packed (total, num_heads, head_dim); a packed tensor without ``cu_seqlens``
            is one sequence.
        k: like q with num_kv_heads, or None.
        cos, sin: (length, rotary_dim / 2) from :func:`rope_tables`; rotary_dim <= head_dim, the other features pass unchanged.
        positions: integer, (seqlen) or (batch, seqlen), packed (total). If None, position = offset + index in the sequence.
        offsets: position of each sequence's first token: an int, or an integer tensor (batch).
        cu_seqlens: int32 (batch + 1), starts of packed sequences.
        interleaved: False pairs feature i with i + rotary_dim / 2 (Llama), True pairs 2i with 2i + 1 (GPT-J, the paper).
        inplace: write into q and k and return them. Under grad with an input that requires it, computes out of place.

    Returns:
        (q, k) rotated, in their dtypes. The arithmetic is float32 (float64 for float64 inputs) with one rounding at the end.
    """
    if positions is None:
        positions = token_positions(q.shape[:-2], offsets, cu_seqlens, q.device)
    positions = positions.long()  # to torch, uint8 would be a mask
    # (..., seqlen, 1, rotary_dim / 2)
    cos_of_token, sin_of_token = cos[positions][..., None, :], sin[positions][..., None, :]
    rotated_q = _rotate(q, cos_of_token, sin_of_token, interleaved)
    rotated_k = None if k is None else _rotate(k, cos_of_token, sin_of_token, interleaved)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or (k is not None and k.requires_grad))
    if inplace and not needs_grad:
        q.copy_(rotated_q)
        if k is not None and rotated_k is not None:
            k.copy_(rotated_k)
        return q, k
    return rotated_q, rotated_k


def token_positions(
    token_shape: torch.Size | tuple[int, ...],
    offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Offset + index of every token of its sequence, int64, broadcastable to ``token_shape``: (batch, seqlen) or (total,)."""
    if cu_seqlens is None:
        index = torch.arange(token_shape[-1], device=device)
        return index + (offsets[:, None] if isinstance(offsets, Tensor) and len(token_shape) == 2 else offsets)
    positions = torch.zeros(token_shape, dtype=torch.int64, device=device)
    for sequence, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        offset = offsets[sequence] if isinstance(offsets, Tensor) else offsets
        positions[start:end] = torch.arange(end - start, device=device) + offset
    return positions


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for each pair of the first rotary_dim features."""
    rotary_dim = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    features, cos, sin = x[..., :rotary_dim].to(wide), cos.to(wide), sin.to(wide)
    first, second = (features[..., 0::2], features[..., 1::2]) if interleaved else features.chunk(2, dim=-1)
    pairs = first * cos - second * sin, second * cos + first * sin
    rotated = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([rotated.to(x.dtype), x[..., rotary_dim:]], dim=-1)


def rope_tables(
    rotary_dim: int,
    length: int,
    *,
    base: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle for positions 0 … length - 1, times the attention factor of the scaling method.

    Angles are computed in float64 on the host, the same on every device, and only the results are rounded: a float32 product
    of position and frequency would be wrong by 0.004 rad at position 100 000.

    Args:
        rotary_dim: number of features that rotate, even.
        length: number of positions. "dynamic" and "longrope" choose their frequencies for a sequence of this length.
        base: the frequencies are base^(-2i / rotary_dim). ``scaling["rope_theta"]``, where present, takes its place.
        scaling: see :func:`rope_frequencies`.
        device: where the tables are wanted.

    Returns:
        cos, sin: float32 (length, rotary_dim / 2).
    """
    frequencies, attention_factor = rope_frequencies(rotary_dim, length, base=base, scaling=scaling)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies[None, :]
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return cos.to(torch.float32).to(device), sin.to(torch.float32).to(device)


def rope_frequencies(
    rotary_dim: int, length: int, *, base: float = 10000.0, scaling: Mapping[str, Any] | None = None
) -> tuple[Tensor, float]:
    """Radians per position of each pair, float64 (rotary_dim / 2), and the factor by which cos and sin are multiplied.

    ``scaling`` is None or a mapping with "rope_type" (or the older "type") and the keys of that method:

    * "default": nothing more.
    * "linear": factor.
    * "ntk": factor. The base becomes base · factor^(d / (d - 2)): the slowest pair is stretched by factor, the fastest by 1.
    * "dynamic": factor, original_max_position_embeddings. As "ntk", with the stretch that a sequence of ``length`` needs.
    * "yarn": factor, original_max_position_embeddings; beta_fast (32), beta_slow (1), truncate (True), attention_factor or
      mscale with mscale_all_dim.
    * "llama3": factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    * "longrope": short_factor, long_factor (one number per pair), original_max_position_embeddings; factor, attention_factor.
      ``length`` beyond the original context selects the long factors, for every position.

    For "yarn" and "longrope" an absent factor is max_position_embeddings (``length`` if that is absent too) divided by
    original_max_position_embeddings.

    Raises:
        ValueError: odd or non-positive rotary_dim, an unknown method, or a missing key.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be a positive even number, got {rotary_dim}")
    scaling = {} if scaling is None else scaling
    method = scaling.get("rope_type", scaling.get("type", "default"))
    if method not in _SCALING_METHODS:
        raise ValueError(f"scaling: rope_type must be one of {sorted(_SCALING_METHODS)}, got {method!r}")
    missing = [key for key in _REQUIRED_KEYS.get(method, ()) if scaling.get(key) is None]
    if missing:
        raise ValueError(f"scaling: rope_type {method!r} needs the keys {missing}, got {sorted(scaling)}")
    return _SCALING_METHODS[method](rotary_dim, length, float(scaling.get("rope_theta", base)), scaling)


_Frequencies = tuple[Tensor, float]
_Scaling = Mapping[str, Any]


def _plain(rotary_dim: int, length: int, base: float, scaling: _Scaling) -> _Frequencies:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    return base**-exponents, 1.0


def _linear(rotary_dim: int, length: int, base: float, scaling: _Scaling) -> _Frequencies:
    frequencies, _ = _plain(rotary_dim, length, base, scaling)
    return frequencies / scaling["factor"], 1.0


def _ntk(rotary_dim: int, length: int, base: float, scaling: _Scaling) -> _Frequencies:
    return _plain(rotary_dim, length, base * scaling["factor"] ** (rotary_dim / (rotary_dim - 2)), scaling)


def _dynamic(rotary_dim: int, length: int, base: float, scaling: _Scaling) -> _Frequencies:
    factor, original_length = scaling["factor"], scaling["original_max_position_embeddings"]
    stretch = factor * max(length, original_length) / original_length - (factor - 1)  # 1 up to the original length
    return _ntk(rotary_dim, length, base, {"factor": stretch})


def _yarn(rotary_dim: int, length: int, base: float, scaling: _Scaling) -> _Frequencies:
    """Pairs that turn often within the original context keep their speed, slow ones are interpolated, others are blended."""
    original_length = scaling["original_max_position_embeddings"]
    factor = _context_ratio(length, scaling)

    def pair_that_turns(times: float) -> float:
        return rotary_dim * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.get("beta_fast") or 32), pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = ((torch.arange(rotary_dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)

    frequencies, _ = _plain(rotary_dim, length, base, scaling)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    return frequencies * (1 - interpolated) + frequencies / factor * interpolated, attention_factor


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rotary_dim: int, length: int, base: float, scaling: _Scaling) -> _Frequencies:
    """As YaRN by parts, with the borders given as numbers of turns within the original context."""
    frequencies, _ = _plain(rotary_dim, length, base, scaling)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * kept + frequencies / scaling["factor"] * (1 - kept), 1.0


def _longrope(rotary_dim: int, length: int, base: float, scaling: _Scaling) -> _Frequencies:
    original_length = scaling["original_max_position_embeddings"]
    factors = scaling["long_factor"] if length > original_length else scaling["short_factor"]
    if len(factors) != rotary_dim // 2:
        raise ValueError(f"scaling: longrope needs {rotary_dim // 2} factors (rotary_dim / 2), got {len(factors)}")
    frequencies, _ = _plain(rotary_dim, length, base, scaling)
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        factor = _context_ratio(length, scaling)
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))
    return frequencies / torch.tensor(factors, dtype=torch.float64), attention_factor


def _context_ratio(length: int, scaling: _Scaling) -> float:
    """How many times longer the context is than the original one."""
    if scaling.get("factor") is not None:
        return float(scaling["factor"])
    return float(scaling.get("max_position_embeddings") or length) / float(scaling["original_max_position_embeddings"])


_SCALING_METHODS = {
    "default": _plain,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
_REQUIRED_KEYS = {
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
