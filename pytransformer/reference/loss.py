"""Cross-entropy of a linear head, in plain PyTorch: the logits are materialised, which the fused kernel avoids."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Loss of the logits ``softcap(x Wᵀ + bias)`` against the targets.

    With lse = log Σ exp(logits), the loss of one token is::

        (1 - label_smoothing) · (lse - logits[target]) + label_smoothing · mean(lse - logits) + z_loss · lse²

    Args:
        x: (..., hidden_size).
        weight: (vocab_size, hidden_size).
        targets: integer (...), token ids or ignore_index.
        bias: (vocab_size).
        ignore_index: targets of this value have loss 0 and do not count in the mean.
        label_smoothing: probability spread evenly over the vocabulary (Szegedy et al. 2016), as in ``F.cross_entropy``.
        softcap: c > 0 replaces a logit s by c · tanh(s / c).
        z_loss: weight of lse², which keeps the logits from drifting (PaLM, Chowdhery et al. 2022).
        reduction: "mean" over the tokens that are not ignored (NaN if there are none, as in ``F.cross_entropy``), "sum" or "none".

    Returns:
        float32 (float64 for float64 inputs): a scalar, or with reduction "none" the shape of targets. Logits are rounded to x's
        dtype, as a linear layer gives them; all that follows is at least float32.

    Raises:
        ValueError: an unknown reduction.
    """
    logits = x @ weight.T
    if bias is not None:
        logits = logits + bias
    logits = logits.to(torch.promote_types(x.dtype, torch.float32))
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)

    counted = targets != ignore_index
    lse = torch.logsumexp(logits, dim=-1)
    target_logit = logits.gather(-1, torch.where(counted, targets, 0).long()[..., None]).squeeze(-1)
    loss = (1 - label_smoothing) * (lse - target_logit) + z_loss * lse * lse
    if label_smoothing > 0:
        loss = loss + label_smoothing * (lse[..., None] - logits).mean(dim=-1)
    loss = torch.where(counted, loss, 0.0)

    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / counted.sum()
    raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
