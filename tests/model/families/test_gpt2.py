"""GPT-2 against transformers."""

import dataclasses

import pytest
import torch

from pytransformer.model.families import CheckpointError, find_family, read_config

from .support import Case, Pair, check_fields, every_check, logits, pair
from .traps import assert_honoured, assert_same_state, load

_SHAPE = {
    "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def _case(name: str, model: str = "GPT2LMHeadModel", **fields: object) -> Case:
    return Case(name, "GPT2Config", model, {**_SHAPE, **fields}, sides=("right",))


TIED = _case("tied")
BY_LAYER = _case(
    "scaled-by-layer",
    scale_attn_by_inverse_layer_idx=True,
    n_inner=40,
    tie_word_embeddings=False,
    activation_function="gelu",
)
UNSCALED = _case("unscaled", scale_attn_weights=False, activation_function="relu")
CLASSIFIER = _case("classifier", "GPT2ForSequenceClassification", num_labels=16, layer_norm_epsilon=1e-3)
BASE = _case("base", "GPT2Model", n_head=2)


@every_check([TIED, BY_LAYER, UNSCALED], brief=[CLASSIFIER, BASE])
def test_as_in_transformers(case, check):
    check(case)


def test_every_field_is_listed():
    aliases = ("hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
    check_fields(find_family("gpt2"), "GPT2Config", older=(*aliases, "n_ctx"))


def test_square_conv1d_matrices_are_transposed_though_their_shapes_fit_as_they_are():
    both = pair(TIED)
    theirs = both.disk["transformer.h.1.attn.c_proj.weight"]
    assert theirs.shape == theirs.t().shape
    assert torch.equal(both.state["model.layers.1.attention.out_proj.weight"], theirs.t())


def test_a_base_checkpoint_lacks_the_prefix():
    both = pair(TIED)
    assert_same_state(both, {name.removeprefix("transformer."): tensor for name, tensor in both.disk.items()})


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_masks_in_older_files_are_dropped_and_other_strangers_are_not(prefix):
    both = pair(TIED)
    tensors = {prefix + name.removeprefix("transformer."): tensor for name, tensor in both.disk.items()}
    masks = {f"{prefix}h.0.attn.bias": torch.ones(1, 1, 24, 24), f"{prefix}h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert_same_state(both, {**tensors, **masks})
    with pytest.raises(ValueError, match=r"unexpected: .*h\.0\.attn\.c_fc\.bias"):
        load(both, {**tensors, f"{prefix}h.0.attn.c_fc.bias": torch.ones(1)})


def test_scale_attn_by_inverse_layer_idx_is_not_ignored():
    assert_honoured(Pair(BY_LAYER), scale_by_layer=False)


def test_scale_attn_weights_false_is_not_ignored():
    assert_honoured(Pair(UNSCALED), softmax_scale=None)


def test_names_of_other_families_for_its_sizes():
    renamed = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    values = {renamed.get(name, name): value for name, value in pair(TIED).values.items()}
    read = read_config(find_family("gpt2"), values)
    assert dataclasses.replace(read, family_fields=None) == dataclasses.replace(pair(TIED).config, family_fields=None)


def test_cross_attention_is_refused():
    with pytest.raises(CheckpointError, match="add_cross_attention must be False, got True"):
        read_config(find_family("gpt2"), {**pair(TIED).values, "add_cross_attention": True})


def test_reorder_and_upcast_attn_changes_no_number_of_float32():
    logits(_case("upcast", reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True))


def test_is_causal_false_sees_both_ways():
    assert_honoured(Pair(dataclasses.replace(TIED, fields={**TIED.fields, "is_causal": False})), causal=True)
