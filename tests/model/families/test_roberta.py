"""RoBERTa and DistilBERT beside transformers' own."""

from __future__ import annotations

import json

import pytest
import torch

from pytransformer.model.families import FAMILIES, CheckpointError, find_family, read_config

from .support import Case, assert_logits, check_fields, every_check
from .support_seq2seq import assert_same, assert_saved, inputs_for, loaded, made

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


ROBERTA = Case("", "RobertaConfig", "RobertaForMaskedLM", _ROBERTA)
ROBERTA_CLASSES = Case("", "RobertaConfig", "RobertaForSequenceClassification", {**_ROBERTA, "num_labels": 4})
DISTILBERT = Case("", "DistilBertConfig", "DistilBertForMaskedLM", _DISTILBERT)


@torch.no_grad()
def test_roberta_positions_come_from_ids_and_not_from_the_mask():
    theirs = made(ROBERTA)
    ours = loaded(theirs)
    ids = inputs_for(ours)["ids"]
    ids[0, 2] = ids[1, 0] = theirs.config.pad_token_id  # a padding token in the midst of a row counts as none
    hidden_ones = torch.ones_like(ids)
    hidden_ones[1, 6:] = 0  # and one that the mask hides counts all the same
    for mask in (None, hidden_ones):
        assert_logits(ours(ids, mask), theirs(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_roberta_positions_of_vectors_count_from_the_padding_token_on():
    theirs = made(ROBERTA)
    ours = loaded(theirs)
    vectors = torch.randn(2, 7, 24)
    assert_logits(ours(inputs_embeds=vectors), theirs(inputs_embeds=vectors).logits)


def test_roberta_has_room_for_fewer_tokens_than_rows_in_its_table():
    ours = loaded(made(ROBERTA))
    assert ours.config.max_seqlen == 14 and ours.model.embed_positions.weight.shape[0] == 16
    longest = torch.full((1, 14), 5)
    assert ours(longest).shape == (1, 14, 37)


def test_roberta_without_a_padding_token_has_no_positions():
    with pytest.raises(CheckpointError, match="pad_token_id"):
        read_config(find_family("roberta"), {**_ROBERTA, "pad_token_id": None})


def test_roberta_masked_lm_has_the_exact_gelu_whatever_the_configuration_says():
    theirs = made(Case("", "RobertaConfig", "RobertaForMaskedLM", {**_ROBERTA, "hidden_act": "relu"}))
    ours = loaded(theirs)
    assert ours.config.head_transform == "gelu" and ours.config.activation == "relu"
    assert_same(ours, theirs)


def test_roberta_classifies_by_the_first_token_without_a_pooler():
    theirs = made(ROBERTA_CLASSES)
    ours = loaded(theirs)
    assert ours.pooler is None and ours.config.head_transform == "tanh"
    pooler = {"roberta.pooler.dense.weight": torch.randn(24, 24), "roberta.pooler.dense.bias": torch.randn(24)}
    assert_same(loaded(theirs, tensors=lambda tensors: {**tensors, **pooler}), theirs)
    assert_saved(ours, theirs)


def test_an_untied_roberta_with_the_outer_bias_alone_means_that_one():
    theirs = made(Case("", "RobertaConfig", "RobertaForMaskedLM", {**_ROBERTA, "tie_word_embeddings": False}))
    kept = loaded(theirs)
    assert_same(kept, theirs)
    ours = loaded(theirs, tensors=lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.decoder.bias"})
    with torch.no_grad():
        theirs.lm_head.decoder.bias.copy_(theirs.lm_head.bias)
    assert_same(ours, theirs)


def test_distilberts_sinusoidal_positions_are_a_table_in_the_file():
    theirs = made(Case("", "DistilBertConfig", "DistilBertForMaskedLM", {**_DISTILBERT, "sinusoidal_pos_embds": True}))
    ours = loaded(theirs)
    assert torch.equal(ours.model.embed_positions.weight, theirs.distilbert.embeddings.position_embeddings.weight)
    assert ours.model.embed_positions.weight.requires_grad
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_distilbert_has_no_token_types():
    ours = loaded(made(DISTILBERT))
    with pytest.raises(ValueError, match="token_type_ids"):
        ours(torch.full((1, 4), 5), token_type_ids=torch.zeros(1, 4, dtype=torch.int64))


def test_distilberts_norms_have_one_epsilon():
    assert loaded(made(DISTILBERT)).config.norm_eps == 1e-12


def test_distilberts_other_names_count_before_its_own():
    import transformers

    values = {"model_type": "distilbert", **_DISTILBERT, "hidden_size": 48, "num_hidden_layers": 3}
    theirs = transformers.DistilBertConfig.from_dict(dict(values))
    config = read_config(find_family("distilbert"), values)
    assert (config.hidden_size, config.num_layers) == (theirs.dim, theirs.n_layers) == (48, 3)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification", "single_label_classification"])
def test_labels_are_read_and_written(labels, problem):
    family = find_family("roberta")
    names = {str(number): f"kind {number}" for number in range(labels)}
    values = {
        "architectures": ["RobertaForSequenceClassification"],
        **_ROBERTA,
        "id2label": names,
        "problem_type": problem,
    }
    if labels == 1 and problem == "single_label_classification":
        with pytest.raises(CheckpointError, match="problem_type"):
            read_config(family, values)
        return
    config = read_config(family, values)
    meant = {
        None: "regression" if labels == 1 else "multi_class", "regression": "regression",
        "multi_label_classification": "binary" if labels == 1 else "multi_label", "single_label_classification": "multi_class",
    }  # fmt: skip
    assert (config.num_labels, config.problem) == (labels, meant[problem])
    again = json.loads(json.dumps(family.write(config)))
    assert read_config(family, {**values, **again}) == config
