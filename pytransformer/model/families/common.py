"""What the decoders with LayerNorm (GPT-2, GPT-NeoX, Falcon, BLOOM) share in their configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .llama import read_labels, read_tokens, write_labels, write_tokens

# Their names of plain activations -> ours, the one that is written first. The approximations by tanh differ in the last bits only.
_ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


def read_activation(field: str, name: Any) -> str:
    """Our name of one of their activations; ValueError, naming the ``field``, for one that is not served."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, _ACTIVATIONS))}, got {name!r}")
    return _ACTIVATIONS[name]


def write_activation(activation: str) -> str:
    """Their name of one of ours (a gated one, which no field of theirs can say, stays as it is and is refused on reading again)."""
    return next((theirs for theirs, ours in _ACTIVATIONS.items() if ours == activation), activation)


def with_aliases(values: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The values with those that stand under another name (its name -> the field) in the field's place."""
    return {**values, **{field: values[name] for name, field in aliases.items() if values[name] is not None}}


def read_shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens, labels, initial weights, head and mask, which all spell alike."""
    return {
        # "is_causal": false makes any decoder of transformers 5 see both ways.
        "causal": values["is_causal"] is not False,
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
