"""Naive norms against torch's, finite differences and the rounding rules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from pytransformer.reference import layer_norm, rms_norm

WIDTH = 12


def make(device, dtype=torch.float64):
    x, residual = torch.randn(2, 3, 5, WIDTH, dtype=dtype, device=device) * 3 + 1
    weight, bias = torch.randn(2, WIDTH, dtype=dtype, device=device)
    return x, residual, weight, bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_layer_norm_equals_torch(dtype, eps, device):
    x, _, weight, bias = make(device, dtype)
    assert_close(layer_norm(x, weight, bias, eps=eps), F.layer_norm(x, (WIDTH,), weight, bias, eps))
    assert_close(layer_norm(x, weight, eps=eps), F.layer_norm(x, (WIDTH,), weight, None, eps))
    assert_close(layer_norm(x, eps=eps), F.layer_norm(x, (WIDTH,), eps=eps))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm_equals_torch(dtype, eps, device):
    x, _, weight, _ = make(device, dtype)
    assert_close(rms_norm(x, weight, eps=eps), F.rms_norm(x, (WIDTH,), weight, eps))
    assert_close(rms_norm(x, eps=eps), F.rms_norm(x, (WIDTH,), eps=eps))
    assert_close(rms_norm(x, weight, eps=eps, weight_offset=1.0), F.rms_norm(x, (WIDTH,), weight + 1, eps))


def test_residual_returns_the_sum_and_normalises_it(device):
    x, residual, weight, bias = make(device)
    y, total = layer_norm(x, weight, bias, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, layer_norm(x + residual, weight, bias))
    y, total = rms_norm(x, weight, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight))


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("residual_dtype", [torch.bfloat16, torch.float32])
def test_16_bit_arithmetic_is_float32_rounded_once(norm, residual_dtype, device):
    x, residual, weight, _ = make(device, torch.float32)
    x, residual = x.to(torch.bfloat16), residual.to(residual_dtype)
    y = norm(x, weight)
    assert y.dtype == torch.bfloat16 and torch.equal(y, norm(x.float(), weight).to(torch.bfloat16))
    y, total = norm(x, weight, residual=residual)
    assert total.dtype == residual_dtype
    assert torch.equal(total, (x.float() + residual.float()).to(residual_dtype))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, norm(total.float(), weight).to(torch.bfloat16))  # the rounded sum is what is normalised


@pytest.mark.parametrize("residual", [False, True])
def test_layer_norm_gradients(residual, device):
    x, added, weight, bias = (tensor[..., :5].detach().requires_grad_() for tensor in make(device))
    if residual:
        assert gradcheck(lambda x, w, b, r: layer_norm(x, w, b, residual=r), (x[:1], weight, bias, added[:1]))
    else:
        assert gradcheck(layer_norm, (x[:1], weight, bias))


@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm_gradients(residual, device):
    x, added, weight, _ = (tensor[..., :5].detach().requires_grad_() for tensor in make(device))
    if residual:
        assert gradcheck(lambda x, w, r: rms_norm(x, w, weight_offset=1.0, residual=r), (x[:1], weight, added[:1]))
    else:
        assert gradcheck(rms_norm, (x[:1], weight))


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_constant_and_single_feature_rows_are_finite(norm, device):
    assert norm(torch.zeros(2, WIDTH, device=device)).isfinite().all()
    assert norm(torch.full((2, 1), 5.0, device=device)).isfinite().all()
    assert norm(torch.zeros(0, WIDTH, device=device)).shape == (0, WIDTH)
