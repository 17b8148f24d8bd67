"""Attention as torch's own surfaces define it: any strides, also heads without features, and causality aligned top-left.

The op asks for adjacent features, at least one, and aligns causality bottom-right; what lies between the two is here, in one place.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pytransformer.ops.attention import attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_left_causal: bool = False,
    **options: Any,
) -> Tensor:
    """:func:`pytransformer.attention` in torch's terms.

    Args:
        q, k, v: (batch, seqlen, heads, head_dim), any strides; q and k of one head_dim, v of its own.
        top_left_causal: query i sees key j only if ``j <= i``, whatever the lengths. Not together with ``mask``, ``bias`` or
            ``key_padding_mask``.
        options: the others of :func:`pytransformer.attention`, without ``return_lse``.

    Returns:
        (batch, seqlen_q, num_heads, value head_dim).

    Raises:
        As :func:`pytransformer.attention`.
    """
    value_dim = v.shape[-1]
    if top_left_causal:
        k, v, alignment = align_top_left(q, k, v)
        options.update(alignment)
    q, k, v = (_with_adjacent_features(tensor) for tensor in (q, k, v))
    out = attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out if out.shape[-1] == value_dim else out[..., :value_dim]


def align_top_left(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Keys, values and options with which the op, which aligns bottom-right, computes "query i sees key j iff j <= i".

    No mask is made. With more keys than queries nobody sees the last ones, so they are cut off and the lengths are equal. With more
    queries than keys the op's query i stands ``seqlen_q - seqlen_k`` keys too far left, so it may look that far to its right.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if seqlen_q > seqlen_k:
        return k, v, {"window": (-1, seqlen_q - seqlen_k)}
    return k[:, :seqlen_q], v[:, :seqlen_q], {"causal": True}


def _with_adjacent_features(tensor: Tensor) -> Tensor:
    """The tensor or a copy; a feature of value 0, which changes no product, where there is none."""
    if tensor.shape[-1] == 0:
        return F.pad(tensor, (0, 1))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
