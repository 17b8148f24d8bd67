"""Byte-level BPE: any text to token ids and back, without an unknown token.

The work is done by Hugging Face's ``tokenizers``; here is what training and generation need around it: a fixed set-up, the
bytes behind each id, and a stream that turns ids into whole characters.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pytransformer.training.config import MIN_VOCAB_SIZE

END_OF_TEXT = "<|endoftext|>"
_LONGEST_WORD = 1000
# Runs of one kind of character, which byte-level BPE takes for one word: letters, digits, white space, all the rest.
_KINDS = (r"[^\W\d_]", r"\d", r"\s", r"(?:[^\w\s]|_)")
_MAY_BE_LONG = re.compile(rf"\S{{{_LONGEST_WORD + 1}}}|\s{{{_LONGEST_WORD + 1}}}")  # five times as fast to look for
_LONG_WORD = re.compile("|".join(f"(?<!{kind}){kind}{{{_LONGEST_WORD + 1},}}" for kind in _KINDS))


def byte_alphabet() -> dict[str, int]:
    """The printable stand-in character of each byte, as byte-level BPE files use it (GPT-2's ``bytes_to_unicode``, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


class TextTokenizer:
    """A byte-level BPE tokenizer with an end-of-text token.

    Text is only ever text: a literal ``<|endoftext|>`` in a document or prompt is encoded like any other characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        end_token_id = tokenizer.token_to_id(END_OF_TEXT)
        if end_token_id is None:
            raise ValueError(f"the tokenizer has no {END_OF_TEXT} token, which separates documents")
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.end_token_id: int = end_token_id
        self.vocab_size: int = tokenizer.get_vocab_size()

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
        tokenizer = Tokenizer(models.BPE())
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
    def load(cls, path: str | Path) -> TextTokenizer:
        """Raises FileNotFoundError if there is no file, and ValueError if it isn't a tokenizer of this kind."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}") from error
        return cls(tokenizer)

    def to_json(self) -> str:
        text: str = self._tokenizer.to_str(pretty=True)
        return text

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes of every id; none for the end-of-text token."""
        alphabet = byte_alphabet()
        table = []
        for token_id in range(self.vocab_size):
            token = self._tokenizer.id_to_token(token_id) or ""
            if token_id == self.end_token_id:
                table.append(b"")
            else:
                table.append(bytes(alphabet[character] for character in token))
        return table

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.token_bytes[token_id] for token_id in ids)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def label(self, token_id: int) -> str:
        """One token as a short visible label: white space and unprintable bytes are written out."""
        if token_id == self.end_token_id:
            return END_OF_TEXT
        text = self.token_bytes[token_id].decode("utf-8", errors="backslashreplace")
        text = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", "␣")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _without_long_words(text: str) -> Iterator[str]:
    """``text`` in parts, cut inside words that are too long and nowhere else."""
    start = 0
    for word in _LONG_WORD.finditer(text) if _MAY_BE_LONG.search(text) else ():
        for place in range(word.start() + _LONGEST_WORD, word.end(), _LONGEST_WORD):
            yield text[start:place]
            start = place
    yield text[start:]


class CharacterStream:
    """Turns tokens into text as they come, holding back bytes until they form whole characters."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, perhaps none."""
        return self._decoder.decode(self._token_bytes[token_id])

    def finish(self) -> str:
        """What is left when no token follows: the replacement character if bytes are still waiting."""
        return self._decoder.decode(b"", final=True)


def stream(tokenizer: TextTokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Non-empty pieces of text as ``ids`` arrive."""
    characters = CharacterStream(tokenizer)
    for token_id in ids:
        if text := characters.push(token_id):
            yield text
    if text := characters.finish():
        yield text
