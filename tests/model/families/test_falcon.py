"""Falcon against transformers."""

import dataclasses
import math

import pytest
import torch

from pytransformer import Transformer
from pytransformer.model.families import CheckpointError, find_family, read_config

from .support import Case, Pair, assert_logits, call_ours, call_theirs, check_fields, every_check, pair
from .traps import assert_honoured

_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _case(name: str, model: str = "FalconForCausalLM", **fields: object) -> Case:
    # With ALiBi eager attention adds the bias twice; sdpa, the default, does it once.
    return Case(name, "FalconConfig", model, {**_SHAPE, **fields}, attention="sdpa")


SEVEN = _case("7b")
FORTY = _case("40b", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=48)
ELEVEN = _case(
    "11b", new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, tie_word_embeddings=False
)
RW = _case("rw", alibi=True, multi_query=False, parallel_attn=False, bias=True)
# Of six heads two have slopes that are no powers of two, and so no numbers of bfloat16.
BIASED = _case("alibi-multi-query", alibi=True, hidden_size=48, num_attention_heads=6, bias=True, activation="gelu_new")
MANY = _case(
    "as-many-keys",
    multi_query=False,
    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0},
    max_position_embeddings=16,
)
CLASSIFIER = _case("classifier", "FalconForSequenceClassification", num_labels=16)


@every_check([SEVEN, FORTY, ELEVEN, RW, BIASED], brief=[MANY, CLASSIFIER])
def test_as_in_transformers(case, check):
    check(case)


def test_every_field_is_listed():
    older = ("n_embed", "rope_theta", "rope_scaling", "apply_residual_connection_post_layernorm")
    check_fields(find_family("falcon"), "FalconConfig", older=older)


def test_slopes_and_positions_are_rounded_to_bfloat16():
    """Positions beyond 256 are no longer all numbers of bfloat16, nor are these slopes."""
    both = Pair(dataclasses.replace(BIASED, seqlen=300))
    assert_honoured(both, alibi_bfloat16=False)


def test_alibi_is_divided_by_the_root_of_the_head_too():
    assert pair(RW).config.alibi_scale == 1 / math.sqrt(8)
    assert_honoured(Pair(RW), alibi_scale=1.0)


@torch.no_grad()
def test_eager_attention_adds_the_bias_twice_and_is_no_reference():
    eager = Pair(dataclasses.replace(RW, attention="eager"))
    inputs = eager.inputs()
    twice = Transformer(dataclasses.replace(eager.config, alibi_scale=2 * eager.config.alibi_scale)).eval()
    twice.load_state_dict(eager.ours().state_dict())
    assert_logits(call_ours(twice, inputs), call_theirs(eager.theirs(), inputs))


def test_groups_of_query_heads_lie_with_their_key_and_value():
    both = pair(FORTY)
    theirs = both.disk["transformer.h.0.self_attention.query_key_value.weight"].view(2, 4, 8, 32)
    ours = both.state["model.layers.0.attention.qkv_proj.weight"]
    assert torch.equal(ours[:32].view(2, 2, 8, 32), theirs[:, :2])
    assert torch.equal(ours[32:48].view(2, 8, 32), theirs[:, 2])
    assert torch.equal(ours[48:].view(2, 8, 32), theirs[:, 3])


def test_the_new_architecture_has_two_norms_unless_the_file_says_one():
    assert (pair(FORTY).config.parallel_norms, pair(ELEVEN).config.parallel_norms) == (2, 1)
    values = {name: value for name, value in pair(FORTY).values.items() if name != "num_ln_in_parallel_attn"}
    assert read_config(find_family("falcon"), values).parallel_norms == 2
    assert "transformer.h.0.ln_mlp.weight" in pair(FORTY).disk


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn must be True"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn must be 1"),
        ({"multi_query": False, "num_kv_heads": 2}, "num_kv_heads must be num_attention_heads"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0.0"),
    ],
)
def test_what_transformers_cannot_run_is_refused(values, message):
    with pytest.raises(CheckpointError, match=message):
        read_config(find_family("falcon"), {**pair(SEVEN).values, **values})


def test_the_older_name_of_the_width():
    values = dict(pair(SEVEN).values)
    values["n_embed"] = values.pop("hidden_size")
    assert read_config(find_family("falcon"), values) == pair(SEVEN).config


@pytest.mark.parametrize("case", [SEVEN, RW], ids=["7b", "rw"])
def test_is_causal_false_sees_both_ways(case):
    assert_honoured(Pair(dataclasses.replace(case, fields={**case.fields, "is_causal": False})), causal=True)
