"""The feed-forward network: each activation's formula, both forms of weights."""

from __future__ import annotations

import math

import pytest
import torch

from pytransformer import use_backend
from pytransformer.nn import FeedForward
from pytransformer.nn.feed_forward import activate
from pytransformer.verification import SEEDS, Contract


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def clamped_swiglu(gate, up, limit, alpha):
    gate, up = (
        torch.where(gate > limit, limit, gate),
        torch.where(up > limit, limit, torch.where(up < -limit, -limit, up)),
    )
    return (up + 1) * gate / (1 + torch.exp(-alpha * gate))


FORMULAS = {
    "relu": lambda up: up * (up > 0),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "swiglu": lambda gate, up: gate / (1 + torch.exp(-gate)) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "geglu_tanh": lambda gate, up: gelu_tanh(gate) * up,
    "silu": lambda up: up / (1 + torch.exp(-up)),
    "reglu": lambda gate, up: gate * (gate > 0) * up,
    "swiglu_clamped": lambda gate, up: clamped_swiglu(gate, up, 7.0, 1.702),
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


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("activation", [name for name in FORMULAS if name != "relu"])
def test_gradients(activation, backend, device):
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module = FeedForward(8, 12, activation=activation, device=device)
        x = 2 * torch.randn(5, 8, device=device)
        dout = torch.randn(5, 8, device=device)
        gradients = []
        for dtype in (None, torch.float32, torch.float64):
            copy = module.to("cpu", dtype) if dtype else module
            leaf = x.to(next(copy.parameters())).requires_grad_()
            with use_backend(None if dtype else backend):
                out = by_formula(copy, leaf, dtype) if dtype else module(leaf)
            gradients.append(torch.autograd.grad(out, leaf, dout.to(out))[0])
        contract.add("grad x", actual=gradients[0], plain=gradients[1], golden=gradients[2], kind="gradient")
    contract.check()


def test_the_gradient_of_gate_and_up_is_written_at_once(device):
    """No addition or concatenation of two halves stands between the activation and its projection."""
    module = FeedForward(8, 12, activation="swiglu", device=device)
    with use_backend("triton"):
        out = module(torch.randn(5, 8, device=device, requires_grad=True))
    (activation, _), *_ = (edge for edge in out.grad_fn.next_functions if "activation_forward" in str(edge[0]))
    (projection, _), *_ = activation.next_functions
    assert projection.name() == "AddmmBackward0"


@pytest.mark.parametrize("activation", FORMULAS)
def test_runs_under_a_backend_without_activations(activation, device):
    module, x = FeedForward(8, 12, activation=activation, device=device), torch.randn(5, 8, device=device)
    with use_backend("torch"):
        expected = module(x)
    with use_backend("cuda"):
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "gelu"])
def test_compiles_whole(activation, device):
    module = FeedForward(8, 12, activation=activation, device=device)
    x = torch.randn(5, 8, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    (expected, actual) = (torch.autograd.grad(f(x).square().sum(), module.down_proj.weight) for f in (module, compiled))
    torch.testing.assert_close(actual, expected)


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
    with pytest.raises(ValueError, match=r"activation must be one of 'relu', .*, got 'selu'"):
        FeedForward(8, 8, activation="selu")


def test_limit_and_alpha_of_the_clamped_swiglu():
    """Beyond the limit neither gate nor up says more; a gate may be as far below 0 as it likes."""
    x = torch.tensor([[-5.0, -0.5, 0.5, 5.0, 2.0, 2.0, 5.0, -5.0]])
    expected = clamped_swiglu(x[:, :4], x[:, 4:], 1.5, 0.7)
    torch.testing.assert_close(activate(x, "swiglu_clamped", limit=1.5, alpha=0.7), expected)
    assert not torch.equal(activate(x, "swiglu_clamped"), expected)
    module = FeedForward(4, 4, activation="swiglu_clamped", activation_limit=1.5, activation_alpha=0.7)
    inner = activate(module.gate_up_proj(x[:, :4]), "swiglu_clamped", 1.5, 0.7)
    torch.testing.assert_close(module(x[:, :4]), module.down_proj(inner))


@pytest.mark.parametrize("name", ["activation_limit", "activation_alpha"])
def test_limit_and_alpha_are_above_0(name):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got -1.0"):
        FeedForward(8, 8, activation="swiglu_clamped", **{name: -1.0})
