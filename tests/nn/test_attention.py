"""Attention as a module of its own: shapes, defaults, errors; its results are compared in tests/model."""

from __future__ import annotations

import pytest
import torch

from pytransformer.nn import Attention, RotaryEmbedding
from pytransformer.verification import SEEDS, Contract


def test_as_torchs_multihead_attention(device):
    """The same weights in ``torch.nn.MultiheadAttention`` give the same output, causal or not."""
    for causal in (True, False):
        contract = Contract(torch.float32)
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            plain = torch.nn.MultiheadAttention(32, 4, batch_first=True, device=device).eval()
            ours = Attention(32, 4, causal=causal, device=device).eval()
            names = {"in_proj_weight": "qkv_proj.weight", "in_proj_bias": "qkv_proj.bias"}
            ours.load_state_dict({names.get(name, name): tensor for name, tensor in plain.state_dict().items()})
            x = torch.randn(2, 9, 32, device=device)
            mask = torch.nn.Transformer.generate_square_subsequent_mask(9, device=device, dtype=torch.float64)
            mask = mask if causal else None
            with torch.no_grad():
                actual = ours(x)
                expected = plain(x, x, x, attn_mask=None if mask is None else mask.float(), need_weights=False)[0]
                golden = plain.double()(x.double(), x.double(), x.double(), attn_mask=mask, need_weights=False)[0]
            contract.add("output", actual=actual, plain=expected, golden=golden)
        contract.check()


def test_shapes_of_the_weights(device):
    module = Attention(
        32, 6, num_kv_heads=2, head_dim=8, bias=False, qk_norm_eps=1e-6, rotary=RotaryEmbedding(8, 16), device=device
    )
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "qkv_proj.weight": (80, 32),
        "out_proj.weight": (32, 48),
        "q_norm.weight": (8,),
        "k_norm.weight": (8,),
    }
    assert module.to(device)(torch.randn(2, 5, 32, device=device)).shape == (2, 5, 32)
    assert "num_kv_heads=2" in repr(module)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads, got 4 and 3"):
        Attention(32, 4, num_kv_heads=3)
    with pytest.raises(
        ValueError, match="hidden_size must be a multiple of num_heads when head_dim is not given, got 30 and 4"
    ):
        Attention(30, 4)
    with pytest.raises(ValueError, match="head_dim"):
        Attention(32, 4, head_dim=12)(torch.zeros(1, 2, 32))
