"""DistilBERT (Sanh et al. 2019): BERT's encoder without token types and pooler.

In training it has no dropout on the output of attention, where this model has the same rate as on that of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .bert import IGNORED
from .family import Family, Field, Harmless, Used
from .parts import old_norm, read_activation, read_labels, with_aliases, write_activation, write_labels
from .weights import QKV, Weight, affine, same

CLASSES: dict[str, dict[str, Any]] = {
    "DistilBertForMaskedLM": {"head": "masked_lm"},
    "DistilBertForSequenceClassification": {
        "head": "classification", "head_transform": "relu", "pooling": "first", "tie_embeddings": False,
    },
    "DistilBertModel": {"head": "none", "head_transform": None, "tie_embeddings": False},
}  # fmt: skip

_ALIASES = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
FIELDS: dict[str, Field] = {
    "vocab_size": Used(30522),
    "max_position_embeddings": Used(512),
    "sinusoidal_pos_embds": Harmless(False),  # what the table starts with; it is in the file and learned either way
    "n_layers": Used(6),
    "n_heads": Used(12),
    "dim": Used(768),
    "hidden_dim": Used(4 * 768),
    **{name: Used() for name in _ALIASES},
    "dropout": Used(0.1),
    "attention_dropout": Used(0.1),
    "activation": Used("gelu"),
    "qa_dropout": Harmless(0.1),
    "seq_classif_dropout": Used(0.2),
    "pad_token_id": Used(0),
    "is_causal": Harmless(),  # an encoder's mask is the same with it
    "tie_weights_": Harmless(True),
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    values = with_aliases(values, _ALIASES)
    activation = read_activation("activation", values["activation"])
    return {
        "architecture": "encoder",
        "vocab_size": values["vocab_size"],
        "hidden_size": values["dim"],
        "intermediate_size": values["hidden_dim"],
        "num_layers": values["n_layers"],
        "num_heads": values["n_heads"],
        "max_seqlen": values["max_position_embeddings"],
        "positions": "learned",
        "norm_placement": "post",
        "norm_eps": 1e-12,
        "embedding_norm": True,
        "activation": activation,
        "embedding_dropout": values["dropout"],
        "residual_dropout": values["dropout"],
        "attention_dropout": values["attention_dropout"],
        "head_dropout": values["seq_classif_dropout"],
        "head_bias": True,
        "head_transform": activation,
        "tie_embeddings": values["tie_word_embeddings"],
        "initializer_range": values["initializer_range"],
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
        "pad_token_id": values["pad_token_id"],
        **read_labels(values),
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "n_layers": config.num_layers,
        "n_heads": config.num_heads,
        "max_position_embeddings": config.max_seqlen,
        "activation": write_activation(config.activation),
        "dropout": config.residual_dropout,
        "attention_dropout": config.attention_dropout,
        "seq_classif_dropout": config.head_dropout,
        "tie_word_embeddings": config.tie_embeddings or config.head != "masked_lm",
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        **write_labels(config),
    }


_LAYER, _OURS = "distilbert.transformer.layer.{i}", "model.layers.{i}"

FAMILIES = (
    Family(
        name="distilbert",
        classes=CLASSES,
        fields=FIELDS,
        read=read,
        write=write,
        weights=(
            same("model.embed_tokens.weight", "distilbert.embeddings.word_embeddings.weight"),
            same("model.embed_positions.weight", "distilbert.embeddings.position_embeddings.weight"),
            *old_norm("model.embed_norm", "distilbert.embeddings.LayerNorm"),
            *(
                Weight(
                    f"{_OURS}.attention.qkv_proj.{name}",
                    tuple(f"{_LAYER}.attention.{part}_lin.{name}" for part in "qkv"),
                    QKV(),
                )
                for name in ("weight", "bias")
            ),
            *affine(f"{_OURS}.attention.out_proj", f"{_LAYER}.attention.out_lin"),
            *affine(f"{_OURS}.attention_norm", f"{_LAYER}.sa_layer_norm"),
            *affine(f"{_OURS}.feed_forward.up_proj", f"{_LAYER}.ffn.lin1"),
            *affine(f"{_OURS}.feed_forward.down_proj", f"{_LAYER}.ffn.lin2"),
            *affine(f"{_OURS}.feed_forward_norm", f"{_LAYER}.output_layer_norm"),
            *affine("lm_head.transform", "vocab_transform"),
            *affine("lm_head.transform_norm", "vocab_layer_norm"),
            *affine("lm_head", "vocab_projector"),
            *affine("classifier.transform", "pre_classifier"),
            *affine("classifier", "classifier"),
        ),
        prefixes=("distilbert.", ""),
        ignored=(*IGNORED, r"^vocab_(transform|layer_norm|projector)\.", r"^pre_classifier\."),
    ),
)
