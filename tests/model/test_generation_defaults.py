"""generation_config.json is read, and written back, with all that transformers finds in it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from transformers import GenerationConfig

from pytransformer.model.generation_defaults import GenerationDefaults

# As public checkpoints have them: a chat model, a summariser, a speech model's suppressed tokens.
FILES = [
    {"bos_token_id": 1, "do_sample": True, "eos_token_id": [128001, 128009], "temperature": 0.6, "top_p": 0.9, "transformers_version": "5"},
    {
        "bos_token_id": 0, "decoder_start_token_id": 2, "early_stopping": True, "eos_token_id": 2, "forced_bos_token_id": 0,
        "forced_eos_token_id": 2, "length_penalty": 2.0, "max_length": 142, "min_length": 56, "no_repeat_ngram_size": 3, "num_beams": 4,
        "pad_token_id": 1, "bad_words_ids": [[58100], [3, 4]], "renormalize_logits": True,
    },
    {"suppress_tokens": [1, 2], "begin_suppress_tokens": [220], "top_k": 0, "min_p": 0.05, "repetition_penalty": 1.05, "max_new_tokens": 9},
    {"do_sample": False, "temperature": None, "eos_token_id": None},
    {},
]  # fmt: skip


@pytest.mark.parametrize("values", FILES, ids=range(len(FILES)))
def test_what_is_written_means_the_same_to_transformers(tmp_path, values):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    defaults = GenerationDefaults.load(tmp_path)
    expected = GenerationConfig.from_pretrained(tmp_path).to_dict()
    (tmp_path / "copy").mkdir()
    defaults.save(tmp_path / "copy")
    assert GenerationConfig.from_pretrained(tmp_path / "copy").to_dict() == expected
    assert GenerationDefaults.load(tmp_path / "copy") == defaults
    assert {name: value for name, value in values.items() if value is not None} == defaults.to_dict()


def test_fields_are_those_of_transformers():
    known = set(GenerationConfig().to_dict())
    assert {field.name for field in dataclasses.fields(GenerationDefaults)} - known == {"others"}


def test_ids_are_tuples_and_the_rest_is_kept():
    defaults = GenerationDefaults.from_dict(FILES[1])
    assert defaults.eos_token_id == defaults.forced_eos_token_id == (2,) and defaults.bad_words_ids == (
        (58100,),
        (3, 4),
    )
    assert defaults.others == {"renormalize_logits": True}
    assert GenerationDefaults(eos_token_id=7).eos_token_id == (7,)
    assert GenerationDefaults.from_dict({"eos_token_id": [7]}).to_dict() == {"eos_token_id": 7}
    changed = dataclasses.replace(defaults, num_beams=1)
    assert changed.to_dict() == {**FILES[1], "num_beams": 1}


def test_a_folder_without_the_file_says_nothing(tmp_path):
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults()
    assert GenerationDefaults().eos_token_id == () and GenerationDefaults().to_dict() == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "2"}, "eos_token_id must be token ids, got '2'"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id must be token ids, got \[2, -1\]"),
        ({"bad_words_ids": [["a"]]}, "bad_words_ids must be token ids"),
        ({"pad_token_id": 1.0}, "pad_token_id must be a whole number of at least 0 or None, got 1.0"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0"),
        ({"do_sample": 1}, "do_sample must be true, false or None, got 1"),
        ({"do_sample": "never"}, "do_sample must be true, false or None, got 'never'"),
        ({"temperature": "hot"}, "temperature must be a number or None, got 'hot'"),
        ({"temperature": -0.5}, "temperature must be at least 0, got -0.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1, got 1.5"),
        ([], "must hold a JSON object, got list"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(tmp_path, values, message):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"generation_config\.json: .*{message}"):
        GenerationDefaults.load(tmp_path)
