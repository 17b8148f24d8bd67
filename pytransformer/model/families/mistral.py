"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Refused, Used
from .llama import (
    COMMON_FIELDS,
    IGNORED,
    PREFIXES,
    classes,
    read_shape,
    read_window,
    weights,
    write_shape,
    write_window,
)
from .rope import read_rope, write_rope


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = read_shape(values)
    window = read_window(values, window=values["sliding_window"], causal=shape["causal"])
    return {**shape, **window, **read_rope(values, shape["head_dim"])}


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**write_shape(config), **write_rope(config), "sliding_window": write_window(config)}


MISTRAL = Family(
    name="mistral",
    classes=classes("Mistral"),
    fields={
        **COMMON_FIELDS,
        "intermediate_size": Used(14336),
        "num_key_value_heads": Used(8),
        "max_position_embeddings": Used(4096 * 32),
        "bos_token_id": Used(1),
        "eos_token_id": Used(2),
        "sliding_window": Used(4096),
        "layer_types": Refused((None,), "transformers' Mistral ignores them without a cache and fails with one"),
    },
    read=read,
    write=write,
    weights=weights(),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

FAMILIES = (MISTRAL,)
