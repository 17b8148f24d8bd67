"""Token for token: what the sampler changes, keeps and draws is what transformers' processors do, where theirs is defined."""

from __future__ import annotations

import math

import pytest
import torch

from pytransformer.generation import Sampler, generate
from pytransformer.generation.sampling import probabilities
from tests.generation.test_sampling import chi_square
from tests.model.configs import CONFIGS, make_model, random_ids

process = pytest.importorskip("transformers.generation.logits_process")


def kept(sampler, scores):
    """Which tokens of each row can be drawn: boolean (batch, vocab_size)."""
    left, tokens = sampler._candidates(scores)
    stay = left > -math.inf
    return stay if tokens is None else torch.zeros_like(scores, dtype=torch.bool).scatter(-1, tokens, stay)


def quarters(rows, size, seed, device):
    """Logits on a grid, so that many are equal and quotients by powers of two are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-12, 13, (rows, size), generator=generator).float().div(4).to(device)


def distinct(rows, size, seed, device):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(size, generator=generator) for _ in range(rows)]).float().div(16).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_penalties_and_bias_are_bit_for_bit_those_of_transformers(dtype, device):
    logits = quarters(4, 50, 0, device).to(dtype)
    logits[2, :5] = -math.inf
    ids = torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1)).to(device)
    bias = {3: 1.3, 7: -2.6, 49: 0.1}
    for penalty in (1.3, 0.7):
        theirs = process.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()})(
            ids, logits.float()
        )
        theirs = process.RepetitionPenaltyLogitsProcessor(penalty)(ids, theirs)
        sampler = Sampler(4, logit_bias=bias, repetition_penalty=penalty, prompts=list(ids[:, :6]))
        first = sampler.edits.apply(logits, 0)
        assert not torch.equal(first, theirs)  # three tokens of each row are to come
        for token in ids[:, 6:].T:
            sampler.edits.count(token)
        assert torch.equal(sampler.edits.apply(logits, 1), theirs)


def test_a_constraint_masks_as_prefix_allowed_tokens_does(device):
    logits, prompts = quarters(3, 20, 0, device), [torch.tensor([row, 5]) for row in range(3)]

    def allowed(row, ids):
        return [(int(ids[-1]) + row * step) % 20 for step in range(1, 5)]

    theirs = process.PrefixConstrainedLogitsProcessor(allowed, 1)(torch.stack(prompts), logits.cpu())
    sampler = Sampler(3, constraint=allowed, prompts=prompts)
    assert torch.equal(sampler.edits.apply(logits, 0).cpu(), theirs)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "limits", [(5, 1.0, 0.0), (None, 0.8, 0.0), (None, 1.0, 0.1), (None, 1.0, 0.5), (9, 0.9, 0.05), (3, 0.5, 1.0)]
)
def test_the_tokens_that_stay_are_those_of_transformers(limits, temperature, device):
    """Of up to 16 scores with equals, and of distinct ones whatever their number: there their sort is stable, or need not be."""
    top_k, top_p, min_p = limits
    for logits in (quarters(40, 16, 3, device), distinct(4, 1000, 4, device)):
        warpers = process.LogitsProcessorList()
        if temperature != 1.0:
            warpers.append(process.TemperatureLogitsWarper(temperature))
        if top_k is not None:
            warpers.append(process.TopKLogitsWarper(top_k))
        if top_p < 1.0:
            warpers.append(process.TopPLogitsWarper(top_p))
        if min_p > 0.0:
            warpers.append(process.MinPLogitsWarper(min_p))
        theirs = warpers(None, logits.cpu())
        sampler = Sampler(len(logits), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert torch.equal(kept(sampler, logits).cpu(), theirs > -math.inf)
        if min_p == 1.0:
            assert bool((kept(sampler, logits).sum(-1) >= 1).all())


def test_a_probability_of_exactly_min_p_stays(device):
    """As theirs in float32, although the logarithms of powers of two are rounded downwards.

    From 2^-16 on that alone moves the probability by more than half a last place.
    """
    for exponent in range(1, 16):
        logits = torch.tensor([[0.0, math.log(2.0**-exponent), -30.0, -40.0]], device=device)
        sampler = Sampler(1, temperature=1.0, min_p=2.0**-exponent)
        theirs = process.MinPLogitsWarper(2.0**-exponent)(None, logits.cpu()) > -math.inf
        assert kept(sampler, logits).cpu().tolist() == theirs.tolist() == [[True, True, False, False]]


def test_tokens_are_drawn_in_proportion_to_what_transformers_leaves(device):
    logits = torch.tensor([[1.0, -2.0, 0.3, 2.2, -0.4, 0.9, 1.7, -5.0, 0.0, 1.1]], device=device)
    ids = torch.tensor([[3, 0, 3]])
    warpers = process.LogitsProcessorList(
        [
            process.SequenceBiasLogitsProcessor({(9,): 0.7}),
            process.RepetitionPenaltyLogitsProcessor(1.4),
            process.TemperatureLogitsWarper(0.8),
            process.MinPLogitsWarper(0.15),
        ]
    )
    sampler = Sampler(
        3000, temperature=0.8, min_p=0.15, repetition_penalty=1.4, logit_bias={9: 0.7}, prompts=[ids[0]] * 3000,
        seed=range(3000),
    )  # fmt: skip
    tokens = sampler.choose(logits.expand(3000, -1))
    # Five standard deviations, as in test_sampling.
    assert chi_square(tokens.cpu(), probabilities(warpers(ids, logits.cpu()))[0]) < 5


@pytest.mark.parametrize("use_cache", [True, False])
def test_every_step_of_a_ragged_batch_is_what_the_processors_give(use_cache, device):
    model = make_model(CONFIGS["llama"], 0, device)
    prompts = [random_ids(model.config, (length,), length, device) for length in (2, 9, 5)]
    bias = {4: 0.5, 60: -0.25}
    editing = process.LogitsProcessorList(
        [
            process.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}),
            process.RepetitionPenaltyLogitsProcessor(1.8),
        ]
    )
    limiting = process.LogitsProcessorList([process.TopKLogitsWarper(4), process.MinPLogitsWarper(0.2)])
    for sampling in ({}, {"temperature": 1.0, "top_k": 4, "min_p": 0.2, "seed": 5}):
        steps = []
        options = {"repetition_penalty": 1.8, "logit_bias": bias, "use_cache": use_cache}
        generate(model, prompts, 8, callback=steps.append, **options, **sampling)
        for row, prompt in enumerate(prompts):
            ids = prompt[None].cpu()
            for step in steps:
                theirs = editing(ids, step.logits[row][None].cpu())
                token = step.tokens[row]
                if sampling:
                    assert limiting(ids, theirs)[0, token] > -math.inf
                else:
                    assert int(theirs.argmax()) == token
                ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


@pytest.mark.parametrize("size", [16, 17, 1000])
def test_of_equals_at_the_limit_those_of_higher_id_stay(size, device):
    """As theirs with up to 16 scores; beyond, their sort is not stable and their sums are rounded."""
    logits = torch.full((1, size), 0.5, device=device)
    found = kept(Sampler(1, temperature=1.0, top_p=0.25), logits)[0].cpu()
    fewest = -(-size // 4)
    assert found.nonzero()[:, 0].tolist() == list(range(size - fewest, size))
    if size <= 16:
        assert torch.equal(found, process.TopPLogitsWarper(0.25)(None, logits.cpu())[0] > -math.inf)
