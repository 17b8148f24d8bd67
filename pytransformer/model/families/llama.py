"""Llama 2 and 3.x (Touvron et al. 2023; Grattafiori et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .family import Harmless, Refused, Used
from .rope import read_rope

FIELDS = {
    "vocab_size": Used(32000),
    "hidden_size": Used(4096),
    "intermediate_size": Used(11008),
    "num_hidden_layers": Used(32),
    "num_attention_heads": Used(32),
    "num_key_value_heads": Used(),
    "head_dim": Used(),
    "hidden_act": Refused(("silu",), "only SwiGLU is served"),
    "max_position_embeddings": Used(2048),
    "rms_norm_eps": Used(1e-6),
    "rope_parameters": Used(),
    "rope_theta": Used(),
    "rope_scaling": Used(),
    "attention_bias": Used(False),
    "attention_dropout": Used(0.0),
    "mlp_bias": Used(False),
    "pretraining_tp": Harmless(1),
    "tie_word_embeddings": Used(False),
    "bos_token_id": Used(1),
    "eos_token_id": Used(2),
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    heads = values["num_attention_heads"]
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": values["num_key_value_heads"],
        "head_dim": head_dim,
        "max_seqlen": values["max_position_embeddings"],
        **read_rope(values, head_dim),
        "norm": "rms_norm",
        "norm_bias": False,
        "norm_eps": values["rms_norm_eps"],
        "activation": "swiglu",
        "attention_bias": values["attention_bias"],
        "mlp_bias": values["mlp_bias"],
        "attention_dropout": values["attention_dropout"],
        "tie_embeddings": values["tie_word_embeddings"],
    }
