"""The naive grouped product against one linear layer for each row, closed forms and finite differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from pytransformer.reference import grouped_linear

OFFSETS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
GROUP_OF_ROW = (0, 0, 2, 2, 2)


def make(device):
    shapes = ((5, 4), (3, 6, 4), (3, 6))
    return [torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True) for shape in shapes]


def test_each_row_meets_the_weight_of_its_group(device):
    x, weight, bias = make(device)
    expected = torch.stack([weight[g] @ row + bias[g] for row, g in zip(x, GROUP_OF_ROW)])
    assert_close(grouped_linear(x, weight, OFFSETS.to(device), bias=bias), expected)
    assert_close(grouped_linear(x, weight, OFFSETS.to(device)), expected - bias[list(GROUP_OF_ROW)])


def test_one_group_is_a_linear_layer(device):
    x, weight, bias = make(device)
    offsets = torch.tensor([0, 5], dtype=torch.int32, device=device)
    assert_close(grouped_linear(x, weight[:1], offsets, bias=bias[:1]), F.linear(x, weight[0], bias[0]))


def test_gradients_by_finite_differences(device):
    assert gradcheck(lambda x, weight, bias: grouped_linear(x, weight, OFFSETS.to(device), bias=bias), make(device))


def test_no_rows(device):
    _, weight, _ = make(device)
    offsets = torch.zeros(4, dtype=torch.int32, device=device)
    assert grouped_linear(weight.new_zeros(0, 4), weight, offsets).shape == (0, 6)
