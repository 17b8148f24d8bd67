"""Stop strings and stop tokens, and the new text of a sequence as it grows."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pytransformer.model.config import TransformerConfig

from .prompts import is_int

if TYPE_CHECKING:
    from pytransformer.text import Tokenizer


def stop_conditions(
    stop: Any, tokenizer: Tokenizer | None, config: TransformerConfig
) -> tuple[frozenset[int], tuple[str, ...]]:
    """Stop tokens and stop strings. A string that is a special token is that token: it is no part of the text.

    Raises:
        TypeError, ValueError: as :func:`pytransformer.generation.generate` says.
    """
    if tokenizer is not None:
        # Not imported before there is one: the library behind it need not be there.
        from pytransformer.text import Tokenizer

        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer must be a pytransformer.text.Tokenizer or None, got {type(tokenizer).__name__}")
    given: list[Any]
    if stop is None:
        given = []
    elif isinstance(stop, str) or is_int(stop) or not isinstance(stop, Iterable):
        given = [stop]
    else:
        given = list(stop)
    tokens: set[int] = set()
    strings: list[str] = []
    special = {}
    if tokenizer is not None:
        special = {tokenizer.token(token): token for token in tokenizer.special_ids}
    for item in given:
        if is_int(item):
            if not 0 <= item < config.vocab_size:
                raise ValueError(f"stop has token id {item}, allowed are 0 to {config.vocab_size - 1}")
            tokens.add(int(item))
        elif not isinstance(item, str):
            raise TypeError(f"stop must be a string, a token id, or several of them, got {item!r}")
        elif not item:
            raise ValueError("stop has an empty string, which would stop everything")
        elif tokenizer is None:
            raise ValueError(f"stop has the string {item!r}, which needs tokenizer= to be found in the text")
        elif item in special:
            tokens.add(special[item])
        else:
            strings.append(item)
    return frozenset(tokens), tuple(strings)


class NewText:
    """The text of one sequence's new tokens, up to the first stop string in it.

    Args:
        tokenizer: of the model.
        context: the ids before, which are not part of it.
        stops: stop strings. They are looked for in the new text alone, wherever its tokens end.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int], stops: Sequence[str]) -> None:
        from pytransformer.text import CharacterStream

        self._characters = CharacterStream(tokenizer, context)
        self.stops = stops
        self._held = ""  # may be the beginning of a stop string
        self._pieces: list[str] = []
        self.is_stopped = False

    @property
    def text(self) -> str:
        """All that has been given out."""
        return "".join(self._pieces)

    def fork(self) -> NewText:
        """Another one that goes on from here."""
        other = copy.copy(self)
        other._characters, other._pieces = self._characters.fork(), list(self._pieces)
        return other

    def push(self, token: int) -> str:
        """What is known to be part of the text since this token, perhaps nothing."""
        return self._give(self._characters.push(token), last=False)

    def finish(self) -> str:
        """What is left when no token follows."""
        return "" if self.is_stopped else self._give(self._characters.finish(), last=True)

    def _give(self, piece: str, last: bool) -> str:
        waiting = self._held + piece
        places = [place for stop in self.stops if (place := waiting.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            end = min(places)
        else:
            end = len(waiting) - (0 if last else self._beginning(waiting))
        self._pieces.append(waiting[:end])
        self._held = waiting[end:]
        return waiting[:end]

    def _beginning(self, waiting: str) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        for count in range(min(longest, len(waiting)), 0, -1):
            if any(stop.startswith(waiting[-count:]) for stop in self.stops):
                return count
        return 0
