"""Weights in four bits: every code with every scale, against the formula and bit for bit against transformers."""

import pytest
import torch

from pytransformer.model.families.mxfp4 import dequantise_mxfp4

CODES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def every_byte():
    """All 256 pairs of codes under each of the 256 scales: blocks (256, 16, 16) and scales (256, 16)."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16)
    return blocks, torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16)


def test_every_code_with_every_scale_byte_is_the_formulas_number():
    numbers = dequantise_mxfp4(*every_byte())
    assert numbers.dtype == torch.bfloat16
    signed = [*CODES, *(-code for code in CODES)]
    pairs = [[signed[byte & 15], signed[byte >> 4]] for byte in range(256)]
    powers = torch.tensor([2.0 ** (byte - 127) for byte in range(256)], dtype=torch.float64)
    expected = (powers[:, None] * torch.tensor(pairs, dtype=torch.float64).flatten()).to(torch.bfloat16)
    # As bits: minus zero is one of the codes.
    assert torch.equal(numbers.view(torch.int16), expected.view(torch.int16))


def test_scales_254_and_255_are_powers_of_two_and_no_nan():
    blocks = torch.full((1, 16), 0x10, dtype=torch.uint8).repeat(2, 1)  # 0 and 0.5 in each byte
    numbers = dequantise_mxfp4(blocks, torch.tensor([254, 255], dtype=torch.uint8)).view(2, 32).double()
    assert numbers[0, :2].tolist() == [0.0, 2.0**126]
    assert numbers[1, :2].tolist() == [0.0, 2.0**127]


def test_the_lower_half_of_a_byte_comes_first():
    blocks = torch.full((1, 16), 0x72, dtype=torch.uint8)
    assert dequantise_mxfp4(blocks, torch.tensor([127], dtype=torch.uint8))[:4].tolist() == [1.0, 6.0, 1.0, 6.0]


def test_equal_to_transformers_bit_for_bit():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = every_byte()
    theirs = convert_moe_packed_tensors(blocks[None].contiguous(), scales[None].contiguous())[0].t()
    assert torch.equal(dequantise_mxfp4(blocks, scales).view(torch.int16), theirs.contiguous().view(torch.int16))


def test_more_groups_than_are_unpacked_at_a_time():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 30000, 1, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (3, 30000, 1), dtype=torch.uint8, generator=generator)
    whole = dequantise_mxfp4(blocks, scales)
    assert whole.shape == (3, 30000, 32)
    for row in (0, 5535, 5536, 29999):
        assert torch.equal(whole[2, row], dequantise_mxfp4(blocks[2, row], scales[2, row]))


def test_other_dtypes_and_shapes_are_refused():
    blocks, scales = torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"blocks must be uint8, got torch\.int8"):
        dequantise_mxfp4(blocks.to(torch.int8), scales)
    with pytest.raises(ValueError, match=r"got \(2, 16\) and \(3,\)"):
        dequantise_mxfp4(blocks, torch.zeros(3, dtype=torch.uint8))
