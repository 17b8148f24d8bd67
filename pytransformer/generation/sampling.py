"""From logits to the next token: greedy, or drawn after temperature, top-k, top-p and min-p, reproducibly.

Every sequence draws from a stream of its own, so what it gets does not depend on what else is in the batch. docs/sampling.md says where
the results are transformers' token for token, and where those depend on the size of the input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .edits import Constraint, Edits, number
from .prompts import is_int

# Random numbers are drawn on the host, so many at a time, and brought to the device together.
_BLOCK = 64
# Probabilities are summed as integers of this unit. Such sums are exact in any order: they neither shrink nor grow along a large
# vocabulary, are the same on every device, and where a token of weight 0 stands they do not move, so that it can never be drawn.
UNIT = 2.0**61
# A probability is off by some units in the last place of a float64, and so is a sum that "reaches" a limit exactly.
_REACHED = 1.0 - 2.0**-50
NO_NUMBER, NOTHING_ALLOWED, INFINITE = 1, 2, 3


class Sampler:
    """Chooses one token per sequence.

    First ``logit_bias``, the penalties and ``constraint`` change the logits, in this order and in float32. Then they are divided by
    ``temperature``; then all below the ``top_k``-th largest are dropped (its equals stay, as in transformers); then all but the smallest
    set of most probable tokens whose probabilities reach ``top_p`` in sum (Holtzman et al. 2020; of equals those of higher id, as
    transformers does where its sort is stable); then those less probable than ``min_p`` times the most probable one (Nguyen et al. 2024;
    the quotient is rounded to float32). What is left is drawn from in proportion. All of that in float64, and the sums exactly.

    A logit of +inf wins for certain (several: drawn evenly), -inf is never drawn. A temperature towards 0 tends to the most probable token.

    Args:
        batch: number of sequences.
        temperature: 0 = greedy, the most probable token (the lowest id among equals).
        top_k: at least 1; ``None`` = no limit.
        top_p: above 0, at most 1.
        min_p: from 0 (no limit) to 1.
        repetition_penalty: above 0; 1 = none. The logit of each token that is in the prompt or came since is divided by it if positive,
            else multiplied (Keskar et al. 2019).
        presence_penalty, frequency_penalty: subtracted from the logit of each token that came since the prompt: once, and as often as it
            came (as in OpenAI's interface). Of any sign.
        logit_bias: by token id, what is added to its logit; -inf = never.
        constraint: called as ``constraint(row, ids)`` before each step for each sequence that goes on, with the row of the batch and a list
            of its ids (the prompt's, of an encoder–decoder the target's, and the new ones); gives the tokens that may come: ids, a boolean
            mask (vocab_size), or ``None`` for all.
        prompts: per sequence int64 ids (seqlen), for ``repetition_penalty`` and ``constraint``; ``None`` = there were none.
        seed: one number for every sequence (two equal prompts then get equal continuations), one for each, or ``None``: drawn from
            torch's default generator, different for each sequence.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.
        ValueError: temperature 0 and a limit of what is drawn from: they contradict each other.
    """

    def __init__(
        self,
        batch: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        constraint: Constraint | None = None,
        prompts: Sequence[Tensor] | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        self.batch = batch
        self.temperature = number("temperature", temperature)
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise ValueError(f"temperature must be finite and at least 0 (0 = greedy), got {temperature}")
        self.top_p = number("top_p", top_p)
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if top_k is not None and not is_int(top_k):
            raise TypeError(f"top_k must be an int or None, got {top_k!r}")
        self.top_k = None if top_k is None else int(top_k)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        self.min_p = number("min_p", min_p)
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"min_p must be from 0 (no limit) to 1, got {min_p}")
        for name, given, limits in (
            ("top_k", self.top_k, self.top_k is not None),
            ("top_p", self.top_p, self.top_p < 1.0),
            ("min_p", self.min_p, self.min_p > 0.0),
        ):
            if limits and self.temperature == 0.0:
                raise ValueError(
                    f"{name}={given} limits what is drawn from, but temperature is 0, which draws nothing (greedy): "
                    f"give a temperature above 0, or leave {name} out"
                )
        self.edits = Edits(
            batch,
            logit_bias=logit_bias,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            constraint=constraint,
            prompts=prompts,
        )
        seeds = _seeds(seed, batch) if self.temperature > 0.0 or seed is not None else []
        self.uniforms = Uniforms(seeds) if self.temperature > 0.0 else None
        self._step = 0

    def choose(self, logits: Tensor) -> Tensor:
        """(batch, vocab_size) floating logits -> (batch) int64 ids.

        Raises:
            TypeError, ValueError: logits of another shape or dtype.
            ValueError: a row holds NaN, or nothing but -inf; the message names the row, and the step, counted from 0 at the first call.
        """
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"logits must be a floating-point tensor, got {got}")
        if logits.ndim != 2 or logits.shape[0] != self.batch or logits.shape[1] < 1:
            raise ValueError(f"logits must have shape ({self.batch}, vocab_size), got {tuple(logits.shape)}")
        tokens, faults = self.draw(logits)
        self.refuse(faults.tolist())
        if self.edits.active:
            self.edits.take(tokens.tolist())
        return tokens

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`choose` returns, and faults (batch), both int64, without waiting for the device.

        A row whose fault is not 0 has an id that means nothing; :meth:`refuse` raises what its fault stands for. ``edits.take`` is to be
        told the tokens before the next step.
        """
        self._step += 1
        uniforms = None if self.uniforms is None else self.uniforms.all_at(self._step - 1, logits.device)
        if not self.edits.active:
            return self.draw_by(logits, uniforms)
        tokens, faults = self.draw_by(self.edits.apply(logits, self._step - 1), uniforms)
        self.edits.count(tokens)
        return tokens, self.with_hidden_faults(faults, logits)

    def log_scores(self, logits: Tensor) -> Tensor:
        """What a beam search adds up: logarithms of the probabilities (batch, vocab_size), changed by bias, penalties and constraint.

        As in transformers the logarithm comes first, and is of float32 (float64 stays). ``edits.count`` and ``edits.take`` are to be told
        the tokens before the next step.
        """
        self._step += 1
        scores = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
        return self.edits.apply(scores, self._step - 1) if self.edits.active else scores

    @property
    def limits(self) -> tuple[float, int | None, float, float]:
        """What decides how it draws, beside the random numbers and the edits."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    @staticmethod
    def draw_together(samplers: Sequence[Sampler], logits: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`draw` of each of these samplers gives for its row of logits, computed at once.

        Each is for one sequence, has the same ``limits`` as the others, and no active edits.
        """
        for sampler in samplers:
            sampler._step += 1
        first, uniforms = samplers[0], None
        if first.temperature > 0.0:
            host_device = torch.device("cpu")
            numbers = [(sampler.uniforms, sampler._step - 1) for sampler in samplers]
            host = torch.cat([own.all_at(step, host_device) for own, step in numbers if own is not None])
            uniforms = (host.pin_memory() if logits.is_cuda else host).to(logits.device, non_blocking=True)
        return first.draw_by(logits, uniforms)

    def draw_by(self, logits: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens and faults (n), of logits (n, vocab_size) as they are after penalties, with a number for each row (n) to draw by.

        ``uniforms`` may be ``None`` at temperature 0.
        """
        best, greedy = logits.max(dim=-1)
        faults = _faults(best)
        if uniforms is None:
            return greedy, faults
        scores, tokens = self._candidates(logits)
        index = pick(_weights(scores), uniforms)[:, None]
        return (index if tokens is None else tokens.gather(-1, index))[:, 0], faults

    def weights(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """What :meth:`draw_by` draws by at a temperature above 0, in order of id, as weights for :func:`pick`; and faults.

        Args:
            logits: (n, vocab_size) as they are after penalties.

        Returns:
            int64 (n, vocab_size), which sum up to about 2^61, and (n).
        """
        scores, tokens = self._candidates(logits)
        found = _weights(scores)
        if tokens is not None:
            found = torch.zeros(logits.shape, dtype=found.dtype, device=found.device).scatter_(-1, tokens, found)
        return found, _faults(logits.amax(dim=-1))

    @staticmethod
    def with_hidden_faults(faults: Tensor, logits: Tensor) -> Tensor:
        """Faults with those that a constraint hides: a broken model is one there too. ``logits``: as the model gave them."""
        return torch.where(logits.amax(dim=-1).isnan(), NO_NUMBER, faults)

    def refuse(self, faults: Sequence[int], step: int | None = None) -> None:
        """ValueError if one of a step's faults is not 0; ``None`` = the latest step's."""
        for fault, what in (
            (NO_NUMBER, "hold NaN"),
            (NOTHING_ALLOWED, "are all -inf, so that no token is allowed"),
            (INFINITE, "hold +inf, whose logarithm of a probability is no number"),
        ):
            rows = [str(row) for row, found in enumerate(faults) if found == fault]
            if rows:
                where = f"row{'s' if len(rows) > 1 else ''} {', '.join(rows)} of the batch"
                step = self._step - 1 if step is None else step
                raise ValueError(f"no token can be chosen in step {step} for {where}: the logits there {what}")

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of the tokens that stay, dropped ones −inf, in float64, and their ids (``None`` = in order of id)."""
        logits, tokens = self._top_k(logits)
        best = logits.amax(dim=-1, keepdim=True)
        # The largest becomes 0 before the division, which can then overflow towards -inf only, whatever the temperature; +inf too.
        scores = (logits.double() - best).div_(self.temperature)
        scores.masked_fill_(
            (logits == best) | best.isnan(), 0.0
        )  # a row with NaN is a fault; here it has to stay within bounds
        if self.top_p < 1.0:
            scores, order = scores.sort(dim=-1, stable=True)
            tokens = order if tokens is None else tokens.gather(-1, order)
            reached = _weights(scores).cumsum(dim=-1)
            total = reached[:, -1:]
            # Not needed: what comes, from the most probable one down, after the limit has been reached.
            scores = scores.masked_fill((total - reached).double() >= self.top_p * total.double() * _REACHED, -math.inf)
        if self.min_p > 0.0:
            scores = scores.masked_fill(scores < _least_score(self.min_p), -math.inf)
        return scores, tokens

    def _top_k(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits with those below the ``top_k``-th largest −inf, and the ids they belong to (``None`` = in order of id)."""
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return logits, None
        values, tokens = logits.topk(self.top_k, dim=-1)
        least = values[:, -1:]
        if not self._counts_tokens(logits):
            return logits.masked_fill(logits < least, -math.inf), None
        count = int((logits >= least.clamp(min=torch.finfo(logits.dtype).min)).sum(dim=-1).max())
        if count > self.top_k:
            tokens = logits.topk(count, dim=-1).indices
        tokens = tokens.sort(dim=-1).values
        logits = logits.gather(-1, tokens)
        return logits.masked_fill(logits < least, -math.inf), tokens

    @staticmethod
    def _counts_tokens(logits: Tensor) -> bool:
        """Whether to pick out the tokens that stay: cheaper from there on, but their number must be known, for which a GPU would wait."""
        return logits.device.type == "cpu"


class Uniforms:
    """Uniform numbers from 0 to below 1, float64, in a stream for each sequence: its n-th new token has the n-th of them.

    Args:
        seeds: one for each sequence.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._numbers: Tensor | None = None  # (batch, drawn so far)

    def all_at(self, index: int, device: torch.device) -> Tensor:
        """Every sequence's number ``index``: (batch)."""
        return self._until(index, device)[:, index]

    def at(self, rows: Tensor, indices: Tensor, most: int) -> Tensor:
        """Numbers ``indices`` (n), none above ``most``, of the sequences ``rows`` (n): (n)."""
        return self._until(most, rows.device)[rows, indices]

    def derived(self, purpose: int) -> Uniforms:
        """Other streams, of seeds that follow from these: for each ``purpose`` others."""
        # An odd factor keeps different seeds different.
        return Uniforms([(seed * 0x9E3779B97F4A7C15 + purpose * 0x3C6EF372FE94F82B) % 2**63 for seed in self.seeds])

    def _until(self, index: int, device: torch.device) -> Tensor:
        while self._numbers is None or self._numbers.shape[1] <= index:
            block = [torch.rand(_BLOCK, generator=g, dtype=torch.float64) for g in self._generators]
            new = torch.stack(block).to(device, non_blocking=True)
            self._numbers = new if self._numbers is None else torch.cat([self._numbers, new], dim=1)
        return self._numbers


def pick(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Indices (n) drawn by int64 weights (n, any), each with a sum from 1 to 2^62, with a number from 0 to below 1 for each row (n)."""
    # By inverting the distribution function: one number per sequence decides, whatever the size of the batch.
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # A uniform number is below 1, but its product with the total may round up to it.
    threshold = (uniforms[:, None] * total.double()).long().minimum(total - 1)
    # The first token whose sum is above the threshold: there is one, and its own weight is not 0.
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def probabilities(logits: Tensor) -> Tensor:
    """Probabilities (…, vocab_size) in float64 as :class:`Sampler` draws at temperature 1; a row with NaN or nothing allowed is NaN."""
    best = logits.amax(dim=-1, keepdim=True)
    scores = (logits.double() - best).masked_fill(logits == best, 0.0)
    return torch.softmax(scores.masked_fill(best == -math.inf, math.nan), dim=-1)


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logarithms of :func:`probabilities` (batch, vocab_size) at one token of each row (batch), in float64."""
    best = logits.amax(dim=-1, keepdim=True)
    scores = (logits.double() - best).masked_fill(logits == best, 0.0)
    chosen = scores.gather(-1, tokens[:, None]) - scores.logsumexp(dim=-1, keepdim=True)
    return chosen.masked_fill(best == -math.inf, math.nan)[:, 0]


def _faults(best: Tensor) -> Tensor:
    """What is wrong with rows of these largest logits (n); 0 = nothing."""
    return NO_NUMBER * best.isnan() + NOTHING_ALLOWED * (best == -math.inf)


@functools.cache
def _least_score(min_p: float) -> float:
    """The logarithm of the smallest probability, in units of the largest, that is ``min_p`` when both are rounded to float32.

    transformers compares in float32, where half of the largest probability is half of it whatever the last bit of the logit is.
    """
    rounded = torch.tensor(min_p, dtype=torch.float32)
    below = torch.nextafter(rounded, torch.zeros(()))
    middle = (rounded.double().item() + below.double().item()) / 2.0
    return math.log(middle) if middle > 0.0 else -math.inf


def _weights(scores: Tensor) -> Tensor:
    """Probabilities of float64 scores, in units of 1 / UNIT."""
    return torch.softmax(scores, dim=-1).mul_(UNIT).long()


def _seeds(seed: Any, batch: int) -> list[int]:
    if seed is None:
        return [int(value) for value in torch.randint(2**62, (batch,))]
    if hasattr(seed, "__array__") and getattr(seed, "ndim", 0) == 1:
        seed = seed.tolist()  # an array of seeds, or a tensor
    if is_int(seed):
        seeds = [int(seed)] * batch
    elif isinstance(seed, Sequence) and all(is_int(value) for value in seed):
        seeds = [int(value) for value in seed]
        if len(seeds) != batch:
            raise ValueError(f"seed must be one int or one for each of the {batch} sequences, got {len(seeds)}")
    else:
        raise TypeError(f"seed must be an int, a sequence of ints or None, got {seed!r}")
    for value in seeds:
        if not 0 <= value < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {value}")
    return seeds
