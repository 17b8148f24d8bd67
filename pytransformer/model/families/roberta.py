"""RoBERTa (Liu et al. 2019): BERT's encoder with positions that skip padding, and other heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .bert import FIELDS, IGNORED, encoder_weights, output_bias, read_encoder, settle, write_encoder
from .family import Family, Used
from .weights import affine, same

CLASSES: dict[str, dict[str, Any]] = {
    # Whatever the configuration's activation, this head has the exact GELU.
    "RobertaForMaskedLM": {"head": "masked_lm", "pooler": False, "head_transform": "gelu"},
    "RobertaForSequenceClassification": {
        "head": "classification", "head_transform": "tanh", "pooler": False, "pooling": "first", "tie_embeddings": False,
    },
    "RobertaModel": {"head": "none", "head_transform": None, "tie_embeddings": False},
}  # fmt: skip


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`. The first token that is no padding has the position after the number of the padding token."""
    padding = values["pad_token_id"]
    if padding is None:
        raise ValueError("pad_token_id must be given, because positions count from it, got None")
    offset = padding + 1
    return {
        **read_encoder(values),
        "position_offset": offset,
        "positions_skip_padding": True,
        "max_seqlen": values["max_position_embeddings"] - offset,
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {**write_encoder(config), "max_position_embeddings": config.max_seqlen + config.position_offset}


FAMILIES = (
    Family(
        name="roberta",
        classes=CLASSES,
        fields={
            **FIELDS,
            "vocab_size": Used(50265),
            "pad_token_id": Used(1),
            "bos_token_id": Used(0),
            "eos_token_id": Used(2),
        },
        read=read,
        write=write,
        weights=(
            *encoder_weights("roberta."),
            *affine("lm_head.transform", "lm_head.dense"),
            *affine("lm_head.transform_norm", "lm_head.layer_norm"),
            same("lm_head.weight", "lm_head.decoder.weight"),
            *output_bias("lm_head.decoder.bias", "lm_head.bias"),
            *affine("classifier.transform", "classifier.dense"),
            *affine("classifier", "classifier.out_proj"),
        ),
        prefixes=("roberta.", ""),
        ignored=IGNORED,
        settle=settle,
    ),
)
