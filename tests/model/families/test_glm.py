"""GLM-4 of 2024 and 2025 against transformers."""

import dataclasses

import pytest

from pytransformer.model.families import CheckpointError, find_family, read_config
from pytransformer.model.families.llama import OLDER_FIELDS

from .support import Case, Pair, check_fields, every_check, logits, pair
from .traps import assert_honoured

_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "eos_token_id": [2, 1], "pad_token_id": 0,
}  # fmt: skip


def _case(name: str, model: str, *, values: object = None, without: tuple = (), **fields: object) -> Case:
    config = "Glm4Config" if model.startswith("Glm4") else "GlmConfig"
    return Case(name, config, model, {**_SHAPE, **fields}, values=values or {}, without=without)


GLM = _case("glm", "GlmForCausalLM")
OLDER = _case(
    "glm-older-spelling",
    "GlmForCausalLM",
    attention_bias=False,
    tie_word_embeddings=True,
    values={"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_scaling": None},
    without=("rope_parameters",),
)
YARN = _case(
    "glm-yarn",
    "GlmForCausalLM",
    num_key_value_heads=4,
    head_dim=8,
    rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 300.0, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 16,
    },
)  # fmt: skip
GLM_CLASSIFIER = _case("glm-classifier", "GlmForSequenceClassification", num_labels=16)
GLM4 = _case("glm4", "Glm4ForCausalLM")
GLM4_TIED = _case(
    "glm4-tied",
    "Glm4ForCausalLM",
    num_key_value_heads=1,
    attention_bias=False,
    tie_word_embeddings=True,
    rms_norm_eps=1e-3,
    rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.25},
)
GLM4_BASE = _case("glm4-base", "Glm4Model", head_dim=8)
GLM4_CLASSIFIER = _case(
    "glm4-classifier", "Glm4ForSequenceClassification", num_labels=16, problem_type="multi_label_classification"
)


@every_check([GLM, OLDER, YARN, GLM4, GLM4_TIED, GLM4_CLASSIFIER], brief=[GLM_CLASSIFIER, GLM4_BASE])
def test_as_in_transformers(case, check):
    check(case)


@pytest.mark.parametrize("name", ["glm", "glm4"])
def test_every_field_is_listed(name):
    config = {"glm": "GlmConfig", "glm4": "Glm4Config"}[name]
    check_fields(find_family(name), config, older=OLDER_FIELDS)


@pytest.mark.parametrize("case", [GLM, GLM4], ids=["glm", "glm4"])
def test_neighbours_rotate_and_not_halves(case):
    assert_honoured(Pair(case), rope_interleaved=False)


def test_half_of_each_head_rotates_where_the_file_says_nothing():
    values = {name: value for name, value in pair(GLM).values.items() if name != "rope_parameters"}
    assert read_config(find_family("glm"), values).rotary_dim == 8
    assert_honoured(Pair(GLM), rotary_dim=16)


@pytest.mark.parametrize("model", ["GlmForCausalLM", "Glm4ForCausalLM"])
def test_all_of_each_head_rotates_where_the_file_says_null(model):
    case = _case("null-part", model, partial_rotary_factor=None, values={"partial_rotary_factor": None})
    assert pair(case).config.rotary_dim == 16
    logits(case)


def test_epsilon_is_smaller_than_in_other_families_where_the_file_says_nothing():
    values = {name: value for name, value in pair(GLM).values.items() if name != "rms_norm_eps"}
    assert read_config(find_family("glm"), values).norm_eps == 1.5625e-7


def test_heads_are_128_wide_where_the_file_says_nothing():
    values = {name: value for name, value in pair(GLM).values.items() if name != "head_dim"}
    assert read_config(find_family("glm"), values).head_dim == 128
    with pytest.raises(CheckpointError, match="head_dim must be an int"):
        read_config(find_family("glm"), {**values, "head_dim": None})


def test_three_end_tokens_where_the_file_says_nothing():
    values = {**pair(GLM).values, "vocab_size": 151552}
    del values["eos_token_id"]
    assert read_config(find_family("glm"), values).eos_token_ids == (151329, 151336, 151338)


def test_glm4_has_four_norms_in_a_layer():
    names = {name for name in pair(GLM4).state if name.startswith("model.layers.0.") and "norm" in name}
    kinds = ("attention_norm", "attention_output_norm", "feed_forward_norm", "feed_forward_output_norm")
    assert names == {f"model.layers.0.{kind}.weight" for kind in kinds}
    before = pair(GLM4).disk["model.layers.0.post_attention_layernorm.weight"]
    assert pair(GLM4).state["model.layers.0.feed_forward_norm.weight"].equal(before)


def test_q_k_and_v_have_biases_and_the_way_back_has_none():
    names = {name for name in pair(GLM).state if name.endswith("bias")}
    assert names == {f"model.layers.{layer}.attention.qkv_proj.bias" for layer in range(2)}


@pytest.mark.parametrize("case", [GLM, GLM4], ids=["glm", "glm4"])
def test_is_causal_false_sees_both_ways(case):
    assert_honoured(Pair(dataclasses.replace(case, fields={**case.fields, "is_causal": False})), causal=True)
