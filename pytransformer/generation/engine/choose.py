"""The next token of each sequence of a step, whose options differ: as few passes and transfers as that allows, each on its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pytransformer.generation.run import Run
from pytransformer.generation.sampling import Sampler, log_probabilities

from .cache import upload


class Choice(NamedTuple):
    """A token, or why there is none; ``log_probability`` if it was asked for."""

    token: int | None
    log_probability: float | None = None
    error: Exception | None = None


def choose(runs: Sequence[Run], logits: Tensor) -> list[Choice]:
    """The next token of each of these sequences, from logits (sequences, vocab_size): what it gets alone.

    Those with the same options are drawn together. The host waits for the device once.
    """
    order, parts, failed = _draw([run.sampler for run in runs], logits)
    choices = [Choice(None, error=failed.get(index)) for index in range(len(runs))]
    if not order:
        return choices
    tokens, faults = (torch.cat([part[place] for part in parts]) for place in range(2))
    rows = [tokens, faults]
    if any(runs[index].log_probabilities is not None for index in order):
        rows.append(log_probabilities(logits.index_select(0, upload(order, logits.device)), tokens).view(torch.int64))
    host = torch.stack(rows).cpu()
    found, faults_found = host[:2].tolist()
    values = host[2].view(torch.float64).tolist() if len(rows) > 2 else [None] * len(order)
    for index, token, fault, value in zip(order, found, faults_found, values):
        choices[index] = _judged(runs[index], token, fault, value)
    return choices


def _draw(
    samplers: Sequence[Sampler], logits: Tensor
) -> tuple[list[int], list[tuple[Tensor, Tensor]], dict[int, Exception]]:
    """The sequences in the order in which they were drawn, their tokens and faults, and what the edits of others raised."""
    alike: dict[tuple[object, ...], list[int]] = {}
    order: list[int] = []
    parts: list[tuple[Tensor, Tensor]] = []
    failed: dict[int, Exception] = {}
    for index, sampler in enumerate(samplers):
        if not sampler.edits.active:
            alike.setdefault(sampler.limits, []).append(index)
            continue
        try:
            parts.append(sampler.draw(logits[index : index + 1]))
            order.append(index)
        except Exception as error:
            failed[index] = error
    for indices in alike.values():
        rows = logits if len(indices) == len(logits) else logits.index_select(0, upload(indices, logits.device))
        parts.append(Sampler.draw_together([samplers[index] for index in indices], rows))
        order += indices
    return order, parts, failed


def _judged(run: Run, token: int, fault: int, value: float | None) -> Choice:
    try:
        run.sampler.refuse([fault])
    except ValueError as error:
        return Choice(None, error=error)
    return Choice(token, value if run.log_probabilities is not None else None)
