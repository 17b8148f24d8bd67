"""BLOOM (BigScience 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Refused, Used
from .layer_norm_decoders import read_shared, write_shared
from .llama import classes
from .parts import with_aliases
from .weights import PerHead, affine, same

# Other names that transformers takes.
_ALIASES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}

_FIELDS: dict[str, Field] = {
    "vocab_size": Used(250880),
    "hidden_size": Used(64),
    "n_layer": Used(2),
    "n_head": Used(8),
    **{name: Used() for name in _ALIASES},
    # ALiBi needs no table of positions; published files say how long the sequences were that the model was trained on.
    "seq_length": Used(2048),
    "layer_norm_epsilon": Used(1e-5),
    "bos_token_id": Used(1),
    "eos_token_id": Used(2),
    "tie_word_embeddings": Used(True),
    "apply_residual_connection_post_layernorm": Used(False),
    "hidden_dropout": Used(0.0),
    "attention_dropout": Used(0.0),
    # Without a causal mask transformers' bias still grows from the first key to the last, ALiBi's to both sides falls with the distance.
    "is_causal": Refused((True,), "a BLOOM that sees both ways is not served"),
    "pretraining_tp": Harmless(1),  # only beside slow_but_exact
    "slow_but_exact": Refused((False,), "with it transformers leaves out the biases after attention and feed-forward"),
    # Of the training code, in published files; transformers reads none of them.
    "n_inner": Harmless(),
    "offset_alibi": Harmless(),
    "skip_bias_add": Harmless(),
    "skip_bias_add_qkv": Harmless(),
    "attention_softmax_in_fp32": Harmless(),
    "masked_softmax_fusion": Harmless(),
    "bias_dropout_fusion": Harmless(),
    "unk_token_id": Harmless(),
}


def _read(values: Mapping[str, Any]) -> dict[str, Any]:
    values = with_aliases(values, _ALIASES)
    return {
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "num_layers": values["n_layer"],
        "num_heads": values["n_head"],
        "max_seqlen": values["seq_length"],
        "positions": "alibi",
        "norm": "layer_norm",
        "norm_eps": values["layer_norm_epsilon"],
        "embedding_norm": True,
        "residual_from_norm": values["apply_residual_connection_post_layernorm"],
        "activation": "gelu_tanh",
        "attention_dropout": values["attention_dropout"],
        "residual_dropout": values["hidden_dropout"],
        **read_shared(values),
    }


def _write(config: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "seq_length": config.max_seqlen,
        "layer_norm_epsilon": config.norm_eps,
        "apply_residual_connection_post_layernorm": config.residual_from_norm,
        "hidden_dropout": config.residual_dropout,
        "attention_dropout": config.attention_dropout,
        **write_shared(config),
    }


_BLOCK, _THEIRS = "model.layers.{i}", "transformer.h.{i}"

BLOOM = Family(
    name="bloom",
    classes=classes("Bloom"),
    fields=_FIELDS,
    read=_read,
    write=_write,
    weights=(
        same("model.embed_tokens.weight", "transformer.word_embeddings.weight"),
        *affine("model.embed_norm", "transformer.word_embeddings_layernorm"),
        *affine(f"{_BLOCK}.attention_norm", f"{_THEIRS}.input_layernorm"),
        *affine(f"{_BLOCK}.attention.qkv_proj", f"{_THEIRS}.self_attention.query_key_value", PerHead()),
        *affine(f"{_BLOCK}.attention.out_proj", f"{_THEIRS}.self_attention.dense"),
        *affine(f"{_BLOCK}.feed_forward_norm", f"{_THEIRS}.post_attention_layernorm"),
        *affine(f"{_BLOCK}.feed_forward.up_proj", f"{_THEIRS}.mlp.dense_h_to_4h"),
        *affine(f"{_BLOCK}.feed_forward.down_proj", f"{_THEIRS}.mlp.dense_4h_to_h"),
        *affine("model.norm", "transformer.ln_f"),
        same("lm_head.weight", "lm_head.weight"),
        same("classifier.weight", "score.weight"),
    ),
    prefixes=("transformer.", ""),
)
FAMILIES = (BLOOM,)
