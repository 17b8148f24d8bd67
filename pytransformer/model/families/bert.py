"""BERT (Devlin et al. 2019)."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from ..config import TransformerConfig
from .family import Family, Field, Harmless, Used
from .parts import old_norm, read_activation, read_labels, write_activation, write_labels
from .weights import QKV, First, Weight, affine, same

# The head of the next sentence (BertForPreTraining) is left out: the masked-LM logits are what that class computes first.
_MASKED_LM = {"head": "masked_lm", "pooler": False}
CLASSES: dict[str, dict[str, Any]] = {
    "BertForMaskedLM": _MASKED_LM,
    "BertForPreTraining": _MASKED_LM,
    "BertForSequenceClassification": {
        "head": "classification", "head_transform": None, "pooler": True, "pooling": "first", "tie_embeddings": False,
    },
    "BertModel": {"head": "none", "head_transform": None, "tie_embeddings": False},
}  # fmt: skip

# Of BERT and of those that followed it.
FIELDS: dict[str, Field] = {
    "vocab_size": Used(30522),
    "hidden_size": Used(768),
    "num_hidden_layers": Used(12),
    "num_attention_heads": Used(12),
    "intermediate_size": Used(3072),
    "hidden_act": Used("gelu"),
    "hidden_dropout_prob": Used(0.1),
    "attention_probs_dropout_prob": Used(0.1),
    "classifier_dropout": Used(),
    "max_position_embeddings": Used(512),
    "type_vocab_size": Used(2),
    "layer_norm_eps": Used(1e-12),
    "pad_token_id": Used(0),
    "is_causal": Harmless(),  # an encoder's mask is the same with it
    "position_embedding_type": Used("absolute"),
    # Ours, for models without a head: in transformers both are said in code.
    "add_pooling_layer": Used(True),
    "pooling": Used(),
    "gradient_checkpointing": Harmless(False),
    # What the first releases wrote down of the pooler and never read.
    "directionality": Harmless(),
    "pooler_fc_size": Harmless(),
    "pooler_num_attention_heads": Harmless(),
    "pooler_num_fc_layers": Harmless(),
    "pooler_size_per_head": Harmless(),
    "pooler_type": Harmless(),
}


# The buffer of earlier releases; the table of a model with relative positions, which has it and never reads it; and what a model with
# another head or none leaves alone.
IGNORED = (
    r"\.position_ids$",
    r"\.position_embeddings\.weight$",
    r"^(\w+\.)?pooler\.",
    r"^cls\.",
    r"^classifier\.",
    r"^lm_head\.",
)


def read_encoder(values: Mapping[str, Any]) -> dict[str, Any]:
    """What BERT and RoBERTa have in common."""
    dropout, classifier_dropout = values["hidden_dropout_prob"], values["classifier_dropout"]
    positions = {"absolute": "learned"}.get(values["position_embedding_type"], values["position_embedding_type"])
    return {
        "architecture": "encoder",
        "vocab_size": values["vocab_size"],
        "hidden_size": values["hidden_size"],
        "intermediate_size": values["intermediate_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "max_seqlen": values["max_position_embeddings"],
        "positions": positions,
        "type_vocab_size": values["type_vocab_size"],
        "norm_placement": "post",
        "norm_eps": values["layer_norm_eps"],
        "embedding_norm": True,
        "activation": read_activation("hidden_act", values["hidden_act"]),
        "embedding_dropout": dropout,
        "residual_dropout": dropout,
        "attention_dropout": values["attention_probs_dropout_prob"],
        "head_dropout": dropout if classifier_dropout is None else classifier_dropout,
        "head_bias": True,
        "pooler": values["add_pooling_layer"],
        "pooling": values["pooling"],
        "tie_embeddings": values["tie_word_embeddings"],
        "initializer_range": values["initializer_range"],
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
        "pad_token_id": values["pad_token_id"],
        **read_labels(values),
    }


def write_encoder(config: TransformerConfig) -> dict[str, Any]:
    """The inverse of :func:`read_encoder`."""
    values = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_seqlen,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": write_activation(config.activation),
        "hidden_dropout_prob": config.residual_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": None if config.head_dropout == config.residual_dropout else config.head_dropout,
        "tie_word_embeddings": config.tie_embeddings or config.head != "masked_lm",
        "initializer_range": config.initializer_range,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        **write_labels(config),
    }
    if config.positions != "learned":
        values["position_embedding_type"] = config.positions
    if config.head == "none" and not config.pooler:
        values["add_pooling_layer"] = False
    if config.head == "none" and config.pooling is not None:
        values["pooling"] = config.pooling
    return values


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`."""
    fields = read_encoder(values)
    return {**fields, "head_transform": fields["activation"]}


