"""RoPE of every spelling against the tables that transformers makes of the same configuration."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer.model.families import CheckpointError, find_family, read_config, write_config
from pytransformer.reference.rope import rope_frequencies

from .support import Doubles

SHAPE: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None,
}  # fmt: skip
PAIRS = 8
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * pair for pair in range(PAIRS)],
    "long_factor": [2.0 + 0.5 * pair for pair in range(PAIRS)],
}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3: dict[str, Any] = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# Name -> what a Llama's configuration says of RoPE. Lengths 12 and 40 stand at either side of most original lengths.
SPELLINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "theta-outside": {"rope_theta": 500.0},
    "theta-inside-first": {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "linear-type": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 300}},
    "scaling-before-parameters": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    },
    "dynamic": {"max_position_embeddings": 20, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "yarn": {"rope_parameters": YARN},
    "yarn-explicit-factor-wins": {"rope_parameters": {**YARN, "factor": 3.0}},
    "yarn-null-factor-is-ratio": {"rope_parameters": {**YARN, "factor": None}},
    "yarn-length-outside": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "yarn-length-outside-before-inside": {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    "yarn-no-length-is-maximum": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn-one-mscale-ignored": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.0}},
    "yarn-two-mscales": {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}},
    "yarn-attention-factor": {"rope_parameters": {**YARN, "attention_factor": 1.5, "mscale": 2.0, "mscale_all_dim": 1.0}},
    "yarn-betas": {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5}},
    "yarn-null-beta-is-32": {"rope_parameters": {**YARN, "beta_fast": None, "rope_theta": 100.0}},
    "yarn-not-truncated": {"rope_parameters": {**YARN, "truncate": False, "rope_theta": 100.0}},
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 32, "rope_theta": 100.0}},
    "llama3-length-outside": {
        "rope_scaling": LLAMA3,
        "rope_theta": 100.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 20}},
    "longrope-explicit-factor-before-ratio": {
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 20, "factor": 8.0}
    },
    "longrope-attention-factor": {
        "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 20, "factor": 8.0, "attention_factor": 1.25}
    },
    "longrope-length-outside": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 20},
    "longrope-length-outside-before-inside": {
        "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 16},
        "original_max_position_embeddings": 20,
    },
    "longrope-no-length-is-maximum": {"rope_scaling": LONGROPE},
}  # fmt: skip


def their_tables(config_class: str, module: str, values: dict[str, Any], seqlen: int) -> tuple[Tensor, Tensor]:
    """cos and sin (seqlen, rotary_dim / 2) in float64, of a fresh model: a dynamic one remembers the longest call."""
    import transformers

    models = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = getattr(transformers, config_class)(**copy.deepcopy(values))
    with Doubles():
        rotary = getattr(models, config_class.replace("Config", "RotaryEmbedding"))(config)
        cos, sin = rotary(torch.zeros(1, dtype=torch.float64), torch.arange(seqlen)[None])
    return tuple(table[0, :, : table.shape[-1] // 2] for table in (cos, sin))


def our_tables(model_type: str, values: dict[str, Any], seqlen: int) -> tuple[Tensor, Tensor]:
    config = read_config(find_family(model_type), values)
    frequencies, factor = rope_frequencies(
        config.rotary_dim, seqlen, base=config.rope_base, scaling=config.rope_scaling
    )
    angles = torch.arange(seqlen, dtype=torch.float64)[:, None] * frequencies
    return angles.cos() * factor, angles.sin() * factor


@pytest.mark.parametrize("seqlen", [12, 40])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_makes_the_tables_of_transformers(name: str, seqlen: int) -> None:
    values = {**SHAPE, **SPELLINGS[name]}
    before = copy.deepcopy(values)
    ours = our_tables("llama", values, seqlen)
    assert values == before, "the caller's mapping was changed"
    torch.testing.assert_close(ours, their_tables("LlamaConfig", "llama", values, seqlen))


@pytest.mark.parametrize("name", SPELLINGS)
def test_what_is_written_is_read_the_same_here_and_there(name: str) -> None:
    family = find_family("llama")
    config = read_config(family, {**SHAPE, **SPELLINGS[name]})
    written = write_config(family, config)
    assert read_config(family, written) == config
    assert "rope_scaling" not in written and "rope_theta" not in written
    for seqlen in (12, 40):
        theirs = their_tables("LlamaConfig", "llama", written, seqlen)
        torch.testing.assert_close(our_tables("llama", {**SHAPE, **SPELLINGS[name]}, seqlen), theirs)


PHI3: dict[str, dict[str, Any]] = {
    "default": {},
    "partial": {"partial_rotary_factor": 0.5},
    "partial-inside-first": {
        "partial_rotary_factor": 0.5,
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25, "rope_theta": 1e4},
    },
    "longrope": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 20},
    "longrope-called-yarn": {
        "rope_scaling": {**LONGROPE, "rope_type": "yarn", "factor": None},
        "original_max_position_embeddings": 20,
    },
    "longrope-of-a-part": {
        "partial_rotary_factor": 0.5,
        "rope_scaling": {
            **LONGROPE,
            "short_factor": LONGROPE["short_factor"][:4],
            "long_factor": LONGROPE["long_factor"][:4],
        },
        "original_max_position_embeddings": 20,
    },
    # Its default of 4096 stands outside even where nobody wrote it.
    "longrope-length-inside-does-not-count": {
        "max_position_embeddings": 8192,
        "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 20},
    },
}


@pytest.mark.parametrize("seqlen", [12, 40])
@pytest.mark.parametrize("name", PHI3)
def test_phi3_every_spelling(name: str, seqlen: int) -> None:
    values = {**SHAPE, **PHI3[name]}
    theirs = their_tables("Phi3Config", "phi3", values, seqlen)
    torch.testing.assert_close(our_tables("phi3", values, seqlen), theirs)
    family = find_family("phi3")
    written = write_config(family, read_config(family, values))
    torch.testing.assert_close(their_tables("Phi3Config", "phi3", written, seqlen), theirs)


def test_phi3_su_means_longrope() -> None:
    # transformers 5.23 means to read it too, and fails on it; the rule is that of its first files.
    values = {**SHAPE, "rope_scaling": {**LONGROPE, "rope_type": "su"}, "original_max_position_embeddings": 20}
    longrope = {**values, "rope_scaling": LONGROPE}
    family = find_family("phi3")
    assert read_config(family, values).rope_scaling == read_config(family, longrope).rope_scaling
    with pytest.raises(CheckpointError, match=r"rope_type must be one of .*, got 'su'"):
        read_config(find_family("llama"), values)


@pytest.mark.parametrize("method", ["linear", "dynamic", "yarn", "llama3"])
def test_phi3_has_longrope_alone(method: str) -> None:
    scaling = {"rope_type": method, **LLAMA3, **{"rope_type": method}}
    if method == "yarn":  # means LongRoPE here, whose factors are missing
        with pytest.raises(CheckpointError, match="needs short_factor, long_factor"):
            read_config(find_family("phi3"), {**SHAPE, "rope_scaling": scaling})
        return
    with pytest.raises(CheckpointError, match=f"rope_type must be 'default' or 'longrope', got '{method}'"):
        read_config(find_family("phi3"), {**SHAPE, "rope_scaling": scaling})


@pytest.mark.parametrize("name", [name for name in SPELLINGS if name != "default"])
def test_a_part_of_the_head_is_ignored_by_llamas_plain_rope_and_refused_by_the_rest(name: str) -> None:
    # transformers' Llama ignores it in the first case, and fails in forward in the others.
    values = {**SHAPE, **SPELLINGS[name], "partial_rotary_factor": 0.5}
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if given.get("rope_type", given.get("type", "default")) == "default":
        assert read_config(find_family("llama"), values).rotary_dim == 16
    else:
        with pytest.raises(
            CheckpointError, match=r"partial_rotary_factor must be 1 with rope_type '.*' in this family, got 0\.5"
        ):
            read_config(find_family("llama"), values)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_type must be one of default, .*, got 'proportional'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' needs low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor must be a number, got '2'"),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0]}}, "longrope needs 8 factors"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "longrope needs 8 factors"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "'factor'. must be greater than 0, got 0"),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "embeddings must be greater than 0, got 0"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor must be below high_freq_factor"),
        ({"rope_theta": 0}, "rope_theta must be greater than 0, got 0"),
        ({"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1, "factor": 2.0}}, "division by zero"),
        ({"rope_scaling": "linear"}, "must be mappings, got 'linear'"),
        ({"rope_parameters": {"full_attention": {}}}, "for each type of layer .* are not served in this family"),
    ],
)  # fmt: skip
def test_refusals_name_the_field(spelling: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(find_family("llama"), {**SHAPE, **spelling})


def test_unknown_parameters_are_named() -> None:
    with pytest.warns(UserWarning, match="RoPE parameters that are not known are ignored: mrope_section"):
        read_config(find_family("llama"), {**SHAPE, "rope_scaling": {"type": "default", "mrope_section": [1, 2]}})


def test_a_method_that_transformers_lacks_cannot_be_written() -> None:
    family = find_family("llama")
    config = read_config(family, SHAPE)
    with pytest.raises(ValueError, match="rope_scaling 'ntk' has no place in this family"):
        write_config(family, type(config)(**{**config.to_dict(), "rope_scaling": {"rope_type": "ntk", "factor": 2.0}}))
