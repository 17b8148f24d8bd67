"""From logits to the next token: greedy, or drawn after temperature, top-k and top-p, reproducibly.

Every sequence draws from a stream of its own, so what it gets does not depend on what else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Random numbers are drawn on the host, so many at a time, and brought to the device together.
_BLOCK = 64


class Sampler:
    """Chooses one token per sequence.

    The logits are divided by ``temperature``; then all but the ``top_k`` largest are dropped; then all but the smallest set of most
    probable tokens whose probabilities reach ``top_p`` in sum (Holtzman et al. 2020); what is left is drawn from in proportion.

    Args:
        batch: number of sequences.
        temperature: 0 = greedy, the most probable token (the lowest id among equals).
        top_k: at least 1; ``None`` = no limit.
        top_p: above 0, at most 1.
        seed: one number for every sequence (two equal prompts then get equal continuations), one for each, or ``None``: drawn from
            torch's default generator, different for each sequence.

    Raises:
        TypeError, ValueError: an argument of a wrong type or out of range.
    """

    def __init__(
        self,
        batch: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        _check_options(temperature, top_k, top_p)
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self._generators = [] if temperature == 0.0 else [torch.Generator().manual_seed(s) for s in _seeds(seed, batch)]
        self._uniforms: Tensor | None = None
        self._used = 0

    def choose(self, logits: Tensor) -> Tensor:
        """(batch, vocab_size) logits -> (batch) int64 ids."""
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        scores, tokens = self._candidates(logits.float() / self.temperature)
        # By inverting the distribution function: one number per sequence decides, whatever the size of the batch. In float64, because a
        # running float32 sum over a large vocabulary is off by more than many a token's probability.
        cumulative = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        threshold = self._next_uniforms(logits.device)[:, None] * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[-1] - 1)
        return index[:, 0] if tokens is None else tokens.gather(-1, index)[:, 0]

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores of the tokens that stay, dropped ones −inf, and their ids (``None`` = in order of id)."""
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            scores, tokens = scores.topk(self.top_k, dim=-1)
        elif self.top_p < 1.0:
            scores, tokens = scores.sort(dim=-1, descending=True, stable=True)
        else:
            return scores, None
        if self.top_p < 1.0:
            probabilities = torch.softmax(scores, dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            before[:, 0] = 0.0  # the most probable token always stays, whatever the rounding
            scores = scores.masked_fill(before >= self.top_p, -math.inf)
        return scores, tokens

    def _next_uniforms(self, device: torch.device) -> Tensor:
        if self._uniforms is None or self._used == _BLOCK:
            block = [torch.rand(_BLOCK, generator=g, dtype=torch.float64) for g in self._generators]
            self._uniforms = torch.stack(block).to(device, non_blocking=True)
            self._used = 0
        self._used += 1
        return self._uniforms[:, self._used - 1]


def _check_options(temperature: float, top_k: int | None, top_p: float) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise ValueError(f"temperature must be finite and at least 0 (0 = greedy), got {temperature}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k must be an int or None, got {top_k!r}")
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")


def _seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    if seed is None:
        return [int(value) for value in torch.randint(2**62, (batch,))]
    if isinstance(seed, int) and not isinstance(seed, bool):
        seeds = [seed] * batch
    elif isinstance(seed, Sequence) and all(isinstance(value, int) and not isinstance(value, bool) for value in seed):
        seeds = list(seed)
        if len(seeds) != batch:
            raise ValueError(f"seed must be one int or one for each of the {batch} sequences, got {len(seeds)}")
    else:
        raise TypeError(f"seed must be an int, a sequence of ints or None, got {seed!r}")
    for value in seeds:
        if not 0 <= value < 2**63:
            raise ValueError(f"seed must be from 0 to 2^63 - 1, got {value}")
    return seeds
