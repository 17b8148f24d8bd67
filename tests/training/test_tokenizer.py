"""Byte-level BPE: any text survives, bytes are known, and a stream never shows half a character."""

from __future__ import annotations

import functools
import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from pytransformer.text import CharacterStream, stream
from pytransformer.text.files import END_OF_TEXT
from pytransformer.text.stream import byte_alphabet
from pytransformer.training.corpus import pieces
from pytransformer.training.tokenizer import TextTokenizer, _without_long_words

TEXT = "def add(first, second):\n    return first + second\n\n\ndef naïve(x):\n\treturn '日本語 🙂'\n" * 40


@functools.cache
def _trained() -> TextTokenizer:
    return TextTokenizer.train([TEXT], 300)


@pytest.fixture
def tokenizer() -> TextTokenizer:
    return _trained()


def test_training_is_repeatable_and_learns_the_text(tokenizer):
    assert TextTokenizer.train([TEXT], 300).to_json() == tokenizer.to_json()
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 2


def test_the_byte_alphabet_is_a_bijection():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert alphabet["A"] == 65 and alphabet["Ġ"] == 32 and alphabet["Ċ"] == 10


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back(text):
    tokenizer = _trained()
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert "".join(stream(tokenizer, ids)) == text


def test_a_literal_end_token_in_text_is_text(tokenizer):
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.end_token_id not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
    assert tokenizer.decode_bytes([tokenizer.end_token_id]) == b""


def test_encoding_in_pieces_gives_the_same_tokens(tokenizer):
    parts = list(pieces(TEXT, 50))
    assert len(parts) > 5
    assert [token for ids in tokenizer.encode_batch(parts) for token in ids] == tokenizer.encode(TEXT)


def test_the_stream_holds_back_bytes_until_they_are_characters(tokenizer):
    single = {value: token for token, value in enumerate(tokenizer.token_bytes) if len(value) == 1}
    characters = CharacterStream(tokenizer)
    shown = [characters.push(single[bytes([byte])]) for byte in "é🙂x".encode()]
    assert shown == ["", "é", "", "", "", "🙂", "x"]
    assert characters.push(single[b"\xe6"]) == ""
    assert characters.finish() == "\N{REPLACEMENT CHARACTER}"
    assert list(stream(tokenizer, [single[b"a"], single[b"\xe6"]])) == ["a", "\N{REPLACEMENT CHARACTER}"]


def test_labels_make_white_space_visible(tokenizer):
    single = {value: token for token, value in enumerate(tokenizer.token_bytes) if len(value) == 1}
    assert [tokenizer.label(single[byte]) for byte in (b" ", b"\n", b"\t", b"\xe6", b"\x07", b"a")] == [
        "␣", "⏎", "⇥", "\\xe6", "\\x07", "a",
    ]  # fmt: skip
    assert tokenizer.label(tokenizer.end_token_id) == END_OF_TEXT


def test_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = TextTokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT) and loaded.end_token_id == tokenizer.end_token_id


def test_what_is_not_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        TextTokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer file"):
        TextTokenizer.load(tmp_path / "broken.json")
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|> token"):
        TextTokenizer(Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .* but is 256"):
        TextTokenizer.train(["a"], 256)


@pytest.mark.parametrize("characters", ["ab", "a", "12", "-=", " ", "\n ", "漢字", "_"])
def test_a_line_without_spaces_takes_no_minutes(characters):
    """The library needs 200 seconds for 300,000 times the same letter, in one word, and a ninth of that for a third."""
    line = "".join(random.Random(0).choices(characters, k=100_000))
    started = time.process_time()
    tokenizer = TextTokenizer.train([f"before {line} after"], 300)
    assert time.process_time() - started < 7
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_ordinary_text_is_learned_from_as_it_is():
    """Also beside long runs of several kinds of characters, which are many words by themselves."""
    texts = [TEXT, "x" * 1000 + " " * 1000 + "-" * 1000, "ab1+/" * 2000, "word " * 5000, " \t\n" * 333 + "def"]
    assert [list(_without_long_words(text)) for text in texts] == [[text] for text in texts]
    for text in ("a" * 2500, "so " + "ß" * 3001 + "1" * 2000, " " * 1001 + "x" * 1001):
        parts = list(_without_long_words(text))
        assert "".join(parts) == text and len(parts) > 1
        assert all(before[-1] == after[0] for before, after in itertools.pairwise(parts))  # within a word
