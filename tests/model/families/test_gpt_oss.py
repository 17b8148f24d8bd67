"""GPT-OSS against transformers, as plain tensors and as mxfp4 blocks."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

import pytransformer
from pytransformer import Transformer
from pytransformer.model.families import CheckpointError, find_family, mapping, read_config, write_config
from pytransformer.model.families.llama import OLDER_FIELDS
from pytransformer.model.families.mxfp4 import dequantise_mxfp4

from .support import (
    Case,
    Pair,
    assert_logits,
    call_ours,
    call_theirs,
    check_fields,
    every_check,
    logits,
    pair,
    tensors_of,
)
from .traps import assert_honoured, assert_same_state

_SHAPE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
    # Their grouped product, the default, does not take float64.
    "experts_implementation": "eager",
}  # fmt: skip


def _case(
    name: str, model: str = "GptOssForCausalLM", *, values: object = None, without: tuple = (), **fields: object
) -> Case:
    # The gate lets large numbers through; with these weights of the way back an error in a gradient is not one token's luck.
    quiet = ("experts.down_proj", 0.25)
    return Case(name, "GptOssConfig", model, {**_SHAPE, **fields}, values=values or {}, quiet=quiet, without=without)


PLAIN = _case("plain")
OLDER = _case(
    "older-spelling",
    num_key_value_heads=4,
    tie_word_embeddings=True,
    swiglu_limit=0.5,
    swiglu_alpha=1.0,
    rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False, "rope_theta": 150000.0,
        "original_max_position_embeddings": 16,
    },
    values={
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 16,
        },
        "experts_per_token": 2,
        "initial_context_length": 16,
    },
    without=("rope_parameters", "layer_types"),
)  # fmt: skip
FULL = _case(
    "full-attention",
    attention_bias=False,
    layer_types=["full_attention", "full_attention"],
    num_experts_per_tok=4,
    rope_parameters={"rope_type": "default", "rope_theta": 300.0},
)
CLASSIFIER = _case("classifier", "GptOssForSequenceClassification", num_labels=16, num_key_value_heads=1)


@every_check([PLAIN, OLDER, FULL], brief=[CLASSIFIER])
def test_as_in_transformers(case, check):
    check(case)


def test_every_field_is_listed():
    older = ("num_experts", "experts_per_token", "initial_context_length", *OLDER_FIELDS)
    check_fields(find_family("gpt_oss"), "GptOssConfig", older=older)


def test_a_sink_takes_part_of_each_heads_attention():
    assert_honoured(Pair(PLAIN), sinks=False)


@pytest.mark.parametrize(("name", "usual"), [("activation_limit", 7.0), ("activation_alpha", 1.702)])
def test_limit_and_gain_of_the_gate_are_those_of_the_file(name, usual):
    assert_honoured(Pair(OLDER), **{name: usual})


def test_gate_and_up_lie_in_alternate_columns():
    both = pair(PLAIN)
    theirs = both.disk["model.layers.0.mlp.experts.gate_up_proj"]
    ours = both.state["model.layers.0.feed_forward.experts.gate_up_proj"]
    assert torch.equal(ours[:, :32], theirs[..., 0::2].transpose(1, 2))
    assert torch.equal(ours[:, 32:], theirs[..., 1::2].transpose(1, 2))
    bias = both.disk["model.layers.0.mlp.experts.gate_up_proj_bias"]
    joined = both.state["model.layers.0.feed_forward.experts.gate_up_bias"]
    assert torch.equal(joined, torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1))


def test_square_matrices_of_the_experts_are_transposed_though_their_shapes_fit_as_they_are():
    both = pair(PLAIN)
    theirs = both.disk["model.layers.1.mlp.experts.down_proj"]
    assert theirs.shape == (4, 32, 32)
    assert torch.equal(both.state["model.layers.1.feed_forward.experts.down_proj"], theirs.transpose(1, 2))


def test_yarn_untruncated_with_theta_150000_where_the_file_says_nothing():
    values = {name: value for name, value in pair(PLAIN).values.items() if name != "rope_parameters"}
    read = read_config(find_family("gpt_oss"), values)
    assert (read.rope_base, read.rope_scaling) == (150000.0, pair(PLAIN).config.rope_scaling)
    both = Pair(PLAIN)
    assert both.config.rope_scaling is not None
    assert_honoured(both, rope_scaling={**both.config.rope_scaling, "truncate": True})


def test_an_empty_mapping_is_plain_rope_and_null_is_yarn():
    plain = _case("empty", rope_parameters={})
    assert pair(plain).config.rope_scaling is None and pair(plain).config.rope_base == 150_000.0
    logits(plain)
    values = {**pair(plain).values, "rope_parameters": None}
    assert read_config(find_family("gpt_oss"), values).rope_scaling["rope_type"] == "yarn"


def test_every_second_layer_slides_from_the_first_on_where_the_file_says_nothing():
    assert pair(OLDER).config.layer_types == ("sliding", "full")
    assert_honoured(Pair(PLAIN), layer_types=("full", "sliding"))


def _blocks(both, generator):
    """Tensors of a file with the experts in mxfp4, and the same as plain tensors."""
    blocks, plain = dict(both.disk), dict(both.disk)
    for layer in range(2):
        for name, rows in (("gate_up_proj", 64), ("down_proj", 32)):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            packed = torch.randint(0, 256, (4, rows, 1, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(120, 127, (4, rows, 1), dtype=torch.uint8, generator=generator)
            plain[key] = dequantise_mxfp4(packed, scales).transpose(1, 2).float()
            del blocks[key]
            blocks |= {f"{key}_blocks": packed, f"{key}_scales": scales}
    return blocks, plain


@torch.no_grad()
def test_blocks_of_mxfp4_mean_what_they_mean_in_transformers():
    both = Pair(PLAIN)
    blocks, plain = _blocks(both, torch.Generator().manual_seed(0))
    quantised = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    config = read_config(both.family, {**both.values, **quantised})
    model = Transformer(config).eval()
    model.load_state_dict(mapping.state_of(both.family, config, tensors_of(model), blocks))
    theirs = both.theirs()
    theirs.load_state_dict(plain)
    inputs = both.inputs()
    assert_logits(call_ours(model, inputs), call_theirs(theirs, inputs))


def test_a_model_from_blocks_is_written_as_plain_tensors_without_a_quantisation():
    both = Pair(PLAIN)
    blocks, plain = _blocks(both, torch.Generator().manual_seed(1))
    quantised = {"quantization_config": {"quant_method": "mxfp4"}}
    config = read_config(both.family, {**both.values, **quantised})
    state = mapping.state_of(both.family, config, both.state, blocks)
    assert "quantization_config" not in write_config(both.family, config)
    written = mapping.theirs_of(both.family, config, state)
    assert written.keys() == plain.keys()
    assert written["model.layers.0.mlp.experts.down_proj"].dtype == torch.bfloat16
    assert all(torch.equal(tensor.float(), plain[name]) for name, tensor in written.items())
    assert_same_state(both, both.disk)


@torch.no_grad()
def test_a_folder_as_published_loads_without_a_word(tmp_path):
    """Blocks in shards, beside a configuration with the older spelling of RoPE and a second name for what it says already."""
    both = Pair(PLAIN)
    blocks, plain = _blocks(both, torch.Generator().manual_seed(2))
    values = {name: value for name, value in both.values.items() if name not in ("rope_parameters", "dtype")}
    yarn = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    values |= {
        "rope_scaling": {**yarn, "original_max_position_embeddings": 8}, "rope_theta": 150000,
        "experts_per_token": values["num_experts_per_tok"], "initial_context_length": 8,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }  # fmt: skip
    names = sorted(blocks)
    shards = {f"model-{shard:05d}-of-00002.safetensors": names[shard::3] for shard in range(3)}
    for file, there in shards.items():
        save_file({name: blocks[name].contiguous() for name in there}, tmp_path / file)
    places = {name: file for file, there in shards.items() for name in there}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (tmp_path / "config.json").write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pytransformer.load(tmp_path, device="cpu", dtype=torch.float32)
    theirs = both.model_class._from_config(
        both.model_class.config_class(**{**values, "quantization_config": None}), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict(plain)
    inputs = both.inputs(seqlen=12)
    assert_logits(call_ours(model, inputs), call_theirs(theirs, inputs))


def test_other_quantisations_are_refused():
    values = {**pair(PLAIN).values, "quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(CheckpointError, match="quant_method 'mxfp4' or be None, got 'bitsandbytes'"):
        read_config(find_family("gpt_oss"), values)


def test_both_names_of_the_number_of_experts():
    values = dict(pair(PLAIN).values)
    values["num_experts"] = values.pop("num_local_experts")
    read = read_config(find_family("gpt_oss"), values)
    assert dataclasses.replace(read, family_fields=None) == dataclasses.replace(pair(PLAIN).config, family_fields=None)
