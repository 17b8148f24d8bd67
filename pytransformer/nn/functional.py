"""Attention as torch's own surfaces define it: any head_dim up to 256, and causality aligned top-left.

The op asks for a head_dim that is a multiple of 8 and aligns causality bottom-right; what lies between the two is here, in one place.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pytransformer.ops.attention import attention

MAX_HEAD_DIM = 256


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top_left_causal: bool = False,
    softmax_scale: float | None = None,
    **options: Any,
) -> Tensor:
    """:func:`pytransformer.attention` for any head_dim up to 256.

    Args:
        q, k, v: (batch, seqlen, heads, head_dim), any strides; q and k of one head_dim, v of its own.
        top_left_causal: query i sees key j only if ``j <= i``, whatever the lengths. Not together with ``mask``, ``bias`` or
            ``key_padding_mask``.
        softmax_scale: 1 / sqrt(head_dim) of the head_dim before padding if ``None``.
        options: the others of :func:`pytransformer.attention`, without ``return_lse``.

    Returns:
        (batch, seqlen_q, num_heads, value head_dim).

    Raises:
        NotImplementedError: a head_dim above 256.
        Others: see :func:`pytransformer.attention`.
    """
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if head_dim > MAX_HEAD_DIM or value_dim > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"attention serves a head_dim of at most {MAX_HEAD_DIM}, got {head_dim} (q, k) and {value_dim} (v)"
        )
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(max(head_dim, 1))  # without features every score is 0
    if top_left_causal:
        k, v, alignment = align_top_left(q, k, v)
        options.update(alignment)
    # Features of value 0 change no product and bring no value; their gradient is cut off with them.
    q, k, v = (_padded(tensor) for tensor in (q, k, v))
    out = attention(q, k, v, softmax_scale=softmax_scale, **options)
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


def _padded(tensor: Tensor) -> Tensor:
    """head_dim filled up with zeros to a multiple of 8, its elements adjacent."""
    missing = -tensor.shape[-1] % 8 if tensor.shape[-1] > 0 else 8
    if missing:
        return F.pad(tensor, (0, missing))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
