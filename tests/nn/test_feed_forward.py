"""The feed-forward network: each activation's formula, both forms of weights."""

from __future__ import annotations

import math

import pytest
import torch

from pytransformer.nn import FeedForward
from pytransformer.verification import SEEDS, Contract


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMULAS = {
    "relu": lambda up: up * (up > 0),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "geglu_tanh": lambda gate, up: gelu_tanh(gate) * up,
}


def by_formula(module, x, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in module.state_dict().items()}
    gated = "gate_up_proj.weight" in weights
    first = "gate_up_proj" if gated else "up_proj"
    inner = x.to(dtype) @ weights[f"{first}.weight"].T + weights[f"{first}.bias"]
    inner = FORMULAS[module.activation](*(inner.chunk(2, dim=-1) if gated else (inner,)))
    return inner @ weights["down_proj.weight"].T + weights["down_proj.bias"]


@pytest.mark.parametrize("activation", FORMULAS)
def test_formula(activation, device):
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module = FeedForward(24, 40, activation=activation, device=device).eval()
        x = 3 * torch.randn(5, 24, device=device)
        contract.add(
            "y",
            actual=module(x),
            plain=by_formula(module, x, torch.float32),
            golden=by_formula(module, x, torch.float64),
        )
    contract.check()


def test_weights_and_dropout(device):
    gated = FeedForward(24, 40, activation="swiglu", bias=False, dropout=0.5, device=device)
    assert {name: tuple(t.shape) for name, t in gated.state_dict().items()} == {
        "gate_up_proj.weight": (80, 24),
        "down_proj.weight": (24, 40),
    }
    x = torch.randn(3, 24, device=device)
    assert not torch.equal(gated(x), gated(x))
    gated.eval()
    assert torch.equal(gated(x), gated(x))


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"activation must be 'relu', .*, got 'selu'"):
        FeedForward(8, 8, activation="selu")
