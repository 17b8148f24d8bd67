"""Byte-level BPE trained on one's own text: any text to token ids and back, without an unknown token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from pytransformer.text import Tokenizer
from pytransformer.text.files import END_OF_TEXT, TRAINED_SETTINGS
from pytransformer.training.config import MIN_VOCAB_SIZE

if TYPE_CHECKING:
    from typing_extensions import Self

_LONGEST_WORD = 1000
# Runs of one kind of character, which byte-level BPE takes for one word: letters, digits, white space, all the rest.
_KINDS = (r"[^\W\d_]", r"\d", r"\s", r"(?:[^\w\s]|_)")
_MAY_BE_LONG = re.compile(rf"\S{{{_LONGEST_WORD + 1}}}|\s{{{_LONGEST_WORD + 1}}}")  # five times as fast to look for
_LONG_WORD = re.compile("|".join(f"(?<!{kind}){kind}{{{_LONGEST_WORD + 1},}}" for kind in _KINDS))


class TextTokenizer(Tokenizer):
    """A byte-level BPE tokenizer with an end-of-text token, and a way to train it.

    Text is only ever text: a literal ``<|endoftext|>`` in a document or prompt is encoded like any other characters, and the token itself
    is no part of what :meth:`decode` gives.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any] | None = None, **parts: Any) -> None:
        end_token_id = backend.token_to_id(END_OF_TEXT)
        if end_token_id is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT} token, which separates documents")
        super().__init__(backend, {**(settings or {}), **TRAINED_SETTINGS}, **parts)
        self.end_token_id: int = end_token_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> TextTokenizer:
        """Learns at most ``vocab_size`` tokens (fewer if the text has no more pairs to merge), the same on every run.

        A word of more than a thousand characters (a line without a space) counts as several words of that length.

        Raises:
            ValueError: ``vocab_size`` is below 257.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be at least {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}), but is {vocab_size}"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        # The library takes time in the square of a word's length: minutes for one of 300,000 letters.
        tokenizer.train_from_iterator((part for text in texts for part in _without_long_words(text)), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Raises FileNotFoundError if there is no file or folder, and ValueError if it isn't a tokenizer of this kind."""
        return super().load(folder)

    def decode(
        self, ids: Any, skip_special_tokens: bool = True, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """The text of token ids, by default without the end-of-text token."""
        return super().decode(ids, skip_special_tokens, clean_up_tokenization_spaces)


def _without_long_words(text: str) -> Iterator[str]:
    """``text`` in parts, cut inside words that are too long and nowhere else."""
    start = 0
    for word in _LONG_WORD.finditer(text) if _MAY_BE_LONG.search(text) else ():
        for place in range(word.start() + _LONGEST_WORD, word.end(), _LONGEST_WORD):
            yield text[start:place]
            start = place
    yield text[start:]
