"""Vectors of distances in attention, against the formula written out."""

from __future__ import annotations

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.nn import Attention, RelativeKeys


@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("seqlen", [1, 2, 7])
def test_scores_and_gradients(with_keys, seqlen):
    torch.manual_seed(0)
    keys = RelativeKeys(7, 4, with_keys=with_keys, dtype=torch.float64)
    q, k = (torch.randn(2, seqlen, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    places = torch.arange(seqlen)
    rows = keys.weight[places[:, None] - places + 6]
    expected = torch.einsum("bqhd,qkd->bhqk", q, rows)
    if with_keys:
        expected = expected + torch.einsum("bkhd,qkd->bhqk", k, rows)
    scores = keys.scores(q, k)
    torch.testing.assert_close(scores, expected)
    direction = torch.randn_like(scores)
    inputs = (q, k, keys.weight) if with_keys else (q, keys.weight)
    actual = torch.autograd.grad((scores * direction).sum(), inputs)
    torch.testing.assert_close(actual, torch.autograd.grad((expected * direction).sum(), inputs))


@torch.no_grad()
def test_they_join_the_scores_before_the_scale():
    torch.manual_seed(0)
    keys = RelativeKeys(5, 8)
    attention = Attention(16, 2, causal=False, softmax_scale=0.3, relative_keys=keys)
    x, bias = torch.randn(2, 5, 16), torch.randn(1, 2, 5, 5)
    q, k, _ = attention.qkv_proj(x).unflatten(-1, (6, 8)).split(2, dim=-2)
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, k) + keys.scores(q, k)) * 0.3 + bias
    torch.testing.assert_close(attention.weights(x, bias=bias), scores.softmax(dim=-1))


def test_they_are_for_whole_sequences_and_as_many_key_heads():
    keys = RelativeKeys(5, 8)
    with pytest.raises(ValueError, match="num_kv_heads"):
        Attention(16, 2, num_kv_heads=1, relative_keys=keys)
    with pytest.raises(ValueError, match="relative_keys"):
        Attention(16, 2, memory_size=16, relative_keys=keys)
    attention = Attention(16, 2, causal=False, relative_keys=keys)
    with pytest.raises(ValueError, match="relative_keys"):
        attention(torch.zeros(1, 2, 16), cache=object())
    with pytest.raises(ValueError, match="relative_keys"):
        attention(torch.zeros(1, 2, 16), torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="relative_key_query"):
        TransformerConfig.bert(num_kv_heads=1, positions="relative_key_query")
    with pytest.raises(ValueError, match="relative_key"):
        TransformerConfig.gpt2(positions="relative_key")
