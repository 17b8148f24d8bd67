"""Token shards: what is in them, when they are reused, when they are made again; and the batches drawn from them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

from pytransformer.training import data as data_module
from pytransformer.training.config import CorpusConfig
from pytransformer.training.data import (
    Batches,
    default_cache,
    example_prompt,
    prepare,
    token_dtype,
    validation_windows,
)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"file {index} says: the cat sat on the mat, number {index}.\n" * 5)
    return folder


def _config(texts, **changes) -> CorpusConfig:
    return CorpusConfig(**{"source": str(texts), "vocab_size": 280, "validation_fraction": 0.2, **changes})


def test_shards_hold_every_file_once_with_its_end(texts, tmp_path):
    prepared = prepare(_config(texts), tmp_path / "cache")
    tokenizer = prepared.tokenizer
    found = []
    for split in (prepared.train, prepared.validation):
        ends = np.flatnonzero(split.tokens == tokenizer.end_token_id)
        assert len(ends) == split.documents and ends[-1] == len(split.tokens) - 1
        found += [
            tokenizer.decode(part[part != tokenizer.end_token_id]) for part in np.split(split.tokens, ends[:-1] + 1)
        ]
        assert split.tokens.dtype == np.uint16 and isinstance(split.tokens, np.memmap)
    assert sorted(found) == sorted(path.read_text() for path in texts.iterdir())
    assert prepared.validation.documents >= 1


def test_the_same_sources_are_prepared_once(texts, tmp_path):
    messages: list[str] = []
    first = prepare(_config(texts), tmp_path / "cache", messages.append)
    written = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    second = prepare(_config(texts), tmp_path / "cache", messages.append)
    assert {path: path.stat().st_mtime_ns for path in second.folder.iterdir()} == written
    assert [message.split()[0] for message in messages] == ["preparing", "learned", "reusing"]
    assert first.data_hash == second.data_hash


@pytest.mark.parametrize("change", ["content", "name", "removed", "added", "vocabulary"])
def test_a_change_prepares_again(texts, tmp_path, change):
    first = prepare(_config(texts), tmp_path / "cache")
    config = _config(texts, vocab_size=290) if change == "vocabulary" else _config(texts)
    if change == "content":  # same size and time as before
        path, stat = texts / "3.txt", (texts / "3.txt").stat()
        path.write_text(path.read_text().replace("cat", "dog"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "name":
        (texts / "3.txt").rename(texts / "33.txt")
    elif change == "removed":
        (texts / "3.txt").unlink()
    elif change == "added":
        (texts / "new.txt").write_text("something new")
    messages: list[str] = []
    second = prepare(config, tmp_path / "cache", messages.append)
    assert messages[0].startswith("preparing") and second.folder != first.folder


@pytest.mark.parametrize("damage", ["cut", "no header", "header of another", "header is no json", "no tokenizer"])
def test_damaged_shards_are_made_again(texts, tmp_path, damage):
    first = prepare(_config(texts), tmp_path / "cache")
    tokens = np.array(first.train.tokens)
    header = first.folder / "data.json"
    if damage == "cut":
        os.truncate(first.folder / "train.bin", 10)
    elif damage == "no header":
        header.unlink()
    elif damage == "header of another":
        header.write_text(json.dumps({**json.loads(header.read_text()), "key": "other"}))
    elif damage == "header is no json":
        header.write_text('{"key": ')
    else:
        (first.folder / "tokenizer.json").unlink()
    second = prepare(_config(texts), tmp_path / "cache")
    assert np.array_equal(second.train.tokens, tokens)
    assert not list((tmp_path / "cache" / "corpora").glob(".*"))


def test_a_failed_preparation_leaves_nothing(texts, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(data_module, "_write", fail)
    with pytest.raises(OSError, match="no space left"):
        prepare(_config(texts), tmp_path / "cache")
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


def test_unreadable_results_are_reported(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "_open", lambda folder, key: None)
    with pytest.raises(OSError, match="cannot be read back: is the disk full"):
        prepare(_config(texts), tmp_path / "cache")


def test_bad_bytes_are_refused_or_skipped(texts, tmp_path):
    (texts / "bad.txt").write_bytes(b"good text \xff bad")
    with pytest.raises(ValueError, match=r"bad.txt: byte 0xff at offset 10 is not UTF-8 .*--bad-bytes skip"):
        prepare(_config(texts), tmp_path / "cache")
    messages: list[str] = []
    prepared = prepare(_config(texts, bad_bytes="skip"), tmp_path / "cache", messages.append)
    assert "bad.txt: byte 0xff at offset 10" in messages[0] and messages[0].startswith("skipped")
    assert prepared.train.documents + prepared.validation.documents == 12


def test_one_file_is_split_at_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("once upon a time there was a file. " * 50)
    prepared = prepare(_config(path), tmp_path / "cache")
    both = np.concatenate([prepared.train.tokens, prepared.validation.tokens])
    assert prepared.tokenizer.decode(both) == path.read_text()
    assert len(prepared.validation.tokens) == round(len(both) * 0.2)
    assert prepare(_config(path, validation_fraction=0.3), tmp_path / "cache").folder != prepared.folder


@pytest.mark.parametrize("sizes", [(50, 50), (10, 200), (200, 100), (100, 100, 100), (1000, *[3] * 30)])
def test_a_few_files_are_split_inside_as_asked(tmp_path, sizes):
    """One whole file of two was the validation side: ten times what was asked for, without a word."""
    folder = tmp_path / "few"
    folder.mkdir()
    texts = [
        f"file {index}: " + "the cat sat on the mat and looked around. " * size for index, size in enumerate(sizes)
    ]
    for index, text in enumerate(texts):
        (folder / f"{index:02d}.txt").write_text(text)
    messages: list[str] = []
    prepared = prepare(_config(folder, validation_fraction=0.05), tmp_path / "cache", messages.append)
    train, validation = prepared.train.tokens, prepared.validation.tokens
    assert len(validation) == pytest.approx(0.05 * (len(train) + len(validation)), abs=len(sizes) + 1)
    assert "of the text the validation side, 5.0% were asked for: so the end of each" in messages[0]
    # Nothing is lost or told twice: the heads in order, each with its end, then the tails.
    end = prepared.tokenizer.end_token_id
    heads, tails = (
        [prepared.tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == end) + 1)][:-1]
        for tokens in (train, validation)
    )
    assert len(heads) == len(sizes) == prepared.train.documents and len(tails) == prepared.validation.documents
    for head, text in zip(heads, texts):
        assert text == head or any(text == head + tail for tail in tails)
    assert prepare(_config(folder, validation_fraction=0.1), tmp_path / "cache").folder != prepared.folder


def test_files_enough_to_choose_from_stay_whole(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(200):
        (folder / f"{index}.txt").write_text("a file like any other\n" * 5)
    messages: list[str] = []
    prepared = prepare(_config(folder, validation_fraction=0.1), tmp_path / "cache", messages.append)
    assert messages[0].startswith("preparing")
    assert prepared.train.documents + prepared.validation.documents == 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('\n\n  # "" \n"quoted"\nOnce upon a time there was a king.\nnext\n', "Once upon a time"),
        ("Es war einmal ein Müller, der hatte drei Söhne\n", "Es war einmal ein"),
        ("从前有一个国王,他有三个儿子。" * 5 + "\n", "从前有一个国王,他有三个儿子。从前有一个国王,他"),
        ("x" * 400 + "\n", "x" * 24),
        ('""\n' * 20, None),
        ("rm $(ls)\x1b[2J\nclean words here\n", "clean words here"),
    ],
)
def test_the_example_prompt_is_of_the_text(tmp_path, text, expected):
    path = tmp_path / "one.txt"
    path.write_text(text * 50)
    prepared = prepare(_config(path, vocab_size=400), tmp_path / "cache")
    assert example_prompt(prepared, 200) == expected
    if expected is not None:
        short = example_prompt(prepared, 3)
        assert expected.startswith(short) and len(prepared.tokenizer.encode(short)) <= 3


def test_no_text_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").write_text("")
    with pytest.raises(ValueError, match="no text to train on"):
        prepare(_config(tmp_path / "empty"), tmp_path / "cache")


def test_large_vocabularies_have_wider_tokens():
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == np.uint32


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTRANSFORMER_CACHE", str(tmp_path / "mine"))
    assert default_cache() == tmp_path / "mine"
    monkeypatch.delenv("PYTRANSFORMER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache() == tmp_path / "xdg" / "pytransformer"


TOKENS = np.arange(1000, dtype=np.uint16)


def test_targets_are_the_inputs_shifted_by_one():
    inputs, targets = Batches(TOKENS, batch_size=4, context_length=16, seed=0)(0)
    assert inputs.shape == targets.shape == (4, 16) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_an_epoch_sees_every_window_once_and_the_next_differs():
    batches = Batches(TOKENS, batch_size=2, context_length=16, seed=0)
    assert batches.num_windows == 62
    epochs = [torch.cat([batches(step)[0][:, 0] for step in range(start, start + 31)]) for start in (0, 31)]
    for starts in epochs:
        gaps = starts.sort().values.diff()
        assert torch.equal(gaps, torch.full((61,), 16))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_batch_is_a_function_of_seed_and_step():
    batches = Batches(TOKENS, 3, 16, seed=7)
    forwards = [batches(step)[0] for step in range(50)]
    again = Batches(TOKENS, 3, 16, seed=7)
    for step in reversed(range(50)):
        assert torch.equal(again(step)[0], forwards[step])
    assert not torch.equal(Batches(TOKENS, 3, 16, seed=8)(0)[0], forwards[0])


def test_too_little_text_for_the_context():
    assert Batches(TOKENS[:17], 1, 16, seed=0).num_windows == 1
    with pytest.raises(ValueError, match="training text has 16 tokens: a context length of 16 needs at least 17"):
        Batches(TOKENS[:16], 1, 16, seed=0)
    with pytest.raises(ValueError, match=r"validation text has 16 tokens.*use a shorter context"):
        validation_windows(TOKENS[:16], 16, 100, 1)


def test_validation_windows_are_spread_and_limited():
    windows = validation_windows(TOKENS, context_length=10, max_tokens=205, batch_size=8)
    starts = torch.cat([inputs[:, 0] for inputs, _ in windows])
    assert [len(inputs) for inputs, _ in windows] == [8, 8, 4]
    assert starts[0] == 0 and starts[-1] > 900 and starts.diff().min() >= 10
    everything = validation_windows(TOKENS, 10, 10**9, 1000)
    assert torch.equal(everything[0][0].flatten(), torch.arange(990))
    assert len(validation_windows(TOKENS, 10, 1, 1)) == 1
