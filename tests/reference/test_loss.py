"""The loss of a linear head against F.cross_entropy and its options' formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from pytransformer.reference import linear_cross_entropy

HIDDEN, VOCAB = 6, 11


def make(device, dtype=torch.float64, tokens=(3, 4)):
    x = torch.randn(*tokens, HIDDEN, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(VOCAB, dtype=dtype, device=device, requires_grad=True)
    targets = torch.randint(VOCAB, tokens, device=device)
    targets[0, 1] = targets[2, 3] = -100
    return x, weight, bias, targets


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_torch(reduction, label_smoothing, with_bias, device):
    x, weight, bias, targets = make(device)
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    loss = linear_cross_entropy(x, weight, targets, bias=bias if with_bias else None, **options)
    logits = F.linear(x, weight, bias if with_bias else None)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), **options).view_as(loss)
    assert_close(loss, expected)
    gradient = torch.randn_like(loss)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (x, weight), gradient, retain_graph=True),
        torch.autograd.grad(expected, (x, weight), gradient),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_ignore_index_may_be_a_token(device):
    x, weight, _, targets = make(device)
    targets = targets.clamp(min=0)
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=0)
    assert_close(linear_cross_entropy(x, weight, targets, ignore_index=0), expected)


def test_softcap_and_z_loss_equal_their_formulas(device):
    x, weight, _, targets = make(device)
    logits = 5 * torch.tanh(x @ weight.T / 5)
    lse = logits.logsumexp(-1)
    counted = targets != -100
    expected = F.cross_entropy(logits[counted], targets[counted]) + 0.01 * (lse[counted] ** 2).mean()
    assert_close(linear_cross_entropy(x, weight, targets, softcap=5.0, z_loss=0.01), expected)


def test_gradients_against_finite_differences(device):
    x, weight, bias, targets = make(device)
    options = {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.02}
    assert gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, targets, bias=b, **options), (x, weight, bias), fast_mode=True
    )


def test_ignored_tokens_get_no_loss_and_no_gradient(device):
    x, weight, _, targets = make(device)
    loss = linear_cross_entropy(x, weight, targets, reduction="none", z_loss=0.1)
    assert loss[0, 1] == 0 and loss[2, 3] == 0
    loss.sum().backward()
    assert not x.grad[0, 1].any() and not x.grad[2, 3].any()
    nothing = torch.full_like(targets, -100)
    assert linear_cross_entropy(x, weight, nothing, reduction="sum") == 0
    assert linear_cross_entropy(x, weight, nothing).isnan()  # as F.cross_entropy


def test_low_precision_gives_a_float32_loss(device):
    x, weight, _, targets = make(device, torch.bfloat16)
    loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, F.cross_entropy((x @ weight.T).float().flatten(0, 1), targets.flatten()))


def test_unknown_reduction_is_refused(device):
    x, weight, _, targets = make(device)
    with pytest.raises(ValueError, match='"mean", "sum" or "none", got \'avg\''):
        linear_cross_entropy(x, weight, targets, reduction="avg")
