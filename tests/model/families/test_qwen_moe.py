"""Qwen3 with experts against transformers."""

import dataclasses

import pytest

from pytransformer.model.families import find_family, read_config
from pytransformer.model.families.llama import OLDER_FIELDS

from .support import Case, Pair, check_fields, every_check, pair
from .traps import assert_honoured, assert_same_state

_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 3, "max_position_embeddings": 64,
    "pad_token_id": 0,
    # Their grouped product, the default, does not take float64.
    "experts_implementation": "eager",
}  # fmt: skip


def _case(
    name: str, model: str = "Qwen3MoeForCausalLM", *, values: object = None, without: tuple = (), **fields: object
) -> Case:
    return Case(name, "Qwen3MoeConfig", model, {**_SHAPE, **fields}, values=values or {}, without=without)


PLAIN = _case("plain")
RENORMALISED = _case(
    "renormalised",
    norm_topk_prob=True,
    head_dim=16,
    attention_bias=True,
    tie_word_embeddings=True,
    values={"num_experts": 6, "rope_theta": 10000.0, "rope_scaling": None},
    without=("num_local_experts", "rope_parameters"),
)
DENSE_FIRST = _case("every-second-layer", decoder_sparse_step=2, num_experts_per_tok=1)
WINDOW = _case("window", mlp_only_layers=[1], use_sliding_window=True, sliding_window=4, max_window_layers=1)
CLASSIFIER = _case("classifier", "Qwen3MoeForSequenceClassification", num_labels=16, num_key_value_heads=1)


@every_check([PLAIN, RENORMALISED, DENSE_FIRST, WINDOW], brief=[CLASSIFIER])
def test_as_in_transformers(case, check):
    check(case)


def test_every_field_is_listed():
    older = ("head_dim", "max_window_layers", "num_local_experts", *OLDER_FIELDS)
    check_fields(find_family("qwen3_moe"), "Qwen3MoeConfig", older=older)


def test_weights_are_not_divided_by_their_sum_where_the_file_says_nothing():
    values = {name: value for name, value in pair(PLAIN).values.items() if name != "norm_topk_prob"}
    assert not read_config(find_family("qwen3_moe"), values).norm_topk_prob
    assert_honoured(Pair(PLAIN), norm_topk_prob=True)


def test_both_names_of_the_number_of_experts():
    values = dict(pair(PLAIN).values)
    assert values.pop("num_local_experts") == 6  # what transformers writes
    read = read_config(find_family("qwen3_moe"), {**values, "num_experts": 6})
    assert dataclasses.replace(read, family_fields=None) == dataclasses.replace(pair(PLAIN).config, family_fields=None)


@pytest.mark.parametrize(("case", "dense"), [(DENSE_FIRST, 0), (WINDOW, 1)], ids=["step", "list"])
def test_layers_without_experts_have_the_wider_feed_forward(case, dense):
    both = pair(case)
    assert both.config.dense_layers == (dense,)
    assert both.state[f"model.layers.{dense}.feed_forward.gate_up_proj.weight"].shape == (80, 32)
    assert both.state[f"model.layers.{1 - dense}.feed_forward.experts.gate_up_proj"].shape == (6, 32, 32)


def test_with_a_window_every_layer_slides_whatever_max_window_layers_says():
    assert pair(WINDOW).config.layer_types == ("sliding", "sliding")
    assert_honoured(Pair(WINDOW), layer_types=("full", "sliding"))


def test_a_window_that_is_not_used_is_none():
    assert read_config(find_family("qwen3_moe"), {**pair(PLAIN).values, "sliding_window": 4}).sliding_window is None


def test_the_state_in_memory_has_another_layout_and_loads():
    assert_same_state(pair(PLAIN), dict(pair(PLAIN).theirs().state_dict()))
