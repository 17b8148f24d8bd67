"""Positions other than RoPE: T5's buckets, Falcon's ALiBi and RoBERTa's positions as transformers computes them, ALiBi's meaning."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers.models.falcon.modeling_falcon import build_alibi_tensor
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings
from transformers.models.t5.modeling_t5 import T5Attention

from pytransformer.reference import alibi_bias_of_keys, relative_bucket, sinusoidal_positions, standard_alibi_slopes
from pytransformer.reference.positions import positions_without_padding


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (12, 1000), (64, 65)])
def test_buckets_equal_t5(buckets, max_distance, bidirectional, device):
    """At every distance up to twice the largest, the borders of the logarithm's bins included."""
    distance = torch.arange(-2 * max_distance, 2 * max_distance + 1, device=device)
    ours = relative_bucket(distance, num_buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    theirs = T5Attention._relative_position_bucket(
        -distance, bidirectional=bidirectional, num_buckets=buckets, max_distance=max_distance
    )
    assert torch.equal(ours, theirs)
    assert ours.min() == 0 and ours.max() == buckets - 1


def test_buckets_of_eight_by_hand():
    """Four for each direction: 0, 1, then 2 and 3, 4 and beyond where the largest distance is 6 (2 · 3^(1/2) = 3.5 is the border)."""
    distance = torch.arange(-7, 8)
    buckets = relative_bucket(distance, num_buckets=8, max_distance=6, bidirectional=True)
    assert buckets.tolist() == [7, 7, 7, 7, 6, 6, 5, 0, 1, 2, 2, 3, 3, 3, 3]
    causal = relative_bucket(distance, num_buckets=4, max_distance=6, bidirectional=False)
    assert causal.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("num_heads", [4, 6])
def test_alibi_of_keys_equals_falcon(num_heads, device):
    """Bit by bit, beyond position 256, where bfloat16 has no odd numbers any more, and with padding in front."""
    mask = torch.ones(2, 300, dtype=torch.int64, device=device)
    mask[1, :40] = 0
    theirs = build_alibi_tensor(mask, num_heads, torch.float32).view(2, num_heads, 1, 300)
    positions = (mask.cumsum(-1) - 1) * mask
    ours = alibi_bias_of_keys(standard_alibi_slopes(num_heads).to(device), positions, 1.0)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    assert torch.equal(alibi_bias_of_keys(standard_alibi_slopes(num_heads).to(device), positions, 0.5), 0.5 * theirs)


def test_alibi_of_keys_is_alibi_up_to_a_constant_for_each_row_and_rounding(device):
    slopes = standard_alibi_slopes(8).to(device)
    keys = torch.arange(40, device=device)
    by_key = alibi_bias_of_keys(slopes, keys[None], 1.0)[0]
    distance = keys[:, None] - keys
    difference = by_key + slopes[:, None, None] * distance  # slope · position of the query, once rounded
    rounding = torch.finfo(torch.bfloat16).eps / 2 * slopes[:, None, None] * keys
    assert bool(((difference - slopes[:, None, None] * keys[:, None]).abs() <= rounding + 1e-6).all())


def test_positions_without_padding_equal_roberta(device):
    ids = torch.tensor([[5, 6, 1, 7, 1], [1, 1, 8, 9, 4]], device=device)
    theirs = RobertaEmbeddings.create_position_ids_from_input_ids(ids, 1)
    assert torch.equal(positions_without_padding(ids, 1) + 2, theirs)
    assert positions_without_padding(ids, 1).tolist() == [[0, 1, -1, 2, -1], [-1, -1, 0, 1, 2]]


def test_halves_are_marians_table():
    theirs = MarianSinusoidalPositionalEmbedding(30, 12)
    assert_close(sinusoidal_positions(30, 12, halves=True), theirs.create_weight())
    interleaved = sinusoidal_positions(30, 12)
    assert torch.equal(
        sinusoidal_positions(30, 12, halves=True), torch.cat([interleaved[:, 0::2], interleaved[:, 1::2]], 1)
    )
