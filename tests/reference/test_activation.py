"""Naive activations against closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from pytransformer.reference import geglu, gelu, swiglu

FORMULAS = {
    "none": lambda x: x * 0.5 * math.erfc(-x / math.sqrt(2)),
    "tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def make(device, shape=(3, 4, 10)):
    gate, up = 3 * torch.randn(2, *shape, dtype=torch.float64, device=device)
    return gate, up


@pytest.mark.parametrize("approximate", FORMULAS)
def test_gelu_equals_the_formula(approximate, device):
    gate, up = make(device)
    expected = torch.tensor([FORMULAS[approximate](x) for x in gate.flatten().tolist()], dtype=gate.dtype)
    expected = expected.view(gate.shape).to(device)
    assert_close(gelu(gate, approximate=approximate), expected)
    assert_close(geglu(gate, up, approximate=approximate), expected * up)


def test_swiglu_equals_the_formula(device):
    gate, up = make(device)
    assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("gated", [swiglu, geglu])
def test_one_tensor_holds_gate_then_up(gated, device):
    gate, up = make(device)
    assert_close(gated(torch.cat((gate, up), dim=-1)), gated(gate, up))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype, device):
    gate, up = (tensor.to(dtype) for tensor in make(device))
    assert {out.dtype for out in (swiglu(gate, up), geglu(gate, up), gelu(gate))} == {dtype}


def test_gradients(device):
    gate, up = (tensor[0].requires_grad_() for tensor in make(device, (2, 2, 4)))
    assert gradcheck(swiglu, (gate, up))
    assert gradcheck(swiglu, (gate,))
    for approximate in FORMULAS:
        assert gradcheck(lambda gate, up, form=approximate: geglu(gate, up, approximate=form), (gate, up))
        assert gradcheck(lambda gate, form=approximate: geglu(gate, approximate=form), (gate,))
        assert gradcheck(lambda x, form=approximate: gelu(x, approximate=form), (gate,))
