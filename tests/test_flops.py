"""The FLOP that torch's counter sees in our ops: as many as in the same computation written with torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import pytransformer
import pytransformer.flops
from pytransformer import reference


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def draw(device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


@pytest.mark.parametrize("value_dim", [16, 24])
def test_attention_counts_what_plain_products_count(value_dim: int, device):
    q, k, v = draw(device, 2, 9, 4, 16), draw(device, 2, 12, 2, 16), draw(device, 2, 12, 2, value_dim)

    def run(attention, **options):
        attention(q, k, v, causal=True, **options).sum().backward()

    ours = count(lambda: run(pytransformer.attention, backend="triton"))
    # The backward pass computes the scores again; heads do not share products.
    scores, values = 2 * 2 * 4 * 9 * 12 * 16, 2 * 2 * 4 * 9 * 12 * value_dim
    assert ours == (scores + values) + (3 * scores + 2 * values)
    assert count(lambda: run(reference.attention)) == 3 * (scores + values)


def test_packed_attention_counts_the_pairs_of_each_sequence(device):
    q = torch.randn(7, 2, 16, device=device)
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=device)
    options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "backend": "triton"}
    assert count(lambda: pytransformer.attention(q, q, q, **options)) == 4 * 2 * 16 * (3 * 3 + 4 * 4)


def test_decode_attention_counts_the_keys_that_are_there(device):
    q, cache = torch.randn(2, 1, 4, 16, device=device), torch.randn(2, 32, 2, 16, device=device)
    cache_seqlens = torch.tensor([5, 9], dtype=torch.int32, device=device)
    counted = count(lambda: pytransformer.decode_attention(q, cache, cache, cache_seqlens, backend="triton"))
    assert counted == 4 * 4 * 16 * (5 + 9)


def test_linear_attention_counts_as_a_recurrence(device):
    q, k, v = draw(device, 1, 9, 4, 16), draw(device, 1, 9, 2, 16), draw(device, 1, 9, 2, 8)
    of_queries, of_keys = 2 * 9 * 4 * 16 * 8, 2 * 9 * 2 * 16 * 8

    def run():
        return pytransformer.linear_attention(q, k, v, backend="triton")

    assert count(run) == of_queries + of_keys
    assert count(lambda: run().sum().backward()) == 3 * of_queries + 4 * of_keys


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_linear_head_counts_as_the_unfused_one(reduction: str, device):
    x, weight = draw(device, 6, 16), draw(device, 11, 16)
    targets = torch.arange(6, device=device)

    def plain():
        F.cross_entropy(x @ weight.T, targets, reduction=reduction).sum().backward()

    def fused():
        pytransformer.linear_cross_entropy(x, weight, targets, reduction=reduction).sum().backward()

    again = 2 * 6 * 16 * 11 if reduction == "none" else 0  # the backward pass computes the logits again
    assert count(fused) == count(plain) + again


def test_a_quantised_layer_counts_as_if_it_were_not():
    x, codes, scale = torch.randn(7, 64, requires_grad=True), torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2)
    forward = 2 * 7 * 64 * 8
    assert count(lambda: pytransformer.quantized_linear(x, codes, scale)) == forward
    assert count(lambda: pytransformer.quantized_linear(x, codes, scale).sum().backward()) == 2 * forward


def test_a_grouped_product_counts_that_of_each_row():
    x, weight = torch.randn(7, 16, requires_grad=True), torch.randn(3, 8, 16, requires_grad=True)
    offsets = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    forward = 2 * 7 * 16 * 8
    assert count(lambda: pytransformer.grouped_linear(x, weight, offsets)) == forward
    assert count(lambda: pytransformer.grouped_linear(x, weight, offsets).sum().backward()) == 3 * forward
    assert count(lambda: pytransformer.grouped_linear(x.detach(), weight, offsets).sum().backward()) == 2 * forward
