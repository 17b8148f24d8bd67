"""The naive mixture of experts: its formula token by token, its losses by hand and as transformers computes them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pytransformer import TransformerConfig
from pytransformer.reference import Transformer, load_balancing_loss, router_z_loss
from pytransformer.reference.experts import Experts

HIDDEN, WIDTH, EXPERTS = 8, 6, 5


def make_config(**changes):
    choices = {
        "vocab_size": 20, "hidden_size": HIDDEN, "num_layers": 2, "num_heads": 2, "intermediate_size": WIDTH, "num_experts": EXPERTS,
        "experts_per_token": 2, "mlp_bias": False, "norm": "rms_norm", "activation": "swiglu",
    }  # fmt: skip
    return TransformerConfig(**{**choices, **changes})


def make_experts(device, **changes):
    experts = Experts(make_config(**changes)).double().to(device)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return experts


CHOICES = {
    "renormalised": {},
    "not renormalised": {"norm_topk_prob": False},
    "one expert": {"experts_per_token": 1, "norm_topk_prob": False},
    "all experts": {"experts_per_token": EXPERTS},
    "plain, biases": {"activation": "gelu", "mlp_bias": True, "router_bias": True},
    "clamped, biases": {"activation": "swiglu_clamped", "activation_limit": 0.5, "mlp_bias": True},
    "shared": {"shared_expert_size": 7},
    "shared, gated": {"shared_expert_size": 7, "shared_expert_gate": True, "mlp_bias": True},
}


@pytest.mark.parametrize("name", CHOICES)
def test_formula_token_by_token(name, device):
    experts = make_experts(device, **CHOICES[name])
    config, weights = experts.config, dict(experts.named_parameters())
    x = torch.randn(2, 4, HIDDEN, dtype=torch.float64, device=device)
    y, logits = experts(x)
    assert_close(logits, F.linear(x, weights["router.weight"], weights.get("router.bias")))

    def feed(token, first, first_bias, second, second_bias):
        inner = first @ token + (0 if first_bias is None else first_bias)
        half = len(inner) // 2
        gate, up = inner[:half], inner[half:]
        if config.activation == "gelu":
            inner = F.gelu(inner)
        elif config.activation == "swiglu":
            inner = F.silu(gate) * up
        else:
            gate, up = gate.clamp(max=0.5), up.clamp(-0.5, 0.5)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return second @ inner + (0 if second_bias is None else second_bias)

    names = ("up_proj", "up_bias") if config.activation == "gelu" else ("gate_up_proj", "gate_up_bias")
    for place in ((0, 0), (0, 3), (1, 2)):
        token, p = x[place], (logits[place].exp() / logits[place].exp().sum()).detach()
        chosen = sorted(range(EXPERTS), key=lambda e: -float(p[e]))[: config.experts_per_token]
        total = sum(p[e] for e in chosen) if config.norm_topk_prob else 1.0
        expected = torch.zeros_like(token)
        for e in chosen:
            parts = [weights.get(f"experts.{part}") for part in (*names, "down_proj", "down_bias")]
            expected += p[e] / total * feed(token, *(None if part is None else part[e] for part in parts))
        if config.shared_expert_size:
            shared = [weights.get(f"shared_expert.{part}") for part in ("gate_up_proj.weight", "gate_up_proj.bias")]
            shared += [weights.get(f"shared_expert.{part}") for part in ("down_proj.weight", "down_proj.bias")]
            gate = torch.sigmoid(weights["shared_expert_gate.weight"][0] @ token) if config.shared_expert_gate else 1.0
            expected += gate * feed(token, *shared)
        assert_close(y[place], expected)


def test_the_router_decides_in_float32(device):
    """bfloat16 logits that are equal after rounding of their softmax in bfloat16 still give float32 weights."""
    experts = make_experts(device).bfloat16()
    y, logits = experts(torch.randn(2, 3, HIDDEN, device=device).bfloat16())
    assert y.dtype == logits.dtype == torch.bfloat16
    single = load_balancing_loss([logits], 2)
    assert single.dtype == torch.float32
    assert_close(single, load_balancing_loss([logits.float()], 2), rtol=0.0, atol=0.0)


def test_balancing_loss_by_hand(device):
    """Even routing gives k, all tokens to the same expert with certainty E, and each layer counts by itself."""
    even = torch.eye(EXPERTS, dtype=torch.float64, device=device)[None] * 1000.0
    assert_close(float(load_balancing_loss([even], 1)), 1.0)
    assert_close(float(load_balancing_loss([torch.zeros_like(even)], 2)), 2.0)
    collapsed = torch.zeros(1, EXPERTS, EXPERTS, dtype=torch.float64, device=device)
    collapsed[..., 3] = 1000.0
    other = collapsed.roll(1, dims=-1)
    assert_close(float(load_balancing_loss([collapsed], 1)), float(EXPERTS))
    # As one layer the two would look like a load on two experts, and cost half.
    assert_close(float(load_balancing_loss([collapsed, other], 1)), float(EXPERTS))
    assert_close(float(load_balancing_loss([torch.cat([collapsed, other])], 1)), EXPERTS / 2)

    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], dtype=torch.float64, device=device)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    expected = 3 * (0.5 * p[:, 0].mean() + 1.0 * p[:, 1].mean() + 0.5 * p[:, 2].mean())  # experts 0 and 1, then 1 and 2
    assert_close(load_balancing_loss([logits[None]], 2), expected)
    lse = torch.stack([torch.log(sum(logits[t, e].exp() for e in range(3))) for t in range(2)])
    assert_close(router_z_loss([logits[None], 0 * logits[None]]), ((lse**2).mean() + math.log(3) ** 2) / 2)


def test_losses_of_a_layer_equal_transformers_and_leave_out_padding(device):
    logits = torch.randn(2, 7, EXPERTS, device=device)
    mask = torch.ones(2, 7, dtype=torch.int64, device=device)
    mask[1, 4:] = 0
    for attention_mask in (None, mask):
        theirs = load_balancing_loss_func((logits.flatten(0, 1),), EXPERTS, 2, attention_mask)
        assert_close(load_balancing_loss([logits], 2, attention_mask), theirs)
        assert_close(load_balancing_loss([logits.flatten(0, 1)], 2, attention_mask), theirs)
    real = torch.cat([logits[0], logits[1, :4]])[None]
    assert_close(router_z_loss([logits], mask), router_z_loss([real]))
    assert_close(load_balancing_loss([logits], 2, mask), load_balancing_loss([real], 2))


def test_balancing_loss_pulls_apart_through_the_probabilities(device):
    """A step against its gradient lowers it: the router of a model learns from it."""
    model = Transformer(make_config(dense_layers=(0,))).double().to(device)
    ids = torch.randint(20, (2, 6), device=device)
    logits: list[torch.Tensor] = []
    model(ids, router_logits=logits)
    assert [tuple(layer.shape) for layer in logits] == [(2, 6, EXPERTS)]
    loss = load_balancing_loss(logits, 2) + 0.1 * router_z_loss(logits)
    router = model.model.layers[1].feed_forward.router
    (gradient,) = torch.autograd.grad(loss, router.weight)
    with torch.no_grad():
        router.weight -= 1e-3 * gradient
        after: list[torch.Tensor] = []
        model(ids, router_logits=after)
    assert float(load_balancing_loss(after, 2) + 0.1 * router_z_loss(after)) < float(loss.detach())


def test_names_of_the_weights():
    names = {
        name: tuple(value.shape)
        for name, value in Experts(make_config(mlp_bias=True, router_bias=True)).state_dict().items()
    }
    assert names == {
        "router.weight": (EXPERTS, HIDDEN),
        "router.bias": (EXPERTS,),
        "experts.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN),
        "experts.gate_up_bias": (EXPERTS, 2 * WIDTH),
        "experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
        "experts.down_bias": (EXPERTS, HIDDEN),
    }
    plain = Experts(make_config(activation="relu", shared_expert_size=7, shared_expert_gate=True)).state_dict()
    assert tuple(plain["experts.up_proj"].shape) == (EXPERTS, WIDTH, HIDDEN)
    assert tuple(plain["shared_expert.up_proj.weight"].shape) == (7, HIDDEN)
    assert tuple(plain["shared_expert_gate.weight"].shape) == (1, HIDDEN)
