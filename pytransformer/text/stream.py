"""Token by token: the bytes behind an id, a visible label, and a stream of whole characters."""

from __future__ import annotations

import codecs
import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@cache
def byte_alphabet() -> dict[str, int]:
    """The printable stand-in character of each byte, as byte-level BPE files use it (GPT-2's ``bytes_to_unicode``, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return alphabet


def bytes_of(token: str) -> bytes:
    """The bytes that a token of a byte-level BPE stands for. One that is not in the alphabet, as added ones can be, is its own text."""
    alphabet = byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode("utf-8")


def visible(text: str) -> str:
    """White space and unprintable characters written out."""
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍").replace(" ", "␣")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def label(token: str, byte_level: bool) -> str:
    """A token that is no special one as a short visible label: words start with ␣, or without a mark where ``##`` goes on with one."""
    if byte_level:
        return visible(bytes_of(token).decode("utf-8", errors="backslashreplace"))
    if byte := _BYTE_TOKEN.fullmatch(token):
        return visible(bytes([int(byte[1], 16)]).decode("utf-8", errors="backslashreplace"))
    return visible(token.replace("▁", " "))


class CharacterStream:
    """Turns tokens into text as they come, holding back what does not form whole characters yet.

    All pieces together are ``tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)`` if that holds no
    broken characters.

    Args:
        tokenizer: of any kind.
        context: ids of the text before, such as the prompt's, which are not shown. They decide whether the first word gets a space, where
            spaces belong to words or are put between them (all but byte-level BPE).
        skip_special_tokens: special tokens are not shown.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace") if tokenizer.is_byte_level else None
        # Decoded are the tokens that were shown last, which decide how the next ones are written, and those that wait. They begin where a
        # character does: of broken bytes some decoders give up whole runs.
        self._ids = [token for token in context if token not in self._skipped]
        self._num_shown = len(self._ids)
        self._shown = self._text()

    def fork(self) -> CharacterStream:
        """Another one that goes on from here."""
        other = copy.copy(self)
        other._decoder, other._ids = copy.copy(self._decoder), list(self._ids)
        return other

    def _text(self) -> str:
        if self._decoder is not None:
            return ""
        text: str = self._tokenizer.decode(self._ids, clean_up_tokenization_spaces=False)
        return text

    def push(self, token_id: int) -> str:
        """The characters that this token completes, perhaps none."""
        if token_id in self._skipped:
            return ""
        if self._decoder is not None:
            token = self._tokenizer.token(token_id)
            return "" if token is None else self._decoder.decode(bytes_of(token))
        self._ids.append(token_id)
        text = self._text()
        return "" if text.endswith(_UNFINISHED) else self._advance(text)

    def finish(self) -> str:
        """What is left when no token follows: the replacement character if bytes are still waiting."""
        return self._decoder.decode(b"", final=True) if self._decoder is not None else self._advance(self._text())

    def _advance(self, text: str) -> str:
        """What of ``text``, that of all tokens which are kept, is new."""
        waiting = self._ids[self._num_shown :]
        if text.startswith(self._shown):
            new = text[len(self._shown) :]
        else:  # broken bytes took the whole ones before them along
            new = self._tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        self._ids = waiting
        self._num_shown = len(self._ids)
        self._shown = self._text()
        return new


def stream(tokenizer: Tokenizer, ids: Iterable[int], context: Sequence[int] = ()) -> Iterator[str]:
    """Non-empty pieces of text as ``ids`` arrive; see :class:`CharacterStream`."""
    characters = CharacterStream(tokenizer, context)
    for token_id in ids:
        if text := characters.push(token_id):
            yield text
    if text := characters.finish():
        yield text
