"""OLMo 2 (Walsh et al. 2024): norms on the sublayers' outputs, and over all heads of q and of k together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Used
from .llama import COMMON_FIELDS, IGNORED, PREFIXES, classes, read_shape, weights, write_shape
from .rope import read_rope, write_rope

_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = read_shape(values)
    return {
        **shape,
        "attention_bias": values["attention_bias"],
        "norm_placement": "output",
        "qk_norm": True,
        "qk_norm_whole": True,
        **read_rope(values, shape["head_dim"]),
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**write_shape(config), **write_rope(config), "attention_bias": config.attention_bias}


OLMO2 = Family(
    name="olmo2",
    classes=classes("Olmo2"),
    fields={
        **COMMON_FIELDS,
        "vocab_size": Used(50304),
        "rms_norm_eps": Used(1e-5),
        "pad_token_id": Used(1),
        "eos_token_id": Used(50279),
        "attention_bias": Used(False),
    },
    read=read,
    write=write,
    weights=weights(norms=_NORMS, qk_norm=True),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

FAMILIES = (OLMO2,)
