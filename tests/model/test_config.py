"""TransformerConfig: derived fields, JSON, and what it refuses."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pytransformer import TransformerConfig
from tests.model.configs import CONFIGS

SHAPE = {"vocab_size": 100, "hidden_size": 64, "num_layers": 2, "num_heads": 4}


@pytest.mark.parametrize("name", CONFIGS)
def test_json_round_trip(name):
    config = CONFIGS[name]
    assert TransformerConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == config.to_dict()


def test_several_end_tokens_survive_json():
    config = TransformerConfig(**SHAPE, eos_token_id=(7, 9))
    assert TransformerConfig.from_json(config.to_json()) == config
    assert config.eos_token_ids == (7, 9)
    assert TransformerConfig(**SHAPE, eos_token_id=7).eos_token_ids == (7,)
    assert TransformerConfig(**SHAPE).eos_token_ids == ()


def test_derived_fields():
    config = TransformerConfig(**SHAPE)
    assert (config.num_kv_heads, config.head_dim, config.rotary_dim, config.intermediate_size) == (4, 16, 16, 256)
    assert TransformerConfig(**SHAPE, head_dim=32).rotary_dim == 32
    # 8/3 of 64 is 170.7, the next multiple of 64 is 192.
    assert TransformerConfig(**SHAPE, activation="swiglu").intermediate_size == 192
    assert TransformerConfig(**SHAPE, sliding_window=5).window(1) == (4, -1)
    assert TransformerConfig(**SHAPE).window(0) == (-1, -1)


def test_the_two_styles_are_the_published_shapes():
    gpt2, llama = TransformerConfig.gpt2(), TransformerConfig.llama()
    assert (gpt2.hidden_size, gpt2.num_layers, gpt2.num_heads, gpt2.intermediate_size) == (768, 12, 12, 3072)
    assert (gpt2.norm, gpt2.positions, gpt2.activation, gpt2.tie_embeddings) == (
        "layer_norm",
        "learned",
        "gelu_tanh",
        True,
    )
    assert (llama.hidden_size, llama.num_layers, llama.head_dim, llama.intermediate_size) == (4096, 32, 128, 11008)
    assert (llama.norm, llama.positions, llama.activation, llama.attention_bias) == (
        "rms_norm",
        "rope",
        "swiglu",
        False,
    )


def test_it_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TransformerConfig(**SHAPE).vocab_size = 5


REFUSED = [
    ({"vocab_size": 0}, ValueError, "vocab_size must be at least 1, got 0"),
    ({"num_layers": 2.0}, TypeError, "num_layers must be an int, got 2.0"),
    ({"num_heads": True}, TypeError, "num_heads must be an int, got True"),
    ({"max_seqlen": -1}, ValueError, "max_seqlen must be at least 1, got -1"),
    (
        {"hidden_size": 65},
        ValueError,
        "hidden_size must be a multiple of num_heads when head_dim is not given, got 65 and 4",
    ),
    ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
    ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
    ({"head_dim": 11, "positions": "rope"}, ValueError, r"rotary_dim must be even and at most head_dim \(11\), got 11"),
    ({"rotary_dim": 7}, ValueError, r"rotary_dim must be even and at most head_dim \(16\), got 7"),
    ({"rotary_dim": 18}, ValueError, r"rotary_dim must be even and at most head_dim \(16\), got 18"),
    ({"rope_scaling": "linear"}, TypeError, "rope_scaling must be a mapping or None, got 'linear'"),
    ({"sliding_window": 0}, ValueError, "sliding_window must be at least 1, got 0"),
    ({"positions": "absolute"}, ValueError, "positions must be one of 'learned', .*got 'absolute'"),
    ({"norm": "batch_norm"}, ValueError, "norm must be one of 'layer_norm', 'rms_norm', got 'batch_norm'"),
    (
        {"norm_placement": "sandwich"},
        ValueError,
        "norm_placement must be one of 'pre', 'post', 'both', 'output', got 'sandwich'",
    ),
    ({"activation": "selu"}, ValueError, "activation must be one of .*got 'selu'"),
    ({"tie_embeddings": 1}, TypeError, "tie_embeddings must be True or False, got 1"),
    ({"norm_weight_offset": 1.0}, ValueError, "norm_weight_offset is for norm='rms_norm'"),
    ({"attention_dropout": 1.0}, ValueError, "attention_dropout must be at least 0 and below 1, got 1.0"),
    ({"residual_dropout": "0.1"}, TypeError, "residual_dropout must be a number, got '0.1'"),
    ({"norm_eps": 0.0}, ValueError, "norm_eps must be above 0, got 0.0"),
    ({"rope_base": float("nan")}, ValueError, "rope_base must be finite, got nan"),
    ({"logit_softcap": -1.0}, ValueError, r"logit_softcap must be at least 0 \(0 = none\), got -1.0"),
    ({"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite, got inf"),
    ({"architecture": "lstm"}, ValueError, "architecture must be one of 'decoder', .*got 'lstm'"),
    ({"layer_types": ("full",)}, ValueError, "layer_types must be 'full' or 'sliding' for each of the 2 layers"),
    ({"layer_types": ("full", "sliding")}, ValueError, "sliding_window must be given, got None"),
    ({"parallel": True, "norm_placement": "post"}, ValueError, "parallel is for norm_placement='pre', got 'post'"),
    (
        {"parallel": True, "residual_from_norm": True},
        ValueError,
        "residual_from_norm is for sublayers one after the other",
    ),
    (
        {"positions": "t5", "relative_buckets": 1},
        ValueError,
        "relative_buckets must be at least 2, two for each direction, got 1",
    ),
    (
        {"positions": "t5", "relative_buckets": 3, "causal": False},
        ValueError,
        "relative_buckets must be at least 4, two for each",
    ),
    (
        {"positions": "t5", "relative_buckets": 32, "relative_max_distance": 16},
        ValueError,
        "must be above 16, the distances that have",
    ),
    (
        {"positions": "t5", "relative_buckets": 32, "relative_max_distance": 8, "causal": False},
        ValueError,
        "relative_max_distance must be above 8, the distances that have one of the 32 buckets each, got 8",
    ),
    ({"qk_norm_whole": True}, ValueError, "qk_norm_whole needs qk_norm=True"),
    ({"num_experts": 4, "experts_per_token": 5}, ValueError, r"experts_per_token must be at most num_experts \(4\)"),
    (
        {"num_experts": 4, "shared_expert_gate": True},
        ValueError,
        "shared_expert_gate needs a shared expert, got shared_expert_size=0",
    ),
    (
        {"architecture": "encoder-decoder", "head_dim": 8, "num_kv_heads": 2, "encoder_num_heads": 3},
        ValueError,
        r"num_heads must be a multiple of num_kv_heads, got 3 and 2 \(in the encoder: encoder_num_heads = 3",
    ),
    (
        {"positions_skip_padding": True, "pad_token_id": 0},
        ValueError,
        "positions_skip_padding needs a position_offset of at least 1, a row for padding, got 0",
    ),
    ({"positions_skip_padding": True}, ValueError, "positions_skip_padding needs a pad_token_id, got None"),
    ({"src_vocab_size": 5, "share_embeddings": True}, ValueError, "needs src_vocab_size = vocab_size, got 5 and 100"),
    ({"head": "classification", "tie_embeddings": True}, ValueError, "got head='classification'"),
    ({"intermediate_size": 0}, ValueError, "intermediate_size must be at least 1, got 0"),
    ({"eos_token_id": 100}, ValueError, r"eos_token_id must be below vocab_size \(100\), got 100"),
    ({"eos_token_id": (5, -1)}, ValueError, "eos_token_id must be at least 0, got -1"),
    ({"pad_token_id": "x"}, TypeError, "pad_token_id must be an int, got 'x'"),
    (
        {"positions": "sinusoidal", "hidden_size": 63, "head_dim": 16},
        ValueError,
        "hidden_size must be even for sinusoidal positions, got 63",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=[str(sorted(case[0])) for case in REFUSED])
def test_what_does_not_fit_is_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        TransformerConfig(**{**SHAPE, **change})


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(ValueError, match="unknown configuration keys: 'n_embd', 'n_head'"):
        TransformerConfig.from_dict({**SHAPE, "n_head": 3, "n_embd": 4})
    with pytest.raises(ValueError, match="missing configuration keys: 'num_heads', 'vocab_size'"):
        TransformerConfig.from_dict({"hidden_size": 8, "num_layers": 1})
    with pytest.raises(TypeError, match="must be a mapping of field names to values, got list"):
        TransformerConfig.from_json("[1]")
    with pytest.raises(ValueError, match="a configuration must be JSON"):
        TransformerConfig.from_json("{")
