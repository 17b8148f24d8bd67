"""The bound decode step: the same bits as through the modules, and only where nothing asks for the modules."""

from __future__ import annotations

import pytest
import torch

from pytransformer import TransformerConfig, use_backend
from pytransformer.generation import bound, generate
from pytransformer.nn.packed_weight import why_not_packed
from pytransformer.verification import SEEDS, Contract
from tests.model.configs import CONFIGS, make_model, make_twin, random_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")
CPU = torch.device("cpu")  # binding is for CPUs alone
WIDE = {"vocab_size": 300, "hidden_size": 256, "num_layers": 1, "num_heads": 4, "max_seqlen": 32}
PACKED = {"gpt2": TransformerConfig.gpt2(**WIDE), "llama": TransformerConfig.llama(**WIDE, num_kv_heads=2)}


def all_logits(model, prompts, new_tokens=10, pack_weights=False):
    """(new tokens, batch, vocab_size)."""
    found = []
    generate(model, prompts, new_tokens, pack_weights=pack_weights, callback=lambda step: found.append(step.logits))
    return torch.stack(found)


@pytest.mark.parametrize("lengths", [(5, 5), (3,), (2, 9, 5)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bits_as_through_the_modules(name, lengths, monkeypatch):
    model = make_model(CONFIGS[name], 0, CPU)
    prompts = [random_ids(model.config, (length,), length, CPU) for length in lengths]
    with torch.no_grad():
        assert bound.why_not_bound(model) is None
    actual = all_logits(model, prompts)
    monkeypatch.setattr(bound, "why_not_bound", lambda model: "not now")
    assert torch.equal(actual, all_logits(model, prompts))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_give_the_logits_of_the_full_forward(name, batch):
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        model = make_model(PACKED[name], seed, CPU)
        ids = random_ids(model.config, (batch, 4), seed, CPU)
        actual = all_logits(model, ids, 8, pack_weights=True)
        ids = torch.cat([ids, actual.argmax(-1).T], dim=1)
        assert model.lm_head.is_packed or why_not_packed(model.lm_head.weight) is not None
        plain, golden = make_twin(model)(ids[:, :-1]), make_twin(model, torch.float64)(ids[:, :-1])
        contract.add("logits", actual=actual.transpose(0, 1), plain=plain[:, 3:], golden=golden[:, 3:])
    contract.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_too(dtype, monkeypatch):
    model = make_model(CONFIGS["llama"], 0, CPU, dtype)
    prompts = [random_ids(model.config, (4,), 0, CPU)]
    actual = all_logits(model, prompts)
    monkeypatch.setattr(bound, "why_not_bound", lambda model: "not now")
    assert torch.equal(actual, all_logits(model, prompts))


@torch.no_grad()
def test_what_needs_the_modules_gets_them():
    model = make_model(CONFIGS["llama"], 0, CPU)
    assert bound.bind(model)[0] is not model.model
    with use_backend("reference"):
        assert bound.bind(model) == (model.model, model.lm_head)
    with torch.enable_grad():
        assert "autograd" in bound.why_not_bound(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in bound.why_not_bound(model)
    assert "training" in bound.why_not_bound(make_model(CONFIGS["llama"], 0, CPU).train())
    assert bound.why_not_bound(make_model(CONFIGS["llama"], 0, torch.device("meta"))).startswith("binding is for CPUs")
    model.model.norm.double()
    assert "several dtypes" in bound.why_not_bound(model)


@torch.no_grad()
def test_hooks_are_called_for_every_token():
    model = make_model(CONFIGS["gpt2"], 0, CPU)
    ids = random_ids(model.config, (1, 4), 0, CPU)
    calls = []
    handle = model.model.layers[1].feed_forward.register_forward_hook(lambda *arguments: calls.append(1))
    assert bound.why_not_bound(model) == "a forward hook is set on a FeedForward"
    model.generate(ids, 5)
    assert len(calls) == 5
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    assert bound.why_not_bound(model) == "a global module hook is set"
    handle.remove()
    assert bound.why_not_bound(model) is None


def test_a_subclass_keeps_its_own_forward():
    model = make_model(CONFIGS["gpt2"], 0, CPU)
    block = model.model.layers[0]
    calls = []

    class Counting(type(block.feed_forward)):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    expected = model.generate(random_ids(model.config, (1, 4), 0, CPU), 5)
    block.feed_forward.__class__ = Counting
    assert torch.equal(model.generate(random_ids(model.config, (1, 4), 0, CPU), 5), expected)
    assert len(calls) == 5


@torch.no_grad()
def test_a_forward_that_one_module_was_given_is_called():
    """As accelerate and others do it, who wrap ``module.forward``."""
    model = make_model(CONFIGS["llama"], 0, CPU)
    ids = random_ids(model.config, (1, 4), 0, CPU)
    layer, calls = model.model.layers[0].feed_forward, []
    before = layer.forward
    layer.forward = lambda *arguments, **options: calls.append(1) or before(*arguments, **options)
    assert bound.why_not_bound(model) == "a FeedForward has been given a forward of its own"
    model.generate(ids, 5)
    assert len(calls) == 5
    del layer.forward
    assert bound.why_not_bound(model) is None
