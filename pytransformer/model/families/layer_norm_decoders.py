"""What the decoders with LayerNorm (GPT-2, GPT-NeoX, Falcon, BLOOM) share in their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .llama import read_tokens, write_tokens
from .parts import read_labels, write_labels


def read_shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens, labels, initial weights, head and mask, which all spell alike."""
    return {
        "causal": bool(values["is_causal"]),
        "tie_embeddings": values["tie_word_embeddings"],
        "initializer_range": values["initializer_range"],
        **read_tokens(values),
        **read_labels(values),
    }


def write_shared(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of :func:`read_shared`."""
    return {
        **({} if config.causal else {"is_causal": False}),
        # A model without a head for tokens says nothing of what that would be.
        **({"tie_word_embeddings": config.tie_embeddings} if config.head == "lm" else {}),
        "initializer_range": config.initializer_range,
        **write_tokens(config),
        **write_labels(config),
    }
