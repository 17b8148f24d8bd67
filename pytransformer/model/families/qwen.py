"""Qwen2 and Qwen3 (Yang et al. 2024, 2025): Llama with biases of q, k and v, or with norms of q and k, and windows in the upper layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Used
from .llama import (
    COMMON_FIELDS,
    IGNORED,
    PREFIXES,
    classes,
    read_shape,
    read_window,
    weights,
    write_layer_types,
    write_shape,
    write_window,
)
from .rope import FULL, SLIDING, read_rope, write_rope

_FIELDS: dict[str, Field] = {
    **COMMON_FIELDS,
    "vocab_size": Used(151936),
    "intermediate_size": Used(22016),
    "num_key_value_heads": Used(32),
    "max_position_embeddings": Used(32768),
    "use_sliding_window": Used(False),
    "sliding_window": Used(4096),
    "max_window_layers": Used(28),
    "layer_types": Used(),
}


def read_windows(values: Mapping[str, Any], causal: bool) -> dict[str, Any]:
    """``sliding_window`` counts with ``use_sliding_window`` only: in the layers of ``layer_types``, or from ``max_window_layers`` on."""
    window = values["sliding_window"] if values["use_sliding_window"] else None
    types = values["layer_types"]
    if types is None:
        first = values["num_hidden_layers"] if window is None else values["max_window_layers"]
        types = [SLIDING if layer >= first else FULL for layer in range(values["num_hidden_layers"])]
    return read_window({"layer_types": types}, window=window, causal=causal)


def write_windows(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of :func:`read_windows`; with the layer from which on all slide, as releases before ``layer_types`` read it."""
    types = write_layer_types(config)
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": write_window(config),
        "max_window_layers": types.index(SLIDING) if SLIDING in types else len(types),
        "layer_types": types,
    }


def read_qwen2(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = read_shape(values)
    biases = {"attention_bias": True, "attention_output_bias": False}
    return {**shape, **biases, **read_windows(values, shape["causal"]), **read_rope(values, shape["head_dim"])}


def read_qwen3(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = read_shape(values)
    attention = {"attention_bias": values["attention_bias"], "qk_norm": True}
    return {**shape, **attention, **read_windows(values, shape["causal"]), **read_rope(values, shape["head_dim"])}


def write_qwen2(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**write_shape(config), **write_windows(config), **write_rope(config)}


def write_qwen3(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**write_qwen2(config), "attention_bias": config.attention_bias}


QWEN2 = Family(
    name="qwen2",
    classes=classes("Qwen2"),
    fields=_FIELDS,
    read=read_qwen2,
    write=write_qwen2,
    weights=weights(),
    prefixes=PREFIXES,
    ignored=IGNORED,
)
QWEN3 = Family(
    name="qwen3",
    classes=classes("Qwen3"),
    fields={**_FIELDS, "head_dim": Used(128), "attention_bias": Used(False)},
    read=read_qwen3,
    write=write_qwen3,
    weights=weights(qk_norm=True),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

FAMILIES = (QWEN2, QWEN3)
