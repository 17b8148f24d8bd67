"""Beam search as its definition has it: without a cache, one history at a time, over lists of all continuations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer import Transformer

Edit = Callable[[list[int], Tensor], Tensor]
"""(the row's ids so far, their log-probabilities (vocab_size)) -> those that are added up."""


class Found(NamedTuple):
    """A continuation that ended: its score, and its new tokens."""

    score: float
    tokens: tuple[int, ...]


@torch.no_grad()
def next_log_probabilities(model: Transformer, prompt: Sequence[int], rows: Sequence[Sequence[int]]) -> Tensor:
    """After each of these target rows of one length: (rows, vocab_size) in float64, through the plain forward pass.

    ``prompt``: what an encoder–decoder reads; of other models the rows begin with it.
    """
    device = model.lm_head.weight.device
    ids = torch.tensor([list(row) for row in rows], device=device)
    given = [torch.tensor([list(prompt)] * len(rows), device=device)] if model.config.is_encoder_decoder else []
    return torch.log_softmax(model(*given, ids)[:, -1].double(), dim=-1).cpu()


def beam_search(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    num_beams: int,
    *,
    length_penalty: float = 1.0,
    early_stopping: Any = False,
    ends: Sequence[int] = (),
    ended: Callable[[tuple[int, ...]], bool] = lambda tokens: False,
    edit: Edit = lambda ids, scores: scores,
) -> list[Found]:
    """One prompt's best continuations that ended, the best first: by a token of ``ends``, because they have ``ended``, or by the limit."""
    start = [model.config.decoder_start_token_id] if model.config.is_encoder_decoder else list(prompt)
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Found] = []
    for length in range(1, max_new_tokens + 1):
        rows = [[*start, *tokens] for _, tokens in running]
        continued = []
        for (total, tokens), row, scores in zip(running, rows, next_log_probabilities(model, prompt, rows)):
            values = edit(row, scores).tolist()
            continued += [(total + value, (*tokens, token)) for token, value in enumerate(values) if value > -math.inf]
        continued.sort(reverse=True)
        over = {tokens for _, tokens in continued if length == max_new_tokens or tokens[-1] in ends or ended(tokens)}
        best = [pair for pair in continued[:num_beams] if pair[1] in over]
        finished += [Found(total / length**length_penalty, tokens) for total, tokens in best]
        finished = sorted(finished, reverse=True)[:num_beams]
        running = [pair for pair in continued if pair[1] not in over][:num_beams]
        if not running:
            break
        if len(finished) == num_beams:
            longest = max_new_tokens if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or running[0][0] / longest**length_penalty <= finished[-1].score:
                break
    return finished


def every_continuation(
    model: Transformer, prompt: Sequence[int], max_new_tokens: int, ends: Sequence[int], length_penalty: float
) -> list[Found]:
    """All that there are, the best first: of at most so many tokens, of which only the last may be an end token."""
    found = []
    for length in range(1, max_new_tokens + 1):
        for tokens in itertools.product(range(model.config.vocab_size), repeat=length):
            if any(token in ends for token in tokens[:-1]) or (tokens[-1] not in ends and length < max_new_tokens):
                continue
            found.append(tokens)
    totals = dict.fromkeys(found, 0.0)
    for length in range(1, max_new_tokens + 1):
        rows = sorted({tokens[: length - 1] for tokens in found if len(tokens) >= length})
        values = next_log_probabilities(model, prompt, [[*prompt, *row] for row in rows])
        scores = dict(zip(rows, values.tolist()))
        for tokens in found:
            if len(tokens) >= length:
                totals[tokens] += scores[tokens[: length - 1]][tokens[length - 1]]
    return sorted(
        (Found(total / len(tokens) ** length_penalty, tokens) for tokens, total in totals.items()), reverse=True
    )
