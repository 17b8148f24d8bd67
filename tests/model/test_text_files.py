"""Tokenizers in folders: older layouts, writing back, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import transformers
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from pytransformer.text import Tokenizer
from pytransformer.text.files import END_OF_TEXT
from pytransformer.training.tokenizer import TextTokenizer

from .text_folders import KINDS, TEXTS, byte_bpe, byte_fallback, unigram, word_piece, write


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _vocabulary(folder: Path, *, more: tuple[str, ...]) -> None:
    """vocab.json and merges.txt as GPT-2 and RoBERTa have them, with further tokens at the end."""
    model = json.loads(byte_bpe().to_str())["model"]
    vocabulary = {**model["vocab"], **{token: len(model["vocab"]) + index for index, token in enumerate(more)}}
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def _bert_vocabulary(folder: Path) -> None:
    words = sorted((vocabulary := word_piece().get_vocab()), key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def _agree(ours: Tokenizer, theirs: PreTrainedTokenizerFast) -> None:
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
    pair = ("the cat", "on the mat")
    expected = theirs(*pair)
    assert dict(ours(*pair)) == {name: expected[name] for name in ours.model_input_names}
    assert ours.special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize(
    "settings", [{}, {"add_bos_token": True, "add_prefix_space": True}, {"pad_token": "<pad>"}], ids=str
)
def test_the_vocabulary_of_gpt2(tmp_path, settings):
    _vocabulary(tmp_path, more=(END_OF_TEXT,))
    if settings:
        _write_json(tmp_path / "tokenizer_config.json", settings)
    _agree(Tokenizer.load(tmp_path), GPT2Tokenizer.from_pretrained(tmp_path))
    Tokenizer.load(tmp_path).save(tmp_path / "copy")
    for file in tmp_path.glob("*.*"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("named_by", ["tokenizer_config.json", "config.json"])
def test_the_vocabulary_of_roberta(tmp_path, named_by):
    _vocabulary(tmp_path, more=("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    names = {
        "tokenizer_config.json": {"tokenizer_class": "RobertaTokenizerFast"},
        "config.json": {"model_type": "roberta"},
    }
    _write_json(tmp_path / named_by, names[named_by])
    _agree(Tokenizer.load(tmp_path), RobertaTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False}],
    ids=str,
)
def test_the_vocabulary_of_bert(tmp_path, settings):
    _bert_vocabulary(tmp_path)
    if settings:
        _write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", **settings})
    ours = Tokenizer.load(tmp_path)
    assert "token_type_ids" in ours("a")
    _agree(ours, BertTokenizer.from_pretrained(tmp_path))
    _write_json(tmp_path / "config.json", {"model_type": "distilbert"})
    if not settings:
        assert "token_type_ids" not in Tokenizer.load(tmp_path)("a")


def _of_class(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer made by a class of transformers, with rules of its own."""
    if name in ("BertTokenizer", "DistilBertTokenizer"):
        return getattr(transformers, name)(vocab=word_piece().get_vocab())
    if name == "T5Tokenizer":
        return transformers.T5Tokenizer(
            vocab=[tuple(entry) for entry in json.loads(unigram().to_str())["model"]["vocab"]], extra_ids=3
        )
    ends = {"LlamaTokenizer": (), "GemmaTokenizer": ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")}
    model = json.loads((byte_fallback if name in ends else byte_bpe)().to_str())["model"]
    last = ("<s>", "<pad>", "</s>", "<unk>", "<mask>") if name == "RobertaTokenizer" else (END_OF_TEXT, "<|padding|>")
    words = dict.fromkeys([*ends.get(name, ()), *model["vocab"], *(() if name in ends else last)])
    vocabulary = {word: index for index, word in enumerate(words)}
    return getattr(transformers, name)(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]])


@pytest.mark.parametrize(
    "name",
    [
        "BertTokenizer", "DistilBertTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "RobertaTokenizer", "LlamaTokenizer", "GemmaTokenizer",
        "Qwen2Tokenizer", "T5Tokenizer",
    ],
)  # fmt: skip
def test_classes_of_transformers(tmp_path, name):
    """What they write is read, and what they imply is known where tokenizer_config.json names nothing but the class."""
    _of_class(name).save_pretrained(tmp_path)
    named = json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
    for settings in (None, {"tokenizer_class": named}):
        if settings is not None:
            _write_json(tmp_path / "tokenizer_config.json", settings)
        ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert type(theirs).__name__ == named
        assert (ours.padding_side, list(ours.model_input_names)) == (theirs.padding_side, theirs.model_input_names)
        _agree(ours, theirs)


