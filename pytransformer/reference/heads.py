"""What stands on the hidden states: tokens' logits, a class or a number for a sequence, or one vector for it.

Sources: Radford et al. 2019 (a tied head), Devlin et al. 2019 (BERT: masked language model, pooler), Gemma 2 (capped logits).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Norm, block_norm
from .feed_forward import activate


class LanguageModelHead(nn.Module):
    """Hidden states to logits over the vocabulary: softcap(hidden Wᵀ + b), with a weight of its own or, tied, the embedding's.

    ``logit_scale`` multiplies the hidden states first. A transform, act(hidden W'ᵀ + b'), stands before the head where the configuration
    has one; before "masked_lm" a norm follows it (BERT).

    Parameters: weight (vocab, hidden) unless tied, bias (vocab); transform (hidden, hidden) and transform_norm.
    """

    def __init__(self, config: Any, embedding: nn.Embedding) -> None:
        super().__init__()
        self.config = config
        # In a tuple it is not registered as a submodule.
        self.tied_to: tuple[nn.Embedding, ...] = (embedding,) if config.tie_embeddings else ()
        if not self.tied_to:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head_bias else None
        if config.head_transform is not None:
            self.transform = nn.Linear(config.hidden_size, config.hidden_size)
            if config.head == "masked_lm":
                self.transform_norm: Norm = block_norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocab_size)."""
        config = self.config
        hidden = hidden * config.logit_scale
        if config.head_transform is not None:
            hidden = transform(config.head_transform, self.transform(hidden))
            if config.head == "masked_lm":
                hidden = self.transform_norm(hidden)
        weight = self.tied_to[0].weight if self.tied_to else self.weight
        logits = F.linear(hidden, weight, self.bias)
        softcap = config.logit_softcap
        return softcap * torch.tanh(logits / softcap) if softcap else logits


class Classifier(nn.Module):
    """One vector for each sequence to the logits of its labels: dropout, a linear layer and an activation (the transform, if there is one),
    dropout and a linear layer.

    Parameters: weight (labels, hidden), bias (labels) if head_bias; transform (hidden, hidden).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        if config.head_transform is not None:
            self.transform = nn.Linear(config.hidden_size, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(config.num_labels, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_labels)) if config.head_bias else None

    def forward(self, pooled: Tensor) -> Tensor:
        """(batch, hidden) -> (batch, num_labels)."""
        config = self.config
        if config.head_transform is not None:
            pooled = torch.dropout(pooled, config.head_dropout, self.training)
            pooled = transform(config.head_transform, self.transform(pooled))
        pooled = torch.dropout(pooled, config.head_dropout, self.training)
        return F.linear(pooled, self.weight, self.bias)


def transform(activation: str, x: Tensor) -> Tensor:
    """The activation of a head's transform: tanh, or one of a feed-forward network's."""
    return torch.tanh(x) if activation == "tanh" else activate(activation, x)


def pool(hidden: Tensor, attention_mask: Tensor | None, how: str) -> Tensor:
    """One vector for each sequence: (batch, seqlen, hidden) -> (batch, hidden).

    Args:
        attention_mask: (batch, seqlen) or as :func:`padding_mask` makes it, True or 1 = a real token. One that says who sees whom leaves
            all of them real.
        how: "first" token, "last" token that is not padding, or "mean" of those that are not.
    """
    mask = padding_mask(attention_mask)
    if mask is None or mask.dim() != 2:
        mask = torch.ones(hidden.shape[:2], device=hidden.device)
    real = mask.bool().expand(hidden.shape[:2])
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        index = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(real, index, 0).amax(dim=-1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    if how == "mean":
        total = (hidden * real[..., None]).sum(dim=1)
        return total / real.sum(dim=1, keepdim=True).clamp(min=1)
    raise ValueError(f'pooling must be "first", "last" or "mean", got {how!r}')


def padding_mask(mask: Tensor | None) -> Tensor | None:
    """A mask that is the same for all queries and heads, (batch, 1, seqlen) or (batch, 1, 1, seqlen), as (batch, seqlen)."""
    if mask is None or mask.dim() < 3 or mask.shape[1:-1].numel() > 1:
        return mask
    return mask.reshape(mask.shape[0], mask.shape[-1])


def label_probabilities(logits: Tensor, problem: str) -> Tensor:
    """What the logits (batch, labels) of a classifier mean.

    "multi_class": softmax, one of the labels is right. "multi_label" and "binary": σ of each. "regression": the numbers themselves.
    """
    if problem == "multi_class":
        return torch.exp(logits - torch.logsumexp(logits, dim=-1, keepdim=True))
    if problem in ("multi_label", "binary"):
        return 1 / (1 + torch.exp(-logits))
    if problem == "regression":
        return logits
    raise ValueError(f'problem must be "multi_class", "multi_label", "binary" or "regression", got {problem!r}')


def label_loss(logits: Tensor, labels: Tensor, problem: str) -> Tensor:
    """The mean loss of logits (batch, labels), whose minimum is where :func:`label_probabilities` are the labels' frequencies.

    "multi_class": -log p of the right label, labels int64 (batch). "multi_label" and "binary": -(y log p + (1 - y) log(1 - p)), y in [0, 1]
    like the logits. "regression": the squared error, y like the logits.
    """
    if problem == "multi_class":
        return (torch.logsumexp(logits, dim=-1) - logits.gather(-1, labels[:, None])[:, 0]).mean()
    if problem not in ("multi_label", "binary", "regression"):
        raise ValueError(f'problem must be "multi_class", "multi_label", "binary" or "regression", got {problem!r}')
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if problem in ("multi_label", "binary"):
        # log p = -softplus(-s) and log(1 - p) = -softplus(s) for p = σ(s), which do not overflow
        return (labels * F.softplus(-logits) + (1 - labels) * F.softplus(logits)).mean()
    return ((logits - labels) ** 2).mean()
