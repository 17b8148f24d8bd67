"""T5 and mT5 beside transformers' own."""

from __future__ import annotations

from pytransformer.model.families import FAMILIES, parts

from .support import Case, check_fields, every_check

_TINY = {
    "vocab_size": 37, "d_model": 16, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
}  # fmt: skip
# Scores are not divided by the root of the width of a head; T5 starts with q so much smaller instead.
_COMMON = {"quiet": (".q.weight", 8**-0.5)}
CASES = [
    Case("relu", "T5Config", "T5ForConditionalGeneration", _TINY, **_COMMON),
    Case(
        "gated-gelu-unscaled-deeper-decoder",
        "T5Config",
        "T5ForConditionalGeneration",
        {**_TINY, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 1, "num_decoder_layers": 3},
        **_COMMON,
    ),
    Case(
        "gated-silu-many-buckets",
        "T5Config",
        "T5ForConditionalGeneration",
        {
            **_TINY, "feed_forward_proj": "gated-silu", "num_heads": 1, "d_kv": 8, "num_decoder_layers": 1,
            "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-3,
        },
        **_COMMON,
    ),
    Case("plain-gelu", "T5Config", "T5ForConditionalGeneration", {**_TINY, "feed_forward_proj": "gelu"}, **_COMMON),
    Case("encoder", "T5Config", "T5EncoderModel", {**_TINY, "feed_forward_proj": "gated-relu"}, **_COMMON),
    Case("mt5", "MT5Config", "MT5ForConditionalGeneration", _TINY, **_COMMON),
    Case(
        "mt5-relu-said-to-be-untied",
        "MT5Config",
        "MT5ForConditionalGeneration",
        {**_TINY, "feed_forward_proj": "relu", "tie_word_embeddings": False, "num_decoder_layers": 1},
        **_COMMON,
    ),
    Case("mt5-encoder", "MT5Config", "MT5EncoderModel", {**_TINY, "num_heads": 2, "d_kv": 8}, **_COMMON),
]  # fmt: skip


@every_check(CASES)
def test_t5(case, check):
    check(case)


def test_fields():
    generation = set(parts.GENERATION)
    older = (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "head_dim",
        "max_position_embeddings",
        "n_positions",
    )
    older = (*older, "output_past", "gradient_checkpointing", *generation)
    check_fields(FAMILIES["t5"], "T5Config", older=older)
    check_fields(FAMILIES["mt5"], "MT5Config", older=(*older, "scale_decoder_outputs"))
