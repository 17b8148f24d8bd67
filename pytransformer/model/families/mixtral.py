"""Mixtral (Jiang et al. 2024): Mistral with experts instead of feed-forwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Refused, Used
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
from .weights import Experts, Weight, same

# Of a family with experts, what all call alike.
EXPERT_FIELDS: dict[str, Field] = {
    "num_experts_per_tok": Used(2),
    "num_local_experts": Used(),
    "num_experts": Used(),
    "output_router_logits": Harmless(False),
    "router_aux_loss_coef": Used(0.001),
}

_FIELDS: dict[str, Field] = {
    **COMMON_FIELDS,
    **EXPERT_FIELDS,
    "intermediate_size": Used(14336),
    "num_key_value_heads": Used(8),
    "max_position_embeddings": Used(131072),
    "rms_norm_eps": Used(1e-5),
    "bos_token_id": Used(1),
    "eos_token_id": Used(2),
    "sliding_window": Used(),
    "num_local_experts": Used(8),
    "router_jitter_noise": Refused((0.0,), "noise on what the router sees in training is not served"),
}


def read_experts(values: Mapping[str, Any], *, name: str, other: str) -> dict[str, Any]:
    """Number of experts and weight of the balancing loss; ``other`` is a second name of the number, which counts if it is there."""
    return {
        "num_experts": values[name] if values[other] is None else values[other],
        "experts_per_token": values["num_experts_per_tok"],
        "router_aux_coef": values["router_aux_loss_coef"],
    }


def write_experts(config: TransformerConfig, *, name: str) -> dict[str, Any]:
    """The inverse of :func:`read_experts`."""
    return {
        name: config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.router_aux_coef,
    }


def without_feed_forward(table: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """A table without the plain feed-forward."""
    return tuple(weight for weight in table if ".feed_forward." not in weight.ours)


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = read_shape(values)
    return {
        **shape,
        **read_rope(values, shape["head_dim"], base=1e6),
        **read_window(values, window=values["sliding_window"], causal=shape["causal"]),
        **read_experts(values, name="num_local_experts", other="num_experts"),
        "norm_topk_prob": True,
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {
        **write_shape(config),
        **write_rope(config),
        "sliding_window": write_window(config),
        **write_experts(config, name="num_local_experts"),
    }


_OURS, MEMORY = "model.layers.{i}.feed_forward", "model.layers.{i}.mlp"
_DISK = "model.layers.{i}.block_sparse_moe"


def expert_weights(disk: str, *, gate: str, up: str, down: str) -> tuple[Weight, ...]:
    """The experts as files have them (``disk``: what stands before the projections' names), and in one as transformers 5 has them."""
    parts = tuple(f"{disk}.{name}.weight" for name in (gate, up))
    return (
        Weight(f"{_OURS}.experts.gate_up_proj", parts, Experts(parts=2)),
        Weight(f"{_OURS}.experts.down_proj", (f"{disk}.{down}.weight",), Experts()),
        same(f"{_OURS}.experts.gate_up_proj", f"{MEMORY}.experts.gate_up_proj"),
        same(f"{_OURS}.experts.down_proj", f"{MEMORY}.experts.down_proj"),
    )


MIXTRAL = Family(
    name="mixtral",
    classes=classes("Mixtral"),
    fields=_FIELDS,
    read=read,
    write=write,
    weights=(
        *without_feed_forward(weights()),
        # As files have it, which is what is written, and as a state_dict of transformers 5 has it.
        same(f"{_OURS}.router.weight", f"{_DISK}.gate.weight"),
        same(f"{_OURS}.router.weight", f"{MEMORY}.gate.weight"),
        *expert_weights(f"{_DISK}.experts.{{e}}", gate="w1", up="w3", down="w2"),
    ),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

FAMILIES = (MIXTRAL,)
