"""Llama and its relatives without Gemma: Mistral, Qwen2, Qwen3, Phi-3, OLMo 2."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from pytransformer import TransformerConfig
from pytransformer.model.families import CheckpointError, find_family, mapping, read_config, write_config

from .support import Case, assert_logits, call_ours, call_theirs, check_fields, every_check, generation, logits, pair

TINY: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLDER = ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings")
# head_dim 8 has four pairs.
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [2.0, 2.5, 3.5, 5.0],
}  # fmt: skip


def llama(name: str, model: str = "LlamaForCausalLM", batch: int = 2, **fields: Any) -> Case:
    return Case(name, "LlamaConfig", model, {**TINY, **fields}, batch=batch)


def scaled(name: str, parameters: dict[str, Any], **fields: Any) -> Case:
    return llama(f"rope-{name}", rope_parameters={"rope_theta": 100.0, **parameters}, **fields)


LLAMA = [
    llama("grouped-queries"),
    llama("multi-query-tied-biases", num_key_value_heads=1, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    llama("head-dim-several-ends", head_dim=16, num_key_value_heads=4, eos_token_id=[2, 5], rope_theta=5e5),
    llama("gelu-wide-eps", hidden_act="gelu", rms_norm_eps=0.1, rope_scaling={"type": "linear", "factor": 2.0}),
    scaled("linear", {"rope_type": "linear", "factor": 3.0}, tie_word_embeddings=True),
    scaled("dynamic-within", {"rope_type": "dynamic", "factor": 2.0}),
    scaled("dynamic-beyond", {"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=8),
    scaled("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}),
    scaled(
        "llama3",
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    scaled("longrope-within", {**LONGROPE, "original_max_position_embeddings": 32}),
    scaled("longrope-beyond", {**LONGROPE, "original_max_position_embeddings": 4, "factor": 8.0}),
    llama("classifier", "LlamaForSequenceClassification", batch=16, pad_token_id=0, num_labels=3),
    llama("base", "LlamaModel"),
]  # fmt: skip
MISTRAL = [
    Case("window", "MistralConfig", "MistralForCausalLM", {**TINY, "sliding_window": 4}),
    Case("no-window", "MistralConfig", "MistralForCausalLM", {**TINY, "sliding_window": None, "tie_word_embeddings": True}),
    Case(
        "head-dim-one-key-head-yarn",
        "MistralConfig",
        "MistralForCausalLM",
        {
            **TINY, "sliding_window": 3, "head_dim": 16, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0},
        },
    ),
]  # fmt: skip
QWEN2 = [
    Case("biases-of-qkv", "Qwen2Config", "Qwen2ForCausalLM", TINY),
    Case(
        "window-from-a-layer-on-tied",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            **TINY, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1,
            "tie_word_embeddings": True, "num_key_value_heads": 1,
        },
        without=("layer_types",),
    ),
    Case(
        "layer-types-yarn",
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            **TINY, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
]  # fmt: skip
QWEN3 = [
    Case("head-dim-tied", "Qwen3Config", "Qwen3ForCausalLM", {**TINY, "head_dim": 16, "tie_word_embeddings": True}),
    Case(
        "biases-window-from-a-layer-on",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {
            **TINY, "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 3,
            "max_window_layers": 1, "num_key_value_heads": 1,
        },
        without=("layer_types",),
    ),
    Case(
        "all-heads-yarn",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        {
            **TINY, "head_dim": 8, "num_key_value_heads": 4, "rms_norm_eps": 0.05,
            "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6, "mscale": 2.0, "mscale_all_dim": 0.5},
        },
    ),
]  # fmt: skip
PHI3 = [
    Case("plain-all-heads", "Phi3Config", "Phi3ForCausalLM", {**TINY, "num_key_value_heads": 4}),
    Case(
        "window-part-of-the-head-tied",
        "Phi3Config",
        "Phi3ForCausalLM",
        {**TINY, "sliding_window": 4, "partial_rotary_factor": 0.5, "tie_word_embeddings": True, "resid_pdrop": 0.1},
    ),
    Case(
        "longrope-within",
        "Phi3Config",
        "Phi3ForCausalLM",
        {**TINY, "rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    ),
    Case(
        "longrope-beyond-part-of-the-head",
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            **TINY, "original_max_position_embeddings": 4, "partial_rotary_factor": 0.5, "num_key_value_heads": 1,
            "rope_scaling": {**LONGROPE, "short_factor": [1.0, 1.2], "long_factor": [2.0, 3.5]},
        },
    ),
]  # fmt: skip
OLMO2 = [
    Case("all-heads", "Olmo2Config", "Olmo2ForCausalLM", {**TINY, "num_key_value_heads": 4}),
    Case(
        "grouped-queries-tied-biases",
        "Olmo2Config",
        "Olmo2ForCausalLM",
        {**TINY, "tie_word_embeddings": True, "attention_bias": True, "rms_norm_eps": 0.05},
    ),
    Case(
        "one-key-head-yarn-three-layers",
        "Olmo2Config",
        "Olmo2ForCausalLM",
        {
            **TINY, "num_key_value_heads": 1, "num_hidden_layers": 3,
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
    ),
]  # fmt: skip


def named(family: str, cases: list[Case]) -> list[Case]:
    return [Case(**{**vars(case), "name": f"{family}-{case.name}"}) for case in cases]


@every_check(
    named("llama", LLAMA)
    + named("mistral", MISTRAL)
    + named("qwen2", QWEN2)
    + named("qwen3", QWEN3)
    + named("phi3", PHI3)
    + named("olmo2", OLMO2)
)
def test_equals_transformers(case: Case, check: Any) -> None:
    check(case)


@pytest.mark.parametrize(
    ("family", "config_class", "older"),
    [
        ("llama", "LlamaConfig", OLDER),
        ("mistral", "MistralConfig", (*OLDER, "layer_types")),
        ("qwen2", "Qwen2Config", (*OLDER, "head_dim")),
        ("qwen3", "Qwen3Config", OLDER),
        ("phi3", "Phi3Config", (*(name for name in OLDER if not name.startswith("original")), "head_dim")),
        ("olmo2", "Olmo2Config", (*OLDER, "head_dim")),
    ],
)
def test_every_field_of_the_configuration_class_is_listed(
    family: str, config_class: str, older: tuple[str, ...]
) -> None:
    check_fields(find_family(family), config_class, older)


# What a file leaves out takes transformers' default, which differs between families.
@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"norm_eps": 1e-6, "head_dim": 128, "rope_base": 10_000.0, "num_kv_heads": 32, "tie_embeddings": False}),
        ("mistral", {"sliding_window": 4096, "head_dim": 128, "num_kv_heads": 8, "norm_eps": 1e-6}),
        ("qwen2", {"sliding_window": None, "num_kv_heads": 32, "norm_eps": 1e-6, "tie_embeddings": False}),
        ("qwen3", {"head_dim": 128, "sliding_window": None, "attention_bias": False}),
        ("phi3", {"norm_eps": 1e-5, "num_kv_heads": 32, "rotary_dim": 96, "pad_token_id": 32000}),
        ("olmo2", {"norm_eps": 1e-5, "num_kv_heads": 32, "rope_base": 10_000.0, "eos_token_id": 50279}),
        ("gemma", {"head_dim": 256, "tie_embeddings": True, "activation": "geglu_tanh", "norm_eps": 1e-6}),
        ("gemma2", {"head_dim": 256, "attention_softcap": 50.0, "logit_softcap": 30.0, "sliding_window": 4096}),
        ("gemma3_text", {"rope_base": 1e6, "local_rope_base": 1e4, "logit_softcap": 0.0, "softmax_scale": None}),
    ],
)  # fmt: skip
def test_defaults_of_what_a_file_leaves_out(family: str, expected: dict[str, Any]) -> None:
    config = read_config(find_family(family), {})
    assert {name: getattr(config, name) for name in expected} == expected


def test_qwen3_head_dim_is_128_and_not_hidden_by_heads() -> None:
    fields = {**TINY, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    case = Case("head-dim-absent", "Qwen3Config", "Qwen3ForCausalLM", fields, without=("head_dim",))
    assert pair(case).config.head_dim == 128
    logits(case)


@pytest.mark.parametrize("config", ["LlamaConfig", "MistralConfig", "Qwen2Config"])
def test_is_causal_false_sees_both_ways(config: str) -> None:
    # With a window, their largest distance is the window itself at either side, not one less.
    windows = {
        "LlamaConfig": {},
        "MistralConfig": {"sliding_window": 3},
        "Qwen2Config": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    }
    model = config.replace("Config", "ForCausalLM")
    case = Case("both-ways", config, model, {**TINY, "is_causal": False, **windows[config]})
    both = pair(case)
    assert not both.config.causal
    logits(case)
    written = write_config(both.family, both.config)
    assert written["is_causal"] is False
    assert written.get("sliding_window") == windows[config].get("sliding_window")


@pytest.mark.parametrize("value", [None, 0])
def test_is_causal_null_sees_both_ways_too(value: object) -> None:
    case = llama("both-ways-by-null", is_causal=value)
    assert not pair(case).config.causal
    logits(case)


def test_llama_ignores_a_part_of_the_head_with_plain_rope() -> None:
    case = llama("part-of-the-head", partial_rotary_factor=0.5)
    assert pair(case).config.rotary_dim == 8
    logits(case)


def test_longrope_factor_of_the_file_counts_before_the_ratio_of_lengths() -> None:
    explicit = scaled("explicit", {**LONGROPE, "original_max_position_embeddings": 4, "factor": 2.0})
    ratio = scaled("ratio", {**LONGROPE, "original_max_position_embeddings": 4})
    logits(explicit)
    logits(ratio)
    inputs = pair(ratio).inputs()
    apart = call_ours(pair(explicit).ours(), inputs) - call_ours(pair(ratio).ours(), inputs)
    assert float(apart.detach().abs().max()) > 0.01, "the two would be the same"


def test_longrope_original_length_inside_and_outside() -> None:
    outside = Case(
        "outside", "LlamaConfig", "LlamaForCausalLM", {**TINY, "rope_scaling": LONGROPE, "original_max_position_embeddings": 4}
    )  # fmt: skip
    both = scaled("both", {**LONGROPE, "original_max_position_embeddings": 32}, original_max_position_embeddings=4)
    for case in (outside, both):
        scaling = pair(case).config.rope_scaling
        assert scaling is not None and scaling["original_max_position_embeddings"] == 4
        logits(case)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["longrope", "dynamic"])
@pytest.mark.parametrize("lengths", [(10, 6), (9, 10), (7, 6)])
def test_frequencies_depend_on_the_length_of_each_row_alone(method: str, side: str, lengths: tuple[int, int]) -> None:
    # Theirs goes by the longest row, padding included, for all; ours gives each row what it gets alone. They change after 8 tokens.
    if method == "longrope":
        case = scaled("rows", {**LONGROPE, "original_max_position_embeddings": 8})
    else:
        case = scaled("rows", {"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=8)
    both = pair(case)
    rows = [both.inputs(seed, batch=1, seqlen=length)["ids"] for seed, length in enumerate(lengths)]
    width = 11
    ids, mask = torch.zeros(2, width, dtype=torch.int64), torch.zeros(2, width, dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[index, place], mask[index, place] = row[0], True
    ours = call_ours(both.ours(), {"ids": ids}, mask)
    theirs = both.theirs()(input_ids=ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        alone = call_theirs(both.theirs(), {"ids": row})
        assert_logits(ours[index : index + 1, mask[index]], alone, f"row {index}")
        if row.shape[1] < width - 1 and (method == "dynamic" or row.shape[1] <= 8):
            assert float((theirs[index, mask[index]] - alone[0]).abs().max()) > 0.01, "their batch would do the same"


@torch.no_grad()
@pytest.mark.parametrize("seqlen", [6, 8, 9, 16])
def test_dynamic_equals_a_fresh_model_at_every_length(seqlen: int) -> None:
    # Theirs keeps the frequencies of its longest call; so each length has a fresh one.
    case = scaled("stretches", {"rope_type": "dynamic", "factor": 3.0}, max_position_embeddings=8)
    both = pair(case)
    assert both.config.max_seqlen == 24
    inputs = both.inputs(seqlen=seqlen)
    ours = both.ours()
    call_ours(ours, both.inputs(1, seqlen=20))
    assert_logits(call_ours(ours, inputs), call_theirs(both.theirs(), inputs))


def test_dynamic_generation_keeps_its_keys_beyond_the_original_length() -> None:
    case = scaled("keeps", {"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=8)
    for prompt in (3, 6, 8):
        generation(dataclasses.replace(case, prompt=prompt))


def test_phi3_generation_computes_its_keys_again_where_the_factors_change() -> None:
    fields = {**TINY, "rope_scaling": LONGROPE, "original_max_position_embeddings": 12}
    generation(Case("crossing", "Phi3Config", "Phi3ForCausalLM", fields, prompt=10))


def test_phi3_su_and_yarn_mean_longrope() -> None:
    fields = {**TINY, "rope_scaling": LONGROPE, "original_max_position_embeddings": 4}
    for name in ("su", "yarn"):
        older = {key: value for key, value in LONGROPE.items() if key != "rope_type"} | {"type": name}
        values = {"rope_scaling": older, "original_max_position_embeddings": 4}
        case = Case(name, "Phi3Config", "Phi3ForCausalLM", fields, values=values, without=("rope_parameters",))
        logits(case)


def test_qwen_layer_types_slide_only_with_use_sliding_window() -> None:
    values = {**TINY, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    for name in ("qwen2", "qwen3"):
        with pytest.raises(CheckpointError, match="layer_types has sliding layers, so sliding_window must be given"):
            read_config(find_family(name), values)
        assert read_config(find_family(name), {**TINY, "sliding_window": 4}).layer_types == ("full", "full")


def test_mistral_layer_types_are_refused() -> None:
    values = {**TINY, "layer_types": ["sliding_attention", "full_attention"]}
    with pytest.raises(CheckpointError, match=r"layer_types must be None, got .* ignores them without a cache"):
        read_config(find_family("mistral"), values)


def test_an_unknown_kind_of_layer_is_refused() -> None:
    values = {**TINY, "use_sliding_window": True, "layer_types": ["chunked_attention", "full_attention"]}
    with pytest.raises(CheckpointError, match="layer_types must be full_attention or sliding_attention, got chunked"):
        read_config(find_family("qwen3"), values)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"hidden_act must be one of 'silu', .*, got 'quick_gelu'"):
        read_config(find_family("llama"), {**TINY, "hidden_act": "quick_gelu"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_activation_of_transformers_is_theirs_or_refused(family: str) -> None:
    gates = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
    plain = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
    field = "hidden_act" if family == "llama" else "activation_function"
    x = torch.linspace(-12, 12, 97)
    served = []
    for name in ACT2FN:
        try:
            ours = read_config(find_family(family), {field: name}).activation
        except CheckpointError as error:
            assert f"{field} must be one of" in str(error)
            continue
        served.append(name)
        torch.testing.assert_close(plain[gates.get(ours, ours)](x), ACT2FN[name](x))
    assert {"gelu_fast", "gelu_accurate", "gelu_python", "gelu_python_tanh", "swish"} <= set(served)


def test_a_padding_token_of_minus_one_is_none() -> None:
    assert read_config(find_family("llama"), {**TINY, "pad_token_id": -1}).pad_token_id is None


def test_stored_frequencies_are_no_weights() -> None:
    both = pair(llama("frequencies"))
    disk = {**both.disk, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    again = mapping.state_of(both.family, both.config, both.state, disk)
    assert again.keys() == both.state.keys()


def test_names_of_labels_survive() -> None:
    family = find_family("qwen2")
    values = {
        **TINY, "architectures": ["Qwen2ForSequenceClassification"], "problem_type": "multi_label_classification",
        "id2label": {"0": "calm", "1": "sad", "2": "glad"}, "label2id": {"calm": 0, "sad": 1, "glad": 2},
    }  # fmt: skip
    config = read_config(family, values)
    assert (config.head, config.pooling, config.num_labels, config.problem) == (
        "classification",
        "last",
        3,
        "multi_label",
    )
    written = write_config(family, config)
    assert {name: written[name] for name in values} == {**values, **{name: written[name] for name in TINY}}
    assert written["id2label"] == values["id2label"] and written["architectures"] == values["architectures"]


def test_a_model_made_here_can_be_saved_as_a_llama() -> None:
    import transformers

    config = TransformerConfig.llama(
        vocab_size=67, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seqlen=64
    )
    written = write_config(find_family("llama"), config)
    assert written["architectures"] == ["LlamaForCausalLM"]
    theirs = transformers.LlamaConfig(**written)
    assert (theirs.num_key_value_heads, theirs.intermediate_size) == (2, config.intermediate_size)
    with pytest.raises(ValueError, match=r"the family qwen2 cannot express this model: attention_bias = False"):
        write_config(find_family("qwen2"), config)
    with pytest.raises(
        ValueError, match=r"the family llama cannot express this model: .*hidden_act .* got 'gelu_tanh'"
    ):
        write_config(
            find_family("llama"), TransformerConfig.gpt2(vocab_size=67, hidden_size=32, num_layers=2, num_heads=4)
        )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "phi3"])
def test_shapes_that_their_configuration_refuses_are_not_saved(name: str) -> None:
    family = find_family(name)
    values = {**TINY, "hidden_size": 33, "head_dim": 8}
    if name == "phi3":
        values |= {"hidden_size": 36, "rope_parameters": LONGROPE, "original_max_position_embeddings": 8}
    config = read_config(family, values)
    with pytest.raises(ValueError, match=f"the family {name} cannot express this model: .*head.*, got .*3[36] and 4$"):
        write_config(family, config)


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text"]
)
def test_rates_of_dropout_survive(name: str) -> None:
    family = find_family(name)
    rates = {"attention_dropout": 0.1, **({"resid_pdrop": 0.2, "embd_pdrop": 0.3} if name == "phi3" else {})}
    config = read_config(family, {**TINY, **rates})
    assert config.attention_dropout == 0.1
    # transformers 5.x has Phi-3's dropout of embeddings in its configuration, and applies it nowhere.
    assert (config.residual_dropout, config.embedding_dropout) == (0.2 if name == "phi3" else 0.0, 0.0)
    written = write_config(family, config)
    assert {rate: written[rate] for rate in rates} == rates
