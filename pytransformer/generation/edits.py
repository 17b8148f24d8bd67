"""Changes of the logits before a token is chosen: a bias, penalties of tokens that were there before, and a constraint.

They come in transformers' order: bias (its ``sequence_bias``), repetition penalty, then presence and frequency penalty, which it lacks,
then the constraint (its ``prefix_allowed_tokens_fn``). Everything lies on the logits' device; the host waits for nothing.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .prompts import is_int

Constraint: TypeAlias = Callable[[int, list[int]], Any]
"""(row of the batch, its ids so far) -> the tokens that may come next: ids, a boolean mask (vocab_size), or ``None`` for all."""

_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def number(name: str, value: Any) -> float:
    """A real number as a float; TypeError for anything else."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


class Edits:
    """See :class:`pytransformer.generation.Sampler`, whose arguments these are."""

    def __init__(
        self,
        batch: int,
        *,
        logit_bias: Mapping[int, float] | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        constraint: Constraint | None = None,
        prompts: Sequence[Tensor] | None = None,
    ) -> None:
        self._bias, self._banned = _bias(logit_bias)
        self._repetition = number("repetition_penalty", repetition_penalty)
        if not _SMALLEST <= self._repetition <= _LARGEST:
            raise ValueError(
                f"repetition_penalty must be finite and above 0, in float32 (1 = none), got {repetition_penalty}"
            )
        self._presence = number("presence_penalty", presence_penalty)
        self._frequency = number("frequency_penalty", frequency_penalty)
        for name, value in (("presence_penalty", self._presence), ("frequency_penalty", self._frequency)):
            if not abs(value) <= _LARGEST:
                raise ValueError(f"{name} must be finite in float32 (0 = none), got {value}")
        if constraint is not None and not callable(constraint):
            raise TypeError(f"constraint must be callable or None, got {type(constraint).__name__}")
        if prompts is not None and len(prompts) != batch:
            raise ValueError(f"prompts must be one for each of the {batch} sequences, got {len(prompts)}")
        self._constraint = constraint
        self._prompts = [torch.as_tensor(prompt) for prompt in prompts or [torch.empty(0, dtype=torch.int64)] * batch]
        penalises = self._repetition != 1.0 or self._presence != 0.0 or self._frequency != 0.0
        self.active = bool(self._bias or self._banned) or penalises or constraint is not None
        self._bias_row: Tensor | None = None  # (vocab_size)
        self._banned_ids: Tensor | None = None
        self._seen: Tensor | None = None  # (batch, vocab_size), of the prompt or new
        self._counts: Tensor | None = None  # (batch, vocab_size), new ones
        self._ids: list[list[int]] = []  # for the constraint, on the host
        self._rows = list(range(batch))  # of the batch, that the sequences belong to
        self._ended = [False] * batch
        self._begun = False

    def apply(self, logits: Tensor, step: int | Sequence[int]) -> Tensor:
        """Logits (batch, vocab_size) to be chosen from, in float32 (float64 stays); ``step``, one or per row, for messages."""
        # transformers computes in float32, whatever the model does.
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if not self._begun:
            self._begin(scores)
        if self._bias_row is not None:
            scores = scores + self._bias_row
        if self._banned_ids is not None:
            scores = scores.index_fill(1, self._banned_ids, -math.inf)
        if self._seen is not None:
            penalised = torch.where(scores < 0, scores * self._repetition, scores / self._repetition)
            scores = torch.where(self._seen, penalised, scores)
        if self._counts is not None:
            if self._frequency:
                scores = scores - self._counts * self._frequency
            if self._presence:
                scores = scores - (self._counts > 0).to(scores.dtype) * self._presence
        if self._constraint is not None:
            scores = scores.masked_fill(~self._allowed(scores, step), -math.inf)
        return scores

    def count(self, tokens: Tensor, counted: Tensor | None = None) -> None:
        """Counts a step's tokens (batch) on the device; ``counted`` (batch, boolean): of which sequences, ``None`` = of all."""
        where = tokens[:, None]
        if self._seen is not None:
            self._seen.scatter_(1, where, True if counted is None else self._seen.gather(1, where) | counted[:, None])
        if self._counts is not None:
            ones = torch.ones_like(tokens) if counted is None else counted
            self._counts.scatter_add_(1, where, ones[:, None].to(self._counts.dtype))

    def take(self, chosen: Sequence[int | None], ended: Sequence[bool] | None = None) -> None:
        """The same tokens on the host, where the constraint wants them; it is not asked about sequences that have ``ended``."""
        if self._constraint is None:
            return
        for ids, token in zip(self._ids, chosen):
            if token is not None:
                ids.append(token)
        if ended is not None:
            self._ended = list(ended)

    def reorder(self, rows: Sequence[int]) -> None:
        """Sequence b becomes what ``rows[b]`` was, with the row of the batch that it belongs to; there may be any number of them."""
        if not self.active or list(rows) == list(range(len(self._rows))):
            return
        self._rows = [self._rows[row] for row in rows]
        self._ended = [self._ended[row] for row in rows]
        if self._constraint is not None:
            self._ids = [list(self._ids[row]) for row in rows]
        if self._seen is not None:
            self._seen = self._seen[torch.tensor(rows, device=self._seen.device)]
        if self._counts is not None:
            self._counts = self._counts[torch.tensor(rows, device=self._counts.device)]

    def _begin(self, scores: Tensor) -> None:
        """What depends on the vocabulary, the dtype and the device."""
        self._begun = True
        vocab_size, device = scores.shape[1], scores.device
        for token in (*self._bias, *self._banned):
            if token >= vocab_size:
                raise ValueError(f"logit_bias has token id {token}, allowed are 0 to {vocab_size - 1}")
        if self._bias:
            row = torch.zeros(vocab_size, dtype=scores.dtype)
            row[list(self._bias)] = torch.tensor(list(self._bias.values()), dtype=scores.dtype)
            self._bias_row = row.to(device)
        if self._banned:
            self._banned_ids = torch.tensor(self._banned, device=device)
        if self._repetition != 1.0:
            self._seen = torch.zeros(scores.shape, dtype=torch.bool, device=device)
            for index, (seen, prompt) in enumerate(zip(self._seen, self._prompts)):
                if len(prompt) and not (int(prompt.min()) >= 0 and int(prompt.max()) < vocab_size):
                    raise ValueError(f"prompt {index} holds a token id outside of 0 to {vocab_size - 1}")
                seen[prompt.to(device, torch.int64)] = True
        if self._presence or self._frequency:
            self._counts = torch.zeros_like(scores)
        if self._constraint is not None:
            self._ids = [row.tolist() for row in self._prompts]

    def _allowed(self, scores: Tensor, step: int | Sequence[int]) -> Tensor:
        """The constraint's tokens: boolean (batch, vocab_size)."""
        assert self._constraint is not None
        rows = []
        steps = [step] * len(self._rows) if isinstance(step, int) else step
        for row, ids, is_over, own_step in zip(self._rows, self._ids, self._ended, steps):
            found = None if is_over else self._constraint(row, list(ids))
            rows.append(_mask(found, scores.shape[1], f"row {row} in step {own_step}"))
        if any(row.device != scores.device for row in rows):
            # Those of the host go over together.
            if all(row.device.type == "cpu" for row in rows):
                mask = torch.stack(rows)
                # From pageable memory the copy would wait for the device.
                mask = mask.pin_memory() if scores.is_cuda else mask
                return mask.to(scores.device, non_blocking=True)
            rows = [row.to(scores.device, non_blocking=True) for row in rows]
        return torch.stack(rows)


