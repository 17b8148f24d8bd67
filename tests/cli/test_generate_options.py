"""``pytransformer generate``: its sampling options, and what of a checkpoint's generation_config.json it takes instead."""

from __future__ import annotations

import json
import re

import pytest
import torch

from pytransformer.cli.main import main
from pytransformer.cli.model_folder import load_model
from pytransformer.generation import checkpoint_options
from pytransformer.generation.defaults import not_followed, with_defaults
from pytransformer.model.checkpoint import save
from pytransformer.training.tokenizer import TextTokenizer
from tests.cli.test_train_generate_plot import _constant_model

TEXT = "abc.\nabd!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that goes on with ``TEXT``, whatever it is told."""
    place = tmp_path_factory.mktemp("constant")
    tokenizer = TextTokenizer.train(["xyz"], 257)
    _constant_model(place, tokenizer, [*tokenizer.encode(TEXT), tokenizer.end_token_id])
    return place


@pytest.fixture
def generate(folder, device, capsys):
    def run(*options, **config):
        path = folder / "generation_config.json"
        path.unlink(missing_ok=True)
        if config:
            path.write_text(json.dumps(config))
        code = main(["generate", "--model", str(folder), "--prompt", "x", "--device", device.type, *options])
        shown = capsys.readouterr()
        return (shown.out, shown.err) if code == 0 else shown.err

    yield run
    (folder / "generation_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ([], TEXT, "stopped at the end-of-text token"),
        (["--stop", ".\n"], "abc", "stopped before a --stop text"),
        (["--stop", "!", "--stop", "\nab"], "abc.", "stopped before a --stop text"),
        (["--stop", "abe", "--max-new-tokens", "7"], TEXT[:7], "stopped after --max-new-tokens 7"),
        (["--stop", "<|endoftext|>"], TEXT, "stopped at the end-of-text token"),
    ],
)
def test_stop_texts_end_the_output(generate, options, text, reason):
    out, err = generate("--temperature", "0", *options)
    assert out == f"x{text}\n" and reason in err


def test_what_is_not_given_is_the_checkpoints_and_is_told(generate):
    _, err = generate()
    assert "generation_config.json" not in err and "seed" in err
    _, err = generate(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1, max_new_tokens=3
    )
    assert "[3 tokens, " in err and "seed" in err
    assert (
        "[from the checkpoint's generation_config.json: temperature 0.6, top_k 20, top_p 0.9, min_p 0.05, "
        "repetition_penalty 1.1, max_new_tokens 3]" in err
    )
    _, err = generate(
        "--temperature", "1", "--top-k", "3", "--top-p", "0.5", "--min-p", "0.1", "--repetition-penalty", "1.2",
        "--max-new-tokens", "2", do_sample=True, temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.1,
    )  # fmt: skip
    assert "generation_config.json" not in err and "[2 tokens, " in err
    _, err = generate(do_sample=False, no_repeat_ngram_size=3, top_k=50)
    assert "from the checkpoint's generation_config.json: temperature 0.0]" in err and "seed" not in err
    assert "[not followed of the checkpoint's generation_config.json: no_repeat_ngram_size 3]" in err
    _, err = generate(do_sample=True, num_beams=4)
    assert "[not followed of the checkpoint's generation_config.json: num_beams 4]" in err and "seed" in err


def test_beams_come_from_the_command_or_the_checkpoint(generate):
    out, err = generate("--num-beams", "3", "--stop", ".\n", temperature=0.7, top_k=3)
    assert out == "xabc\n" and "generation_config.json" not in err and "seed" not in err
    out, err = generate(num_beams=4, length_penalty=2.0, early_stopping=True, temperature=0.7)
    assert out == f"x{TEXT}\n" and "seed" not in err
    assert "json: temperature 0.0, num_beams 4, length_penalty 2.0, early_stopping True]" in err
    out, err = generate("--length-penalty", "0.5", num_beams=2, length_penalty=2.0)
    assert out == f"x{TEXT}\n" and "json: temperature 0.0, num_beams 2]" in err
    _, err = generate("--temperature", "0.5", num_beams=4)
    assert "generation_config.json" not in err and "seed" in err


