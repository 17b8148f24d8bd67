"""LayerNorm and RMSNorm: torch's constructors, state_dict keys and results."""

from __future__ import annotations

import pytest
import torch

from pytransformer.nn import LayerNorm, RMSNorm
from pytransformer.verification import SEEDS, Contract

PAIRS = [
    (LayerNorm, torch.nn.LayerNorm, {}),
    (LayerNorm, torch.nn.LayerNorm, {"bias": False, "eps": 1e-3}),
    (LayerNorm, torch.nn.LayerNorm, {"elementwise_affine": False}),
    (RMSNorm, torch.nn.RMSNorm, {}),
    (RMSNorm, torch.nn.RMSNorm, {"eps": 1e-3}),
    (RMSNorm, torch.nn.RMSNorm, {"elementwise_affine": False}),
]


@pytest.mark.parametrize("shape", [48, (48,), (4, 12)], ids=str)
@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_same_constructor_keys_and_results_as_torch(ours, theirs, options, shape, device):
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        plain = theirs(shape, **options).to(device)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.normal_()
        actual = ours(shape, **options).to(device)
        assert list(actual.state_dict()) == list(plain.state_dict())
        actual.load_state_dict(plain.state_dict())
        x = torch.randn(3, 5, *plain.normalized_shape, device=device)
        golden = theirs(shape, **{"eps": actual.eps or torch.finfo(torch.float32).eps, **options}).to(device).double()
        golden.load_state_dict(plain.state_dict())
        contract.add("y", actual=actual(x), plain=plain(x), golden=golden(x.double()))
    contract.check()


@pytest.mark.parametrize("shape", [48, (4, 12)], ids=str)
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_a_residual_is_added_first_and_returned(kind, shape, device):
    norm = kind(shape).to(device)
    x = torch.randn(3, *norm.normalized_shape, device=device)
    residual = torch.randn_like(x)
    y, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm(total))


def test_weight_offset(device):
    """Gemma's weight is stored as a difference from 1."""
    x = torch.randn(3, 16, device=device)
    gemma = RMSNorm(16, weight_offset=1.0).to(device)
    assert not bool(gemma.weight.any()) and "weight_offset=1.0" in repr(gemma)
    assert torch.equal(gemma(x), RMSNorm(16).to(device)(x))


def test_a_wrong_shape_is_named(device):
    """With torch's exception."""
    with pytest.raises(RuntimeError, match=r"input must have a shape ending in \(4, 12\), got \(3, 12, 4\)"):
        LayerNorm((4, 12)).to(device)(torch.zeros(3, 12, 4, device=device))
    with pytest.raises(RuntimeError, match=r"input must have a shape ending in \(8,\), got \(8, 1\)"):
        RMSNorm(8).to(device)(torch.zeros(8, 1, device=device))
