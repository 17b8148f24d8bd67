"""Qwen3 with experts (Yang et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Used
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
from .mixtral import EXPERT_FIELDS, MEMORY, expert_weights, read_experts, write_experts
from .rope import read_rope, write_rope
from .weights import same

_FIELDS: dict[str, Field] = {
    **COMMON_FIELDS,
    **EXPERT_FIELDS,
    "vocab_size": Used(151936),
    "hidden_size": Used(2048),
    "intermediate_size": Used(6144),
    "num_hidden_layers": Used(24),
    "num_key_value_heads": Used(4),
    "max_position_embeddings": Used(32768),
    "attention_bias": Used(False),
    "use_sliding_window": Used(False),
    "sliding_window": Used(4096),
    "max_window_layers": Harmless(),  # in published files, read by nobody: with a window every layer has it
    "decoder_sparse_step": Used(1),
    "moe_intermediate_size": Used(768),
    "num_experts_per_tok": Used(8),
    "num_experts": Used(128),  # published files have this one, those of transformers 5 num_local_experts
    "norm_topk_prob": Used(False),
    "mlp_only_layers": Used(),
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = read_shape(values)
    window = values["sliding_window"] if values["use_sliding_window"] else None
    return {
        **shape,
        **read_rope(values, shape["head_dim"]),
        "attention_bias": values["attention_bias"],
        "qk_norm": True,
        **read_window({}, window=window, causal=shape["causal"]),
        **read_experts(values, name="num_experts", other="num_local_experts"),
        "expert_size": values["moe_intermediate_size"],
        "norm_topk_prob": values["norm_topk_prob"],
        "dense_layers": _dense_layers(values),
    }


def _dense_layers(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Every layer of the list, and of the rest those whose number, counted from 1, the step does not divide."""
    listed, step = values["mlp_only_layers"] or (), values["decoder_sparse_step"]
    return tuple(layer for layer in range(values["num_hidden_layers"]) if layer in listed or (layer + 1) % step)


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {
        **write_shape(config),
        **write_rope(config),
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": write_window(config),
        **write_experts(config, name="num_experts"),
        "moe_intermediate_size": config.expert_size,
        "norm_topk_prob": config.norm_topk_prob,
        "mlp_only_layers": list(config.dense_layers),
        "decoder_sparse_step": 1,
    }


QWEN3_MOE = Family(
    name="qwen3_moe",
    classes=classes("Qwen3Moe"),
    fields=_FIELDS,
    read=read,
    write=write,
    weights=(
        *weights(qk_norm=True),
        same("model.layers.{i}.feed_forward.router.weight", f"{MEMORY}.gate.weight"),
        *expert_weights(f"{MEMORY}.experts.{{e}}", gate="gate_proj", up="up_proj", down="down_proj"),
    ),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

FAMILIES = (QWEN3_MOE,)