def test_a_repetition_penalty_is_felt(folder, tmp_path, device, capsys):
    model, tokenizer = load_model(folder, device.type)
    first, second = tokenizer.encode("ab")
    with torch.no_grad():
        model.lm_head.weight.zero_()[[first, second], :7] = torch.tensor([[10.0], [9.0]], device=device)
    save(model, tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    command = ["generate", "--model", str(tmp_path), "--prompt", "x", "--device", device.type, "--temperature", "0"]
    for options, text in (([], "aaaa"), (["--repetition-penalty", "2"], "abaa")):
        assert main([*command, "--max-new-tokens", "4", *options]) == 0
        assert capsys.readouterr().out == f"x{text}\n"


@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        (["--min-p", "2"], {}, "min_p must be from 0 (no limit) to 1, got 2.0"),
        (["--repetition-penalty", "0"], {}, "repetition_penalty must be finite and above 0"),
        (["--temperature", "0", "--top-k", "3"], {}, "top_k=3 limits what is drawn from, but temperature is 0"),
        (["--num-beams", "0"], {}, "num_beams must be at least 1, got 0"),
        (["--num-beams", "2", "--temperature", "0.5"], {}, "temperature=0.5 draws tokens, num_beams=2 searches"),
        (["--num-beams", "2", "--top-k", "5"], {}, "top_k=5 limits what is drawn from, but temperature is 0"),
        (["--length-penalty", "2"], {}, "length_penalty=2.0 is for beam search: give num_beams above 1"),
        (["--stop", ""], {}, "--stop is empty"),
        (["--prompt-lookup", "3", "--num-beams", "2"], {}, "plain decoding, but 2 beams are asked for"),
        (["--prompt-lookup", "3"], {"num_beams": 3}, "plain decoding, but 3 beams are asked for"),
        (["--top", "2", "--prompt-lookup", "3"], {}, "--top generates nothing, so --prompt-lookup has no use"),
        (["--top", "2", "--no-cache"], {}, "--top generates nothing, so --no-cache has no use"),
        ([], {"top_p": 3}, "generation_config.json: top_p must be between 0 and 1, got 3"),
        ([], {"temperature": "hot"}, "generation_config.json: temperature must be a number or None, got 'hot'"),
    ],
)
def test_errors_name_the_option_or_the_file(generate, options, config, message):
    assert message in generate(*options, **config)


def test_what_contradicts_is_said_before_the_prompt_is_shown(folder, device, capsys):
    assert (
        main(["generate", "--model", str(folder), "--prompt", "x", "--device", device.type, "--length-penalty", "2"])
        == 2
    )
    assert capsys.readouterr().out == ""


def test_options_of_a_file():
    assert checkpoint_options(None) == checkpoint_options({"eos_token_id": 2}) == {}
    assert checkpoint_options({"do_sample": True}) == {"temperature": 1.0}
    assert checkpoint_options({"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}) == {
        "temperature": 1.0
    }
    assert checkpoint_options({"do_sample": False, "temperature": 0.7, "top_p": 0.9}) == {"temperature": 0.0}
    assert checkpoint_options({"temperature": 0.7, "top_k": 20}) == {"temperature": 0.7, "top_k": 20}
    beams = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": "never", "num_return_sequences": 2}
    assert checkpoint_options(beams) == {"temperature": 0.0, "num_beams": 4, "early_stopping": "never"}
    assert not_followed(beams) == {}
    assert checkpoint_options({**beams, "do_sample": True}) == {"temperature": 1.0}
    assert not_followed({**beams, "do_sample": True}) == {"num_beams": 4}
    assert checkpoint_options({"num_beams": 1, "length_penalty": 2.0}) == {}
    assert not_followed({"num_beams": 1, "min_length": 0, "suppress_tokens": [3]}) == {"suppress_tokens": (3,)}


def test_what_is_given_wins_over_what_contradicts_it():
    drawn = {"do_sample": True, "temperature": 0.6, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    assert with_defaults({"temperature": 0.0, "top_p": None}, drawn) == (
        {"temperature": 0.0, "repetition_penalty": 1.1},
        {"repetition_penalty": 1.1},
    )
    assert with_defaults({"top_k": 5}, {"do_sample": False}) == ({"top_k": 5}, {})
    assert with_defaults({"top_k": 5}, drawn)[0]["top_k"] == 5
    searched = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}
    assert with_defaults({"length_penalty": 0.5}, searched) == (
        {"temperature": 0.0, "num_beams": 4, "early_stopping": True, "length_penalty": 0.5},
        {"temperature": 0.0, "num_beams": 4, "early_stopping": True},
    )
    for temperature in (0.0, 0.5):
        assert with_defaults({"temperature": temperature}, searched) == ({"temperature": temperature}, {})
    assert with_defaults({"top_k": 5}, searched) == ({"top_k": 5}, {})
    assert with_defaults({"num_beams": 1}, searched)[0] == {"num_beams": 1, "temperature": 0.0}
    assert with_defaults({"num_beams": 2}, drawn) == (
        {"num_beams": 2, "repetition_penalty": 1.1},
        {"repetition_penalty": 1.1},
    )


@pytest.mark.parametrize("options", [["--prompt-lookup", "3"], ["--draft"]], ids=["lookup", "draft"])
def test_drafts_change_the_speed_and_not_the_text(generate, folder, options):
    options = [*options, str(folder)] if options == ["--draft"] else options
    out, err = generate("--temperature", "0", *options)
    assert out == f"x{TEXT}\n" and re.search(r"; \d+ of \d+ proposed tokens kept; stopped at", err)


def test_drafts_that_cannot_serve_are_refused(generate, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    _constant_model(other, TextTokenizer.train(["hello hello"] * 9, 260), [1])
    for options, message in (
        (["--prompt-lookup", "0"], "--prompt-lookup must be at least 1, but is 0"),
        (
            ["--prompt-lookup", "3", "--no-cache"],
            "--no-cache is for plain decoding: leave --prompt-lookup and --draft out",
        ),
        (["--draft", str(other)], "has another tokenizer than --model"),
        (["--draft", str(tmp_path / "none")], "no model folder"),
    ):
        assert message in generate(*options)
