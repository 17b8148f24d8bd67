"""The plain formulas: in float64 they are the golden result, in bfloat16 they are what torch.compile is given."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32, as every implementation computes inside."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *, centred: bool, eps: float
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm, or LayerNorm if ``centred``; with residual also the sum, which is rounded before it is normalised."""
    total = x if residual is None else (wide(x) + wide(residual)).to(residual.dtype)
    found = wide(total)
    if centred:
        found = found - found.mean(-1, keepdim=True)
    found = found * torch.rsqrt(found.square().mean(-1, keepdim=True) + eps) * weight
    if bias is not None:
        found = found + bias
    return found.to(x.dtype) if residual is None else (found.to(x.dtype), total)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in half layout of (…, seqlen, num_heads, head_dim) with tables (…, seqlen, head_dim / 2)."""
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one function, so that torch.compile may fuse them."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def head_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm of each head, in float32 and not rounded: RoPE follows in the same kernel."""
    found = wide(x)
    return found * torch.rsqrt(found.square().mean(-1, keepdim=True) + eps) * weight


def append_(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, q: Tensor | None = None, cos: Tensor | None = None,
    sin: Tensor | None = None, q_norm_weight: Tensor | None = None, k_norm_weight: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Writes k and v, normalised and rotated where the rest is given, into contiguous caches; returns q, likewise."""
    batch, tokens = k.shape[:2]
    sequences = torch.arange(batch, device=k.device)[:, None]
    slots = cache_seqlens.long()[:, None] + torch.arange(tokens, device=k.device)
    if q is not None:
        assert cos is not None and sin is not None and q_norm_weight is not None and k_norm_weight is not None
        cos, sin = cos[slots], sin[slots]
        k = rotate(head_norm(k, k_norm_weight), cos, sin).to(k.dtype)
        q = rotate(head_norm(q, q_norm_weight), cos, sin).to(q.dtype)
    k_cache.index_put_((sequences, slots), k)
    v_cache.index_put_((sequences, slots), v)
    return q


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The usual two steps: all logits, then their mean cross-entropy in float32."""
    return F.cross_entropy(wide(F.linear(x, weight)), targets)


def linear_attention_rows(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, decay: Tensor | None) -> Tensor:
    """Of causal linear attention with elu's features the results of these queries, (batch, tokens, num_heads, value_dim): the weights of
    all keys written out."""
    group = q.shape[2] // k.shape[2]
    features_q, features_k = F.elu(q[:, tokens]) + 1, F.elu(k) + 1
    weights = torch.einsum("bihd,bjhd->bhij", features_q, features_k.repeat_interleave(group, 2))
    distance = tokens[:, None] - torch.arange(k.shape[1], device=k.device)
    visible = (distance >= 0).to(q.dtype)
    if decay is not None:
        powers = decay.to(q.dtype)[:, None, None] ** distance.clamp_min(0)
        visible = (visible * powers).repeat_interleave(group, 0)
    weights = weights * visible
    return torch.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdim=True), v.repeat_interleave(group, 2))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)
