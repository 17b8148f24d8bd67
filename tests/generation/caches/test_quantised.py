"""Caches of 8 bits: what lies in them, and logits as near as the quantisation step allows."""

from __future__ import annotations

import itertools

import pytest
import torch

from pytransformer.generation import KVCache, generate, make_cache
from pytransformer.generation.caches import contiguous
from pytransformer.verification import SEEDS, Contract
from tests.model.configs import make_model, make_twin, random_ids
from tests.support.draws import pool

from .support import GENERATING, logits_through

KINDS = ["int8", "fp8", "paged-int8", "paged-fp8"]
NAMES = ["gemma2", "t5", "gpt-oss"]


def half_step(x, kind):
    """Half the distance of neighbouring codes at x, whose scale gives the largest of a token and head the highest code."""
    highest = x.abs().amax(dim=-1, keepdim=True)
    if kind.endswith("int8"):
        return (highest / 127 / 2).expand_as(x)
    # e4m3: three bits of mantissa, down to the normal 2^-6, below that equal steps of 2^-9.
    scale = highest / 448
    exponent = (x.abs() / scale).clamp(min=2.0**-6).log2().floor()
    return scale * exponent.exp2() * 2.0**-4


class NoisyLayer(contiguous.ContiguousLayer):
    """A plain cache whose every key and value is off by half a step, up or down: as far as rounding can be."""

    def append(self, q, k, v, **options):
        q = super().append(q, k, v, **options)
        places = slice(self._cache.max_length, self._cache.max_length + k.shape[1])
        for cache in (self.k_cache, self.v_cache):
            new = cache[:, places]
            sign = torch.randint(0, 2, new.shape, generator=self.generator).to(new) * 2 - 1
            new += sign * half_step(new, self.kind)
        return q


def noisy_cache(config, kind, seed, *arguments, **options):
    cache = KVCache(config, *arguments, **options)
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(cache._layers):
        cache._layers[index] = NoisyLayer(cache, layer.k_cache, layer.v_cache)
        cache._layers[index].kind, cache._layers[index].generator = kind, generator
    return cache


# The contract's draws of ids are the rows of so many batches, each with weights of its own.
WEIGHTS = 2


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(NAMES, KINDS[:2]), ("gemma2", "paged-fp8")])
def test_logits_are_nearer_than_those_of_keys_and_values_off_by_half_a_step(name, kind, small_pages, device):
    """The contract of 16 bits, where the plain implementation's error is that of half a step everywhere."""
    config = GENERATING[name]
    contract, rows = Contract(torch.bfloat16), SEEDS // WEIGHTS

    def add(seed):
        model, ids = make_model(config, seed, device), random_ids(config, (rows, 10), seed, device)
        memory, source = None, ()
        if config.is_encoder_decoder:
            source = (random_ids(config.encoder, (rows, 6), seed + 1, device),)
            memory = model.encode(*source)
        golden = make_twin(model, torch.float64)(*source, ids)
        actual = logits_through(model, make_cache(kind, config, rows, 10, device, torch.float32), ids, memory)
        plain = logits_through(model, noisy_cache(config, kind, seed, rows, 10, device=device), ids, memory)
        contract.add("logits", actual=actual, plain=plain, golden=golden)

    # Where a rounding exchanges two experts the largest error of few draws says little.
    pool(contract, add, WEIGHTS).check()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_is_stored_is_off_by_half_a_step_at_most(kind, device):
    config = GENERATING["llama"]
    model, ids = make_model(config, 0, device), random_ids(config, (2, 10), 0, device)
    caches = [KVCache(config, 2, 10, device=device, quantised=quantised) for quantised in (None, kind)]
    for cache in caches:
        model(ids, cache=cache)
    plain, codes = (cache.part for cache in caches)
    for name in ("k", "v"):
        exact, code, scale = getattr(plain, name)[0], getattr(codes, name)[0], getattr(codes, f"{name}_scale")[0]
        error = (code.float() * scale[..., None] - exact).abs()
        step = half_step(exact, kind)
        assert bool((error <= step * (1 + 1e-5)).all()) and bool((error > step / 4).any())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_pieces_and_in_company_gets_what_it_gets_alone(kind, small_pages, device):
    """Every query sees quantised keys, those of its own step too, so that it does not matter how a prompt was cut."""
    model = make_model(GENERATING["gemma2"], 0, device)
    prompts = [random_ids(model.config, (length,), length, device) for length in (1, 9, 4, 12)]
    together = generate(model, prompts, 6, cache=kind)
    for index, prompt in enumerate(prompts):
        assert torch.equal(
            together.token_ids[index], generate(model, prompt, 6, cache=kind.removeprefix("paged-")).token_ids
        )
    whole, pieces = (make_cache(kind, model.config, 1, 12, device, torch.float32) for _ in range(2))
    expected = model(prompts[3][None], cache=whole)
    for piece in prompts[3].split(4):
        actual = model(piece[None], cache=pieces)
        pieces.advance(4)
    torch.testing.assert_close(actual, expected[:, 8:])


def test_another_quantisation_is_refused():
    with pytest.raises(ValueError, match="quantised must be 'int8', 'fp8' or None, got 'int4'"):
        contiguous.new_part((1, 2), None, torch.float32, "int4")
