"""quantized_linear of the reference: codes written out by hand, torch's own linear layer, gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.testing import assert_close

from pytransformer.reference import dequantize, quantized_linear


def test_codes_of_8_bits_are_multiplied_by_the_scale_of_their_row():
    codes = torch.tensor([[-128, 0, 127], [1, 2, 3]], dtype=torch.int8)
    scale = torch.tensor([0.5, 2.0])
    assert torch.equal(dequantize(codes, scale), torch.tensor([[-64.0, 0.0, 63.5], [2.0, 4.0, 6.0]]))


def test_codes_of_4_bits_lie_in_the_halves_of_a_groups_bytes():
    columns = torch.arange(64) % 16  # column j holds j mod 16, in two groups of 32
    low, high = columns.view(2, 2, 16).unbind(1)
    weight = (low + 16 * high).view(1, 32).to(torch.uint8)
    scale, zero = torch.tensor([[1.0, 0.5]]), torch.tensor([[0, 15]], dtype=torch.uint8)
    expected = columns.float()
    assert torch.equal(dequantize(weight, scale, zero)[0], torch.cat((expected[:32], (expected[32:] - 15) / 2)))
    assert torch.equal(dequantize(weight, scale)[0], torch.cat((expected[:32] - 8, (expected[32:] - 8) / 2)))


def test_it_is_a_linear_layer_and_differentiable(device):
    codes = torch.randint(-128, 128, (6, 4), dtype=torch.int8, device=device)
    scale, x, bias = (torch.randn(*shape, dtype=torch.float64, device=device) for shape in ((6,), (2, 3, 4), (6,)))
    y = quantized_linear(x, codes, scale, bias=bias)
    assert_close(y, F.linear(x, codes.double() * scale[:, None], bias))
    leaves = [tensor.requires_grad_() for tensor in (x, scale, bias)]
    assert gradcheck(lambda x, scale, bias: quantized_linear(x, codes, scale, bias=bias), leaves)
