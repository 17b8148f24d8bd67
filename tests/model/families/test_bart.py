"""BART and Marian beside transformers' own."""

from __future__ import annotations

from pytransformer.model.families import FAMILIES, parts

from .support import Case, check_fields, every_check

# Padding on the left moves a source to other positions, in transformers too. The bias of the logits is a buffer of theirs.
_COMMON = {"sides": ("right",), "untrained": ("lm_head.bias",)}

_TINY = {
    "vocab_size": 37, "d_model": 48, "max_position_embeddings": 24, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 6, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 32,
}  # fmt: skip
_MARIAN = {**_TINY, "pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 0, "activation_function": "gelu"}
CASES = [
    Case("bart", "BartConfig", "BartForConditionalGeneration", _TINY, **_COMMON),
    Case(
        "bart-scaled-relu-deeper-decoder",
        "BartConfig",
        "BartForConditionalGeneration",
        {**_TINY, "scale_embedding": True, "activation_function": "relu", "encoder_layers": 1, "decoder_layers": 3},
        **_COMMON,
    ),
    Case("bart-base", "BartConfig", "BartModel", {**_TINY, "encoder_attention_heads": 1, "decoder_attention_heads": 2}, sides=("right",)),
    Case("marian", "MarianConfig", "MarianMTModel", {**_MARIAN, "scale_embedding": True}, **_COMMON),
    Case(
        "marian-two-vocabularies",
        "MarianConfig",
        "MarianMTModel",
        {**_MARIAN, "decoder_vocab_size": 29, "share_encoder_decoder_embeddings": False},
        **_COMMON,
    ),
    Case(
        "marian-two-vocabularies-untied",
        "MarianConfig",
        "MarianMTModel",
        {
            **_MARIAN, "decoder_vocab_size": 41, "share_encoder_decoder_embeddings": False, "tie_word_embeddings": False,
            "activation_function": "gelu",
        },
        **_COMMON,
    ),
]  # fmt: skip


@every_check(CASES)
def test_bart_and_marian(case, check):
    check(case)


def test_fields():
    older = (
        "hidden_size", "num_attention_heads", "num_hidden_layers", "tie_head", "classif_dropout", "gradient_checkpointing",
        "force_bos_token_to_be_generated", "output_past", "normalize_before", "add_final_layer_norm", "add_bias_logits",
        "normalize_embedding", "static_position_embeddings", "extra_pos_embeddings",
    )  # fmt: skip
    older = (*older, *(set(parts.GENERATION) - {"forced_eos_token_id"}))
    check_fields(FAMILIES["bart"], "BartConfig", older=older)
    check_fields(FAMILIES["marian"], "MarianConfig", older=(*older, "classifier_dropout"))
