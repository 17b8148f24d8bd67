"""S_dmask, the third result of ``return_attn_probs=True`` with dropout: for tests and for looking at, of quadratic size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.reference.philox import dropout_keep


@torch.no_grad()
def signed_probabilities(q: Tensor, k: Tensor, dropout_p: float, dropout_seed: Tensor, **options: Any) -> Tensor:
    """The softmax of each row, negative where dropout drops the weight: what ``attention`` used with the same seed.

    Args:
        q, k: (batch, seqlen, heads, head_dim), or packed (total, heads, head_dim) with ``cu_seqlens_q`` and ``cu_seqlens_k``.
        dropout_p, dropout_seed: as in ``attention``.
        options: causal, window, softmax_scale, softcap, alibi_slopes, cu_seqlens_q, cu_seqlens_k of ``attention``.

    Returns:
        (batch, num_heads, seqlen_q, seqlen_k) in q's dtype; packed: with the lengths of the longest sequences, zeros behind the others.
    """
    if options.get("cu_seqlens_q") is None:
        lengths_q, lengths_k = [q.shape[1]] * q.shape[0], [k.shape[1]] * k.shape[0]
    else:
        lengths_q, lengths_k = (options[f"cu_seqlens_{side}"].diff().tolist() for side in "qk")
    longest_q, longest_k = max(lengths_q, default=0), max(lengths_k, default=0)
    # Values that are unit vectors turn the output into the weights.
    units = torch.eye(longest_k, device=k.device)
    values = torch.cat([units[:length] for length in lengths_k]).view(*k.shape[:-2], 1, longest_k)
    weights = reference.attention(q.float(), k.float(), values.expand(*k.shape[:-1], longest_k), **options)
    assert isinstance(weights, Tensor)
    num_heads = q.shape[-2]
    result = q.new_zeros(len(lengths_q), num_heads, longest_q, longest_k)
    for sequence, rows in enumerate(torch.split(weights.flatten(0, -3), lengths_q)):
        keep = dropout_keep(dropout_p, dropout_seed, sequence, num_heads, len(rows), longest_k, q.device)
        rows = rows.transpose(0, 1)
        result[sequence, :, : rows.shape[1]] = torch.where(keep, rows, -rows).to(q.dtype)
    return result
