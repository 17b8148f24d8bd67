"""The files of a tokenizer's folder, in the layout of Hugging Face transformers, old and new."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from .classes import BERT, CLASSES, GENERIC, GPT2, TokenizerClass, class_name

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
_BYTE_BPE_FILES = ("vocab.json", "merges.txt")
_WORDPIECE_FILE = "vocab.txt"
# Every file that one tokenizer consists of, besides further chat templates.
ALL_FILES = (
    TOKENIZER_FILE, SETTINGS_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, TEMPLATE_FILE, *_BYTE_BPE_FILES, _WORDPIECE_FILE,
)  # fmt: skip
_SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model")
_MARIAN = ("source.spm", "target.spm")
_OTHERS = ("tekken.json", "tiktoken.model", "vocab.bpe", "encoder.json")

# How a tokenizer that was trained here is loaded: text is only ever text.
TRAINED_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": END_OF_TEXT,
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Loaded:
    """A folder's tokenizer, in parts.

    Attributes:
        backend: the tokenizer itself.
        settings: tokenizer_config.json, with what special_tokens_map.json and added_tokens.json say.
        templates: chat templates by name; the usual one is "default".
        contents: the bytes of each file, by its path inside the folder.
        defaults: those of its class.
    """

    backend: tokenizers.Tokenizer
    settings: dict[str, Any]
    templates: dict[str, str] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    defaults: TokenizerClass = GENERIC


def read(place: Path) -> Loaded:
    """A folder's tokenizer, or that of one tokenizer.json, whatever lies beside it.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file is damaged, or of a kind that is not read; the message says what can be done.
    """
    if place.is_file():
        content = place.read_bytes()
        backend = _backend(content, place)
        return Loaded(backend, trained_settings(backend), contents={TOKENIZER_FILE: content})
    if not place.is_dir():
        raise FileNotFoundError(f"no tokenizer at {place}")
    names = [
        *ALL_FILES,
        *(f"{TEMPLATE_FOLDER}/{path.name}" for path in sorted((place / TEMPLATE_FOLDER).glob("*.jinja"))),
    ]
    contents = {name: (place / name).read_bytes() for name in names if (place / name).is_file()}
    settings = _json(contents, SETTINGS_FILE, place)
    config_file = place / "config.json"
    config = _json({"config.json": config_file.read_bytes()}, "config.json", place) if config_file.is_file() else {}
    name = class_name(settings, config)
    if TOKENIZER_FILE in contents:
        backend = _backend(contents[TOKENIZER_FILE], place / TOKENIZER_FILE)
        defaults = CLASSES.get(str(name), GENERIC)
        if name == "LlamaTokenizer" and isinstance(backend.decoder, decoders.ByteLevel):
            defaults = GENERIC  # Llama 3's tokenizer, of another kind than the class that some folders name
        if SETTINGS_FILE not in contents:
            settings = trained_settings(backend)
    else:
        backend, defaults = _older(contents, settings, name, place)
    _merge_older(settings, contents, place)
    return Loaded(backend, settings, templates_of(settings, contents), contents, defaults)


def trained_settings(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """:data:`TRAINED_SETTINGS` if the tokenizer is of the form that ``pytransformer train`` writes, otherwise nothing.

    Its folders held nothing but tokenizer.json. No public one has this form: there the end of text is the last token, not the first.
    """
    added = backend.get_added_tokens_decoder()
    is_ours = (
        isinstance(backend.model, models.BPE)
        and isinstance(backend.decoder, decoders.ByteLevel)
        and backend.post_processor is None
        and [(index, token.content) for index, token in added.items()] == [(0, END_OF_TEXT)]
    )
    return dict(TRAINED_SETTINGS) if is_ours else {}


def _backend(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer file: {error}") from error


def _json(contents: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    """What a file holds, empty if there is none."""
    if name not in contents:
        return {}
    try:
        values = json.loads(contents[name].decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / name} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, but holds a {type(values).__name__}")
    return values


def _older(
    contents: Mapping[str, bytes], settings: Mapping[str, Any], name: str | None, folder: Path
) -> tuple[tokenizers.Tokenizer, TokenizerClass]:
    """The tokenizer of a folder without tokenizer.json, built from its vocabulary."""
    has_bpe = all(file in contents for file in _BYTE_BPE_FILES)
    if not has_bpe and _WORDPIECE_FILE not in contents:
        raise (ValueError if (found := _foreign(folder)) else FileNotFoundError)(
            f"no tokenizer at {folder}: {found or 'it has neither tokenizer.json, nor vocab.json and merges.txt, nor vocab.txt'}"
        )
    # A class of no name, or one that says nothing, is the one that the files were made for.
    unnamed = name in (None, "PreTrainedTokenizer", "TokenizersBackend")
    defaults = (GPT2 if has_bpe else BERT) if unnamed else CLASSES.get(str(name), GENERIC)
    fitting = ("byte_bpe", "roberta") if has_bpe else ("wordpiece",)
    if defaults.vocabulary not in fitting:
        files = " and ".join(_BYTE_BPE_FILES) if has_bpe else _WORDPIECE_FILE
        raise ValueError(f"no tokenizer at {folder}: {files} alone do not say how a {name} splits text; {_HOW}")
    try:
        build = _wordpiece if defaults.vocabulary == "wordpiece" else _byte_bpe
        return build(contents, settings, defaults), defaults
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the vocabulary in {folder} is damaged: {error}") from error


_HOW = (
    "make a tokenizer.json of it once, with transformers: "
    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), for which sentencepiece or tiktoken may have to be installed"
)


def _foreign(folder: Path) -> str | None:
    """What of another kind is there, and what to do with it."""
    if found := [name for name in _MARIAN if (folder / name).is_file()]:
        return (
            f"it has {' and '.join(found)}, two vocabularies of SentencePiece, for which tokenizer.json has no form; "
            "encode and decode with transformers' MarianTokenizer, and hand ids to the model"
        )
    if found := [name for name in (*_SENTENCEPIECE, *_OTHERS) if (folder / name).is_file()]:
        return f"it has {' and '.join(found)}, which is not read here; {_HOW}"
    return None


def _byte_bpe(
    contents: Mapping[str, bytes], settings: Mapping[str, Any], defaults: TokenizerClass
) -> tokenizers.Tokenizer:
    vocabulary = json.loads(contents["vocab.json"].decode("utf-8"))
    lines = contents["merges.txt"].decode("utf-8").split("\n")
    merges = []
    for line in lines:
        if line.strip() and not line.startswith("#version"):
            first, second = line.rstrip("\r").split(" ")
            merges.append((first, second))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    prefix_space = bool(settings.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    if defaults.vocabulary == "roberta":
        sep, cls = (content_of(settings.get(key, defaults.tokens[key])) for key in ("sep_token", "cls_token"))
        backend.post_processor = processors.RobertaProcessing(
            (sep, vocabulary[sep]), (cls, vocabulary[cls]), add_prefix_space=prefix_space
        )
        return backend
    bos, eos = (
        content_of(settings.get(f"{name}_token", END_OF_TEXT)) if settings.get(f"add_{name}_token") else None
        for name in ("bos", "eos")
    )
    single, pair = (
        [token for token in (bos and f"{bos}:{kind}", f"${text}:{kind}", eos and f"{eos}:{kind}") if token]
        for text, kind in (("A", 0), ("B", 1))
    )
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, *pair],
        special_tokens=[(token, vocabulary[token]) for token in {bos, eos} if token is not None],
    )
    return backend


def _wordpiece(
    contents: Mapping[str, bytes], settings: Mapping[str, Any], defaults: TokenizerClass
) -> tokenizers.Tokenizer:
    lines = contents[_WORDPIECE_FILE].decode("utf-8").split("\n")
    words = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    vocabulary = {word: index for index, word in enumerate(words)}
    unknown, sep, cls = (
        content_of(settings.get(f"{name}_token", f"[{name.upper()}]")) for name in ("unk", "sep", "cls")
    )
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocabulary, unk_token=unknown))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
        strip_accents=settings.get("strip_accents"),
        lowercase=bool(settings.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, vocabulary[token]) for token in (cls, sep)],
    )
    return backend


def content_of(token: Any) -> str:
    """A token's text; files have it as it is or with its properties."""
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _merge_older(settings: dict[str, Any], contents: Mapping[str, bytes], folder: Path) -> None:
    """Adds what special_tokens_map.json and added_tokens.json say; they are of no account where tokenizer_config.json lists the tokens."""
    if "added_tokens_decoder" in settings:
        return
    settings.update(_json(contents, SPECIAL_TOKENS_FILE, folder))
    added = _json(contents, ADDED_TOKENS_FILE, folder)
    if added:
        special = {content_of(value) for name, value in settings.items() if name.endswith("_token") and value}
        extra = settings.get("additional_special_tokens") or settings.get("extra_special_tokens") or []
        special.update(map(content_of, extra.values() if isinstance(extra, dict) else extra))
        settings["added_tokens_decoder"] = {
            str(index): {"content": token, "special": token in special, "normalized": token not in special}
            for token, index in added.items()
        }


def is_template(name: str) -> bool:
    """Whether a file's path inside the folder is that of a chat template."""
    return name == TEMPLATE_FILE or name.startswith(TEMPLATE_FOLDER)


def templates_of(settings: Mapping[str, Any], contents: Mapping[str, bytes]) -> dict[str, str]:
    """Chat templates by name: files of their own come before those in tokenizer_config.json."""
    files = {
        Path(name).stem if name.startswith(TEMPLATE_FOLDER) else "default": content.decode("utf-8")
        for name, content in contents.items()
        if is_template(name)
    }
    if files:
        return files
    given = settings.get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    return {entry["name"]: entry["template"] for entry in given or ()}