def encoder_weights(prefix: str) -> tuple[Weight, ...]:
    """The tensors of an encoder and its pooler, as BERT and RoBERTa name them."""
    layer, ours = f"{prefix}encoder.layer.{{i}}", "model.layers.{i}"
    query, key, value = (f"{layer}.attention.self.{name}" for name in ("query", "key", "value"))
    return (
        same("model.embed_tokens.weight", f"{prefix}embeddings.word_embeddings.weight"),
        same("model.embed_positions.weight", f"{prefix}embeddings.position_embeddings.weight"),
        same("model.embed_types.weight", f"{prefix}embeddings.token_type_embeddings.weight"),
        *old_norm("model.embed_norm", f"{prefix}embeddings.LayerNorm"),
        *(
            Weight(f"{ours}.attention.qkv_proj.{name}", tuple(f"{part}.{name}" for part in (query, key, value)), QKV())
            for name in ("weight", "bias")
        ),
        same(f"{ours}.attention.relative_keys.weight", f"{layer}.attention.self.distance_embedding.weight"),
        *affine(f"{ours}.attention.out_proj", f"{layer}.attention.output.dense"),
        *old_norm(f"{ours}.attention_norm", f"{layer}.attention.output.LayerNorm"),
        *affine(f"{ours}.feed_forward.up_proj", f"{layer}.intermediate.dense"),
        *affine(f"{ours}.feed_forward.down_proj", f"{layer}.output.dense"),
        *old_norm(f"{ours}.feed_forward_norm", f"{layer}.output.LayerNorm"),
        *affine("pooler", f"{prefix}pooler.dense"),
    )


def output_bias(used: str, other: str) -> tuple[Weight, ...]:
    """The masked-LM head's bias, which stands in a file under one of two names or both.

    Untied, transformers 5 has both and computes with the decoder's; files of earlier releases hold the other alone, which 5 then loads and
    never reads.
    """
    return (
        Weight("lm_head.bias", (used, other), First(), when=_is_untied),
        same("lm_head.bias", used, when=_is_untied),
        same("lm_head.bias", other, when=_is_untied),
        Weight("lm_head.bias", (other,), when=_is_tied, copies=(used,)),
    )


def _is_tied(config: TransformerConfig) -> bool:
    return config.tie_embeddings


def _is_untied(config: TransformerConfig) -> bool:
    return not config.tie_embeddings


def settle(config: TransformerConfig, names: Collection[str]) -> TransformerConfig:
    """A model without a head need not have a pooler: ``add_pooling_layer`` is no field of the configuration in transformers."""
    if config.head == "none" and config.pooler and not any(".pooler." in name for name in names):
        return dataclasses.replace(config, pooler=False)
    return config


FAMILIES = (
    Family(
        name="bert",
        classes=CLASSES,
        fields=FIELDS,
        read=read,
        write=write_encoder,
        weights=(
            *encoder_weights("bert."),
            *affine("lm_head.transform", "cls.predictions.transform.dense"),
            *old_norm("lm_head.transform_norm", "cls.predictions.transform.LayerNorm"),
            same("lm_head.weight", "cls.predictions.decoder.weight"),
            *output_bias("cls.predictions.decoder.bias", "cls.predictions.bias"),
            *affine("classifier", "classifier"),
        ),
        prefixes=("bert.", ""),
        ignored=IGNORED,
        settle=settle,
    ),
)
