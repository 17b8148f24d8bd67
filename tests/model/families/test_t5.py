"""T5 and mT5 beside transformers' own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pytransformer import load
from pytransformer.model.families import FAMILIES, CheckpointError, find_family, parts, read_config

from .support import Case, assert_logits, check_fields, every_check, on_disk
from .support_seq2seq import assert_same, assert_saved, inputs_for, loaded, made, padded_sources, write_folder

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
        {
            **_TINY, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 5, "num_layers": 1,
            "num_decoder_layers": 3,
        },
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


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("gated-silu-many-buckets", "mt5")], ids=lambda case: case.name
)
def test_sources_of_several_lengths(case):
    padded_sources(case)


T5 = Case("", "T5Config", "T5ForConditionalGeneration", _TINY)
UNSCALED = dataclasses.replace(T5, fields={**_TINY, "tie_word_embeddings": False})
MT5 = Case("", "MT5Config", "MT5ForConditionalGeneration", _TINY)
HEAD = "lm_head.weight"


def own_head(model):
    """Their head as a matrix of its own, which no configuration can ask for."""
    model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    model.all_tied_weights_keys.pop(HEAD, None)


@pytest.mark.parametrize("case", [T5, UNSCALED, MT5], ids=["scaled", "unscaled", "mt5"])
def test_a_head_of_its_own_in_the_file_wins(case):
    theirs = made(case, own_head)
    head = {HEAD: theirs.lm_head.weight.detach()}
    ours = loaded(theirs, tensors=lambda tensors: {**tensors, **head})
    assert not ours.config.tie_embeddings
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


def test_a_published_1_1_says_untied_and_means_unscaled_too():
    theirs = made(UNSCALED, own_head)
    head = {HEAD: theirs.lm_head.weight.detach()}
    ours = loaded(
        theirs, tensors=lambda tensors: {**tensors, **head}, tie_word_embeddings=False, scale_decoder_outputs=None
    )
    assert ours.config.logit_scale == 1.0
    assert_same(ours, theirs)


def test_a_file_without_a_head_is_tied_whatever_the_flag_says():
    theirs = made(UNSCALED)
    ours = loaded(theirs, tie_word_embeddings=False)
    assert ours.config.tie_embeddings and ours.config.logit_scale == 1.0
    assert_same(ours, theirs)
    assert_saved(ours, theirs)


@pytest.mark.parametrize(
    ("values", "scaled"),
    [
        ({}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, True),
    ],
)
def test_the_output_is_scaled_as_scale_decoder_outputs_says(values, scaled):
    import transformers

    assert transformers.T5Config.from_dict({**_TINY, **values}).scale_decoder_outputs is scaled
    assert read_config(find_family("t5"), {**_TINY, **values}).logit_scale == (0.25 if scaled else 1.0)


def test_mt5_is_never_scaled():
    for values in ({}, {"tie_word_embeddings": True}, {"scale_decoder_outputs": True}):
        assert read_config(find_family("mt5"), {**_TINY, **values}).logit_scale == 1.0


@pytest.mark.parametrize(
    ("values", "activation"),
    [
        ({"feed_forward_proj": "gated-gelu"}, "geglu_tanh"),
        ({"feed_forward_proj": "gelu"}, "gelu"),
        ({"feed_forward_proj": "gated-relu"}, "reglu"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "gelu_new", "is_gated_act": True}, "geglu_tanh"),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True}, "geglu"),
    ],
)
def test_the_derived_fields_of_the_feed_forward_count(values, activation):
    family = find_family("t5")
    config = read_config(family, {**_TINY, **values})
    assert config.activation == activation
    assert read_config(family, {**_TINY, **family.write(config)}).activation == activation


def test_each_stack_has_one_bias_of_positions_and_cross_attention_none():
    theirs = made(T5)
    ours = loaded(theirs)
    assert [name for name, _ in ours.named_parameters() if "relative_bias" in name] == [
        "encoder.relative_bias.weight",
        "model.relative_bias.weight",
    ]
    left_over = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.randn(8, 3)}
    assert_same(loaded(theirs, tensors=lambda tensors: {**tensors, **left_over}), theirs)


def test_the_embedding_may_stand_in_the_file_for_each_side_again():
    theirs = made(T5)
    sides = {f"{side}.embed_tokens.weight": theirs.shared.weight.detach() for side in ("encoder", "decoder")}
    assert_same(loaded(theirs, tensors=lambda tensors: {**tensors, **sides}), theirs)

    def alone(tensors):
        return {name: tensor for name, tensor in {**tensors, **sides}.items() if name != "shared.weight"}

    assert_same(loaded(theirs, tensors=alone), theirs)
    with pytest.raises(CheckpointError, match=r"decoder\.embed_tokens\.weight must equal shared\.weight"):
        loaded(theirs, tensors=lambda tensors: {**tensors, **sides, "decoder.embed_tokens.weight": torch.ones(37, 16)})


@torch.no_grad()
def test_sources_have_no_limit():
    theirs = made(dataclasses.replace(T5, fields={**_TINY, "n_positions": 16}))
    ours = loaded(theirs)
    src, tgt = torch.randint(3, 37, (1, 40)), torch.randint(3, 37, (1, 33))
    assert_logits(ours(src, tgt), theirs(input_ids=src, decoder_input_ids=tgt).logits)


@torch.no_grad()
def test_a_file_may_keep_wo_in_float32(tmp_path):
    theirs = made(T5)
    tensors = {n: t if ".wo." in n else t.bfloat16() for n, t in on_disk(theirs).items()}
    folder = write_folder(tmp_path / "t5", theirs, {}, tensors)
    inputs = inputs_for(loaded(theirs))
    for dtype in (torch.float32, torch.bfloat16):
        ours = load(folder, dtype=dtype)
        assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
        assert ours(inputs["src"], inputs["ids"]).isfinite().all()
    assert_same(load(folder, dtype=torch.float32), theirs)


def test_a_decoder_that_sees_later_tokens_is_refused():
    with pytest.raises(CheckpointError, match="is_causal"):
        read_config(find_family("t5"), {**_TINY, "is_causal": False})


def test_the_decoder_starts_with_padding_where_nothing_else_is_said():
    values = {name: value for name, value in _TINY.items() if name != "decoder_start_token_id"}
    assert read_config(find_family("t5"), {**values, "pad_token_id": 2}).decoder_start_token_id == 2


def test_the_first_name_of_the_class_is_the_same_model():
    theirs = made(T5)
    ours = loaded(theirs, architectures=["T5WithLMHeadModel"])
    assert_same(ours, theirs)
    assert_saved(ours, theirs)
