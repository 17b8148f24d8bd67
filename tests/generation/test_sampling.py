"""The sampler: its distribution, its limits, and that a sequence does not feel its neighbours."""

from __future__ import annotations

import math

import pytest
import torch

from pytransformer.generation import Sampler
from pytransformer.generation.sampling import probabilities


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


def kept(logits, **options):
    """How many tokens of the only row can be drawn."""
    scores, _ = Sampler(1, temperature=1.0, **options)._candidates(logits)
    return int((scores > -math.inf).sum())


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


def test_infinite_logits_win_for_certain_and_evenly(device):
    logits = torch.tensor([0.0, math.inf, 3.0, math.inf, -math.inf], device=device)
    for options in ({}, {"top_k": 1}, {"top_k": 4}, {"top_p": 0.99}, {"temperature": 1e-300}, {"temperature": 100.0}):
        tokens = draw(logits, 400, **{"temperature": 1.0, **options}).cpu()
        assert chi_square(tokens, torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0], dtype=torch.float64)) < 5
    assert Sampler(1).choose(logits[None]).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("temperature", [1e-4, 1e-38, 1e-45, 5e-324])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature, dtype, device):
    logits = torch.randn(20, 3000, dtype=torch.float64, device=device).argsort(dim=-1).to(dtype)
    logits[:10] -= 1e4  # negative ones overflow to -inf, all of them
    best = logits.amax(dim=-1, keepdim=True)
    for options in ({}, {"top_k": 5}, {"top_p": 0.5}):
        tokens = Sampler(20, temperature=temperature, seed=0, **options).choose(logits)
        assert bool((logits.gather(-1, tokens[:, None]) == best).all())


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 3}, {"temperature": 1.0, "top_p": 0.9}]
)
@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "hold NaN"), (-math.inf, "are all -inf, so that no token is allowed")],
)
def test_a_row_without_a_token_is_named_with_its_step(options, value, message, device):
    logits = torch.zeros(4, 50, device=device)
    sampler = Sampler(4, seed=0, **options)
    sampler.choose(logits)
    sampler.choose(logits)
    for row in (1, 3):
        logits[row] = value
    if math.isnan(value):
        logits[1] = 0.0
        logits[1, 49] = math.nan  # one is enough, beside +inf too
        logits[1, 3] = math.inf
    with pytest.raises(
        ValueError, match=f"no token can be chosen in step 2 for rows 1, 3 of the batch: the logits there {message}"
    ):
        sampler.choose(logits)


@pytest.mark.parametrize("size", [2, 3, 10, 49, 100])
def test_of_equal_tokens_as_many_stay_as_reach_top_p(size, device):
    logits = torch.full((1, size), 0.37, device=device)
    assert [kept(logits, top_p=count / size) for count in range(1, size)] == list(range(1, size))


def test_top_p_stops_where_it_is_reached(device):
    logits = torch.tensor([[0.5, 0.3, 0.1, 0.1]], device=device).log()
    assert kept(logits, top_p=0.8) == 2
    assert {int(Sampler(1, temperature=1.0, top_p=0.8, seed=seed).choose(logits)) for seed in range(100)} == {0, 1}


@pytest.mark.parametrize("size", [50_257, 262_144])
def test_top_p_counts_in_large_vocabularies(size, device):
    """In float32 a running sum stands still, hundreds of tokens before it reaches the limit."""
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(0)) * 3
    ordered = sorted(torch.softmax(logits.double(), dim=-1)[0].tolist(), reverse=True)
    for top_p in (0.9, 0.9999):
        fewest = kept(logits.to(device), top_p=top_p)
        assert math.fsum(ordered[: fewest - 1]) < top_p <= math.fsum(ordered[:fewest])


def test_the_last_token_comes_only_if_it_may(device):
    """The largest uniform number there is draws the last token of those that stay."""
    for size, last in ((7, 2), (128_256, 1000), (262_144, 262_143)):
        logits = torch.zeros(1, size, device=device)
        logits[:, last + 1 :] = -math.inf
        for options in ({}, {"top_p": 1 - 1e-9}, {"top_k": last + 1}):
            sampler = Sampler(1, temperature=1.0, seed=0, **options)
            for uniform, token in ((1 - 2.0**-53, last), (0.0, 0)):
                sampler.uniforms._numbers = torch.full((1, 64), uniform, dtype=torch.float64, device=device)
                assert sampler.choose(logits).tolist() == [token]


def test_top_k_keeps_the_equals_of_the_last_as_transformers_does(device):
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(0)
    for k in (1, 3, 10, 500):
        logits = torch.randint(0, 20, (6, 400), generator=generator).float()
        logits[5, 2:] = -math.inf
        theirs = process.TopKLogitsWarper(k)(None, logits) > -math.inf
        sampler = Sampler(6, temperature=1.0, top_k=k, seed=0)
        scores, tokens = sampler._candidates(logits.to(device))
        stay = scores > -math.inf
        ours = stay if tokens is None else torch.zeros_like(theirs, device=device).scatter(-1, tokens, stay)
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_top_k_draws_the_same_with_and_without_picking_the_tokens_out(top_p, device, monkeypatch):
    """The first is for CPUs, the second for GPUs, which would have to wait for the number of tokens."""
    generator = torch.Generator().manual_seed(0)
    for k in (1, 7, 50, 300):
        logits = torch.randint(-30, 30, (64, 400), generator=generator).float().to(device) / 4
        logits[3, 5:] = -math.inf
        logits[4, 7] = logits[4, 9] = math.inf
        drawn = []
        for counts in (True, False):
            monkeypatch.setattr(Sampler, "_counts_tokens", staticmethod(lambda logits, counts=counts: counts))
            drawn.append(Sampler(64, temperature=1.0, top_k=k, top_p=top_p, seed=range(64)).choose(logits))
        assert torch.equal(*drawn)


def test_probabilities_are_those_of_the_draw():
    logits = torch.tensor(
        [[0.0, math.inf, math.inf, 1.0], [0.5, -math.inf, 0.5, 2.0], [0.0, math.nan, 0.0, 0.0], [-math.inf] * 4]
    )
    found = probabilities(logits)
    assert found[0].tolist() == [0.0, 0.5, 0.5, 0.0] and bool(found[2:].isnan().all())
    torch.testing.assert_close(found[1], torch.softmax(logits[1].double(), dim=-1))


def test_numpy_numbers_are_numbers():
    np = pytest.importorskip("numpy")
    logits = torch.randn(2, 50)
    plain = Sampler(2, temperature=0.75, top_k=7, top_p=0.5, seed=[3, 4])
    theirs = Sampler(2, temperature=np.float32(0.75), top_k=np.int64(7), top_p=np.float64(0.5), seed=np.array([3, 4]))
    assert torch.equal(plain.choose(logits), theirs.choose(logits))
    with pytest.raises(TypeError, match="top_k must be an int or None"):
        Sampler(2, temperature=1.0, top_k=np.float32(3.0))


@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(2, 4), ValueError, r"logits must have shape \(3, vocab_size\), got \(2, 4\)"),
        (torch.zeros(3), ValueError, r"logits must have shape \(3, vocab_size\), got \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, r"logits must be a floating-point tensor, got torch\.int64"),
    ],
)
def test_what_are_no_logits_is_refused(logits, error, message):
    with pytest.raises(error, match=message):
        Sampler(3).choose(logits)


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
