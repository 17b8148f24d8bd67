"""Who proposes the next tokens in speculative decoding: a smaller model, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pytransformer.model.transformer import EncoderDecoder, Transformer

from .bound import bind
from .caches import KVCache
from .caches.prefix import lengths_that_change_rope
from .prepare import prepare
from .prompts import check_generates, is_int
from .run import Run, Source, padded
from .sampling import Uniforms, pick

# A sequence in a batch has room for what another one has to catch up with: its newest tokens of a step or two without proposals.
_MARGIN = 4


@dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed when the text last ended as it does now: the longest run of its last tokens that came before decides.

    It costs next to nothing and pays where a text repeats itself: code, summaries, edits of what the prompt holds. Of an encoder–decoder
    the source counts as the beginning of the text, if both sides have as many tokens.

    Args:
        max_ngram: the longest run of tokens that is looked for, at least 1.
        num_tokens: the most tokens that are proposed at a time, at least 1.

    Raises:
        TypeError, ValueError: a number that is no int, or below 1.

    Source: Saxena 2023 (prompt lookup decoding).
    """

    max_ngram: int = 3
    num_tokens: int = 10

    def __post_init__(self) -> None:
        _check_count("max_ngram", self.max_ngram)
        _check_count("num_tokens", self.num_tokens)


@dataclass(frozen=True)
class DraftModel:
    """Proposes what a smaller model with the same vocabulary says, drawn as the large one's tokens are.

    Its own context may be shorter: a sequence that has left it goes on without proposals.

    Args:
        model: a decoder; for an encoder–decoder another encoder–decoder, which reads the same source.
        num_tokens: tokens that are proposed at a time, at least 1.

    Raises:
        TypeError, ValueError: no Transformer, one that does not predict the next token, or a number that is no int or below 1.

    Sources: Leviathan et al. 2023, Chen et al. 2023.
    """

    model: Transformer
    num_tokens: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.model, Transformer):
            raise TypeError(f"model of DraftModel must be a Transformer, got {type(self.model).__name__}")
        check_generates(self.model.config)
        _check_count("num_tokens", self.num_tokens)


def check_draft(draft: object, model: Transformer) -> DraftModel | PromptLookup:
    """The draft for ``model`` as it is used: a bare Transformer becomes a :class:`DraftModel`.

    Raises:
        TypeError, ValueError: it is no draft, or does not go with the model.
    """
    if isinstance(draft, Transformer):
        draft = DraftModel(draft)
    if not isinstance(draft, (DraftModel, PromptLookup)):
        raise TypeError(
            f"draft must be a DraftModel, a PromptLookup, a Transformer or None, got {type(draft).__name__}"
        )
    if isinstance(draft, PromptLookup):
        return draft
    own, large = draft.model.config, model.config
    if own.vocab_size != large.vocab_size:
        raise ValueError(
            f"draft must have the model's vocabulary of {large.vocab_size} tokens, got a model with vocab_size={own.vocab_size}"
        )
    if own.is_encoder_decoder != large.is_encoder_decoder:
        raise ValueError(
            "draft and model must both be encoder-decoders or both not, "
            f"got {own.architecture!r} as the draft of {large.architecture!r}"
        )
    sides = (draft.model.model.embed_tokens.weight.device, model.model.embed_tokens.weight.device)
    if sides[0] != sides[1]:
        raise ValueError(f"draft must be on the model's device {sides[1]}, got {sides[0]}")
    return draft


class Proposals(NamedTuple):
    """What may come next.

    Attributes:
        tokens: of each sequence, perhaps none.
        probabilities: (batch, most, vocab_size) float64, what each token was drawn by, 0 where there is none; ``None`` = none was drawn.
    """

    tokens: list[list[int]]
    probabilities: Tensor | None = None

    @classmethod
    def none(cls, batch: int) -> Proposals:
        """Of a step without any."""
        return cls([[] for _ in range(batch)])


class Drafter(Protocol):
    """Proposes tokens in one run."""

    def begin(self) -> None:
        """Before the first step: what is heavy."""

    def propose(self, counts: Sequence[int]) -> Proposals:
        """At most so many tokens for each sequence, to follow those that the run has recorded."""
        ...