def test_a_class_of_another_kind_than_the_file(tmp_path):
    """As folders of Llama 3 name Llama 2's: whose padding is on the left, and whose special tokens are not there."""
    _write_json(write("byte BPE", tmp_path) / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"})
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.padding_side == theirs.padding_side == "right"
    _agree(ours, theirs)


def test_special_tokens_in_files_of_their_own(tmp_path):
    """As folders had them before tokenizer_config.json listed all tokens."""
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
    tokens = {
        "eos_token": {**mask, "content": "<|im_end|>", "lstrip": False},
        "mask_token": mask,
        "additional_special_tokens": ["<|extra|>"],
    }
    _write_json(tmp_path / "special_tokens_map.json", tokens)
    _write_json(tmp_path / "added_tokens.json", {"<word>": 326, "<|extra|>": 325, "<mask>": 324})
    _write_json(
        tmp_path / "tokenizer_config.json",
        {"eos_token": "<|endoftext|>", "image_token": "<|im_start|>", "bos_token": None},
    )
    ours, theirs = Tokenizer.load(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab() and ours.eos_token == "<|im_end|>"
    assert ours.special_tokens["image_token"] == theirs.image_token
    _agree(ours, theirs)
    for text in ("a <mask> b", "x<|extra|> <word>", "<|im_start|>"):
        assert ours.encode(text) == theirs.encode(text)
    ours.eos_token = "<|endoftext|>"
    ours.save(tmp_path / "changed")
    assert Tokenizer.load(tmp_path / "changed").eos_token == "<|endoftext|>"
    assert AutoTokenizer.from_pretrained(tmp_path / "changed").eos_token == "<|endoftext|>"


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_written_back_as_they_were(tmp_path, kind):
    folder = write(kind, tmp_path / "loaded")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}\r\n", newline="")
    ours = Tokenizer.load(folder)
    ours(TEXTS, padding=True, max_length=6, truncation=True)
    ours.save(tmp_path / "saved")
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == names
    for name in names:
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    ours.pad_token, ours.padding_side, ours.model_max_length = ours.eos_token or ours.sep_token, "left", 7
    ours.save(tmp_path / "saved")
    for again in (Tokenizer.load(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert (again.pad_token, again.padding_side, again.model_max_length) == (ours.pad_token, "left", 7)
        assert again.encode(TEXTS[5]) == ours.encode(TEXTS[5])


def test_a_tokenizer_of_ones_own_is_loaded_by_transformers(tmp_path):
    ours = Tokenizer(byte_bpe(), {"eos_token": "<|im_end|>", "pad_token": "<|new|>", "chat_template": "{{ messages }}"})
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == ours.pad_token_id == len(ours) - 1 and theirs.chat_template == "{{ messages }}"
    _agree(ours, theirs)


def test_lengths_in_a_tokenizer_file_are_not_used(tmp_path):
    backend = byte_bpe()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("a b c d e f g h i j k l m")) > 9


def test_a_trained_folder_and_a_public_one_are_told_apart(tmp_path):
    trained = TextTokenizer.train(["some text " * 9], 300)
    trained.save(tmp_path / "tokenizer.json")
    for ours in (Tokenizer.load(tmp_path), Tokenizer.load(tmp_path / "tokenizer.json"), TextTokenizer.load(tmp_path)):
        assert ours.encode(f"some{END_OF_TEXT}") == trained.encode(f"some{END_OF_TEXT}")
        assert ours.eos_token_id == trained.end_token_id and trained.end_token_id not in ours.encode(END_OF_TEXT)
        ids = ours.encode(TEXTS[9])
        assert ours.decode_bytes(ids) == TEXTS[9].encode()
    assert TextTokenizer.load(tmp_path).decode([trained.end_token_id]) == ""
    trained.save(tmp_path / "public")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "public")
    assert theirs.eos_token == END_OF_TEXT and theirs.encode(f"some{END_OF_TEXT}") == trained.encode(
        f"some{END_OF_TEXT}"
    )
    byte_bpe().save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode(END_OF_TEXT)) == 1


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ((), FileNotFoundError, "no tokenizer at .*neither tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt"),
        (("vocab.json",), FileNotFoundError, "neither tokenizer.json"),
        (("spiece.model",), ValueError, r"it has spiece\.model, .*save_pretrained\(FOLDER\)"),
        (("tokenizer.model", "tokenizer_config.json"), ValueError, r"it has tokenizer\.model, .*AutoTokenizer"),
        (("source.spm", "target.spm", "vocab.json"), ValueError, r"source\.spm and target\.spm.*MarianTokenizer"),
        (("tokenizer.json",), ValueError, r"tokenizer\.json is not a tokenizer file"),
        (("vocab.json", "merges.txt"), ValueError, "the vocabulary in .* is damaged"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, names, error, message):
    for name in names:
        (tmp_path / name).write_text("{}" if name != "merges.txt" else "a b c\n")
    with pytest.raises(error, match=message):
        Tokenizer.load(tmp_path)


def test_other_mistakes_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*missing"):
        Tokenizer.load(tmp_path / "missing")
    _vocabulary(tmp_path, more=())
    _write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(
        ValueError, match=r"vocab\.json and merges\.txt alone do not say how a Qwen2Tokenizer splits text"
    ):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object, but holds a list"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is no JSON"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match='padding_side must be "right" or "left", got \'up\''):
        Tokenizer(byte_bpe(), {"padding_side": "up"})
    with pytest.raises(FileExistsError, match=r"holds files of another tokenizer: vocab\.json, merges\.txt"):
        Tokenizer(byte_bpe(), {"padding_side": "left"}).save(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_page_about_tokenizers_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs/tokenizers.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "docs/tokenizers.md", "exec"), names)
    assert names["text"] == "The capital of France is" and names["answer"] == " Paris. 🙂"
    assert names["prompt"] == f"[user] Hello{END_OF_TEXT}"
