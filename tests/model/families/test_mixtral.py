"""Mixtral against transformers."""

import pytest
import torch

from pytransformer.model.families import CheckpointError, find_family, read_config
from pytransformer.model.families.llama import OLDER_FIELDS

from .support import Case, Pair, check_fields, every_check, pair
from .traps import assert_honoured, assert_same_state, load

_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64, "pad_token_id": 0,
    # Their grouped product, the default, does not take float64.
    "experts_implementation": "eager",
}  # fmt: skip


def _case(
    name: str, model: str = "MixtralForCausalLM", *, values: object = None, without: tuple = (), **fields: object
) -> Case:
    return Case(name, "MixtralConfig", model, {**_SHAPE, **fields}, values=values or {}, without=without)


PLAIN = _case("plain")
WINDOW = _case("window", sliding_window=4, num_experts_per_tok=1, head_dim=16)
OLDER = _case(
    "older-spelling",
    tie_word_embeddings=True,
    num_experts_per_tok=3,
    num_key_value_heads=4,
    values={"rope_theta": 1e6, "rope_scaling": None},
    without=("rope_parameters", "head_dim"),
)
CLASSIFIER = _case("classifier", "MixtralForSequenceClassification", num_labels=16, num_key_value_heads=1)


@every_check([PLAIN, WINDOW, OLDER], brief=[CLASSIFIER])
def test_as_in_transformers(case, check):
    check(case)


def test_every_field_is_listed():
    check_fields(find_family("mixtral"), "MixtralConfig", older=(*OLDER_FIELDS, "num_experts"))


def test_files_and_the_state_in_memory_have_different_layouts_and_both_load():
    both = pair(PLAIN)
    memory = dict(both.theirs().state_dict())
    assert memory["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 48, 32)
    assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in both.disk
    assert not set(memory) & {name for name in both.disk if "block_sparse_moe" in name}
    assert_same_state(both, memory)


def test_a_file_without_one_expert_is_refused():
    both = pair(PLAIN)
    missing = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    with pytest.raises(ValueError, match=f"missing: {missing}"):
        load(both, {name: tensor for name, tensor in both.disk.items() if name != missing})


def test_what_a_file_with_too_few_experts_lacks_is_named_as_the_file_names_the_rest():
    both = pair(PLAIN)
    with pytest.raises(ValueError) as error:
        load(both, {name: tensor for name, tensor in both.disk.items() if ".experts.3." not in name})
    assert str(error.value).count("missing: ") == 6
    assert "unexpected" not in str(error.value)


def test_w1_is_the_gate_w3_the_linear_branch_and_w2_the_way_back():
    both = pair(PLAIN)
    theirs = "model.layers.1.block_sparse_moe.experts.2"
    ours = both.state["model.layers.1.feed_forward.experts.gate_up_proj"][2]
    assert torch.equal(ours[:24], both.disk[f"{theirs}.w1.weight"])
    assert torch.equal(ours[24:], both.disk[f"{theirs}.w3.weight"])
    down = both.state["model.layers.1.feed_forward.experts.down_proj"][2]
    assert torch.equal(down, both.disk[f"{theirs}.w2.weight"])


def test_weights_of_the_chosen_experts_are_divided_by_their_sum():
    assert_honoured(Pair(PLAIN), norm_topk_prob=False)


def test_the_window_is_not_ignored():
    assert_honoured(Pair(WINDOW), sliding_window=None, layer_types=("full", "full"))


def test_theta_and_epsilon_where_the_file_says_nothing():
    values = {
        name: value for name, value in pair(PLAIN).values.items() if name not in ("rope_parameters", "rms_norm_eps")
    }
    read = read_config(find_family("mixtral"), values)
    assert (read.rope_base, read.norm_eps) == (1e6, 1e-5)


def test_noise_at_the_router_is_refused():
    with pytest.raises(CheckpointError, match=r"router_jitter_noise must be 0\.0, got 0\.1"):
        read_config(find_family("mixtral"), {**pair(PLAIN).values, "router_jitter_noise": 0.1})