def _mask(found: Any, vocab_size: int, where: str) -> Tensor:
    """What a constraint gave as a boolean mask (vocab_size)."""
    if found is None:
        return torch.ones(vocab_size, dtype=torch.bool)
    if isinstance(found, Tensor) and found.dtype == torch.bool:
        if found.shape != (vocab_size,):
            raise ValueError(
                f"a mask of constraint must have shape ({vocab_size},), got {tuple(found.shape)} for {where}"
            )
        return found
    ids = found.tolist() if hasattr(found, "__array__") else list(found) if hasattr(found, "__iter__") else [found]
    if not isinstance(ids, list) or not all(is_int(token) for token in ids):
        raise TypeError(f"constraint must give token ids, a boolean mask or None, got {found!r} for {where}")
    if not ids:
        raise ValueError(f"constraint allows no token for {where}")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"constraint gave token id {bad} for {where}, allowed are 0 to {vocab_size - 1}")
    mask = torch.zeros(vocab_size, dtype=torch.bool)
    mask[[int(token) for token in ids]] = True
    return mask


def _bias(logit_bias: Any) -> tuple[dict[int, float], list[int]]:
    """What is added by token, and the tokens that never come."""
    if logit_bias is None:
        return {}, []
    if not isinstance(logit_bias, Mapping):
        raise TypeError(
            f"logit_bias must be a mapping from token ids to numbers or None, got {type(logit_bias).__name__}"
        )
    bias: dict[int, float] = {}
    for token, value in logit_bias.items():
        if not is_int(token):
            raise TypeError(f"logit_bias must have token ids (ints) as keys, got {token!r}")
        if token < 0:
            raise ValueError(f"logit_bias has token id {token}, allowed are those of the vocabulary, from 0")
        added = number(f"logit_bias[{token}]", value)
        if not (abs(added) <= _LARGEST or added == -math.inf):
            raise ValueError(
                f"logit_bias[{token}] must be finite in float32 or -inf (never), got {value}; to force a token use constraint"
            )
        bias[int(token)] = added
    banned = [token for token, value in bias.items() if value == -math.inf]
    return {token: value for token, value in bias.items() if value not in (0.0, -math.inf)}, banned
