"""The sampler: its distribution, its limits, and that a sequence does not feel its neighbours."""

from __future__ import annotations

import math

import pytest
import torch

from pytransformer.generation import Sampler


def draw(logits, count, **options):
    """``count`` tokens from one distribution, as so many sequences with seeds of their own."""
    sampler = Sampler(count, seed=list(range(count)), **options)
    return sampler.choose(logits.expand(count, -1))


def chi_square(tokens, probabilities):
    """Pearson's statistic in units of its standard deviation above its mean."""
    counts = torch.bincount(tokens, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not bool(counts[~possible].any())
    expected = probabilities[possible] * len(tokens)
    freedom = int(possible.sum()) - 1
    statistic = ((counts[possible] - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def limited(logits, temperature, top_k, top_p):
    """The distribution that is asked for, written out one token at a time."""
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    order = sorted(range(len(probabilities)), key=lambda token: (-probabilities[token].item(), token))
    kept = order[: len(order) if top_k is None else top_k]
    total = sum(probabilities[token].item() for token in kept)
    nucleus, reached = [], 0.0
    for token in kept:
        if reached / total >= top_p:
            break
        nucleus.append(token)
        reached += probabilities[token].item()
    result = torch.zeros_like(probabilities)
    result[nucleus] = probabilities[nucleus]
    return result / result.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (4, 1.0), (None, 0.7), (6, 0.8), (100, 0.95)])
def test_tokens_are_drawn_in_proportion(temperature, top_k, top_p, device):
    logits = torch.tensor([1.0, -2.0, 0.3, 2.2, -0.4, 0.9, 1.7, -5.0, 0.0, 1.1], device=device)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens = draw(logits, 3000, **options).cpu()
    # Five standard deviations: one false alarm in some ten thousand, and none with these seeds.
    assert chi_square(tokens, limited(logits.cpu(), temperature, top_k, top_p)) < 5


def test_greedy_takes_the_lowest_of_equals(device):
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 5.0, 5.0]], device=device)
    assert Sampler(2).choose(logits).tolist() == [1, 0]


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_the_narrowest_limits_are_greedy(options, device):
    logits = torch.randn(40, 50, device=device)
    tokens = Sampler(40, seed=0, **{"temperature": 1.0, **options}).choose(logits)
    assert torch.equal(tokens, logits.argmax(-1))


def test_a_token_of_no_probability_is_never_drawn(device):
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.0], device=device)
    assert set(draw(logits, 500, temperature=1.0).tolist()) == {1, 3}


def test_every_token_of_a_large_vocabulary_is_drawn_alike(device):
    """A running float32 sum of 200 000 equal probabilities would be off by a thousand tokens."""
    size, count = 200_000, 40
    tokens = draw(torch.zeros(size, device=device), count, temperature=1.0)
    uniforms = torch.stack(
        [torch.rand(64, generator=torch.Generator().manual_seed(i), dtype=torch.float64)[0] for i in range(count)]
    )
    assert int((tokens.cpu() - (uniforms * size).long()).abs().max()) <= 1


def test_seeds_reproduce_and_neighbours_do_not_matter(device):
    logits = torch.randn(100, 4, 50, device=device)

    def tokens(rows, seeds):
        sampler = Sampler(len(rows), temperature=1.0, top_p=0.9, seed=seeds)
        return torch.stack([sampler.choose(step[rows]) for step in logits], dim=1)

    together = tokens([0, 1, 2, 3], [7, 8, 9, 10])
    assert torch.equal(together, tokens([0, 1, 2, 3], [7, 8, 9, 10]))
    for row, seed in enumerate([7, 8, 9, 10]):
        assert torch.equal(together[row], tokens([row], seed)[0])
    assert not torch.equal(together[0], tokens([0], 8)[0])


def test_without_a_seed_torchs_generator_decides(device):
    logits = torch.zeros(6, 1000, device=device)

    def tokens():
        return Sampler(6, temperature=1.0).choose(logits)

    torch.manual_seed(3)
    first, second = tokens(), tokens()
    torch.manual_seed(3)
    assert torch.equal(first, tokens()) and not torch.equal(first, second)
    assert len(set(first.tolist())) > 1


REFUSED = [
    ({"temperature": -1.0}, ValueError, r"temperature must be finite and at least 0 \(0 = greedy\), got -1.0"),
    ({"temperature": math.inf}, ValueError, "temperature must be finite"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": 2.5}, TypeError, r"top_k must be an int or None, got 2\.5"),
    ({"top_p": 0.0}, ValueError, r"top_p must be above 0 and at most 1, got 0\.0"),
    ({"top_p": 1.5}, ValueError, r"top_p must be above 0 and at most 1, got 1\.5"),
    ({"top_p": None}, TypeError, "top_p must be a number, got None"),
    ({"temperature": 1.0, "seed": "x"}, TypeError, "seed must be an int, a sequence of ints or None, got 'x'"),
    ({"temperature": 1.0, "seed": [1]}, ValueError, "seed must be one int or one for each of the 2 sequences, got 1"),
    ({"temperature": 1.0, "seed": -1}, ValueError, r"seed must be from 0 to 2\^63 - 1, got -1"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        Sampler(2, **options)