class NgramIndex:
    """A text that grows token by token, and where each of its runs of up to ``max_ngram`` tokens came last: constant time per token."""

    def __init__(self, max_ngram: int) -> None:
        self.ids: list[int] = []
        self._max_ngram = max_ngram
        self._next: dict[tuple[int, ...], int] = {}  # run of tokens -> the place behind where it came last
        self._match = 0  # the place behind the longest run before that ends as the text does; 0 = there is none

    def push(self, tokens: Sequence[int]) -> None:
        """Tokens that follow."""
        ids, behind = self.ids, self._next
        for token in tokens:
            ids.append(token)
            end = len(ids)
            self._match = 0
            for count in range(1, min(self._max_ngram, end) + 1):
                run = tuple(ids[end - count :])
                self._match = behind.get(run, self._match)
                behind[run] = end

    def propose(self, count: int) -> list[int]:
        """What followed there, ``count`` tokens or none; where that reaches the end of the text it goes round."""
        if self._match == 0 or count < 1:
            return []
        known = self.ids[self._match :]
        while len(known) < count:
            known = known + known
        return known[:count]


class LookupDrafter:
    """See :class:`PromptLookup`."""

    def __init__(self, draft: PromptLookup, run: Run) -> None:
        self._run = run
        self._indices = [NgramIndex(draft.max_ngram) for _ in run.rows]
        self._taken = [0] * len(run.rows)

    def begin(self) -> None:
        run = self._run
        for index, row in zip(self._indices, _sources(run)):
            index.push(row)
        for index, prompt in zip(self._indices, run.rows):
            index.push(prompt.tolist())

    def propose(self, counts: Sequence[int]) -> Proposals:
        found = []
        for row, (index, new, count) in enumerate(zip(self._indices, self._run.new_tokens, counts)):
            if count:
                index.push(new[self._taken[row] :])
                self._taken[row] = len(new)
            found.append(index.propose(count))
        return Proposals(found)


def _sources(run: Run) -> list[list[int]]:
    """What an encoder–decoder's sequences read, where its ids are those of the target."""
    if run.source is None or run.model.config.encoder.vocab_size != run.model.config.vocab_size:
        return [[] for _ in run.rows]
    lengths = run.source.mask.sum(dim=1).tolist()
    return [row[:length] for row, length in zip(run.source.ids.tolist(), lengths)]


