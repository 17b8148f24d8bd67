"""What stands on the hidden states: a language model's head, a classifier, one vector for a sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.nn import Linear, QuantizedLinear, RowBlocks

from .block import make_norm
from .config import TransformerConfig

_ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


class _LogitsOf(nn.Module):
    """What stands before and behind the weight of a head."""

    softcap: float
    scale_of_features: float
    activation: Callable[[Tensor], Tensor] | None
    transform: nn.Module | None
    transform_norm: nn.Module | None

    def features(self, hidden: Tensor) -> Tensor:
        """What the weight multiplies, of the same shape: for losses that never make the logits."""
        if self.scale_of_features != 1.0:
            hidden = hidden * self.scale_of_features
        if self.transform is not None:
            assert self.activation is not None
            hidden = self.activation(self.transform(hidden))
        return hidden if self.transform_norm is None else self.transform_norm(hidden)

    def forward(self, input: Tensor) -> Tensor:
        """Hidden states (…, hidden) to logits (…, vocab_size)."""
        logits: Tensor = super().forward(self.features(input))
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap > 0.0 else logits


class LMHead(_LogitsOf, Linear):
    """Hidden states to logits (…, vocab_size): what :meth:`features` makes of them, times the weight, with the configuration's softcap."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_device: torch.device | str | None = None,
    ) -> None:
        width = config.hidden_size
        super().__init__(width, config.vocab_size, bias=config.head_bias, device=device, dtype=dtype)
        if weight_device is not None:
            self.weight = nn.Parameter(torch.empty(self.weight.shape, device=weight_device, dtype=self.weight.dtype))
        self.softcap = config.logit_softcap
        self.scale_of_features = config.logit_scale
        self.activation = _ACTIVATIONS.get(config.head_transform)
        self.transform = None
        self.transform_norm = None
        if config.head_transform is not None:
            self.transform = Linear(width, width, device=device, dtype=dtype)
            if config.head == "masked_lm":
                self.transform_norm = make_norm(config, device=device, dtype=dtype)


class QuantizedLMHead(_LogitsOf, QuantizedLinear):
    """A :class:`LMHead` over codes; with tied embeddings the embedding keeps the weight that the codes were made from."""

    @classmethod
    def like(cls, linear: nn.Linear | RowBlocks, bits: int, group_size: int, **options: Any) -> QuantizedLMHead:
        """As of :class:`pytransformer.nn.QuantizedLinear`, with what stands around the weight of a :class:`LMHead`."""
        assert isinstance(linear, LMHead)
        head = super().like(linear, bits, group_size, **options)
        assert isinstance(head, QuantizedLMHead)
        head.softcap, head.scale_of_features, head.activation = (
            linear.softcap,
            linear.scale_of_features,
            linear.activation,
        )
        head.transform, head.transform_norm = linear.transform, linear.transform_norm
        return head


class Classifier(Linear):
    """One vector for a sequence to scores (batch, num_labels), with dropout and a layer between where the configuration has them."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = config.hidden_size
        super().__init__(width, config.num_labels, bias=config.head_bias, device=device, dtype=dtype)
        self.problem = config.problem
        self.dropout = config.head_dropout
        self.activation = _ACTIVATIONS.get(config.head_transform)
        self.transform: Linear | None = None
        if config.head_transform is not None:
            self.transform = Linear(width, width, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        if self.transform is not None:
            assert self.activation is not None
            input = self.activation(self.transform(self._drop(input)))
        return super().forward(self._drop(input))

    def probabilities(self, scores: Tensor) -> Tensor:
        """Of each label: softmax over them ("multi_class"), sigmoid of each ("multi_label", "binary"); regression: the scores."""
        if self.problem == "regression":
            return scores
        return scores.softmax(dim=-1) if self.problem == "multi_class" else scores.sigmoid()

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of (batch, num_labels) scores.

        Args:
            targets: "multi_class": int64 (batch); "multi_label" and "binary": 0 or 1, of the scores' shape; "regression": numbers of the
                scores' shape (mean square error). A single label may be left out of the shape.
        """
        if self.problem == "multi_class":
            return F.cross_entropy(scores, targets)
        targets = targets.view(scores.shape).to(scores.dtype)
        if self.problem == "regression":
            return F.mse_loss(scores, targets)
        return F.binary_cross_entropy_with_logits(scores, targets)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout > 0.0 else x


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """(batch, seqlen, hidden) -> (batch, hidden): the first token, the last that is real, or the mean of the real ones.

    ``attention_mask``: as :func:`padding_mask` knows it, nonzero = real; ``None`` = all, as with one that says who sees whom.
    """
    if pooling == "first":
        return hidden[:, 0]
    mask = padding_mask(attention_mask)
    if mask is None or mask.ndim != 2:
        return hidden[:, -1] if pooling == "last" else hidden.mean(dim=1)
    real = (mask != 0).expand(hidden.shape[:2])
    if pooling == "last":
        places = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(real, places, 0).amax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]
    weights = real.to(hidden.dtype)[..., None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def padding_mask(mask: Tensor | None) -> Tensor | None:
    """A mask of (batch, 1, seqlen) or (batch, 1, 1, seqlen), the same for every query and head, as (batch, seqlen); others as they are."""
    if mask is not None and mask.ndim > 2 and mask.shape[1:-1].numel() == 1:
        return mask.reshape(mask.shape[0], mask.shape[-1])
    return mask
