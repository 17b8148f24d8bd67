"""``pytransformer quantize`` on a small model: the folder it writes, what it prints, and its errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tokenizers
import torch

from pytransformer import Transformer, TransformerConfig, load, save
from pytransformer.cli.main import main

TEXT = "the quick brown fox jumps over the lazy dog and runs away again " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of words, and two texts beside it."""
    place = tmp_path_factory.mktemp("quantize")
    torch.manual_seed(0)
    words = {word: index for index, word in enumerate(sorted(set(TEXT.split())))}
    config = TransformerConfig.llama(
        vocab_size=len(words) + 1, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_seqlen=24
    )
    save(Transformer(config), place / "model")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({**words, "?": len(words)}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(place / "model" / "tokenizer.json"))
    (place / "text.txt").write_text(TEXT)
    (place / "short.txt").write_text("fox")
    (place / "bytes.txt").write_bytes(b"\xff")
    return place


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_folder_that_loads_and_what_it_cost(method: str, folder: Path, tmp_path: Path, capsys) -> None:
    text, out = folder / "text.txt", tmp_path / "out"
    more = ["--method", "gptq", "--calibration", str(text)] if method == "gptq" else []
    command = [
        "quantize",
        str(folder / "model"),
        "-o",
        str(out),
        "--bits",
        "4",
        "--group-size",
        "32",
        "--text",
        str(text),
    ]
    assert main([*command, *more]) == 0
    shown = capsys.readouterr().out
    before, after = map(float, re.search(r"perplexity +([\d.]+) +-> +([\d.]+)", shown).groups())
    assert before != after and abs(after / before - 1) < 0.1
    model = load(out)
    assert model.config.quantization == "int4-32" and (out / "tokenizer.json").is_file()
    megabytes = float(re.search(r"memory .*-> +([\d.]+) MB", shown)[1])
    assert megabytes == pytest.approx(sum(parameter.nbytes for parameter in model.parameters()) / 1e6, abs=0.01)
    ids = torch.tensor([[1, 2, 3, 4]])
    difference = (model(ids) - load(folder / "model")(ids)).abs().max()
    assert 0 < difference < 0.5
    assert main([*command, *more]) == 2 and "holds a model already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "gptq"], "--calibration FILE and --method gptq go together"),
        (["--calibration", "text.txt"], "--calibration FILE and --method gptq go together"),
        (["--act-order"], "--act-order is for --method gptq"),
        (["--bits", "4", "--group-size", "48"], "group_size must be one of 32, 64, 128, got 48"),
        (["--bits", "4", "--group-size", "64"], "group_size must divide in_features (32), got 64"),
        (["--text", "short.txt"], "--text has 1 tokens, at least 2 are needed"),
        (["--text", "none.txt"], "none.txt"),
        (["--text", "bytes.txt"], "bytes.txt must be UTF-8 text: byte 0 is 0xff"),
        (["--bits", "4", "--group-size", "0"], "group_size must be one of 32, 64, 128, got 0"),
        (["--bits", "8", "--group-size", "64"], "--group-size 64 is for --bits 4"),
    ],
)
def test_errors(options: list[str], message: str, folder: Path, tmp_path: Path, capsys) -> None:
    paths = [str(folder / option) if option.endswith(".txt") else option for option in options]
    assert main(["quantize", str(folder / "model"), "-o", str(tmp_path / "out"), *paths]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_quantised_is_not_quantised_again(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["quantize", str(folder / "model"), "-o", str(tmp_path / "one")]) == 0
    assert main(["quantize", str(tmp_path / "one"), "-o", str(tmp_path / "two")]) == 2
    assert "it is quantised to 'int8'" in capsys.readouterr().err


def test_a_text_needs_a_model_that_predicts_it(folder: Path, tmp_path: Path, capsys) -> None:
    pair = TransformerConfig.original(
        vocab_size=20, hidden_size=32, num_layers=1, num_heads=2, decoder_start_token_id=1
    )
    save(Transformer(pair), tmp_path / "pair")
    command = ["quantize", str(tmp_path / "pair"), "-o", str(tmp_path / "out")]
    assert main([*command, "--text", str(folder / "text.txt")]) == 2
    assert "--text: a text's next tokens are predicted by a decoder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and main(command) == 0
