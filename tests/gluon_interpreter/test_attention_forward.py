"""A whole kernel: right within the contract, the same bits in every schedule, and quick enough for hundreds of cases."""

from __future__ import annotations

import time

import pytest
import torch

from pytransformer.gluon_interpreter import EARLY, SCHEDULES
from pytransformer.verification import Contract
from tests.gluon_interpreter.attention_forward import LOG2_E, run


def _inputs(heads: int, queries: int, keys: int, head_dim: int) -> list[torch.Tensor]:
    return [torch.randn(heads, length, head_dim).to(torch.bfloat16) for length in (queries, keys, keys)]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1) * LOG2_E


@pytest.mark.parametrize(
    ("heads", "queries", "keys", "head_dim", "causal"),
    [(1, 256, 256, 128, True), (2, 128, 128, 64, False), (1, 128, 512, 64, False)],
    ids=["d128-causal", "two-heads", "d64"],
)
def test_every_schedule_gives_the_same_bits_within_the_contract(heads, queries, keys, head_dim, causal) -> None:
    q, k, v = _inputs(heads, queries, keys, head_dim)
    out, lse, _ = run(q, k, v, causal, 128, EARLY)
    contract = Contract(torch.bfloat16)
    golden = _plain(q.double(), k.double(), v.double(), causal)
    plain = _plain(q, k, v, causal)
    for name, actual, of_plain, of_golden in zip(("out", "lse"), (out, lse), plain, golden):
        contract.add(name, actual=actual, plain=of_plain, golden=of_golden)
    contract.check()
    for schedule in SCHEDULES[1:]:
        again, lse_again, _ = run(q, k, v, causal, 128, schedule)
        assert torch.equal(out, again), schedule
        assert torch.equal(lse, lse_again), schedule


def test_a_tile_of_queries_takes_less_than_a_third_of_a_second() -> None:
    q, k, v = _inputs(1, 128, 512, 64)
    run(q, k, v, False, 128, EARLY)
    begin = time.process_time()
    run(q, k, v, False, 128, EARLY)
    assert time.process_time() - begin < 0.3
