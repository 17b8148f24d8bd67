"""How a transformer is told where a token stands, besides RoPE: sinusoidal vectors, ALiBi's and T5's biases, positions that skip padding.

Sources: Vaswani et al. 2017 (sinusoidal), Press et al. 2022 (ALiBi), Raffel et al. 2020 (T5's buckets), Liu et al. 2019 (RoBERTa).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoidal_positions(
    length: int, hidden_size: int, *, halves: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d)), d = hidden_size (Vaswani et al. 2017).

    PE(pos + k) is PE(pos) times a matrix that depends on k alone, a rotation of each pair: so relative positions are easy
    to learn. ``halves`` puts all sines first and all cosines behind them (Marian). Computed in float64 on the host and
    rounded to float32: (length, hidden_size).
    """
    pairs = torch.arange(0, hidden_size + 1, 2, dtype=torch.float64)[: (hidden_size + 1) // 2]
    angles = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (pairs / hidden_size)
    waves = [angles.sin(), angles.cos()]
    table = torch.cat(waves, dim=-1) if halves else torch.stack(waves, dim=-1).flatten(-2)
    return table[:, :hidden_size].to(torch.float32).to(device)


def positions_without_padding(input_ids: Tensor, pad_token_id: int) -> Tensor:
    """0, 1, 2, … over the tokens that are not padding, which itself stands at -1 (RoBERTa): int64 like input_ids, (batch, seqlen)."""
    real = (input_ids != pad_token_id).long()
    return real.cumsum(dim=-1) * real - 1


def alibi_bias_of_keys(slopes: Tensor, key_positions: Tensor, scale: float) -> Tensor:
    """Falcon's ALiBi: slope · position of the key, in bfloat16, times ``scale``: float32 (batch, num_heads, 1, seqlen_k).

    Added to a row of causal scores it differs from ALiBi's -slope · distance by a constant, slope · position of the query, which
    the softmax does not see, and by bfloat16's rounding, which it does: from position 257 on even neighbours fall together.

    Args:
        slopes: (num_heads).
        key_positions: integer (batch, seqlen_k).
        scale: 1 / sqrt(head_dim) in Falcon, which scales the sum of q·k and bias.
    """
    products = slopes.to(torch.bfloat16)[:, None] * key_positions.to(torch.bfloat16)[:, None, :]
    return products.float()[:, :, None, :] * scale


def relative_bucket(distance: Tensor, *, num_buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """T5's bucket of a distance: small ones have a bucket each, larger ones share buckets that widen like a logarithm.

    With n buckets, e = n/2 of them are exact, and a distance d from e on lies in e + floor(log(d / e) / log(max_distance / e) · (n - e)),
    at most n - 1. Bidirectional: each direction has half of the buckets, those of later keys come second.

    Args:
        distance: integer, query position - key position (how far the key lies behind), any shape.
        num_buckets: rows of the table of biases.
        max_distance: distances from here on share the last bucket.
        bidirectional: otherwise later keys, which a causal mask hides, have bucket 0.

    Returns:
        int64, like distance. The logarithm is float32's, as T5 was trained with it.
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = torch.where(distance < 0, num_buckets, 0)
        distance = distance.abs()
    else:
        distance = distance.clamp(min=0)
    exact = num_buckets // 2
    # What is smaller than `exact` is not used here; 1 keeps the logarithm finite.
    octaves = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    shared = (exact + (octaves * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distance < exact, distance, shared)
