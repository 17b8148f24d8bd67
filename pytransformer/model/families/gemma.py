"""Gemma 1, 2 and 3 (Gemma Team 2024, 2025), text: scaled embeddings, 1 + weight in the norms, tanh-GEGLU, tied head."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Refused, Used, read_config
from .llama import (
    COMMON_FIELDS,
    IGNORED,
    PREFIXES,
    check_heads_share,
    classes,
    read_shape,
    read_window,
    weights,
    write_layer_types,
    write_shape,
    write_window,
)
from .rope import FULL, SLIDING, read_layered_rope, read_rope, write_layered_rope, write_rope
from .weights import Weight, same

_CHOICES = {"norm_weight_offset": 1.0, "scale_embeddings": True}
_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}
_FIELDS: dict[str, Field] = {
    **COMMON_FIELDS,
    "vocab_size": Used(256000),
    "head_dim": Used(256),
    "max_position_embeddings": Used(8192),
    "pad_token_id": Used(0),
    "eos_token_id": Used(1),
    "bos_token_id": Used(2),
    "tie_word_embeddings": Used(True),
    "attention_bias": Used(False),
    "use_bidirectional_attention": Refused(
        (None, False), "transformers applies it here with one attention implementation only, and without padding only"
    ),
}
# Of Gemma 2 and 3.
_LATER_FIELDS: dict[str, Field] = {
    **{name: field for name, field in _FIELDS.items() if name != "hidden_act"},
    "hidden_size": Used(2304),
    "intermediate_size": Used(9216),
    "num_hidden_layers": Used(26),
    "num_attention_heads": Used(8),
    "num_key_value_heads": Used(4),
    "hidden_activation": Used("gelu_pytorch_tanh"),
    "hidden_act": Harmless(),  # older files have both; only hidden_activation counts
    "query_pre_attn_scalar": Used(256),
    "sliding_window": Used(4096),
    "layer_types": Used(),
}


def read_gemma(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    # The first files say "gelu" and mean the tanh approximation.
    act = "gelu_pytorch_tanh" if values["hidden_act"] == "gelu" else values["hidden_act"]
    shape = read_shape({**values, "hidden_act": act})
    bias = {"attention_bias": values["attention_bias"]}
    return {**shape, **bias, **_CHOICES, **read_rope(values, shape["head_dim"])}


def write_gemma(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    written = {**write_shape(config), "attention_bias": config.attention_bias, **write_rope(config)}
    if config.activation == "geglu":
        written["hidden_act"] = "gelu_python"  # "gelu" would be read as the tanh approximation
    return written


def read_gemma2(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    later = _read_later(values, pattern=2)
    softcaps = {"attention_softcap": _cap(values, "attn_logit_softcapping")}
    return {**later, **softcaps, **read_rope(values, later["head_dim"])}


def write_gemma2(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    check_heads_share("gemma2", config)
    return {
        **_write_later(config),
        "attn_logit_softcapping": config.attention_softcap or None,
        "sliding_window": write_window(config),
        **write_rope(config),
    }


def read_gemma3(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    later = _read_later(values, pattern=values.get("sliding_window_pattern") or 6)
    if values["use_bidirectional_attention"]:
        # Their window counts the tokens at both sides, and the distance must be smaller than half of it and one.
        half = values["sliding_window"] // 2 + 1
        later |= {"causal": False, "sliding_window": half + (not values["is_causal"])}
    rope = read_layered_rope(
        values, later["head_dim"], base=1_000_000.0, local_base=10_000.0, local_theta="rope_local_base_freq"
    )
    return {**later, "qk_norm": True, **rope}


def write_gemma3(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    check_heads_share("gemma3_text", config)
    written = {**_write_later(config), "sliding_window": config.sliding_window, **write_layered_rope(config)}
    if not config.causal:
        written.pop("is_causal")
        written["use_bidirectional_attention"] = True
        if config.sliding_window is not None:
            written["sliding_window"] = 2 * (config.sliding_window - 1)
    return written


def read_gemma3_text_part(values: Mapping[str, Any]) -> dict[str, Any]:
    """The language model of a Gemma 3 that also sees pictures. It is a model of ``gemma3_text`` and is saved as one."""
    text = values["text_config"]
    if not isinstance(text, Mapping):
        raise ValueError(f"text_config must be a mapping, got {text!r}")
    warnings.warn("only the text part of this gemma3 model is loaded, without its vision tower", stacklevel=4)
    outside = {name: values[name] for name in ("eos_token_id", "tie_word_embeddings") if values[name] is not None}
    config = read_config(GEMMA3_TEXT, {**text, **outside, "architectures": None})
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def write_gemma3_text_part(config: TransformerConfig) -> dict[str, Any]:
    """Never: see :func:`read_gemma3_text_part`."""
    raise ValueError("the family gemma3 cannot express a model without vision; save it as gemma3_text")


def _language_model(weight: Weight) -> Weight:
    """The same weight of ours in a file that also holds a vision tower."""
    return dataclasses.replace(weight, theirs=tuple(f"language_model.{name}" for name in weight.theirs))


def _read_later(values: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share. Without ``layer_types`` every ``pattern``-th layer sees everything."""
    shape = read_shape(values, activation="hidden_activation")
    scalar = values["query_pre_attn_scalar"]
    if not scalar > 0:
        raise ValueError(f"query_pre_attn_scalar must be above 0, got {scalar!r}")
    types = values["layer_types"]
    if types is None:
        types = [FULL if (layer + 1) % pattern == 0 else SLIDING for layer in range(shape["num_layers"])]
    return {
        **shape,
        **_CHOICES,
        "attention_bias": values["attention_bias"],
        "norm_placement": "both",
        "softmax_scale": None if scalar == shape["head_dim"] else scalar**-0.5,
        "logit_softcap": _cap(values, "final_logit_softcapping"),
        **read_window({"layer_types": types}, window=values["sliding_window"], causal=shape["causal"]),
    }


