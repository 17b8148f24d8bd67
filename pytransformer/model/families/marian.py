"""Marian's translation models (Junczys-Dowmunt et al. 2018; Tiedemann & Thottingal 2020): the 2017 transformer, sines before cosines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TransformerConfig
from .bart import FIELDS, FINAL_BIAS, embeddings, read_stacks, stack, write_stacks
from .family import Family, Field, Harmless, Refused, Used
from .weights import same

_FIELDS: dict[str, Field] = {
    **FIELDS,
    "vocab_size": Used(58101),
    "decoder_vocab_size": Used(),
    "decoder_start_token_id": Used(58100),
    "pad_token_id": Used(58100),
    "eos_token_id": Used(0),
    "bos_token_id": Used(),
    "forced_eos_token_id": Harmless(0),
    "share_encoder_decoder_embeddings": Used(True),
    "normalize_embedding": Refused((False, None), "Marian has no norm after the embeddings"),
    "static_position_embeddings": Refused((True, None), "Marian's positions are sinusoidal"),
    "extra_pos_embeddings": Harmless(),
}


def read(values: Mapping[str, Any]) -> dict[str, Any]:
    """See :class:`Family`. The embeddings of both sides are one only if the head is tied too."""
    shared, tied = values["share_encoder_decoder_embeddings"], values["tie_word_embeddings"]
    return {
        **read_stacks(values),
        "vocab_size": values["vocab_size"] if shared else values["decoder_vocab_size"] or values["vocab_size"],
        "src_vocab_size": values["vocab_size"],
        "share_embeddings": shared and tied,
        "tie_embeddings": tied and values["tie_head"],
        "positions": "sinusoidal",
        "sinusoidal_halves": True,
    }


def write(config: TransformerConfig) -> dict[str, Any]:
    """See :class:`Family`."""
    return {
        **write_stacks(config),
        "vocab_size": config.src_vocab_size,
        "decoder_vocab_size": config.vocab_size,
        "share_encoder_decoder_embeddings": config.share_embeddings,
        "tie_word_embeddings": config.tie_embeddings or config.share_embeddings,
    }


FAMILIES = (
    Family(
        name="marian",
        classes={"MarianMTModel": {"head": "lm"}},
        fields=_FIELDS,
        read=read,
        write=write,
        weights=(
            *embeddings(unused=False),
            *stack("model.", "model.decoder.", cross=True),
            *stack("encoder.", "model.encoder.", cross=False),
            same("lm_head.weight", "lm_head.weight"),
            FINAL_BIAS,
        ),
        # The table of positions is computed; untied, transformers has a third embedding that nothing reads.
        ignored=(r"(^|\.)embed_positions\.weight$", r"^model\.shared\.weight$"),
    ),
)
