"""Falcon (Almazrouei et al. 2023): 7B, 40B and 180B, and the RW models with ALiBi (Penedo et al. 2023).

Their four decisions make these: the new architecture (groups of query heads, attention beside the feed-forward) has one norm for both or
one each; the old one has one key head or as many as query heads, and attention beside the feed-forward or before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Refused, Used
from .layer_norm_decoders import read_shared, write_shared
from .llama import classes
from .parts import read_activation, with_aliases, write_activation
from .rope import read_rope, write_rope
from .weights import PerHead, affine, same

_FIELDS: dict[str, Field] = {
    "vocab_size": Used(65024),
    "hidden_size": Used(4544),
    "n_embed": Used(),  # the older name
    "num_hidden_layers": Used(32),
    "num_attention_heads": Used(71),
    "num_ln_in_parallel_attn": Used(),
    "layer_norm_epsilon": Used(1e-5),
    "hidden_dropout": Used(0.0),
    # transformers applies it to the probabilities with ALiBi alone, and to the attention's output where the feed-forward comes after.
    "attention_dropout": Refused((0.0, None), "it has another meaning in each kind of Falcon"),
    "num_kv_heads": Used(),
    "alibi": Used(False),
    "new_decoder_architecture": Used(False),
    "multi_query": Used(True),
    "parallel_attn": Used(True),
    "bias": Used(False),
    "max_position_embeddings": Used(2048),
    "rope_parameters": Used(),
    "rope_theta": Used(),
    "rope_scaling": Used(),
    "bos_token_id": Used(11),
    "eos_token_id": Used(11),
    "ffn_hidden_size": Used(),
    "activation": Used("gelu"),
    "tie_word_embeddings": Used(True),
    "apply_residual_connection_post_layernorm": Harmless(False),  # in published files, read by nobody
}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    values = with_aliases(values, {"n_embed": "hidden_size"})
    hidden = values["hidden_size"]
    heads = values["num_attention_heads"]
    head_dim = hidden // heads
    alibi = {
        "positions": "alibi",
        "alibi_scale": 1 / math.sqrt(head_dim),
        "alibi_bfloat16": True,
        "max_seqlen": values["max_position_embeddings"],
    }
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": hidden,
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "intermediate_size": values["ffn_hidden_size"],
        **(alibi if values["alibi"] else read_rope(values, head_dim)),
        "norm": "layer_norm",
        "norm_eps": values["layer_norm_epsilon"],
        **_read_architecture(values),
        "activation": read_activation("activation", values["activation"]),
        "attention_bias": values["bias"],
        "mlp_bias": values["bias"],
        "residual_dropout": values["hidden_dropout"],
        **read_shared(values),
    }


def _read_architecture(values: Mapping[str, Any]) -> dict[str, Any]:
    heads, kv_heads = values["num_attention_heads"], values["num_kv_heads"]
    kv_heads = heads if kv_heads is None else kv_heads
    norms, new, parallel = (
        values["num_ln_in_parallel_attn"],
        values["new_decoder_architecture"],
        values["parallel_attn"],
    )
    if new and not parallel:
        raise ValueError(
            "parallel_attn must be True with new_decoder_architecture (transformers cannot run it), got False"
        )
    if norms not in ((None, 1, 2) if new else (None, 1)):
        raise ValueError(
            f"num_ln_in_parallel_attn must be 1, or 2 with new_decoder_architecture (transformers cannot run others), got {norms}"
        )
    if not new and not values["multi_query"] and kv_heads != heads:
        raise ValueError(
            f"num_kv_heads must be num_attention_heads ({heads}) without multi_query and new_decoder_architecture, got {kv_heads}"
        )
    return {
        "num_kv_heads": 1 if values["multi_query"] and not new else kv_heads,
        "parallel": new or parallel,
        "parallel_norms": 2 if new and norms != 1 else 1,
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    multi_query = config.num_kv_heads == 1
    new = config.parallel and (config.parallel_norms == 2 or config.num_kv_heads not in (1, config.num_heads))
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_ln_in_parallel_attn": config.parallel_norms if new else None,
        "layer_norm_epsilon": config.norm_eps,
        "hidden_dropout": config.residual_dropout,
        "num_kv_heads": config.num_kv_heads if new or not multi_query else None,
        "alibi": config.positions == "alibi",
        "new_decoder_architecture": new,
        "multi_query": multi_query,
        "parallel_attn": config.parallel,
        "bias": config.attention_bias,
        **({"max_position_embeddings": config.max_seqlen} if config.positions == "alibi" else write_rope(config)),
        "ffn_hidden_size": config.intermediate_size,
        "activation": write_activation(config.activation),
        **write_shared(config),
    }


def _has_two_norms(config: TransformerConfig) -> bool:
    return config.parallel and config.parallel_norms == 2


def _has_other_norms(config: TransformerConfig) -> bool:
    return not _has_two_norms(config)


_BLOCK, _THEIRS = "model.layers.{i}", "transformer.h.{i}"

FALCON = Family(
    name="falcon",
    classes=classes("Falcon"),
    fields=_FIELDS,
    read=_read,
    write=_write,
    weights=(
        same("model.embed_tokens.weight", "transformer.word_embeddings.weight"),
        *affine(f"{_BLOCK}.attention_norm", f"{_THEIRS}.ln_attn", when=_has_two_norms),
        *affine(f"{_BLOCK}.feed_forward_norm", f"{_THEIRS}.ln_mlp", when=_has_two_norms),
        *affine(f"{_BLOCK}.attention_norm", f"{_THEIRS}.input_layernorm", when=_has_other_norms),
        *affine(f"{_BLOCK}.feed_forward_norm", f"{_THEIRS}.post_attention_layernorm", when=_has_other_norms),
        *affine(f"{_BLOCK}.attention.qkv_proj", f"{_THEIRS}.self_attention.query_key_value", PerHead()),
        *affine(f"{_BLOCK}.attention.out_proj", f"{_THEIRS}.self_attention.dense"),
        *affine(f"{_BLOCK}.feed_forward.up_proj", f"{_THEIRS}.mlp.dense_h_to_4h"),
        *affine(f"{_BLOCK}.feed_forward.down_proj", f"{_THEIRS}.mlp.dense_4h_to_h"),
        *affine("model.norm", "transformer.ln_f"),
        same("lm_head.weight", "lm_head.weight"),
        same("classifier.weight", "score.weight"),
    ),
    prefixes=("transformer.", ""),
    ignored=(r"\.rotary_emb\.inv_freq$",),
)
FAMILIES = (FALCON,)
