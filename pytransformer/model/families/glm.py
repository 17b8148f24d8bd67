"""GLM-4 of 2024 (``glm``) and of 2025 (``glm4``, with norms on the sublayers' outputs too)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Used
from .llama import COMMON_FIELDS, IGNORED, PREFIXES, classes, read_shape, weights, write_shape
from .rope import read_rope, write_rope
from .weights import Weight, same

# The end tokens that transformers takes where a file names none.
_END = (151329, 151336, 151338)

_FIELDS: dict[str, Field] = {
    **COMMON_FIELDS,
    "vocab_size": Used(151552),
    "intermediate_size": Used(13696),
    "num_hidden_layers": Used(40),
    "num_key_value_heads": Used(2),
    "head_dim": Used(128),
    "max_position_embeddings": Used(131072),
    "rms_norm_eps": Used(1.5625e-07),
    "pad_token_id": Used(151329),
    "attention_bias": Used(True),
    "partial_rotary_factor": Used(0.5),
}


def read_glm(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    if values["head_dim"] is None:
        raise ValueError("head_dim must be an int (transformers cannot run a GLM without), got None")
    shape = read_shape(values)
    return {
        **shape,
        "eos_token_id": _END if shape["eos_token_id"] is None else shape["eos_token_id"],
        **read_rope(values, shape["head_dim"], fraction=1.0),  # null is all of a head, nothing said is half
        "rope_interleaved": True,
        "attention_bias": values["attention_bias"],
        "attention_output_bias": False,
    }


def read_glm4(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**read_glm(values), "norm_placement": "both"}


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**write_shape(config), **write_rope(config, fraction=True), "attention_bias": config.attention_bias}


def _weights(**output_norms: str) -> tuple[Weight, ...]:
    """Llama's, with gate and up in one tensor."""
    norms = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm", **output_norms}
    ours = "model.layers.{i}.feed_forward.gate_up_proj.weight"
    rest = tuple(weight for weight in weights(norms=norms) if weight.ours != ours)
    return (*rest, same(ours, "model.layers.{i}.mlp.gate_up_proj.weight"))


GLM = Family(
    name="glm",
    classes=classes("Glm"),
    fields=_FIELDS,
    read=read_glm,
    write=write,
    weights=_weights(),
    prefixes=PREFIXES,
    ignored=IGNORED,
)
GLM4 = Family(
    name="glm4",
    classes=classes("Glm4"),
    fields=_FIELDS,
    read=read_glm4,
    write=write,
    weights=_weights(attention_output_norm="post_self_attn_layernorm", feed_forward_output_norm="post_mlp_layernorm"),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

FAMILIES = (GLM, GLM4)
