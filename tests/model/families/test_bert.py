"""BERT beside transformers' own."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from pytransformer.model.families import FAMILIES, CheckpointError, read_config

from .support import Case, assert_logits, check_fields, every_check
from .support_seq2seq import assert_same, assert_saved, inputs_for, loaded, made

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


MASKED_LM = Case("", "BertConfig", "BertForMaskedLM", _TINY)
UNTIED = Case("", "BertConfig", "BertForMaskedLM", {**_TINY, "tie_word_embeddings": False})
BASE = Case("", "BertConfig", "BertModel", _TINY)


def renamed(tensors, pattern, by):
    return {re.sub(pattern, by, name): tensor for name, tensor in tensors.items()}


def test_gamma_and_beta_are_weight_and_bias():
    theirs = made(MASKED_LM)

    def old(tensors):
        return renamed(
            renamed(tensors, r"LayerNorm\.weight$", "LayerNorm.gamma"), r"LayerNorm\.bias$", "LayerNorm.beta"
        )

    assert_same(loaded(theirs, tensors=old), theirs)


def test_stray_position_ids_are_passed_over():
    theirs = made(MASKED_LM)
    buffer = {"bert.embeddings.position_ids": torch.arange(16)[None]}
    assert_same(loaded(theirs, tensors=lambda tensors: {**tensors, **buffer}), theirs)


def test_names_need_no_prefix():
    theirs = made(MASKED_LM)
    assert_same(loaded(theirs, tensors=lambda tensors: renamed(tensors, r"^bert\.", "")), theirs)
    base = made(BASE)
    assert_same(loaded(base), base)
    assert_same(loaded(base, tensors=lambda tensors: renamed(tensors, "^", "bert.")), base)


def test_a_base_model_is_taken_out_of_one_with_a_head():
    theirs = made(MASKED_LM)
    ours = loaded(theirs, architectures=["BertModel"])
    assert ours.config.head == "none" and not ours.config.pooler
    assert_logits(ours(inputs_for(ours)["ids"]), theirs.bert(inputs_for(ours)["ids"]).last_hidden_state)


def test_a_tied_decoder_may_stand_in_the_file_again():
    theirs = made(MASKED_LM)
    again = {
        "cls.predictions.decoder.weight": theirs.bert.embeddings.word_embeddings.weight.detach(),
        "cls.predictions.decoder.bias": theirs.cls.predictions.bias.detach(),
    }
    ours = loaded(theirs, tensors=lambda tensors: {**tensors, **again})
    assert ours.config.tie_embeddings
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_a_decoder_of_its_own_wins_over_the_flag():
    theirs = made(UNTIED)
    ours = loaded(theirs, tie_word_embeddings=True, tensors=lambda tensors: without(tensors, "cls.predictions.bias"))
    assert not ours.config.tie_embeddings
    assert_same(ours, theirs)


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def test_of_two_output_biases_the_decoders_counts():
    theirs = made(UNTIED)
    assert not torch.equal(theirs.cls.predictions.bias, theirs.cls.predictions.decoder.bias)
    ours = loaded(theirs)
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_an_untied_file_with_the_outer_bias_alone_means_that_one():
    theirs = made(UNTIED)
    ours = loaded(theirs, tensors=lambda tensors: without(tensors, "cls.predictions.decoder.bias"))
    with torch.no_grad():
        theirs.cls.predictions.decoder.bias.copy_(theirs.cls.predictions.bias)
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_the_head_of_the_next_sentence_is_left_out():
    theirs = made(dataclasses.replace(MASKED_LM, model="BertForPreTraining"))
    ours = loaded(theirs)
    inputs = inputs_for(ours)
    with torch.no_grad():
        logits = theirs(inputs["ids"], token_type_ids=inputs["types"]).prediction_logits
    assert_logits(ours(inputs["ids"], token_type_ids=inputs["types"]), logits)


def test_a_base_model_need_not_have_a_pooler():
    theirs = made(BASE)
    ours = loaded(theirs, tensors=lambda tensors: without(tensors, "pooler.dense.weight", "pooler.dense.bias"))
    assert ours.pooler is None
    assert_same(ours, theirs)


def test_the_pooled_vector_is_there_where_it_is_asked_for():
    theirs = made(BASE)
    ours = loaded(theirs, pooling="first")
    inputs = inputs_for(ours)
    with torch.no_grad():
        pooled = theirs(inputs["ids"], token_type_ids=inputs["types"]).pooler_output
    assert_logits(ours(inputs["ids"], token_type_ids=inputs["types"]), pooled)


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_relative_positions_are_not_ignored(kind, monkeypatch):
    """transformers 5 passes over ``position_embedding_type``; the formula is that of release 4."""
    from transformers.models.bert import modeling_bert

    theirs = made(BASE)
    limit = theirs.config.max_position_embeddings
    tables = {index: torch.randn(2 * limit - 1, 8) for index in range(2)}

    def attend(module, query, key, value, attention_mask, scaling=None, **options):
        places = torch.arange(query.shape[2])
        rows = tables[module.layer_idx][places[:, None] - places + limit - 1]
        scores = query @ key.transpose(2, 3) + torch.einsum("bhld,lrd->bhlr", query, rows)
        if kind == "relative_key_query":
            scores = scores + torch.einsum("bhrd,lrd->bhlr", key, rows)
        weights = torch.softmax(scores * scaling, dim=-1)
        return (weights @ value).transpose(1, 2), weights

    monkeypatch.setattr(modeling_bert, "eager_attention_forward", attend)
    distances = {
        f"encoder.layer.{index}.attention.self.distance_embedding.weight": table for index, table in tables.items()
    }
    ours = loaded(theirs, position_embedding_type=kind, tensors=lambda tensors: {**tensors, **distances})
    with torch.no_grad():
        theirs.embeddings.position_embeddings.weight.zero_()
    assert_same(ours, theirs)
    config = {name: value for name, value in FAMILIES["bert"].write(ours.config).items() if "position" in name}
    assert config == {"max_position_embeddings": 16, "position_embedding_type": kind}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("hidden_act", "quick_gelu"),
        ("position_embedding_type", "rotary"),
    ],
)
def test_what_is_not_served_is_refused_by_name(field, value):
    with pytest.raises(CheckpointError, match=field.replace("position_embedding_type", "positions")):
        loaded(made(MASKED_LM), **{field: value})


def test_one_label_is_a_regression():
    theirs = made(Case("", "BertConfig", "BertForSequenceClassification", {**_TINY, "num_labels": 1}))
    ours = loaded(theirs)
    assert ours.config.problem == "regression"
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_a_configuration_of_the_first_releases_is_read_without_a_warning(recwarn):
    values = {
        **_TINY,
        "torchscript": False,
        "use_bfloat16": False,
        "output_past": True,
        "xla_device": True,
        "tf_legacy_loss": False,
    }
    assert read_config(FAMILIES["bert"], values).num_layers == 2
    assert not recwarn.list
