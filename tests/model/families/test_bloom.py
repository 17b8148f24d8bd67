"""BLOOM against transformers."""

import dataclasses

import pytest
import torch

from pytransformer.model.families import CheckpointError, find_family, read_config

from .support import Case, Pair, check_fields, every_check, pair
from .traps import assert_honoured, assert_same_state

_SHAPE = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}


def _case(name: str, model: str = "BloomForCausalLM", **fields: object) -> Case:
    return Case(name, "BloomConfig", model, {**_SHAPE, **fields})


TIED = _case("tied")
FROM_NORM = _case("residual-from-norm", apply_residual_connection_post_layernorm=True, tie_word_embeddings=False)
# Slopes of a number of heads that is no power of two.
SIX = _case("six-heads", hidden_size=48, n_head=6, layer_norm_epsilon=1e-3, pretraining_tp=4)
CLASSIFIER = _case("classifier", "BloomForSequenceClassification", num_labels=16, n_head=1)
BASE = _case("base", "BloomModel", hidden_size=24, n_head=3)


@every_check([TIED, FROM_NORM, SIX], brief=[CLASSIFIER, BASE])
def test_as_in_transformers(case, check):
    check(case)


def test_every_field_is_listed():
    aliases = ("n_embed", "num_hidden_layers", "num_attention_heads")
    training = (
        "seq_length", "n_inner", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "attention_softmax_in_fp32",
        "masked_softmax_fusion", "bias_dropout_fusion", "unk_token_id",
    )  # fmt: skip
    check_fields(find_family("bloom"), "BloomConfig", older=(*aliases, *training))


def test_a_norm_follows_the_embeddings():
    assert_honoured(Pair(TIED), embedding_norm=False)


def test_the_residual_can_be_the_norms_output():
    assert_honoured(Pair(FROM_NORM), residual_from_norm=False)


def test_q_k_and_v_lie_together_for_each_head():
    both = pair(TIED)
    theirs = both.disk["transformer.h.0.self_attention.query_key_value.weight"].view(4, 3, 8, 32)
    ours = both.state["model.layers.0.attention.qkv_proj.weight"].view(3, 4, 8, 32)
    assert torch.equal(ours, theirs.transpose(0, 1))


def test_a_slow_but_exact_model_would_lose_its_biases_and_is_refused():
    with pytest.raises(CheckpointError, match=r"slow_but_exact must be False, got True: .*leaves out the biases"):
        read_config(find_family("bloom"), {**pair(TIED).values, "slow_but_exact": True})


def test_published_files_lack_the_prefix():
    both = pair(TIED)
    assert_same_state(both, {name.removeprefix("transformer."): tensor for name, tensor in both.disk.items()})


def test_names_of_other_families_for_its_sizes():
    renamed = {"hidden_size": "n_embed", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    values = {renamed.get(name, name): value for name, value in pair(TIED).values.items()}
    read = read_config(find_family("bloom"), values)
    assert dataclasses.replace(read, family_fields=None) == dataclasses.replace(pair(TIED).config, family_fields=None)


def test_a_model_that_sees_both_ways_would_have_another_bias_and_is_refused():
    with pytest.raises(CheckpointError, match="is_causal must be True, got False"):
        read_config(find_family("bloom"), {**pair(TIED).values, "is_causal": False})
    with pytest.raises(CheckpointError, match="is_causal must be True, got None"):
        read_config(find_family("bloom"), {**pair(TIED).values, "is_causal": None})
