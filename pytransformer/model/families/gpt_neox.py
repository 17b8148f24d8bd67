"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Used
from .layer_norm_decoders import read_shared, write_shared
from .llama import classes
from .parts import read_activation, write_activation
from .rope import read_rope, write_rope
from .weights import PerHead, affine, same

_FIELDS: dict[str, Field] = {
    "vocab_size": Used(50432),
    "hidden_size": Used(6144),
    "num_hidden_layers": Used(44),
    "num_attention_heads": Used(64),
    "intermediate_size": Used(24576),
    "hidden_act": Used("gelu"),
    "attention_dropout": Used(0.0),
    "hidden_dropout": Used(0.0),
    "classifier_dropout": Harmless(0.1),  # of the head for single tokens alone, which is not among the classes
    "max_position_embeddings": Used(2048),
    "layer_norm_eps": Used(1e-5),
    "bos_token_id": Used(0),
    "eos_token_id": Used(2),
    "tie_word_embeddings": Used(False),
    "use_parallel_residual": Used(True),
    "rope_parameters": Used(),
    "rope_scaling": Used(),
    "rotary_pct": Used(0.25),
    "rotary_emb_base": Used(10000.0),
    "is_decoder": Harmless(False),  # this family has nothing else
    "attention_bias": Used(True),
}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    heads = values["num_attention_heads"]
    head_dim = values["hidden_size"] // heads
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "intermediate_size": values["intermediate_size"],
        **read_rope(values, head_dim, theta="rotary_emb_base", fraction=0.25, fraction_name="rotary_pct"),
        "norm": "layer_norm",
        "norm_eps": values["layer_norm_eps"],
        "parallel": values["use_parallel_residual"],
        "parallel_norms": 2,
        "activation": read_activation("hidden_act", values["hidden_act"]),
        "attention_bias": values["attention_bias"],
        "mlp_bias": True,
        "embedding_dropout": values["hidden_dropout"],
        "attention_dropout": values["attention_dropout"],
        "residual_dropout": values["hidden_dropout"],
        **read_shared(values),
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": write_activation(config.activation),
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.residual_dropout,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
        **write_rope(config, fraction=True),
        "attention_bias": config.attention_bias,
        **write_shared(config),
    }


_BLOCK, _THEIRS = "model.layers.{i}", "gpt_neox.layers.{i}"

GPT_NEOX = Family(
    name="gpt_neox",
    classes=classes("GPTNeoX"),
    fields=_FIELDS,
    read=_read,
    write=_write,
    weights=(
        same("model.embed_tokens.weight", "gpt_neox.embed_in.weight"),
        *affine(f"{_BLOCK}.attention_norm", f"{_THEIRS}.input_layernorm"),
        *affine(f"{_BLOCK}.attention.qkv_proj", f"{_THEIRS}.attention.query_key_value", PerHead()),
        *affine(f"{_BLOCK}.attention.out_proj", f"{_THEIRS}.attention.dense"),
        *affine(f"{_BLOCK}.feed_forward_norm", f"{_THEIRS}.post_attention_layernorm"),
        *affine(f"{_BLOCK}.feed_forward.up_proj", f"{_THEIRS}.mlp.dense_h_to_4h"),
        *affine(f"{_BLOCK}.feed_forward.down_proj", f"{_THEIRS}.mlp.dense_4h_to_h"),
        *affine("model.norm", "gpt_neox.final_layer_norm"),
        # "embed_out" in files, "lm_head" in the state_dict of transformers 5.
        same("lm_head.weight", "embed_out.weight"),
        same("lm_head.weight", "lm_head.weight"),
        same("classifier.weight", "score.weight"),
    ),
    prefixes=("gpt_neox.", ""),
    ignored=(r"\.attention\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
)
FAMILIES = (GPT_NEOX,)
