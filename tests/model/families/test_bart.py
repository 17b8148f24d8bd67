"""BART and Marian beside transformers' own."""

from __future__ import annotations

from pytransformer.model.families import FAMILIES

from .support import Case, check_fields, every_check

_TINY = {
    "vocab_size": 37, "d_model": 24, "max_position_embeddings": 24, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 32,
}  # fmt: skip
_MARIAN = {**_TINY, "pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 0, "activation_function": "swish"}
CASES = [
    Case("bart", "BartConfig", "BartForConditionalGeneration", _TINY),
    Case(
        "bart-scaled-relu-deeper-decoder",
        "BartConfig",
        "BartForConditionalGeneration",
        {**_TINY, "scale_embedding": True, "activation_function": "relu", "encoder_layers": 1, "decoder_layers": 3},
    ),
    Case("bart-base", "BartConfig", "BartModel", {**_TINY, "encoder_attention_heads": 1, "decoder_attention_heads": 2}),
    Case("marian", "MarianConfig", "MarianMTModel", {**_MARIAN, "scale_embedding": True}),
    Case(
        "marian-two-vocabularies",
        "MarianConfig",
        "MarianMTModel",
        {**_MARIAN, "decoder_vocab_size": 29, "share_encoder_decoder_embeddings": False},
    ),
    Case(
        "marian-two-vocabularies-untied",
        "MarianConfig",
        "MarianMTModel",
        {
            **_MARIAN, "decoder_vocab_size": 41, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False,
            "activation_function": "gelu",
        },
    ),
]  # fmt: skip


@every_check(CASES)
def test_bart_and_marian(case, check):
    check(case)
