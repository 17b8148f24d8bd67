"""Phi-3 and Phi-4-mini (Abdin et al. 2024): Llama with fused projections, a part of each head rotated, and LongRoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Harmless, Used
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

# The first files called LongRoPE so.
_RENAMED = {"su": "longrope", "yarn": "longrope"}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    shape = read_shape(values)
    rope = read_rope(values, shape["head_dim"], fraction=1.0, renamed=_RENAMED)
    if rope["rope_scaling"] is not None and rope["rope_scaling"]["rope_type"] != "longrope":
        raise ValueError(f"rope_type must be 'default' or 'longrope', got {rope['rope_scaling']['rope_type']!r}")
    window = read_window(values, window=values["sliding_window"], causal=shape["causal"])
    return {**shape, **window, **rope, "residual_dropout": values["resid_pdrop"]}


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    if config.rope_scaling is not None and config.head_dim != config.hidden_size // config.num_heads:
        raise ValueError(
            "the family phi3 cannot express this model: with LongRoPE head_dim must be hidden_size / num_heads, "
            f"got {config.head_dim}, {config.hidden_size} and {config.num_heads}"
        )
    written = {
        **write_shape(config),
        **write_rope(config, fraction=True),
        "sliding_window": write_window(config),
        "resid_pdrop": config.residual_dropout,
    }
    # This family's length outside the mapping counts, whatever stands inside; without LongRoPE it says nothing.
    scaling = config.rope_scaling or {}
    written["original_max_position_embeddings"] = scaling.get("original_max_position_embeddings", config.max_seqlen)
    return written


PHI3 = Family(
    name="phi3",
    classes=classes("Phi3"),
    fields={
        **COMMON_FIELDS,
        "vocab_size": Used(32064),
        "hidden_size": Used(3072),
        "intermediate_size": Used(8192),
        "max_position_embeddings": Used(4096),
        "original_max_position_embeddings": Used(4096),
        "rms_norm_eps": Used(1e-5),
        "bos_token_id": Used(1),
        "eos_token_id": Used(32000),
        "pad_token_id": Used(32000),
        "resid_pdrop": Used(0.0),
        "embd_pdrop": Harmless(0.0),  # no class of transformers 5.x applies it
        "sliding_window": Used(),
    },
    read=read,
    write=write,
    weights=weights(fused=True),
    prefixes=PREFIXES,
    ignored=IGNORED,
)

FAMILIES = (PHI3,)
