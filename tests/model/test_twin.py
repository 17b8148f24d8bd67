"""The fused model against its naive twin with the same weights: logits, gradients, attention weights, cached decoding."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from pytransformer import use_backend
from pytransformer.verification import SEEDS, Contract
from tests.model.configs import (
    CONFIGS,
    TINY_CONFIGS,
    cached_logits,
    gradients,
    make_model,
    make_twin,
    random_ids,
)
from tests.support.draws import pool

pytestmark = pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")

# Softcap and ALiBi have no fused backend on every machine: the automatic choice is one of the backends under test.
AUTOMATIC = None
EVERYWHERE = ["reference", AUTOMATIC]
# A whole model through the interpreter takes seconds, and each kernel goes through all draws in its own tests: two, in doubt all.
INTERPRETED_DRAWS = 2
# The contract's draws of ids are the rows of so many batches, each with weights of its own: a pass of a tiny model costs the same for all.
WEIGHTS = 2


class Drawn:
    """A model of a configuration with random weights, ids (batch, 11), and what its twins make of them."""

    def __init__(self, name: str, seed: int, batch: int, device: torch.device) -> None:
        self.model = make_model(CONFIGS[name], seed, device)
        self.ids = random_ids(self.model.config, (batch, 11), seed, device)
        self._twins = make_twin(self.model), make_twin(self.model, torch.float64)

    @functools.cached_property
    @torch.no_grad()
    def logits(self) -> tuple[Tensor, Tensor]:
        """Plain and golden."""
        plain, golden = (twin(self.ids) for twin in self._twins)
        return plain, golden

    @functools.cached_property
    def gradients(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Plain and golden."""
        plain, golden = (gradients(twin, self.ids) for twin in self._twins)
        return plain, golden


# The tests ask for the same models again with other backends and chunks, and change none.
drawn = functools.cache(Drawn)


@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_the_twin(name, backend, device):
    contract = Contract(torch.float32)

    def add(seed: int) -> None:
        draw = drawn(name, seed, SEEDS // WEIGHTS, device)
        plain, golden = draw.logits
        with use_backend(backend):
            contract.add("logits", actual=draw.model(draw.ids), plain=plain, golden=golden)
            actual = gradients(draw.model, draw.ids)
        plain, golden = draw.gradients
        assert set(actual) == set(golden)
        contract.add_all(actual, plain, golden, kind="gradient")

    pool(contract, add, WEIGHTS).check()


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_triton_logits_and_gradients_are_those_of_the_twin(name, device):
    contract = Contract(torch.float32)

    def add(seed: int) -> None:
        model = make_model(TINY_CONFIGS[name], seed, device)
        plain, golden = make_twin(model), make_twin(model, torch.float64)
        ids = random_ids(model.config, (2, 6), seed, device)
        with use_backend("triton"):
            contract.add("logits", actual=model(ids), plain=plain(ids), golden=golden(ids))
            actual = gradients(model, ids)
        contract.add_all(actual, gradients(plain, ids), gradients(golden, ids), kind="gradient")

    pool(contract, add, INTERPRETED_DRAWS).check()


@pytest.mark.parametrize("name", ["gpt2", "llama-qk-norm-head-dim"])
def test_bfloat16_logits_are_as_near_as_plain_bfloat16(name, device):
    contract = Contract(torch.bfloat16)
    for seed in range(SEEDS):
        model = make_model(CONFIGS[name], seed, device, torch.bfloat16)
        ids = random_ids(model.config, (4, 20), seed, device)
        contract.add(
            "logits", actual=model(ids), plain=make_twin(model)(ids), golden=make_twin(model, torch.float64)(ids)
        )
    contract.check()


# One token at a time from the start; a prompt, then tokens; a prompt in chunks (queries that follow a filled cache).
CHUNKS = {"tokens": [1] * 11, "prompt": [7, 1, 1, 1, 1], "chunked": [4, 3, 1, 3]}


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("backend", EVERYWHERE)
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_gives_the_logits_of_the_full_forward(name, backend, chunks, device):
    contract = Contract(torch.float32)
    for seed in range(WEIGHTS):
        draw = drawn(name, seed, SEEDS // WEIGHTS, device)
        plain, golden = draw.logits
        with use_backend(backend):
            actual = cached_logits(draw.model, draw.ids, CHUNKS[chunks], poison=float("nan"))
        contract.add("logits", actual=actual, plain=plain, golden=golden)
    contract.check()


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_triton_cached_decoding_gives_the_logits_of_the_full_forward(name, device):
    contract = Contract(torch.float32)

    def add(seed: int) -> None:
        model = make_model(TINY_CONFIGS[name], seed, device)
        ids = random_ids(model.config, (2, 5), seed, device)
        with use_backend("triton"), torch.no_grad():
            actual = cached_logits(model, ids, [2, 1, 2], poison=float("nan"))
        plain, golden = make_twin(model), make_twin(model, torch.float64)
        contract.add("logits", actual=actual, plain=plain(ids), golden=golden(ids))

    pool(contract, add, INTERPRETED_DRAWS).check()


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_weights_are_probabilities_that_obey_the_masks(name, device):
    model = make_model(CONFIGS[name], 0, device)
    seqlen = 9
    weights = model.attention_weights(random_ids(model.config, (2, seqlen), 0, device))
    assert len(weights) == model.config.num_layers
    rows = torch.arange(seqlen, device=device)
    distance = rows[:, None] - rows
    hidden = distance < 0
    if model.config.sliding_window is not None:
        hidden |= distance >= model.config.sliding_window
    for layer in weights:
        assert layer.shape == (2, model.config.num_heads, seqlen, seqlen)
        assert bool((layer[..., hidden] == 0).all()) and bool((layer[..., ~hidden] > 0).all())
        ones = torch.ones_like(layer[..., 0])
        assert float((layer.sum(-1) - ones).abs().max()) <= seqlen * torch.finfo(torch.float32).eps


def test_attention_weights_explain_the_output(device):
    """Probabilities times values, through the output projection, is what the layer gives."""
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        attention = make_model(CONFIGS["llama"], seed, device).model.layers[0].attention
        x = torch.randn(2, 7, CONFIGS["llama"].hidden_size, device=device)
        with torch.no_grad():
            actual, plain = attention(x), _output_from_weights(attention, x)
            golden = _output_from_weights(attention.double(), x.double())
        contract.add("output", actual=actual, plain=plain, golden=golden)
    contract.check()


def _output_from_weights(attention, x):
    values = attention.qkv_proj(x)[..., -attention.num_kv_heads * attention.head_dim :]
    values = values.unflatten(-1, (attention.num_kv_heads, attention.head_dim))
    values = values.repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=-2)
    attended = torch.einsum("bhqk,bkhd->bqhd", attention.weights(x), values)
    return attention.out_proj(attended.flatten(-2))