class ModelDrafter:
    """See :class:`DraftModel`. It has a cache of its own, contiguous and not quantised, from which refused tokens are taken back."""

    def __init__(self, draft: DraftModel, run: Run) -> None:
        self.model, self._num_tokens = draft.model, draft.num_tokens
        self._run = run
        uniforms = run.sampler.uniforms
        self._uniforms: Uniforms | None = None if uniforms is None else uniforms.derived(1)
        # Behind this length it proposes nothing: its context ends, or all of its keys would have to be rotated anew.
        self._limit = min([self.model.config.max_seqlen, *lengths_that_change_rope(self.model)])
        self._held = [0] * len(run.rows)  # tokens of each sequence that are in the cache
        self._tails: list[list[int]] = [[] for _ in run.rows]  # and the proposed ones behind them

    def begin(self) -> None:
        run, model = self._run, self.model
        longest = max(length + limit for length, (limit, _) in zip(run.prompt_lengths, run.limits))
        weight = model.model.embed_tokens.weight
        capacity = min(self._limit, longest + self._num_tokens + _MARGIN)
        self._cache = KVCache(model.config, len(run.rows), capacity, device=weight.device, dtype=weight.dtype)
        self._options: dict[str, Any] = {}
        if run.source is not None:
            assert isinstance(model, EncoderDecoder)
            source = Source(model, [row[: int(real.sum())] for row, real in zip(run.source.ids, run.source.mask)])
            source.encode()
            self._options = source.options(self._cache)
        if model is run.model:
            # Not bind alone: copies of the weights that an earlier call packed may be out of date.
            self._decoder, self._head = run.prepared()
        else:
            prepare(model, len(run.rows), run.max_new_tokens, run.pack_weights)
            self._decoder, self._head = bind(model)

    def propose(self, counts: Sequence[int]) -> Proposals:
        run = self._run
        rows = [row.tolist() + new for row, new in zip(run.rows, run.new_tokens)]
        serves = [
            reason is None and len(row) + self._num_tokens + _MARGIN <= self._limit
            for row, reason in zip(rows, run.stop_reasons)
        ]
        counts = [count if serve else 0 for count, serve in zip(counts, serves)]
        if not any(counts):
            return Proposals.none(len(counts))
        self._take_back(rows, serves)
        feed = [row[held:] if serve else [] for row, held, serve in zip(rows, self._held, serves)]
        tokens: list[list[int]] = [[] for _ in counts]
        drawn_by: list[Tensor] = []
        for step in range(max(counts)):
            going = [step < count for count in counts]
            logits = self._logits(feed)
            chosen, probabilities = self._choose(logits, step, going)
            if probabilities is not None:
                drawn_by.append(probabilities)
            feed = [[token] if goes else [] for token, goes in zip(chosen, going)]
            for own, new in zip(tokens, feed):
                own += new
            # The last one of a sequence is not fed.
            feed = [new if step + 1 < count else [] for new, count in zip(feed, counts)]
        self._held = [len(row) if serve else 0 for row, serve in zip(rows, serves)]
        self._tails = [own[:-1] for own in tokens]
        return Proposals(tokens, torch.stack(drawn_by, dim=1) if drawn_by else None)

    def _take_back(self, rows: list[list[int]], serves: list[bool]) -> None:
        """Leaves in the cache what is still right, but the newest token: its logits are to be computed. Nothing of who has no place."""
        for index, (row, serve) in enumerate(zip(rows, serves)):
            held, tail = self._held[index], self._tails[index]
            accepted = 0
            while accepted < len(tail) and row[held + accepted : held + accepted + 1] == tail[accepted : accepted + 1]:
                accepted += 1
            self._held[index] = min(held + accepted, len(row) - 1) if serve else 0
            self._tails[index] = []
        self._cache.truncate(self._held)

    def _logits(self, feed: list[list[int]]) -> Tensor:
        """Logits (batch, vocab_size) behind the newest token of each sequence; of one that is fed none they mean nothing."""
        ids, lengths, real = padded(self.model, feed)
        cache = self._cache
        cache.choose_path(bound=self._decoder is not self.model.model)
        hidden = self._decoder(ids, real, cache=cache, **self._options)
        cache.advance(lengths)
        return self._head(hidden[torch.arange(len(feed), device=ids.device), lengths - 1])

    def _choose(self, logits: Tensor, step: int, going: list[bool]) -> tuple[list[int], Tensor | None]:
        """Tokens, and (batch, vocab_size) what they were drawn by."""
        sampler, device = self._run.sampler, logits.device
        probabilities = None
        if self._uniforms is None:
            tokens, faults = sampler.draw_by(logits, None)
        else:
            weights, faults = sampler.weights(logits)
            indices = [len(new) + step for new in self._run.new_tokens]
            rows = torch.arange(len(going), device=device)
            tokens = pick(weights, self._uniforms.at(rows, torch.tensor(indices, device=device), max(indices)))
            probabilities = weights.double() / weights.sum(dim=-1, keepdim=True)
            probabilities *= torch.tensor(going, device=device)[:, None]
        chosen, found = torch.stack((tokens, faults)).tolist()
        broken = [str(row) for row, (fault, goes) in enumerate(zip(found, going)) if fault and goes]
        if broken:
            raise ValueError(
                f"the draft model can propose nothing for rows {', '.join(broken)} of the batch: its logits hold NaN, or are all -inf"
            )
        return chosen, probabilities


def make_drafter(draft: DraftModel | PromptLookup, run: Run) -> Drafter:
    """What proposes tokens in ``run``."""
    return LookupDrafter(draft, run) if isinstance(draft, PromptLookup) else ModelDrafter(draft, run)


def _check_count(name: str, value: object) -> None:
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:  # type: ignore[operator]
        raise ValueError(f"{name} must be at least 1, got {value}")
