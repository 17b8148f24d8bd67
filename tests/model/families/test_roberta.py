"""RoBERTa and DistilBERT beside transformers' own."""

from __future__ import annotations

from pytransformer.model.families import FAMILIES

from .support import Case, check_fields, every_check

_ROBERTA = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 16, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": 37, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 16,
}  # fmt: skip
# Padding on the left moves a row to other positions, in transformers too (but for RoBERTa's), and away from the place of a first token.
_RIGHT = ("right",)
CASES = [
    Case("roberta-masked-lm", "RobertaConfig", "RobertaForMaskedLM", _ROBERTA),
    Case(
        "roberta-masked-lm-untied-relu-pad-0",
        "RobertaConfig",
        "RobertaForMaskedLM",
        {**_ROBERTA, "tie_word_embeddings": False, "hidden_act": "relu", "pad_token_id": 0},
        unread=("lm_head.bias",),
    ),
    Case("roberta-base-types", "RobertaConfig", "RobertaModel", {**_ROBERTA, "type_vocab_size": 2}),
    Case(
        "roberta-classes",
        "RobertaConfig",
        "RobertaForSequenceClassification",
        {**_ROBERTA, "num_attention_heads": 1, "num_labels": 4},
        batch=64,
        sides=_RIGHT,
    ),
    Case("distilbert-masked-lm", "DistilBertConfig", "DistilBertForMaskedLM", _DISTILBERT, sides=_RIGHT),
    Case(
        "distilbert-masked-lm-untied-relu",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {**_DISTILBERT, "tie_word_embeddings": False, "activation": "relu"},
        sides=_RIGHT,
    ),
    Case(
        "distilbert-base",
        "DistilBertConfig",
        "DistilBertModel",
        {**_DISTILBERT, "n_heads": 1, "n_layers": 1},
        sides=_RIGHT,
    ),
    Case(
        "distilbert-classes",
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {**_DISTILBERT, "num_labels": 3, "activation": "silu"},
        batch=64,
        sides=_RIGHT,
    ),
]


@every_check(CASES)
def test_roberta_and_distilbert(case, check):
    check(case)


def test_fields():
    aliases = ("hidden_size", "num_attention_heads", "num_hidden_layers")
    check_fields(FAMILIES["distilbert"], "DistilBertConfig", older=(*aliases, "tie_weights_"))
    check_fields(
        FAMILIES["roberta"],
        "RobertaConfig",
        older=(
            "position_embedding_type", "add_pooling_layer", "pooling", "gradient_checkpointing", "directionality", "pooler_fc_size",
            "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
        ),
    )  # fmt: skip
