"""Speculative decoding: tokens are proposed cheaply, and the model looks at several of them in one pass.

A pass over a few tokens takes about as long as a pass over one, because reading the weights takes the time (or, of a small model, Python).
Of the proposed tokens those stay that the model would have chosen; the first other one is replaced by the model's own choice, and where all
stay the pass gives one more. So a pass brings from one token to one more than were proposed.

Greedy, and with proposals that were not drawn (prompt-lookup), the model's own choice is made at each place as without proposals, with the
random number of that place, and a proposal stays if it is that choice: the tokens are those of plain decoding. Proposals y that were drawn
by a draft's probabilities q stay with probability min(1, p(y) / q(y)), and are else replaced by a draw from max(p − q, 0): that is a draw
from p (Leviathan et al. 2023; Chen et al. 2023). p and q are what temperature, top-k, top-p and min-p leave, p after penalties too.

Every random number belongs to a sequence and to the place of a new token in it, and how many tokens are proposed depends on the sequence
alone, so that a sequence gets the same whatever it is batched with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytransformer.model.transformer import Transformer

from .caches import SequenceCache
from .drafts import Drafter, DraftModel, ModelDrafter, PromptLookup, Proposals, make_drafter
from .results import Generation, Step
from .run import Run, Source, padded
from .sampling import UNIT, Sampler, Uniforms, log_probabilities, pick

# A sequence this many tokens ahead of the slowest one, whose tokens are told together with its own, waits: their logits take memory.
_FAR_AHEAD = 64


class Token(NamedTuple):
    """A token of one sequence that is not told yet; or the fault because of which there is none."""

    token: int
    logits: Tensor  # (1, vocab_size)
    value: float | None
    text: str
    reason: str | None
    fault: int


# Tokens, faults and log-probabilities (if asked for) of every sequence at one place of a pass, for those that have come so far.
Choices = tuple[list[int], list[int], list[float] | None]


class SpeculativeRun(Run):
    """A :class:`Run` with proposals.

    Args:
        draft: where they come from; the others are those of :class:`Run`.

    Attributes:
        drafted, accepted: per sequence, how many tokens were proposed, and how many of those stayed.
    """

    def __init__(
        self,
        model: Transformer,
        rows: list[Tensor],
        source: Source | None,
        max_new_tokens: int,
        sampler: Sampler,
        draft: DraftModel | PromptLookup,
    ) -> None:
        super().__init__(model, rows, source, max_new_tokens, sampler)
        self.num_tokens = draft.num_tokens
        self.longest_step = 1 + draft.num_tokens
        self.drafter: Drafter = make_drafter(draft, self)
        batch = len(rows)
        self.drafted, self.accepted = [0] * batch, [0] * batch
        # The numbers by which proposals that were drawn are accepted; None = they are not drawn.
        self._accepting: Uniforms | None = None
        if sampler.uniforms is not None and isinstance(draft, DraftModel):
            self._accepting = sampler.uniforms.derived(2)
        self._untold: list[deque[Token]] = [deque() for _ in rows]
        self._told: list[str | None] = list(self.stop_reasons)
        self._steps_told = 0
        self._broken: set[int] = set()
        self._dropped = [False] * batch

    def modules(self) -> list[nn.Module]:
        own = super().modules()
        return own + list(self.drafter.model.modules()) if isinstance(self.drafter, ModelDrafter) else own

    def with_cache(self) -> Generator[Step, None, None]:
        cache, options, logits = self._begin()
        self.drafter.begin()
        decoder: Any = None
        jumps = self._jumps_of_rope()
        batch = len(self.rows)
        self._accept(logits[:, None], Proposals.none(batch), self._open())
        while True:
            yield from self._ready()
            if not self._open():
                return
            if decoder is None:
                decoder, head = self.prepared()
            if self.kept is not None:
                self.kept.check_turn(self)
            self._drop_ended(cache)
            if crossing := [row for length in jumps for row in self._crossing(length)]:
                # Other frequencies from here on, for the tokens before too. The others go on as if nothing had been.
                cache.reset()
                self._dropped = [False] * batch
                logits = self._prefill(cache, options, without_newest=set(range(batch)).difference(crossing))
                self._accept(logits[:, None], Proposals.none(batch), crossing)
                continue
            going = self._going(cache)
            counts = [self._room(row) if row in going else 0 for row in range(batch)]
            proposals = self.drafter.propose(counts)
            feed = [
                [*new[-1:], *tokens] if row in going else []
                for row, (new, tokens) in enumerate(zip(self.new_tokens, proposals.tokens))
            ]
            ids, _, real = padded(self.model, feed)
            cache.expect([len(tokens) for tokens in feed])
            cache.choose_path(bound=decoder is not self.model.model)
            hidden = decoder(ids, real, cache=cache, **options)
            counts = self._accept(head(hidden), proposals, going)
            # What was not accepted is padding: the cache forgets it.
            self._advance(cache, counts)

    def why_not_recorded(self) -> str:
        return "speculative decoding gives its steps other shapes each time"

    def result(self) -> Generation:
        found = super().result()
        return replace(found, drafted=self.drafted, accepted=self.accepted)

    def _open(self) -> list[int]:
        """Sequences that get more tokens."""
        return [row for row, reason in enumerate(self.stop_reasons) if reason is None and row not in self._broken]

    def _held(self, row: int) -> int:
        """Tokens of a sequence in the cache: all but the newest."""
        return self.prompt_lengths[row] + len(self.new_tokens[row]) - 1

    def _room(self, row: int) -> int:
        """How many tokens may be proposed for a sequence: a pass must neither run past its limit nor see RoPE change."""
        most = min(self.num_tokens, self.limits[row][0] - len(self.new_tokens[row]) - 1)
        length = self._held(row) + 1
        for rotary in self.model.model.rotaries:
            # "dynamic" has other frequencies with every token from there on, the others have them once.
            if rotary.depends_on_length and (rotary.is_dynamic or length <= rotary.original_length):
                most = min(most, max(rotary.original_length - length, 0))
        return most

    def _going(self, cache: SequenceCache) -> list[int]:
        """Sequences that take part in the next pass, each with all of its proposals or not at all.

        The pass is a rectangle, which must fit behind the longest sequence. Near the end of the cache wide ones wait until that has ended.
        """
        rows = self._open()
        width = cache.capacity - max(map(self._held, rows))
        fitting = [row for row in rows if 1 + self._room(row) <= width]
        near = [row for row in fitting if len(self._untold[row]) < _FAR_AHEAD]
        return near or fitting

    def _drop_ended(self, cache: SequenceCache) -> None:
        rows = self._open()
        dropped = [row not in rows for row in range(len(self.rows))]
        if dropped != self._dropped:
            cache.drop(torch.tensor(dropped, device=self.device), max(map(self._held, rows)))
            self._dropped = dropped

    def _advance(self, cache: SequenceCache, counts: list[int]) -> None:
        if rows := self._open():
            longest = max(map(self._held, rows))
            same = counts.count(counts[0]) == len(counts)
            cache.advance(counts[0] if same else torch.tensor(counts, device=self.device), longest)

    def _accept(self, logits: Tensor, proposals: Proposals, rows: Sequence[int]) -> list[int]:
        """Chooses tokens for the sequences ``rows`` and records them, by logits (batch, places, vocab_size): how many for each sequence."""
        choose = self._chooser(logits, proposals)
        counts = [0] * len(self.rows)
        for row in rows:
            self.drafted[row] += len(proposals.tokens[row])
        place = 0
        while rows:
            tokens, faults, values = choose(place, rows)
            following = []
            for row in rows:
                own, token, value = logits[row : row + 1, place], tokens[row], None if values is None else values[row]
                if faults[row]:
                    self._broken.add(row)
                    self._untold[row].append(Token(token, own, None, "", None, faults[row]))
                    continue
                text = self.take(row, token, value)
                reason = self.stop_reasons[row]
                self._untold[row].append(Token(token, own, value, text, reason, 0))
                counts[row] += 1
                if [token] == proposals.tokens[row][place : place + 1]:
                    self.accepted[row] += 1
                    if reason is None:
                        following.append(row)
            rows = following
            place += 1
        return counts

    def _chooser(self, logits: Tensor, proposals: Proposals) -> Callable[[int, Sequence[int]], Choices]:
        """What chooses the tokens at one place of a pass, called for one after another with the sequences that have come so far."""
        if self._accepting is not None or self.sampler.edits.active:
            # What is chosen, or what it is chosen by, depends on the tokens before.
            return lambda place, rows: self._choose_at(logits[:, place], place, rows, proposals)
        batch, places = logits.shape[:2]
        flat = logits.flatten(0, 1)
        uniforms = self.sampler.uniforms
        tokens, faults = self.sampler.draw_by(flat, None if uniforms is None else self._numbers(uniforms, places))
        values = None
        if self.log_probabilities is not None:
            values = log_probabilities(flat, tokens).view(batch, places).t().tolist()
        chosen, found = torch.stack((tokens, faults)).view(2, batch, places).transpose(1, 2).tolist()
        return lambda place, rows: (chosen[place], found[place], None if values is None else values[place])

    def _choose_at(self, logits: Tensor, place: int, rows: Sequence[int], proposals: Proposals) -> Choices:
        """The same for one place, logits (batch, vocab_size)."""
        edits, scores = self.sampler.edits, logits
        others = [row not in rows for row in range(len(self.rows))]
        if edits.active:
            edits.take([None] * len(others), others)
            scores = edits.apply(logits, [len(new) for new in self.new_tokens])
        if self._accepting is not None:
            tokens, faults = self._accept_or_redraw(scores, place, proposals, self._accepting)
        else:
            uniforms = self.sampler.uniforms
            tokens, faults = self.sampler.draw_by(scores, None if uniforms is None else self._numbers(uniforms, 1))
        if edits.active:
            faults = self.sampler.with_hidden_faults(faults, logits)
            edits.count(tokens, ~torch.tensor(others, device=self.device))
        values = None if self.log_probabilities is None else log_probabilities(logits, tokens).tolist()
        chosen, found = torch.stack((tokens, faults)).tolist()
        edits.take([None if other else token for token, other in zip(chosen, others)])
        return chosen, found, values

    def _accept_or_redraw(
        self, scores: Tensor, place: int, proposals: Proposals, accepting: Uniforms
    ) -> tuple[Tensor, Tensor]:
        """Tokens and faults (batch): a proposal drawn by q stays with probability min(1, p / q), else max(p - q, 0) is drawn from."""
        assert self.sampler.uniforms is not None
        weights, faults = self.sampler.weights(scores)
        p = weights.double() / weights.sum(dim=-1, keepdim=True)
        uniforms = self._numbers(self.sampler.uniforms, 1)
        most = 0 if proposals.probabilities is None else proposals.probabilities.shape[1]
        if proposals.probabilities is None or place >= most:
            return pick(weights, uniforms), faults
        q = proposals.probabilities[:, place]
        proposed = [(tokens[place : place + 1] or [0])[0] for tokens in proposals.tokens]
        y = torch.tensor(proposed, device=self.device)
        p_of_y, q_of_y = (values.gather(-1, y[:, None])[:, 0] for values in (p, q))
        # Where nothing was proposed q is 0, and so the left side is not below the right one's 0: what is left is p.
        stays = (self._numbers(accepting, 1) * q_of_y < p_of_y) & (q_of_y > 0.0)
        rest = (p - q).clamp_(min=0.0)
        total = rest.sum(dim=-1, keepdim=True)
        # Equal up to rounding: whatever is left is none of it.
        rest = torch.where(total > 0.0, rest / total, p)
        return torch.where(stays, y, pick((rest * UNIT).long(), uniforms)), faults

    def _numbers(self, uniforms: Uniforms, places: int) -> Tensor:
        """Random numbers of each sequence for its next tokens: (batch · places)."""
        starts = [len(new) for new in self.new_tokens]
        indices = torch.tensor(starts, device=self.device)[:, None] + torch.arange(places, device=self.device)
        rows = torch.arange(len(starts), device=self.device)[:, None].expand_as(indices)
        return uniforms.at(rows.flatten(), indices.flatten(), max(starts) + places - 1)

    def _ready(self) -> Generator[Step, None, None]:
        """The steps for which every sequence that goes on there has its token."""
        while True:
            rows = [row for row, reason in enumerate(self._told) if reason is None]
            if not rows or not all(self._untold[row] for row in rows):
                return
            yield self._tell(rows)

    def _tell(self, rows: list[int]) -> Step:
        batch, index = len(self.rows), self._steps_told
        news = {row: self._untold[row].popleft() for row in rows}
        self.sampler.refuse([news[row].fault if row in news else 0 for row in range(batch)], index)
        self._steps_told += 1
        for row, new in news.items():
            self._told[row] = new.reason
        any_logits = news[rows[0]].logits  # those of an ended sequence mean nothing
        all_logits = [news[row].logits if row in news else any_logits for row in range(batch)]
        values = None
        if self.log_probabilities is not None:
            values = [news[row].value if row in news else None for row in range(batch)]
        texts = None if self.texts is None else [news[row].text if row in news else "" for row in range(batch)]
        tokens = [news[row].token if row in news else None for row in range(batch)]
        logits = all_logits[0] if batch == 1 else torch.cat(all_logits)
        return Step(index, tokens, logits, list(self._told), values, texts)
