"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Used
from .layer_norm_decoders import read_shared, write_shared
from .parts import read_activation, with_aliases, write_activation
from .weights import Transposed, affine, same

# Other names that transformers takes for four of them.
_ALIASES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head", "num_hidden_layers": "n_layer",
}  # fmt: skip

_FIELDS: dict[str, Field] = {
    "vocab_size": Used(50257),
    "n_positions": Used(1024),
    "n_embd": Used(768),
    "n_layer": Used(12),
    "n_head": Used(12),
    "n_inner": Used(),
    **{name: Used() for name in _ALIASES},
    "activation_function": Used("gelu_new"),
    "resid_pdrop": Used(0.1),
    "embd_pdrop": Used(0.1),
    "attn_pdrop": Used(0.1),
    "layer_norm_epsilon": Used(1e-5),
    "scale_attn_weights": Used(True),
    "scale_attn_by_inverse_layer_idx": Used(False),
    # Only how scores are computed in mixed precision; here they always are in float32.
    "reorder_and_upcast_attn": Harmless(False),
    "bos_token_id": Used(50256),
    "eos_token_id": Used(50256),
    # Of the multiple-choice head, which is not among the classes.
    "summary_type": Harmless("cls_index"),
    "summary_use_proj": Harmless(True),
    "summary_activation": Harmless(),
    "summary_proj_to_labels": Harmless(True),
    "summary_first_dropout": Harmless(0.1),
    "n_ctx": Harmless(),
}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    values = with_aliases(values, _ALIASES)
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["n_embd"],
        "num_layers": values["n_layer"],
        "num_heads": values["n_head"],
        "intermediate_size": values["n_inner"],
        "max_seqlen": values["n_positions"],
        "positions": "learned",
        "norm": "layer_norm",
        "norm_eps": values["layer_norm_epsilon"],
        "activation": read_activation("activation_function", values["activation_function"]),
        "softmax_scale": None if values["scale_attn_weights"] else 1.0,
        "scale_by_layer": values["scale_attn_by_inverse_layer_idx"],
        "embedding_dropout": values["embd_pdrop"],
        "attention_dropout": values["attn_pdrop"],
        "residual_dropout": values["resid_pdrop"],
        **read_shared(values),
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seqlen,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "activation_function": write_activation(config.activation),
        "resid_pdrop": config.residual_dropout,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.softmax_scale is None,
        "scale_attn_by_inverse_layer_idx": config.scale_by_layer,
        **write_shared(config),
    }


_BLOCK, _THEIRS = "model.layers.{i}", "transformer.h.{i}"

GPT2 = Family(
    name="gpt2",
    classes={
        "GPT2LMHeadModel": {"head": "lm"},
        "GPT2Model": {"head": "none", "tie_embeddings": False},
        "GPT2ForSequenceClassification": {"head": "classification", "pooling": "last", "tie_embeddings": False},
    },
    fields=_FIELDS,
    read=_read,
    write=_write,
    weights=(
        same("model.embed_tokens.weight", "transformer.wte.weight"),
        same("model.embed_positions.weight", "transformer.wpe.weight"),
        *affine(f"{_BLOCK}.attention_norm", f"{_THEIRS}.ln_1"),
        # Conv1D: matrices are stored (in, out); of a bias the transpose is itself.
        *affine(f"{_BLOCK}.attention.qkv_proj", f"{_THEIRS}.attn.c_attn", Transposed()),
        *affine(f"{_BLOCK}.attention.out_proj", f"{_THEIRS}.attn.c_proj", Transposed()),
        *affine(f"{_BLOCK}.feed_forward_norm", f"{_THEIRS}.ln_2"),
        *affine(f"{_BLOCK}.feed_forward.up_proj", f"{_THEIRS}.mlp.c_fc", Transposed()),
        *affine(f"{_BLOCK}.feed_forward.down_proj", f"{_THEIRS}.mlp.c_proj", Transposed()),
        *affine("model.norm", "transformer.ln_f"),
        same("lm_head.weight", "lm_head.weight"),
        same("classifier.weight", "score.weight"),
    ),
    prefixes=("transformer.", ""),
    ignored=(r"(^|\.)attn\.(masked_)?bias$",),  # the causal mask, which older releases saved as a buffer
)
FAMILIES = (GPT2,)
