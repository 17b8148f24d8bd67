"""Linear attention in plain PyTorch: one token after another, with every state in memory.

Without a softmax the sum over the keys can be taken before the query is known: a matrix for each head, the state, to which a token adds
the product of its features and its value. Sources: Katharopoulos et al. 2020; Sun et al. 2023 (RetNet) for the decay.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str | None = "elu",
    causal: bool = True,
    normalize: bool = True,
    decay: Tensor | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """φ(q_t) S_t / (φ(q_t) · z_t) with S_t = decay · S_{t-1} + φ(k_t) v_tᵀ and z_t = decay · z_{t-1} + φ(k_t).

    Args:
        q: (batch, seqlen_q, num_heads, head_dim).
        k: (batch, seqlen_k, num_kv_heads, head_dim); query head h reads key head ``h // (num_heads // num_kv_heads)``.
        v: (batch, seqlen_k, num_kv_heads, value_dim).
        feature_map: "elu", φ(x) = elu(x) + 1, or None, φ(x) = x.
        causal: query t reads the state after token t; False: every query reads the last state.
        normalize: divide as above, where a denominator of exactly 0 counts as 1.
        decay: (num_kv_heads), factors from 0 to 1; None = 1.
        initial_state: (S, z) before the first token; None = zeros.
        return_state: return the last (S, z) too.

    Returns:
        (batch, seqlen_q, num_heads, value_dim) in q's dtype, in which the products with φ(q) are computed. S: (batch, num_kv_heads,
        head_dim, value_dim) and z: (batch, num_kv_heads, head_dim), in which sums are taken, in float32 (float64 for float64 inputs).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, seqlen, num_kv_heads, head_dim = k.shape
    features_q, features_k = (x if feature_map is None else _elu_plus_one(x) for x in (q, k))
    features_q = torch.unflatten(features_q, 2, (num_kv_heads, q.shape[2] // num_kv_heads))
    factor = q.new_ones(num_kv_heads, dtype=wide) if decay is None else decay.to(wide)
    zeros = torch.zeros(batch, num_kv_heads, head_dim, v.shape[-1] + 1, dtype=wide, device=q.device)
    state, normalizer = (
        (zeros[..., :-1], zeros[..., -1])
        if initial_state is None
        else (initial_state[0].to(wide), initial_state[1].to(wide))
    )
    states, normalizers = [state], [normalizer]
    for token in range(seqlen):
        added = features_k[:, token].to(wide)
        state = factor[:, None, None] * state + added[..., :, None] * v[:, token].to(wide)[..., None, :]
        normalizer = factor[:, None] * normalizer + added
        states.append(state)
        normalizers.append(normalizer)

    read = slice(1, None) if causal else slice(seqlen, None)
    output = torch.einsum("bthgd,bthde->bthge", features_q, torch.stack(states, dim=1)[:, read].to(q.dtype))
    if normalize:
        sums = torch.einsum("bthgd,bthd->bthg", features_q, torch.stack(normalizers, dim=1)[:, read].to(q.dtype))
        output = output / sums.masked_fill(sums == 0, 1)[..., None]
    output = output.flatten(2, 3)
    return (output, (state, normalizer)) if return_state else output


def _elu_plus_one(x: Tensor) -> Tensor:
    """x + 1 above 0, else exp(x), of which exp(x) - 1 + 1 would keep few digits."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())
