"""Tables of positions: float32 in every model, and never in the state_dict."""

from __future__ import annotations

import pytest
import torch

from pytransformer.nn import AlibiSlopes, RotaryEmbedding, SinusoidalPositions
from pytransformer.reference import rope, rope_tables, sinusoidal_positions, standard_alibi_slopes

MODULES = {
    "rotary": lambda device=None: RotaryEmbedding(8, 16, base=500.0, device=device),
    "alibi": lambda device=None: AlibiSlopes(6, device=device),
    "sinusoidal": lambda device=None: SinusoidalPositions(16, 12, device=device),
}


@pytest.mark.parametrize("name", MODULES)
def test_tables_follow_the_device_but_not_the_dtype(name, device):
    module = MODULES[name]()
    before = {key: table.clone() for key, table in module.named_buffers()}
    assert before and not module.state_dict()
    for moved in (module.half(), module.to(device), module.to(torch.bfloat16), module.double()):
        for key, table in moved.named_buffers():
            assert table.dtype == torch.float32 and torch.equal(table.cpu(), before[key])
    assert all(table.device.type == device.type for table in module.to(device).buffers())


@pytest.mark.parametrize("name", MODULES)
def test_tables_are_made_again_after_the_meta_device(name, device):
    there = MODULES[name]("meta")
    assert all(table.is_meta for table in there.half().buffers())
    made = there.to_empty(device=device)
    for actual, expected in zip(made.buffers(), MODULES[name]().buffers()):
        assert torch.equal(actual.cpu(), expected)
    with torch.device("meta"):
        assert all(table.is_meta for table in MODULES[name]().buffers())


def test_rotary_rotates_as_the_reference(device):
    module = RotaryEmbedding(8, 16, base=500.0, interleaved=True).to(device)
    cos, sin = rope_tables(8, 16, base=500.0, device=device)
    q, k = torch.randn(2, 5, 4, 16, device=device), torch.randn(2, 5, 2, 16, device=device)
    offsets = torch.tensor([3, 9], device=device)
    for options in ({}, {"offsets": offsets}, {"positions": torch.tensor([4, 4, 0, 15, 2], device=device)}):
        expected_q, expected_k = rope(q.double(), k.double(), cos.double(), sin.double(), interleaved=True, **options)
        actual_q, actual_k = module(q, k, **options)
        # Two products and a sum per feature: half an ulp each, on numbers of at most |x_i| + |x_j|.
        bound = 2 * torch.finfo(torch.float32).eps * float(q.abs().max() + k.abs().max())
        assert float((actual_q - expected_q).abs().max()) <= bound
        assert float((actual_k - expected_k).abs().max()) <= bound
    assert "interleaved=True" in repr(module)


def test_sinusoidal_and_alibi_are_the_published_tables(device):
    sinusoidal = SinusoidalPositions(16, 12).to(device)
    positions = torch.tensor([[3, 0], [15, 7]], device=device)
    assert torch.equal(sinusoidal(positions), sinusoidal_positions(16, 12, device=device)[positions])
    assert torch.equal(AlibiSlopes(6).slopes, standard_alibi_slopes(6))
