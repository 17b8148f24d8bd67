"""A KV cache that stays from one call of generate to the next, so that only what is new in a text is computed."""

from __future__ import annotations

import torch

from pytransformer.model.transformer import Transformer
from pytransformer.nn.position import RotaryEmbedding

from .caches import SequenceCache, make_cache
from .caches.sizes import split_kind
from .record import Record

# A cache grows by so many tokens at least, so that short calls do not copy it each time.
_STEP = 256


class KeptCache:
    """The KV cache of one sequence, for calls whose prompts begin alike: ``generate(model, prompt, 100, cache=kept)``.

    A call keeps what its prompt and the text in the cache have in common, at most all but the prompt's last token, and rolls back the rest;
    results are those of a call with a cache of its own. What it generated stays for the next call. The memory grows with the text. One
    call at a time: a new one ends the one before. After an error in a step, or an interruption, nothing is kept.

    Args:
        model: without an encoder. If its parameters change, :meth:`forget` what was computed by the old ones.
        kind: "contiguous", "paged", or quantised: "int8", "fp8", "paged-int8", "paged-fp8"; see docs/caches.md.

    Attributes:
        cache: the cache itself, or ``None`` while there is nothing in it.
        reused: tokens of its prompt that the newest call found in the cache.

    Raises:
        TypeError, ValueError: an unknown kind, or a model with an encoder.
    """

    def __init__(self, model: Transformer, kind: str = "contiguous") -> None:
        split_kind(kind)
        if model.config.is_encoder_decoder:
            raise ValueError(
                "a kept cache is for models without an encoder: an encoder-decoder's target depends on the source"
            )
        self.model = model
        self.kind = kind
        self.cache: SequenceCache | None = None
        self.reused = 0
        self._run: Record | None = None

    @property
    def token_ids(self) -> list[int]:
        """The tokens whose keys and values are in the cache."""
        if self.cache is None or self._run is None:
            return []
        text = self._run.rows[0].tolist() + self._run.new_tokens[0]
        return text[: self.cache.max_length]

    def forget(self) -> None:
        """Frees the cache; the next call computes its whole prompt."""
        self.cache = self._run = None

    def check_model(self, model: Transformer, batch: int) -> None:
        """ValueError unless a call with so many prompts of ``model`` can use it."""
        if model is not self.model:
            raise ValueError("cache is a KeptCache of another model: what it holds means nothing to this one")
        if batch != 1:
            raise ValueError(f"cache is a KeptCache, which is of one sequence, but there are {batch} prompts")

    def check_turn(self, run: Record) -> None:
        """ValueError if another call than ``run`` has taken the cache since."""
        if self._run is not run:
            raise ValueError("another call has taken the kept cache, so this one cannot go on")

    def give_up(self, run: Record) -> None:
        """Forgets what ``run`` has left, unless another call has taken the cache since."""
        if self._run is run:
            self.forget()

    def open(self, run: Record, capacity: int) -> SequenceCache:
        """The cache with room for ``capacity`` tokens, holding what the prompt of ``run`` begins with."""
        prompt = run.rows[0].tolist()
        known = _common(prompt, self.token_ids, self.model.model.rotaries)
        # From here on the text is that of this run, of which at least what is common is in the cache.
        self._run, self.reused = run, 0
        self._roll_back(known)
        cache = self._grow(capacity)
        cache.choose_path(bound=False)
        self.reused = cache.max_length
        return cache

    def _roll_back(self, length: int) -> None:
        if self.cache is None or self.cache.max_length == length:
            return
        try:
            self.cache.truncate(torch.tensor([length]))
        except ValueError:
            self.cache.reset()  # layers with a window have freed pages that would be needed again

    def _grow(self, capacity: int) -> SequenceCache:
        old, limit = self.cache, self.model.config.max_seqlen
        if old is not None and old.capacity >= capacity:
            return old
        weight = self.model.model.embed_tokens.weight
        room = min(limit, -(-capacity // _STEP) * _STEP)
        new = make_cache(self.kind, self.model.config, 1, room, weight.device, weight.dtype)
        if old is not None and old.max_length > 0:
            try:
                new.write_prefix(old.read_prefix(0, old.max_length), old.max_length)
            except ValueError:
                new.reset()  # a window has freed the first pages
        self.cache = new
        return new


def _common(prompt: list[int], held: list[int], rotaries: list[RotaryEmbedding]) -> int:
    """How many tokens of the prompt need not be computed, as they are what the cache holds."""
    for rotary in rotaries:
        # Behind its first length other frequencies hold, for the tokens before too: constant ones, or ("dynamic") others for each length.
        longer = [length > rotary.original_length for length in (len(prompt), len(held))]
        if rotary.depends_on_length and (any(longer) if rotary.is_dynamic else longer[0] != longer[1]):
            return 0
    count = 0
    for ours, theirs in zip(prompt[:-1], held):
        if ours != theirs:
            break
        count += 1
    return count