def _write_later(config: TransformerConfig) -> dict[str, Any]:
    scale = config.softmax_scale
    return {
        **write_shape(config, activation="hidden_activation"),
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2),
        "final_logit_softcapping": config.logit_softcap or None,
        "layer_types": write_layer_types(config),
    }


def _cap(values: Mapping[str, Any], name: str) -> float:
    cap = values[name]
    if cap is not None and not cap > 0:
        raise ValueError(f"{name} must be above 0 or null, got {cap!r}")
    return 0.0 if cap is None else float(cap)


GEMMA = Family(
    name="gemma",
    classes=classes("Gemma"),
    fields={
        **_FIELDS,
        "hidden_size": Used(3072),
        "intermediate_size": Used(24576),
        "num_hidden_layers": Used(28),
        "num_attention_heads": Used(16),
        "num_key_value_heads": Used(16),
        "hidden_act": Used("gelu_pytorch_tanh"),
        "hidden_activation": Harmless(),  # transformers' Gemma 1 looks at hidden_act alone
    },
    read=read_gemma,
    write=write_gemma,
    weights=weights(),
    prefixes=PREFIXES,
    ignored=IGNORED,
)
GEMMA2 = Family(
    name="gemma2",
    classes=classes("Gemma2"),
    fields={
        **_LATER_FIELDS,
        "attn_logit_softcapping": Used(50.0),
        "final_logit_softcapping": Used(30.0),
    },
    read=read_gemma2,
    write=write_gemma2,
    weights=weights(norms=_NORMS),
    prefixes=PREFIXES,
    ignored=IGNORED,
)
GEMMA3_TEXT = Family(
    name="gemma3_text",
    classes=classes("Gemma3", base="Gemma3TextModel", classifier="Gemma3TextForSequenceClassification"),
    fields={
        **_LATER_FIELDS,
        "vocab_size": Used(262_208),
        "max_position_embeddings": Used(131_072),
        "rope_local_base_freq": Used(),
        "sliding_window_pattern": Used(),
        "use_bidirectional_attention": Used(False),
        "attn_logit_softcapping": Harmless(),  # no class of transformers applies it
        "final_logit_softcapping": Used(),
    },
    read=read_gemma3,
    write=write_gemma3,
    weights=weights(norms=_NORMS, qk_norm=True),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

GEMMA3 = Family(
    name="gemma3",
    classes={"Gemma3ForConditionalGeneration": {"head": "lm"}},
    fields={
        "text_config": Used(),
        "vision_config": Harmless(),
        "mm_tokens_per_image": Harmless(256),
        "boi_token_index": Harmless(255_999),
        "eoi_token_index": Harmless(256_000),
        "image_token_index": Harmless(262_144),
    },
    read=read_gemma3_text_part,
    write=write_gemma3_text_part,
    weights=(*map(_language_model, GEMMA3_TEXT.weights), same("lm_head.weight", "lm_head.weight")),
    prefixes=("language_model.model.", "model.language_model."),
    ignored=(*IGNORED, r"^(model\.)?(vision_tower|multi_modal_projector)\."),
)

FAMILIES = (GEMMA, GEMMA2, GEMMA3_TEXT, GEMMA3)
