"""Beam search: of each prompt the ``num_beams`` best continuations are kept side by side, and the best that ended are the result.

What is kept, what ends and when the search is over follows transformers' ``GenerationMixin._beam_search`` step by step (its numbers too, on
a CPU to the last bit); docs/sampling.md says where it does not. A prompt is computed once, for all of its beams.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pytransformer.model.transformer import Transformer

from .caches import SequenceCache
from .edits import number
from .prompts import is_int
from .results import Generation, Step
from .run import Run, Source
from .sampling import INFINITE, NO_NUMBER, NOTHING_ALLOWED, Sampler, log_probabilities
from .stopping import NewText

_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class BeamOptions:
    """How a beam search goes; transformers' options of the same names.

    Args:
        num_beams: continuations side by side; 1 = no beam search.
        length_penalty: the sum of a continuation's log-probabilities is divided by its number of new tokens to this power: above 0 longer
            ones are favoured, below 0 shorter ones.
        early_stopping: when a prompt's search is over, once ``num_beams`` continuations have ended. ``True``: at once. ``False``: when the
            best one that goes on would, at its present length, not be better than the worst of them. "never": the same, but at the length
            where it would score best, which for a ``length_penalty`` above 0 is the limit: nothing better can then be missed.
        num_return_sequences: of each prompt, the best first; at most ``num_beams``.

    Raises:
        TypeError, ValueError: an option of a wrong type or out of range, or one that means nothing without beams.
    """

    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        for name in ("num_beams", "num_return_sequences"):
            value = getattr(self, name)
            if not is_int(value):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        penalty = number("length_penalty", self.length_penalty)
        if not math.isfinite(penalty):
            raise ValueError(f"length_penalty must be finite (0 = none), got {self.length_penalty}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping must be True, False or 'never', got {self.early_stopping!r}")
        if self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences must be at most num_beams ({self.num_beams}), got {self.num_return_sequences}"
            )
        if self.num_beams == 1:
            for name, default in (("length_penalty", 1.0), ("early_stopping", False)):
                if (value := getattr(self, name)) != default:
                    raise ValueError(
                        f"{name}={value!r} is for beam search: give num_beams above 1, or leave {name} out"
                    )


def check_greedy(sampler: Sampler, options: BeamOptions) -> None:
    """ValueError if the sampler is to draw and there are beams: they would mean different searches."""
    if options.num_beams > 1 and sampler.temperature != 0.0:
        raise ValueError(
            f"temperature={sampler.temperature} draws tokens, num_beams={options.num_beams} searches for the most probable ones: "
            "leave one of the two out"
        )


@dataclass
class Beam:
    """A continuation of one prompt.

    Attributes:
        tokens: the new ones.
        total: the sum of their log-probabilities.
        score: ``total`` divided by their number to the power of the length penalty.
        hope: the score that it may come to when it goes on, by ``early_stopping``.
        place: of the beam that it continues, among its prompt's in the step before.
        reason: why it ended, or ``None``.
        values: of each token the model's own log-probability, where they were asked for.
        text: with its stop strings, if there are any.
    """

    tokens: list[int] = field(default_factory=list)
    total: float = 0.0
    score: float = 0.0
    hope: float = 0.0
    place: int = 0
    reason: str | None = None
    values: list[float] = field(default_factory=list)
    text: NewText | None = None


class Search:
    """One prompt's search.

    Attributes:
        running: what goes on, the best first, at most ``num_beams``.
        finished: the best that ended, the best first, at most ``num_beams``.
        is_over: nothing changes any more.
    """

    def __init__(self, options: BeamOptions, start: Beam) -> None:
        self.options = options
        self.running = [start] if start.reason is None else []
        # Of a prompt that gets no token at all there is one continuation, as often as it is asked for.
        self.finished = [] if start.reason is None else [start] * options.num_return_sequences
        self.is_over = not self.running

    def advance(self, candidates: Sequence[Beam]) -> None:
        """Takes in a step's best candidates, the best first: enough of them that ``num_beams`` go on if so many can."""
        count = self.options.num_beams
        # One that ends must be among the best. The others are there to take the places of those that do.
        ended = [beam for beam in candidates[:count] if beam.reason is not None]
        # The sort is stable: of equals the earlier one stays.
        self.finished = sorted(self.finished + ended, key=lambda beam: -beam.score)[:count]
        self.running = [beam for beam in candidates if beam.reason is None][:count]
        is_full = len(self.finished) == count
        self.is_over = not self.running or (
            is_full and (self.options.early_stopping is True or self.running[0].hope <= self.finished[-1].score)
        )

    def common(self) -> int | None:
        """New tokens that all running beams begin with; ``None`` where a place has no beam."""
        if len(self.running) < self.options.num_beams:
            return None
        # All others begin with what the first and the last in order have in common.
        first, last = min(beam.tokens for beam in self.running), max(beam.tokens for beam in self.running)
        return next((place for place, (one, other) in enumerate(zip(first, last)) if one != other), len(first))


