"""A prompt's beginning kept by one command and used by another; kinds of caches and dtypes on the command line."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.cli.generate import CACHES, DTYPES
from pytransformer.cli.main import main
from pytransformer.cli.model_folder import encode, load_model
from pytransformer.generation.caches import KINDS
from pytransformer.model.checkpoint import save
from tests.model.configs import make_model
from tests.model.text_folders import write

START = "The capital of France is "


@pytest.fixture(scope="module")
def folder(tmp_path_factory, device):
    place = write("byte BPE", tmp_path_factory.mktemp("model"))
    config = TransformerConfig.llama(vocab_size=370, hidden_size=32, num_layers=2, num_heads=2, max_seqlen=64)
    save(make_model(config, 0, device), place)
    return place


@pytest.fixture
def run(folder, device, capsys):
    def run(command, *options, code=0):
        assert main([command, "--model", str(folder), "--device", device.type, *options]) == code
        return capsys.readouterr()

    return run


def _generate(run, *options, code=0):
    return run(
        "generate", "--prompt", START + "what", "--temperature", "0", "--max-new-tokens", "6", *options, code=code
    )


@pytest.mark.parametrize("options", [(), ("--cache", "paged-int8"), ("--dtype", "bfloat16")])
def test_what_is_kept_is_used(run, folder, tmp_path, options):
    (tmp_path / "start.txt").write_text(START)
    made = run("prefix", "--text", str(tmp_path / "start.txt"), "-o", str(tmp_path / "kept"), *options).out
    tokens = json.loads((tmp_path / "kept" / "prefix.json").read_text())["tokens"]
    assert f"kept: {tokens} tokens, " in made
    plain, used = _generate(run, *options), _generate(run, *options, "--prefix", str(tmp_path / "kept"))
    assert used.out == plain.out
    _, tokenizer = load_model(folder, None)
    prompt, start = tokenizer.encode(START + "what"), tokenizer.encode(START)
    common = next(index for index, pair in enumerate(zip(prompt, [*start, None])) if len(set(pair)) > 1)
    assert f"; {common} of {len(prompt)} tokens of the prompt from the prefix]" in used.err
    assert "prefix" not in plain.err and common > 8
    wrong = ("--dtype", "float32", "--cache", "fp8") if options else ("--cache", "int8")
    refused = _generate(run, *wrong, "--prefix", str(tmp_path / "kept"), code=2)
    said = (
        "or by this one in another dtype"
        if "bfloat16" in options
        else f"does not take: make one with `pytransformer prefix --cache {wrong[-1]}`"
    )
    assert said in refused.err and not refused.out


@pytest.mark.parametrize("kind", CACHES)
def test_every_kind_of_cache_is_served(run, kind):
    assert CACHES == KINDS
    plain, found = _generate(run), _generate(run, "--cache", kind)
    assert found.out.startswith(START) and (found.out == plain.out or "8" in kind)


def test_the_dtype_is_that_of_the_weights(folder, device):
    for name in DTYPES:
        network, _ = load_model(folder, device.type, name)
        assert {parameter.dtype for parameter in network.parameters()} == {getattr(torch, name)}
    assert load_model(folder, device.type)[0].lm_head.weight.dtype == torch.float32


def test_the_text_may_come_from_a_pipe(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(START))
    assert "kept: " in run("prefix", "--text", "-", "-o", str(tmp_path / "kept")).out


def test_an_unknown_token_names_the_option_that_it_came_by(folder, device):
    network, _ = load_model(folder, device.type)
    beyond = SimpleNamespace(encode=lambda text: [999], label=str)  # as a tokenizer to which tokens were added later
    with pytest.raises(ValueError, match="--text has the token '999' of id 999, but the model's vocabulary is 370"):
        encode(network, beyond, "x", "--text")


def test_errors_are_one_line(run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "long.txt").write_text("word " * 100)
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    for name, message in (
        ("empty.txt", "empty.txt is empty: there is nothing to keep"),
        ("long.txt", "tokens, but the model's context is 64: there is no room for what follows"),
        ("missing.txt", "No such file or directory"),
        ("bytes.txt", "bytes.txt must be UTF-8 text: byte 1 is 0xff"),
    ):
        shown = run("prefix", "--text", str(tmp_path / name), "-o", str(tmp_path / "kept"), code=2)
        assert message in shown.err and shown.err.count("\n") == 1 and not (tmp_path / "kept").exists()
    for options, message in (
        (("--prefix", str(tmp_path)), "does not hold a prefix: there is no prefix.json"),
        (("--no-cache", "--cache", "paged"), "--no-cache computes without a cache"),
        (("--no-cache", "--prefix", str(tmp_path)), "--no-cache computes without a cache"),
    ):
        assert message in _generate(run, *options, code=2).err
