"""What a checkpoint's ``generation_config.json`` says: how its authors mean it to be generated with.

Field names are those of the file, which is Hugging Face transformers'. ``None`` is what the file does not say.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_NAME = "generation_config.json"
# Fields of several ids, of which a file may name one without a list.
_IDS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
_ONE_ID = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
_COUNTS = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k", "no_repeat_ngram_size",
)  # fmt: skip
_SHARES = ("top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of generation.

    Args:
        eos_token_id: tokens that end a text; empty if the file has none.
        bos_token_id, pad_token_id: special tokens.
        decoder_start_token_id: what a decoder with an encoder starts with.
        forced_bos_token_id: the first token after it.
        forced_eos_token_id: what the last token must be when ``max_length`` is reached; one of several.
        do_sample: draw, rather than take the most probable token.
        temperature, top_k, top_p, min_p, typical_p: of drawing; a ``top_k`` of 0 cuts nothing.
        repetition_penalty: of tokens that were there before; 1 = none.
        no_repeat_ngram_size: so many tokens in a row never come twice; 0 = they may.
        num_beams, length_penalty, early_stopping, num_return_sequences: of beam search. The sum of log-probabilities is divided by
            length ** length_penalty; ``early_stopping`` is a bool or "never".
        max_length, min_length: tokens, those of the prompt included; ``max_new_tokens``, ``min_new_tokens``: without them.
        suppress_tokens, begin_suppress_tokens: tokens that never come, or not first.
        bad_words_ids: sequences of tokens that never come.
        others: all further fields, as they are in the file, to be written back.

    Raises:
        TypeError, ValueError: a field of the wrong type or out of range; the message names it.
    """

    eos_token_id: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_return_sequences: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _IDS:
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        words = tuple(_ids("bad_words_ids", word) for word in self.bad_words_ids or ())
        object.__setattr__(self, "bad_words_ids", words)
        for name in (*_ONE_ID, *_COUNTS):
            value = getattr(self, name)
            if value is not None and (not _is_whole(value) or value < 0):
                _refuse(name, "a whole number of at least 0 or None", value)
        for name in ("do_sample", "early_stopping"):
            value = getattr(self, name)
            if value not in (None, True, False, *(("never",) if name == "early_stopping" else ())) or _is_whole(value):
                _refuse(name, "true, false or None", value)
        for name in ("temperature", "repetition_penalty", "length_penalty", *_SHARES):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
                _refuse(name, "a number or None", value)
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature!r}")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationDefaults:
        """Of the file's fields."""
        if not isinstance(values, Mapping):
            raise TypeError(f"{FILE_NAME} must hold a JSON object, got {type(values).__name__}")
        names = {entry.name for entry in dataclasses.fields(cls)} - {"others"}
        given = {name: value for name, value in values.items() if name in names and value is not None}
        return cls(**given, others={name: value for name, value in values.items() if name not in names})

    def to_dict(self) -> dict[str, Any]:
        """The file's fields, without those that say nothing. A single id is written without a list where transformers does so."""
        values: dict[str, Any] = dict(self.others)
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "others" or value is None or value == ():
                continue
            if entry.name in ("eos_token_id", "forced_eos_token_id") and len(value) == 1:
                value = value[0]
            if isinstance(value, tuple):
                value = [list(item) if isinstance(item, tuple) else item for item in value]
            values[entry.name] = value
        return values

    @classmethod
    def load(cls, folder: str | Path) -> GenerationDefaults:
        """Of a checkpoint's folder; of one without the file nothing is said.

        Raises:
            ValueError: the file is damaged, or a field is wrong.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            return cls()
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes the file into a folder, which must be there."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (Path(folder) / FILE_NAME).write_text(text, encoding="utf-8")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Ids as a tuple; a file may have a number, a list or nothing."""
    ids = () if value is None else (value,) if _is_whole(value) else value
    if not isinstance(ids, (tuple, list)) or not all(_is_whole(token) and token >= 0 for token in ids):
        _refuse(name, "token ids", value)
    return tuple(ids)


def _refuse(name: str, allowed: str, value: Any) -> None:
    raise TypeError(f"{name} must be {allowed}, got {value!r}")
