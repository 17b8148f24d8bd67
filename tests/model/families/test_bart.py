"""BART and Marian beside transformers' own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pytransformer.model.families import FAMILIES, CheckpointError, find_family, parts, read_config

from .support import Case, assert_logits, check_fields, every_check
from .support_seq2seq import assert_same, assert_saved, inputs_for, loaded, made, padded_sources

# Padding on the left moves a source to other positions, in transformers too. The bias of the logits is a buffer of theirs.
_COMMON = {"sides": ("right",), "untrained": ("lm_head.bias",)}

_TINY = {
    "vocab_size": 37, "d_model": 48, "max_position_embeddings": 24, "encoder_layers": 2, "decoder_layers": 1,
    "encoder_attention_heads": 6, "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 32,
}  # fmt: skip
_MARIAN = {**_TINY, "pad_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 0, "activation_function": "swish"}
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
    Case(
        "marian",
        "MarianConfig",
        "MarianMTModel",
        {**_MARIAN, "scale_embedding": True},
        quiet=("shared.weight", 48**-0.5),  # as embeddings that are scaled start
        **_COMMON,
    ),
    Case(
        "marian-two-vocabularies",
        "MarianConfig",
        "MarianMTModel",
        {
            **_MARIAN, "decoder_vocab_size": 29, "share_encoder_decoder_embeddings": False, "d_model": 24,
            "encoder_attention_heads": 2, "decoder_attention_heads": 4,
        },
        quiet=("q_proj.weight", 0.5),  # sharper softmaxes make one rounding grow to whatever the library of products decides
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


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("bart", "marian-two-vocabularies")], ids=lambda case: case.name
)
def test_sources_of_several_lengths(case):
    padded_sources(case)


BART = Case("", "BartConfig", "BartForConditionalGeneration", _TINY)
UNTIED = dataclasses.replace(BART, fields={**_TINY, "tie_word_embeddings": False})
MARIAN = Case("", "MarianConfig", "MarianMTModel", _MARIAN)
UNTIED_MARIAN = dataclasses.replace(MARIAN, fields={**_MARIAN, "tie_word_embeddings": False})
SIDES = tuple(f"model.{side}.embed_tokens.weight" for side in ("encoder", "decoder"))


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize("case", [BART, MARIAN], ids=["bart", "marian"])
def test_a_file_without_final_logits_bias_has_none(case):
    theirs = made(case)
    assert theirs.final_logits_bias.abs().max() > 0
    assert_same(loaded(theirs), theirs)
    ours = loaded(theirs, tensors=lambda tensors: without(tensors, "final_logits_bias"))
    theirs.final_logits_bias.zero_()
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_positions_begin_in_row_two():
    ours = loaded(made(BART))
    assert ours.config.position_offset == 2 and ours.model.embed_positions.weight.shape[0] == 24 + 2


def test_generation_starts_with_the_end_token():
    ours = loaded(made(BART))
    assert ours.config.decoder_start_token_id == ours.config.eos_token_id == 2
    assert ours.generate([5, 6, 7], 2)[0] == 2


@pytest.mark.parametrize("case", [UNTIED, UNTIED_MARIAN], ids=["bart", "marian"])
def test_three_embeddings_of_an_untied_model(case):
    theirs = made(case)
    assert (
        len({theirs.get_parameter(name).data_ptr() for name in (*SIDES, "model.shared.weight", "lm_head.weight")}) == 4
    )
    ours = loaded(theirs)
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


@pytest.mark.parametrize("case", [UNTIED, UNTIED_MARIAN], ids=["bart", "marian"])
def test_an_untied_file_of_release_4_means_shared_for_both_sides(case):
    theirs = made(case)
    ours = loaded(theirs, tensors=lambda tensors: without(tensors, *SIDES))
    with torch.no_grad():
        for name in SIDES:
            theirs.get_parameter(name).copy_(theirs.model.shared.weight)
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", [BART, MARIAN], ids=["bart", "marian"])
def test_a_head_of_its_own_in_the_file_wins(case):
    def own_head(model):
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        model.all_tied_weights_keys.pop("lm_head.weight", None)

    theirs = made(case, own_head)
    head = {"lm_head.weight": theirs.lm_head.weight.detach()}
    ours = loaded(theirs, tensors=lambda tensors: {**tensors, **head})
    assert ours.config.share_embeddings and not ours.config.tie_embeddings
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_is_causal_false_lets_the_decoder_see_later_tokens():
    theirs = made(dataclasses.replace(BART, fields={**_TINY, "is_causal": False}))
    ours = loaded(theirs)
    assert not ours.config.causal
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_num_hidden_layers_counts_before_encoder_layers():
    import transformers

    values = {**_TINY, "num_hidden_layers": 3}
    assert transformers.BartConfig.from_dict(dict(values)).encoder_layers == 3
    config = read_config(find_family("bart"), values)
    assert (config.num_encoder_layers, config.num_layers) == (3, 1)


@pytest.mark.parametrize(("family", "field", "value"), [
    ("bart", "normalize_before", True), ("bart", "add_final_layer_norm", True), ("bart", "static_position_embeddings", True),
    ("bart", "normalize_embedding", False), ("marian", "normalize_embedding", True), ("bart", "activation_function", "quick_gelu"),
])  # fmt: skip
def test_another_familys_choices_are_refused_by_name(family, field, value):
    with pytest.raises(CheckpointError, match=field):
        read_config(find_family(family), {**_TINY, field: value})


def test_marians_sines_come_before_its_cosines():
    theirs = made(MARIAN)
    ours = loaded(theirs)
    table = theirs.model.encoder.embed_positions.weight
    torch.testing.assert_close(ours.encoder.embed_positions.weight, table.detach())
    assert torch.equal(table[0], torch.tensor([0.0] * 24 + [1.0] * 24))


def test_marians_tables_in_a_file_say_nothing():
    theirs = made(MARIAN)
    tables = {f"model.{side}.embed_positions.weight": torch.randn(24, 48) for side in ("encoder", "decoder")}
    assert_same(loaded(theirs, tensors=lambda tensors: {**tensors, **tables}), theirs)


def test_marians_decoder_vocab_size_counts_only_where_nothing_is_shared():
    values = {**_MARIAN, "decoder_vocab_size": 50}
    assert read_config(find_family("marian"), values).vocab_size == 37
    config = read_config(find_family("marian"), {**values, "share_encoder_decoder_embeddings": False})
    assert (config.vocab_size, config.src_vocab_size, config.share_embeddings) == (50, 37, False)


@torch.no_grad()
def test_marian_and_bart_scale_embeddings_only_where_asked():
    for case in (BART, MARIAN):
        assert not loaded(made(case)).config.scale_embeddings
        theirs = made(dataclasses.replace(case, fields={**case.fields, "scale_embedding": True}))
        ours = loaded(theirs)
        assert ours.config.scale_embeddings
        inputs = inputs_for(ours)
        expected = theirs.model.encoder(inputs["src"]).last_hidden_state
        assert_logits(ours.encode(inputs["src"]), expected)
