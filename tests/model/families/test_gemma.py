"""Gemma 1, 2 and 3."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pytransformer.model.families import CheckpointError, find_family, read_config, write_config

from .support import Case, assert_logits, call_ours, call_theirs, check_fields, every_check, logits, pair, round_trip

TINY: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
OLDER = ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")


def gemma(version: str, name: str, model: str = "", generates: bool = True, batch: int = 2, **fields: Any) -> Case:
    config, family = {
        "1": ("GemmaConfig", "Gemma"),
        "2": ("Gemma2Config", "Gemma2"),
        "3": ("Gemma3TextConfig", "Gemma3"),
    }[version]
    fields = {**TINY, **fields}
    return Case(
        f"gemma{version}-{name}", config, model or f"{family}ForCausalLM", fields, generates=generates, batch=batch
    )


CASES = [
    gemma("1", "grouped-queries"),
    gemma("1", "one-key-head-wide-untied", num_key_value_heads=1, head_dim=16, tie_word_embeddings=False),
    gemma("1", "biases-linear-rope", attention_bias=True, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    gemma("2", "softcaps-window", attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=4),
    gemma("2", "no-softcaps-scalar", attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=24),
    gemma(
        "2", "layer-types-untied-biases", layer_types=["full_attention", "sliding_attention"], sliding_window=3,
        num_key_value_heads=1, tie_word_embeddings=False, attention_bias=True,
    ),
    gemma("3", "every-sixth-layer-full", num_hidden_layers=6, sliding_window=4, query_pre_attn_scalar=24),
    gemma(
        "3", "two-ropes-scaled", sliding_window=3, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    gemma(
        "3", "both-ways-odd-window", sliding_window=5, layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True, final_logit_softcapping=2.0, num_key_value_heads=4, generates=False,
    ),
    gemma("3", "classifier", "Gemma3TextForSequenceClassification", batch=16, num_labels=3, tie_word_embeddings=False),
]  # fmt: skip


@every_check(CASES)
def test_equals_transformers(case: Case, check: Any) -> None:
    check(case)


@pytest.mark.parametrize(
    ("family", "config_class", "older"),
    [
        ("gemma", "GemmaConfig", (*OLDER, "hidden_activation")),
        ("gemma2", "Gemma2Config", (*OLDER, "hidden_act")),
        ("gemma3_text", "Gemma3TextConfig", (*OLDER, "hidden_act", "rope_local_base_freq", "sliding_window_pattern")),
        ("gemma3", "Gemma3Config", ()),
    ],
)
def test_every_field_of_the_configuration_class_is_listed(
    family: str, config_class: str, older: tuple[str, ...]
) -> None:
    check_fields(find_family(family), config_class, older)


def test_gemma1_gelu_means_its_tanh_form() -> None:
    case = gemma("1", "gelu", hidden_act="gelu")
    assert read_config(find_family("gemma"), {**TINY, "hidden_act": "gelu"}).activation == "geglu_tanh"
    logits(Case(**{**vars(case), "values": {"hidden_act": "gelu"}}))


def test_gemma1_gelu_python_is_exact_and_stays_so() -> None:
    case = gemma("1", "exact", hidden_act="gelu_python")
    assert pair(case).config.activation == "geglu"
    logits(case)
    round_trip(case)


def test_gemma1_hidden_activation_is_ignored() -> None:
    case = gemma("1", "ignored", hidden_activation="relu")
    assert pair(case).config.activation == "geglu_tanh"
    logits(case)


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_gemma1_and_2_refuse_to_see_both_ways(name: str) -> None:
    with pytest.raises(CheckpointError, match="use_bidirectional_attention must be None or False, got True"):
        read_config(find_family(name), {**TINY, "use_bidirectional_attention": True})


def test_gemma2_softcaps_are_there_where_the_file_says_nothing() -> None:
    case = gemma("2", "silent")
    silent = Case(**{**vars(case), "without": ("attn_logit_softcapping", "final_logit_softcapping")})
    assert (pair(silent).config.attention_softcap, pair(silent).config.logit_softcap) == (50.0, 30.0)
    logits(silent)


def test_gemma2_layers_alternate_with_the_first_sliding() -> None:
    config = read_config(find_family("gemma2"), {**TINY, "num_hidden_layers": 3})
    assert config.layer_types == ("sliding", "full", "sliding")


def test_gemma3_attention_softcap_is_never_applied() -> None:
    case = gemma("3", "softcap", attn_logit_softcapping=0.5)
    assert pair(case).config.attention_softcap == 0.0
    logits(case)
    assert write_config(pair(case).family, pair(case).config)["attn_logit_softcapping"] == 0.5


def test_gemma3_older_spelling_of_the_two_ropes() -> None:
    older = {
        "rope_theta": 700.0,
        "rope_local_base_freq": 30.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
        "sliding_window": 3,
    }
    case = Case(**{
        **vars(gemma("3", "older", num_hidden_layers=4, **older)),
        "values": older,
        "without": ("rope_parameters", "layer_types"),
    })  # fmt: skip
    config = pair(case).config
    assert config.layer_types == ("sliding", "full", "sliding", "full")
    assert (config.rope_base, config.local_rope_base, config.local_rope_scaling) == (700.0, 30.0, None)
    logits(case)


@pytest.mark.parametrize("window", [4, 5])
def test_gemma3_window_to_both_sides_is_half_of_theirs_and_one(window: int) -> None:
    # 5.x writes the number it was given, so that a second load does not halve it again.
    case = gemma("3", f"half-{window}", num_hidden_layers=1, sliding_window=window, use_bidirectional_attention=True)
    both = pair(case)
    assert both.config.sliding_window == window // 2 + 1 == 3
    assert both.config.window(0) == (2, 2)
    logits(case)
    written = write_config(both.family, both.config)
    assert written["sliding_window"] == 4 and read_config(both.family, written) == both.config


@torch.no_grad()
def test_embeddings_are_multiplied_by_a_factor_rounded_to_their_dtype() -> None:
    # sqrt(48) = 6.928… is 6.9375 in bfloat16.
    case = gemma("1", "scale", hidden_size=48, num_hidden_layers=1)
    model = pair(case).ours(torch.bfloat16)
    inputs = pair(case).inputs()
    states = model(inputs["ids"], return_hidden_states=True).hidden_states[0]
    expected = model.model.embed_tokens(inputs["ids"]) * torch.tensor(48**0.5).to(torch.bfloat16)
    assert torch.equal(states, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be above 0 or null, got 0.0"),
        ({"sliding_window": None}, "layer_types has sliding layers, so sliding_window must be given"),
        ({"hidden_activation": "silu_glu"}, "hidden_activation must be one of"),
    ],
)
def test_gemma2_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(find_family("gemma2"), {**TINY, **values})


def test_a_scale_of_no_number_above_zero_is_refused() -> None:
    for scalar, message in ((0, "query_pre_attn_scalar must be above 0, got 0"), ("8", "gemma2 configuration")):
        with pytest.raises(CheckpointError, match=message):
            read_config(find_family("gemma2"), {"query_pre_attn_scalar": scalar})


def test_gemma3_flat_rope_parameters_are_refused() -> None:
    # transformers would take its defaults in silence.
    with pytest.raises(CheckpointError, match="rope_parameters must be given for each type of layer"):
        read_config(find_family("gemma3_text"), {**TINY, "rope_parameters": {"rope_type": "linear", "factor": 8.0}})


@torch.no_grad()
def test_gemma3_with_vision_gives_its_text_part() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**TINY, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    fields = {
        "text_config": text, "vision_config": {**vision, "image_size": 8, "patch_size": 4}, "mm_tokens_per_image": 4,
        "image_token_index": 66, "eos_token_id": [1, 6],
    }  # fmt: skip
    case = Case("vision", "Gemma3Config", "Gemma3ForConditionalGeneration", fields)
    with pytest.warns(UserWarning, match="only the text part of this gemma3 model is loaded"):
        both = pair(case)
    assert any(name.startswith("vision_tower") for name in both.disk)
    assert both.config.eos_token_id == (1, 6)
    inputs = both.inputs()
    inputs["ids"].clamp_(max=65)  # the last is a picture's
    assert_logits(call_ours(both.ours(), inputs), call_theirs(both.theirs(), inputs))
    # It is saved as what it is now, a gemma3_text.
    assert both.config.family == "gemma3_text"
    family = find_family(both.config.family)
    assert read_config(family, write_config(family, both.config)) == both.config
    with pytest.raises(ValueError, match="save it as gemma3_text"):
        write_config(both.family, both.config)


def test_gemma3_causal_and_not_differ() -> None:
    one_way, both_ways = (
        gemma("3", f"ways-{flag}", num_hidden_layers=1, use_bidirectional_attention=flag) for flag in (False, True)
    )
    inputs = pair(one_way).inputs()
    apart = call_ours(pair(one_way).ours(), inputs) - call_ours(pair(both_ways).ours(), inputs)
    assert float(apart.detach().abs().max()) > 0.01
