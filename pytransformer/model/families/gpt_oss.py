"""GPT-OSS (OpenAI 2025): mixtures of experts with attention sinks, as bfloat16 tensors or with the experts in mxfp4 blocks.

The blocks are turned into bfloat16 on loading, and bfloat16 is what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    write_layer_types,
    write_shape,
    write_window,
)  # fmt: skip
from .mixtral import EXPERT_FIELDS, read_experts, without_feed_forward, write_experts
from .mxfp4 import GROUP, dequantise_mxfp4
from .rope import FULL, SLIDING, read_rope, write_rope
from .weights import Transposed, Weight, affine, same

# What transformers takes where a file says nothing of positions.
_YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip

_FIELDS: dict[str, Field] = {
    **COMMON_FIELDS,
    **EXPERT_FIELDS,
    "vocab_size": Used(201088),
    "hidden_size": Used(2880),
    "intermediate_size": Used(2880),
    "num_hidden_layers": Used(36),
    "num_attention_heads": Used(64),
    "num_key_value_heads": Used(8),
    "head_dim": Used(64),
    "hidden_act": Harmless("silu"),  # read by nobody: the experts have a gate of their own
    "max_position_embeddings": Used(131072),
    "initial_context_length": Harmless(),  # in published files; the scaling of RoPE has it too
    "rms_norm_eps": Used(1e-5),
    "attention_bias": Used(True),
    "sliding_window": Used(128),
    "layer_types": Used(),
    "num_local_experts": Used(128),
    "num_experts_per_tok": Used(4),
    "experts_per_token": Harmless(),  # in published files beside num_experts_per_tok
    "swiglu_alpha": Used(1.702),
    "swiglu_limit": Used(7.0),
    "quantization_config": Used(),
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    quantisation = values["quantization_config"]
    if quantisation is not None and quantisation.get("quant_method") != "mxfp4":
        raise ValueError(
            f"quantization_config must have quant_method 'mxfp4' or be None, got {quantisation.get('quant_method')!r}"
        )
    shape = read_shape({**values, "hidden_act": "silu"})
    types = values["layer_types"] or [FULL if layer % 2 else SLIDING for layer in range(shape["num_layers"])]
    if values["rope_parameters"] is None and not values["rope_scaling"]:  # an empty mapping is plain RoPE
        values = {**values, "rope_parameters": _YARN}
    return {
        **shape,
        **read_rope(values, shape["head_dim"], base=150_000.0),
        "activation": "swiglu_clamped",
        "activation_limit": values["swiglu_limit"],
        "activation_alpha": values["swiglu_alpha"],
        "attention_bias": values["attention_bias"],
        "sinks": True,
        **read_window({"layer_types": types}, window=values["sliding_window"], causal=shape["causal"]),
        **read_experts(values, name="num_local_experts", other="num_experts"),
        "mlp_bias": True,
        "router_bias": True,
        # The softmax over the chosen experts' scores alone is the one over all, divided by the chosen ones' sum.
        "norm_topk_prob": True,
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = write_shape(config)
    del shape["hidden_act"]  # kept as it was
    return {
        **shape,
        **write_rope(config),
        "swiglu_limit": config.activation_limit,
        "swiglu_alpha": config.activation_alpha,
        "attention_bias": config.attention_bias,
        "sliding_window": write_window(config),
        "layer_types": write_layer_types(config),
        **write_experts(config, name="num_local_experts"),
    }


@dataclass(frozen=True)
class _Interleaved:
    """Gate and up of all experts in alternate columns, (experts, hidden, 2 · width), or in a bias (experts, 2 · width)."""

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        return _apart(theirs[0].transpose(1, -1))

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        gate, up = ours.chunk(2, dim=1)
        return [torch.stack([gate, up], dim=2).flatten(1, 2).transpose(1, -1)]


@dataclass(frozen=True)
class _Blocks:
    """A matrix of all experts, (experts, rows, columns), in mxfp4: blocks (experts, rows, columns / 32, 16) and scales; read only."""

    interleaved: bool

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        numbers = dequantise_mxfp4(*theirs)
        return _apart(numbers) if self.interleaved else numbers

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        if not ours.is_meta:
            raise NotImplementedError("weights are not written as mxfp4 blocks, but in their own dtype")
        scales = ours.new_empty(*ours.shape[:-1], ours.shape[-1] // GROUP, dtype=torch.uint8)
        return [scales.new_empty(*scales.shape, GROUP // 2), scales]


def _apart(alternate: Tensor) -> Tensor:
    """(experts, 2 · width, …) with rows gate, up, gate, up, … as [gate; up]."""
    return torch.cat([alternate[:, 0::2], alternate[:, 1::2]], dim=1)


_OURS, _THEIRS = "model.layers.{i}.feed_forward", "model.layers.{i}.mlp"


def _blocks(ours: str, theirs: str, *, interleaved: bool) -> Weight:
    return Weight(ours, (f"{theirs}_blocks", f"{theirs}_scales"), _Blocks(interleaved))


GPT_OSS = Family(
    name="gpt_oss",
    classes=classes("GptOss"),
    fields=_FIELDS,
    read=read,
    write=write,
    weights=(
        *without_feed_forward(weights()),
        same("model.layers.{i}.attention.sinks", "model.layers.{i}.self_attn.sinks"),
        *affine(f"{_OURS}.router", f"{_THEIRS}.router"),
        Weight(f"{_OURS}.experts.gate_up_proj", (f"{_THEIRS}.experts.gate_up_proj",), _Interleaved()),
        _blocks(f"{_OURS}.experts.gate_up_proj", f"{_THEIRS}.experts.gate_up_proj", interleaved=True),
        Weight(f"{_OURS}.experts.gate_up_bias", (f"{_THEIRS}.experts.gate_up_proj_bias",), _Interleaved()),
        Weight(f"{_OURS}.experts.down_proj", (f"{_THEIRS}.experts.down_proj",), Transposed()),
        _blocks(f"{_OURS}.experts.down_proj", f"{_THEIRS}.experts.down_proj", interleaved=False),
        same(f"{_OURS}.experts.down_bias", f"{_THEIRS}.experts.down_proj_bias"),
    ),
    prefixes=PREFIXES,
    ignored=IGNORED,
)
FAMILIES = (GPT_OSS,)
