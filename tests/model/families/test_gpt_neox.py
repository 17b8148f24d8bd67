"""GPT-NeoX against transformers."""

import dataclasses

import pytest
import torch

from pytransformer.model.families import CheckpointError, find_family, read_config

from .support import Case, Pair, check_fields, every_check, logits, pair, round_trip
from .traps import assert_honoured, assert_same_state, load

_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _case(
    name: str, model: str = "GPTNeoXForCausalLM", *, values: object = None, without: tuple = (), **fields: object
) -> Case:
    return Case(name, "GPTNeoXConfig", model, {**_SHAPE, **fields}, values=values or {}, without=without)


PARALLEL = _case("parallel")
SEQUENTIAL = _case(
    "sequential", use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True, hidden_act="gelu_fast"
)
HALF = _case(
    "half-rotary",
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.5},
)
OLDER = _case(
    "older-spelling",
    rotary_pct=1.0,
    rotary_emb_base=300,
    values={"rotary_pct": 1.0, "rotary_emb_base": 300},
    without=("rope_parameters",),
)
CLASSIFIER = _case("classifier", "GPTNeoXForSequenceClassification", num_labels=16)


@every_check([PARALLEL, SEQUENTIAL, HALF], brief=[OLDER, CLASSIFIER])
def test_as_in_transformers(case, check):
    check(case)


def test_every_field_is_listed():
    check_fields(find_family("gpt_neox"), "GPTNeoXConfig", older=("rotary_pct", "rotary_emb_base", "rope_scaling"))


def test_q_k_and_v_lie_together_for_each_head():
    both = pair(PARALLEL)
    theirs = both.disk["gpt_neox.layers.0.attention.query_key_value.weight"].view(4, 3, 8, 32)
    ours = both.state["model.layers.0.attention.qkv_proj.weight"].view(3, 4, 8, 32)
    assert torch.equal(ours, theirs.transpose(0, 1))


def test_a_quarter_of_each_head_rotates_where_the_file_says_nothing():
    values = {name: value for name, value in pair(PARALLEL).values.items() if name != "rope_parameters"}
    assert read_config(find_family("gpt_neox"), values).rotary_dim == 2
    assert_honoured(Pair(PARALLEL), rotary_dim=8)


def test_an_odd_number_of_rotated_features_is_rounded_up_and_keeps_its_frequencies():
    for method in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}):
        case = dataclasses.replace(
            PARALLEL,
            fields={
                **PARALLEL.fields,
                "rope_parameters": {**method, "rope_theta": 500.0, "partial_rotary_factor": 0.4},
            },
        )
        assert pair(case).config.rotary_dim == 4
        logits(case)
        round_trip(case)
    odd = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0, "partial_rotary_factor": 0.4}
    with pytest.raises(CheckpointError, match="'dynamic' needs an even number of rotated features, got 3"):
        read_config(find_family("gpt_neox"), {**PARALLEL.fields, "rope_parameters": odd})


def test_use_parallel_residual_false_is_not_ignored():
    assert_honoured(Pair(SEQUENTIAL), parallel=True)


def test_attention_bias_false_has_no_biases_and_keeps_those_of_the_feed_forward():
    names = set(pair(SEQUENTIAL).state)
    assert not [name for name in names if ".attention." in name and name.endswith("bias")]
    assert "model.layers.1.feed_forward.down_proj.bias" in names


@pytest.mark.parametrize("name", ["embed_out.weight", "lm_head.weight"])
def test_the_head_is_embed_out_in_files_and_lm_head_in_memory(name):
    both = pair(PARALLEL)
    head = both.disk["embed_out.weight"]
    assert_same_state(both, {**{key: tensor for key, tensor in both.disk.items() if tensor is not head}, name: head})


def test_masks_and_frequencies_in_older_files_are_dropped():
    both = pair(PARALLEL)
    theirs = "gpt_neox.layers.0.attention"
    buffers = {f"{theirs}.bias": torch.ones(1, 1, 8, 8), f"{theirs}.masked_bias": torch.tensor(-1e9)}
    assert_same_state(both, {**both.disk, **buffers, f"{theirs}.rotary_emb.inv_freq": torch.ones(1)})
    with pytest.raises(ValueError, match=r"unexpected: gpt_neox\.layers\.0\.attention\.scale"):
        load(both, {**both.disk, f"{theirs}.scale": torch.ones(1)})


def test_both_spellings_of_the_rotation_mean_the_same():
    theirs = pair(OLDER).model_class.config_class(**OLDER.fields)
    read = read_config(find_family("gpt_neox"), theirs.to_dict())
    older = pair(OLDER).config
    assert (read.rope_base, read.rotary_dim, read.rope_scaling) == (
        older.rope_base,
        older.rotary_dim,
        older.rope_scaling,
    )
    assert older.rope_base == 300.0
    assert dataclasses.asdict(read)["positions"] == "rope"


def test_is_causal_false_sees_both_ways():
    assert_honoured(Pair(dataclasses.replace(PARALLEL, fields={**PARALLEL.fields, "is_causal": False})), causal=True)