class BeamRun(Run):
    """One call with beams. The record's rows are the prompts at first, and from the first token on the places of each prompt's beams.

    A place without a beam, such as those of a search that is over, is a row that has ended.
    """

    def __init__(
        self,
        model: Transformer,
        rows: list[Tensor],
        source: Source | None,
        max_new_tokens: int,
        sampler: Sampler,
        options: BeamOptions,
    ) -> None:
        super().__init__(model, rows, source, max_new_tokens, sampler)
        check_greedy(sampler, options)
        most = max(2, *(limit for limit, _ in self.limits))
        steepest = math.log(_LARGEST) / math.log(most)
        if abs(options.length_penalty) > steepest:
            raise ValueError(
                f"length_penalty must be from {-steepest:.4g} to {steepest:.4g}, so that float32 holds {most} new tokens to this power, "
                f"got {options.length_penalty}"
            )
        self.options = options
        self.width = len(rows) * options.num_beams
        self.searches = [Search(options, Beam(reason=reason if limit == 0 else None)) for limit, reason in self.limits]
        self._prompts = self.rows
        self._length = 0  # new tokens of the running beams
        self._order: list[int] = []  # for each row, the one that it was before the latest token
        self._shared = 0  # tokens that these have in common at least

    def steps(self) -> Generator[Step, None, None]:
        """See :class:`Run`."""
        if self.texts is not None and self.texts[0].stops:
            for search, text in zip(self.searches, self.texts):
                for beam in search.running:
                    beam.text = text
        yield from super().steps()

    def why_not_recorded(self) -> str:
        """See :class:`Run`."""
        return "a beam search moves its sequences between two steps"

    def without_cache(self) -> Generator[Step, None, None]:
        """See :class:`Run`."""
        steps = super().without_cache()
        yield next(steps)
        if self.source is not None:
            self.source.repeat(self.options.num_beams)
        yield from steps

    def _make_cache(self, capacity: int) -> SequenceCache:
        cache = super()._make_cache(capacity)
        cache.reorder(torch.arange(len(self._prompts)))  # each prompt is computed once
        return cache

    def _arrange(self, cache: SequenceCache) -> None:
        if self._order != list(range(cache.batch)):
            cache.reorder(torch.tensor(self._order), self._shared)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Step]:
        """A step's tokens (rows), taken in."""
        candidates = self._candidates(logits)
        self._length += 1
        going_on = [index for index, search in enumerate(self.searches) if not search.is_over]
        common = [self.searches[index].common() for index in going_on]
        lengths = [len(self._prompts[index]) + count for index, count in zip(going_on, common) if count is not None]
        self._shared = min(lengths) if len(lengths) == len(common) else 0
        for index in going_on:
            self.searches[index].advance(candidates[index])
        chosen = self._place(len(logits) // len(self.searches))
        tokens = torch.tensor([token or 0 for token in chosen], device=self.device)
        edits = self.sampler.edits
        if edits.active:
            edits.reorder(self._order)
            edits.count(tokens)
            edits.take(chosen, [reason is not None for reason in self.stop_reasons])
        return tokens, Step(self._length - 1, chosen, logits, list(self.stop_reasons))

    def _place(self, places: int) -> list[int | None]:
        """Makes the running beams the record's rows; there were ``places`` for each prompt. The newest token of each row."""
        beams: list[Beam | None] = []
        self._order = []
        for index, search in enumerate(self.searches):
            running = [] if search.is_over else search.running
            for place in range(self.options.num_beams):
                beam = running[place] if place < len(running) else None
                self._order.append(index * places + (min(place, places - 1) if beam is None else beam.place))
                beams.append(beam)
        self.rows = [prompt for prompt in self._prompts for _ in range(self.options.num_beams)]
        self.prompt_lengths = [len(row) for row in self.rows]
        self.new_tokens = [[] if beam is None else beam.tokens for beam in beams]
        self.stop_reasons = ["over" if beam is None else None for beam in beams]
        return [None if beam is None else beam.tokens[-1] for beam in beams]

    def _candidates(self, logits: Tensor) -> list[list[Beam]]:
        """Of each search the best continuations by one token, the best first; of one that is over none."""
        batch, places, vocab_size = len(self.searches), len(logits) // len(self.searches), logits.shape[1]
        totals = self._sums(logits, places).view(batch, -1)
        # So many that if all beams end by each token that ends one, as many others are there to go on.
        count = min(max(2, 1 + len(self.ends)) * self.options.num_beams, totals.shape[1])
        best, found = totals.topk(count, dim=1)
        parts = [best.double().view(torch.int64), found]
        if self.log_probabilities is not None:
            rows = found // vocab_size + places * torch.arange(batch, device=found.device)[:, None]
            own = log_probabilities(logits[rows.flatten()], (found % vocab_size).flatten())
            parts.append(own.view(torch.int64).view(batch, count))
        host = torch.stack(parts).cpu()  # the host waits for the device once
        best = host[0].view(torch.float64).to(totals.dtype)
        self._refuse(best[:, 0].tolist(), logits)
        # In the precision of the sums, as transformers does.
        scores = best / (self._length + 1) ** self.options.length_penalty
        hopes = scores
        if self.options.early_stopping == "never" and self.options.length_penalty > 0.0:
            powers = [[max(limit, 1) ** self.options.length_penalty] for limit, _ in self.limits]
            hopes = best / torch.tensor(powers, dtype=best.dtype)
        values: list[list[float | None]] = [[None] * count] * batch
        if self.log_probabilities is not None:
            values = host[2].view(torch.float64).tolist()
        by_search = zip(host[1].tolist(), best.tolist(), scores.tolist(), hopes.tolist(), values)
        return [
            [
                self._extended(index, where // vocab_size, where % vocab_size, total, score, hope, value)
                for where, total, score, hope, value in zip(*figures)
                if total > -math.inf
            ]
            for index, figures in enumerate(by_search)
        ]

    def _sums(self, logits: Tensor, places: int) -> Tensor:
        """Of each row and token the sum of log-probabilities (rows, vocab_size), −inf in rows without a beam, which mean nothing."""
        before = []
        for search in self.searches:
            totals = [] if search.is_over else [beam.total for beam in search.running]
            before += totals + [-math.inf] * (places - len(totals))
        scores = self.sampler.log_scores(logits)
        column = torch.tensor(before, dtype=scores.dtype, device=self.device)[:, None]
        return (scores + column).masked_fill_(column == -math.inf, -math.inf)

    def _refuse(self, best: Sequence[float], logits: Tensor) -> None:
        """ValueError if a search that goes on has a beam with faulty logits, or can neither go on nor has a result."""
        faults = [0] * len(best)
        for index, (total, search) in enumerate(zip(best, self.searches)):
            if math.isnan(total):
                # NaN, an infinity, or nothing but −inf: the logarithms are NaN after each of them.
                rows = logits.view(len(best), -1, logits.shape[1])[index, : len(search.running)]
                largest = rows.amax(dim=-1)
                faults[index] = NOTHING_ALLOWED
                if bool(largest.isnan().any()):
                    faults[index] = NO_NUMBER
                elif bool((largest == math.inf).any()):
                    faults[index] = INFINITE
            elif total == -math.inf and not search.is_over and not search.finished:
                faults[index] = NOTHING_ALLOWED
        self.sampler.refuse(faults)

    def _extended(
        self, index: int, place: int, token: int, total: float, score: float, hope: float, value: float | None
    ) -> Beam:
        """The beam at a place of a search, continued by a token."""
        parent = self.searches[index].running[place]
        limit, limit_reason = self.limits[index]
        tokens = [*parent.tokens, token]
        reason = self.ends.get(token) or (limit_reason if len(tokens) == limit else None)
        text = None
        if parent.text is not None:
            text = parent.text.fork()
            text.push(token)
            reason = "stop" if text.is_stopped else reason
        values = parent.values if value is None else [*parent.values, value]
        return Beam(tokens, total, score, hope, place, reason, values, text)

    def result(self) -> Generation:
        """The best that ended, see :class:`Generation`.

        Raises:
            ValueError: of some prompt fewer ended than are to be returned.
        """
        count = self.options.num_return_sequences
        for index, search in enumerate(self.searches):
            if (found := len(search.finished)) < count:
                raise ValueError(
                    f"num_return_sequences={count}, but of prompt {index} there are only {found} continuations: what is allowed to come "
                    "(constraint, logit_bias, the vocabulary) leaves no more"
                )
        chosen = [beam for search in self.searches for beam in search.finished[:count]]
        self.rows = [prompt for prompt in self._prompts for _ in range(count)]
        self.prompt_lengths = [len(row) for row in self.rows]
        self.new_tokens = [beam.tokens for beam in chosen]
        self.stop_reasons = [beam.reason for beam in chosen]
        if self.log_probabilities is not None:
            self.log_probabilities = [beam.values for beam in chosen]
        if self.texts is not None:
            starts = [text for text in self.texts for _ in range(count)]
            self.texts = [_written(start.fork(), beam.tokens) for start, beam in zip(starts, chosen)]
        if self.form == "one" and count > 1:
            self.form = "batch"
        return dataclasses.replace(super().result(), scores=[beam.score for beam in chosen])


def _written(text: NewText, tokens: Sequence[int]) -> NewText:
    for token in tokens:
        text.push(token)
    text.finish()
    return text
