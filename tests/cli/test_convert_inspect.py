"""``pytransformer convert`` and ``pytransformer inspect`` on folders of ours and of a public family."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytransformer import TransformerConfig, load, save
from pytransformer.benchmarks.programs import cpu_load
from pytransformer.cli.convert import parse_size
from pytransformer.cli.inspect import facts
from pytransformer.cli.main import main
from pytransformer.cli.model_folder import find_model
from pytransformer.model.description import cache_bytes, describe
from pytransformer.model.quantized import quantize
from tests.model.configs import CONFIGS, make_model

LLAMA = TransformerConfig.llama(
    vocab_size=67, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seqlen=24
)


@pytest.fixture
def own(tmp_path) -> Path:
    """A model in our own layout, with a tokenizer beside it."""
    save(make_model(LLAMA, 0, torch.device("cpu"), torch.bfloat16), tmp_path / "own")
    (tmp_path / "own" / "tokenizer.json").write_text("{}")
    (tmp_path / "own" / "notes.txt").write_text("mine")
    return tmp_path / "own"


def error_of(capsys, *command: object) -> str:
    """The one line that a wrong command prints."""
    assert main([str(word) for word in command]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and shown.out == ""
    return shown.err


def test_there_and_back_with_the_tokenizers_files(own, tmp_path, capsys):
    public, back = tmp_path / "public", tmp_path / "back"
    assert main(["convert", str(own), str(public), "--to", "llama", "--max-shard-size", "20KB"]) == 0
    assert capsys.readouterr().out == f"{public}\n"
    assert json.loads((public / "config.json").read_text())["model_type"] == "llama"
    assert (public / "tokenizer.json").read_text() == "{}" and not (public / "notes.txt").exists()
    assert len(list(public.glob("model-0000?-of-0000?.safetensors"))) > 1
    assert find_model(public) == public
    assert main(["convert", str(public), str(back), "--to", "pytransformer"]) == 0
    before, after = load_file(own / "model.safetensors"), load_file(back / "model.safetensors")
    assert set(before) == set(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert main(["convert", str(public), str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    wide = load(tmp_path / "wide", device="cpu")
    assert wide.config.family == "llama" and wide.lm_head.weight.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, before["lm_head.weight"].float())
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_what_cannot_be_converted_is_one_line(own, tmp_path, capsys):
    target = tmp_path / "new"
    (tmp_path / "file").write_text("")
    assert "file is a file: give the folder" in error_of(capsys, "inspect", tmp_path / "file")
    assert "no model folder" in error_of(capsys, "convert", tmp_path / "missing", target)
    assert f"{own} holds a model already" in error_of(capsys, "convert", own, own)
    assert "family must be one of pytransformer, " in error_of(capsys, "convert", own, target, "--to", "gpt-17")
    assert "--max-shard-size must be a size" in error_of(capsys, "convert", own, target, "--max-shard-size", "much")
    save(make_model(CONFIGS["gpt2"], 0, torch.device("cpu")), tmp_path / "gpt2")
    message = error_of(capsys, "convert", tmp_path / "gpt2", target, "--to", "llama")
    assert "the family llama cannot express this model: " in message
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 500 * 10**6), ("5gb", 5 * 10**9), ("2GiB", 2 << 30), ("1000", 1000), (" 7 KB ", 7000)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "0GB", "-1GB", "1.5GB", "5PB", "GB"])
def test_what_is_no_size(text):
    if text == "5":
        assert parse_size(text) == 5
        return
    with pytest.raises(ValueError, match="--max-shard-size must be a size as 500MB, 5GB or 2GiB, got "):
        parse_size(text)


@pytest.mark.parametrize("family", ["pytransformer", "llama"])
def test_inspect_says_what_the_model_is(tmp_path, capsys, monkeypatch, family):
    model = make_model(LLAMA, 0, torch.device("cpu"), torch.bfloat16)
    save(model, tmp_path, family=family)
    found = describe(tmp_path)
    assert (found.family, found.model_class) == (family, "LlamaForCausalLM" if family == "llama" else None)
    assert found.parameters == found.active_parameters == model.num_parameters()
    assert found.weight_bytes == 2 * model.num_parameters() and found.dtypes == {"BF16": model.num_parameters()}
    assert found.cache_bytes == 2 * 2 * 2 * 8 * 2 * 24  # layers, k and v, heads, head_dim, bytes, tokens
    assert found.cache_bytes_per_1k * 24 == found.cache_bytes * 1024 and not found.tied
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name, value in facts(found).items():
        assert name in shown and value in shown
    assert f"{model.num_parameters():,}" in shown and "4 of 8, 2 of keys and values" in shown


def test_tied_weights_and_repeated_ones_count_once(tmp_path):
    tied = make_model(TransformerConfig.from_dict({**LLAMA.to_dict(), "tie_embeddings": True}), 0, torch.device("cpu"))
    save(tied, tmp_path, family="llama")
    assert describe(tmp_path).parameters == tied.num_parameters() and describe(tmp_path).tied
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 0}, tmp_path / "model.safetensors")
    found = describe(tmp_path)
    assert found.parameters == tied.num_parameters()
    assert "head and embedding are to be tied and are both there: they stay two if they differ" in found.decisions


@pytest.mark.parametrize(
    ("bits", "said"), [(8, "8 bits, a scale for each row"), (4, "4 bits, a scale for each 32 columns")]
)
def test_codes_count_as_the_weights_they_stand_for(tmp_path, bits, said):
    config = {
        **LLAMA.to_dict(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "attention_bias": True,
        "tie_embeddings": True,
    }
    model = make_model(TransformerConfig.from_dict(config), 0, torch.device("cpu"))
    save(model, tmp_path / "full")
    save(quantize(model, bits, group_size=32), tmp_path / "codes")
    full, codes = describe(tmp_path / "full"), describe(tmp_path / "codes")
    assert codes.parameters == model.num_parameters() == full.parameters + model.lm_head.out_features * 32
    assert (full.tied, codes.tied) == (True, False)  # a head that was tied has codes of its own
    assert (codes.cache_bytes, codes.cache_bytes_per_1k) == (full.cache_bytes, full.cache_bytes_per_1k)
    assert said in facts(codes)["quantisation"] and "quantisation" not in facts(full)


def test_what_a_configuration_leaves_open_is_said(tmp_path):
    save(make_model(LLAMA, 0, torch.device("cpu")), tmp_path, family="llama")
    values = json.loads((tmp_path / "config.json").read_text())
    del values["architectures"], values["tie_word_embeddings"], values["dtype"]
    values |= {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    told = "\n".join(describe(tmp_path).decisions)
    for said in (
        "architectures is absent: taken for LlamaForCausalLM",
        "rope_parameters and rope_theta are there",
        "tie_word_embeddings is absent: taken for False",
        "dtype is absent",
        "eos_token_id [3, 4] of generation_config.json counts",
    ):
        assert said in told


def test_windows_and_encoders_bound_the_cache():
    every = TransformerConfig.llama(vocab_size=8, hidden_size=16, num_layers=4, num_heads=2, max_seqlen=4096)
    windowed = TransformerConfig.from_dict(
        {**every.to_dict(), "sliding_window": 100, "layer_types": ["sliding", "full", "sliding", "sliding"]}
    )
    row = 2 * 2 * 8 * 2
    assert cache_bytes(every, 1024, 2) == row * 4 * 1024
    assert cache_bytes(windowed, 1024, 2) == row * (1024 + 3 * 100)
    assert cache_bytes(windowed, 50, 2) == row * 4 * 50
    encoder = TransformerConfig.bert(vocab_size=8, hidden_size=16, num_layers=1, num_heads=2)
    assert cache_bytes(encoder, 1024, 2) == 0
    pair = TransformerConfig.original(vocab_size=8, hidden_size=16, num_layers=2, num_heads=2)
    assert cache_bytes(pair, 10, 2) == row * 2 * 10 * 2


def test_a_large_checkpoint_is_described_from_its_headers(tmp_path):
    size = cpu_load.make_checkpoint(tmp_path)
    describe(tmp_path)
    start = time.process_time()
    found = describe(tmp_path)
    assert time.process_time() - start < 0.2
    assert found.weight_bytes == size and found.parameters == size // 2 == 6_738_415_616
    assert found.cache_bytes_per_1k == 32 * 2 * 4096 * 2 * 1024
