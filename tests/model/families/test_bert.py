"""BERT beside transformers' own."""

from __future__ import annotations

from pytransformer.model.families import FAMILIES

from .support import Case, check_fields, every_check

_TINY = {
    "vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 16,
}  # fmt: skip
# Padding on the left moves a row to other positions, in transformers too.
_RIGHT = ("right",)
CASES = [
    Case("masked-lm", "BertConfig", "BertForMaskedLM", _TINY, sides=_RIGHT),
    Case(
        "masked-lm-untied-tanh-gelu",
        "BertConfig",
        "BertForMaskedLM",
        {**_TINY, "tie_word_embeddings": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        unread=("cls.predictions.bias",),
        sides=_RIGHT,
    ),
    Case("base-relu", "BertConfig", "BertModel", {**_TINY, "hidden_act": "relu", "type_vocab_size": 3}, sides=_RIGHT),
    Case(
        "classes-silu",
        "BertConfig",
        "BertForSequenceClassification",
        {**_TINY, "num_attention_heads": 1, "num_labels": 5, "hidden_act": "silu"},
        batch=64,
        sides=_RIGHT,
    ),
    Case(
        "labels",
        "BertConfig",
        "BertForSequenceClassification",
        {**_TINY, "num_labels": 3, "problem_type": "multi_label_classification"},
        batch=64,
        sides=_RIGHT,
    ),
    Case(
        "regression", "BertConfig", "BertForSequenceClassification", {**_TINY, "num_labels": 1}, batch=64, sides=_RIGHT
    ),
]


@every_check(CASES)
def test_bert(case, check):
    check(case)


def test_fields():
    check_fields(
        FAMILIES["bert"],
        "BertConfig",
        older=(
            "position_embedding_type", "add_pooling_layer", "pooling", "gradient_checkpointing", "directionality", "pooler_fc_size",
            "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
        ),
    )  # fmt: skip
