"""QuantizedLinear: codes by rounding, the layer against the weight its codes stand for, the packed product, moving and copying."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from pytransformer.nn import Linear, QuantizedLinear, RowBlocks, packed_codes
from pytransformer.nn.packed_codes import why_not_packed
from pytransformer.nn.quantized import round_to_nearest
from pytransformer.reference import dequantize
from pytransformer.verification import Contract

KINDS = [(8, 64), (4, 32), (4, 64)]
packs = pytest.mark.skipif(
    why_not_packed(torch.zeros(16, 64, dtype=torch.int8)) is not None, reason="this torch has no 4-bit kernel here"
)


def draw(bits: int, group_size: int, features: tuple[int, int] = (128, 40)) -> tuple[Linear, QuantizedLinear]:
    torch.manual_seed(0)
    linear = Linear(*features)
    return linear, QuantizedLinear.of(linear, bits, group_size)


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_no_weight_is_further_than_half_a_step_from_its_code(bits, group_size):
    weight = torch.randn(24, 128) * torch.logspace(-6, 3, 24)[:, None]
    weight[3] = 0.0
    weight[4] = weight[4].abs() + 1  # a group that does not reach 0
    codes = round_to_nearest(weight, bits, group_size)
    error = (dequantize(*codes, torch.float32) - weight).abs().view(24, -1, group_size).amax(dim=-1)
    # A step may have been rounded down by 2^-9, which the outermost of 127 or 15 codes lacks; a zero point is rounded to a code.
    slack = {8: 0.5 + 127 / 256, 4: 1.0 + 15 / 256}[bits]
    steps = codes.scale.float()[:, None] if bits == 8 else codes.scale.float()
    assert bool((error <= slack * steps).all())
    assert bool((dequantize(*codes, torch.float32)[3] == 0).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    weight = torch.zeros(4, 32)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="weight must be finite"):
        round_to_nearest(weight)


@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_the_layer_is_that_of_the_weight_it_stands_for(bits, group_size):
    linear, layer = draw(bits, group_size)
    x = torch.randn(2, 3, 128, requires_grad=True)
    y, expected = layer(x), F.linear(x, layer.dequantized(), linear.bias)
    assert layer.bias is linear.bias
    assert_close(y, expected)
    wanted = (x, linear.bias)
    assert_close(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted))
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == ["bias"]


def test_row_blocks_are_one_layer():
    blocks = RowBlocks([torch.randn(8, 32), torch.randn(4, 32)], torch.randn(12))
    layer = QuantizedLinear.of(blocks, 4, 32)
    assert torch.equal(layer.weight, round_to_nearest(blocks.weight, 4, 32).weight) and layer.bias is blocks.bias


@packs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (3, 1)])
@pytest.mark.parametrize(("bits", "group_size"), KINDS)
def test_the_packed_product_is_within_the_contract_of_bfloat16(bits, group_size, shape, dtype):
    """Also of float32 inputs, which are rounded; the rows of the weight are not a multiple of the kernel's tile."""
    contract = Contract(torch.bfloat16)
    for seed in range(3):
        linear, layer = draw(bits, group_size)
        torch.manual_seed(seed)
        x = torch.randn(*shape, 128).to(torch.bfloat16)
        layer.to(dtype)
        assert layer.pack() and layer.is_packed
        y = layer.product()(x.to(dtype))
        assert y.dtype == dtype and y.shape == (*shape, 40)
        weight, bias = layer.dequantized(torch.float64), linear.bias.double()
        plain = F.linear(x, weight.to(torch.bfloat16), bias.to(torch.bfloat16))
        golden = F.linear(x.double(), weight, layer.bias.double())
        contract.add("y", actual=y.to(torch.bfloat16), plain=plain, golden=golden, kind="output")
    contract.check()


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_an_input_of_two_whole_numbers_is_off_by_half_a_step_of_the_lower_one(rows, bias_dtype):
    """Codes up to 64, whose sums of two products stay within 16 bits, are multiplied exactly on CPUs without VNNI too."""
    torch.manual_seed(0)
    codes, scale = torch.randint(-64, 65, (40, 96), dtype=torch.int8), torch.rand(40)
    x = torch.randn(rows, 96)
    x[-1] *= 1e4
    bias = None if bias_dtype is None else torch.randn(40).to(bias_dtype)
    y = packed_codes._multiply_int8(codes, scale)(x, bias)
    weight = codes.double() * scale.double()[:, None]
    exact = x.double() @ weight.t() + (0.0 if bias is None else bias.double())
    step = x.abs().amax(1, keepdim=True).double() / 127 / 254
    # The product's share of float32's own rounding, of a sum of so many magnitudes.
    rounding = 2**-23 * (x.abs().double() @ weight.abs().t() + 1)
    assert y.dtype == torch.float32
    assert ((y - exact).abs() <= step / 2 * weight.abs().sum(1) + rounding).all()
    assert not packed_codes._multiply_int8(codes, scale)(torch.zeros(rows, 96), None).any()


@pytest.mark.skipif(not packed_codes._has_bags(), reason="this build of torch, or this CPU, is without FBGEMM's sums")
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_features", [40, 96, 97, 192])
def test_a_row_times_bags_of_codes_is_rounded_as_a_sum_in_float32(out_features, bias_dtype):
    """The least and the largest code among them, and the row's numbers of one sign, as behind a ReLU, or of both."""
    torch.manual_seed(0)
    codes, scale = torch.randint(-128, 128, (out_features, 160), dtype=torch.int8), torch.rand(out_features)
    codes[0], codes[-1] = -128, 127
    bias = None if bias_dtype is None else torch.randn(out_features).to(bias_dtype)
    multiply = packed_codes._multiply_int8_by_bags(codes, scale)
    for x in (torch.randn(1, 160), torch.rand(1, 160), torch.zeros(1, 160)):
        terms = x.double() * codes.double()
        exact = terms.sum(1) * scale.double() + (0.0 if bias is None else bias.double())
        # Each step adds a product with a byte up to 255 and takes 128 times x off again.
        passed = (terms.cumsum(1).abs() + 384 * x.abs()).sum(1) * scale + exact.abs()
        y = multiply(x, bias)
        assert y.dtype == torch.float32 and y.shape == (1, out_features)
        assert ((y[0] - exact).abs() <= 2**-23 * passed).all()
    several = torch.randn(3, 160)
    assert torch.equal(multiply(several, bias), packed_codes._multiply_int8_in_bfloat16(codes, scale)(several, bias))


@packs
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("has_vnni", [True, False])
def test_codes_are_packed_anew_only_where_another_number_of_rows_has_another_kernel(has_vnni, bits, monkeypatch):
    monkeypatch.setattr(packed_codes, "_adds_in_32_bits", lambda: has_vnni)
    _, layer = draw(bits, 64)
    assert layer.pack(1)
    first = layer._packed
    assert layer.pack(4)
    is_other = bits == 8 and not has_vnni and packed_codes._has_bags()
    assert (layer._packed is not first) == is_other
    first = layer._packed
    assert layer.pack(3) and layer._packed is first


def test_widths_that_a_kernel_would_read_beyond(monkeypatch):
    monkeypatch.setattr(packed_codes, "_adds_in_32_bits", lambda: False)
    assert "multiple of 32 in_features, got 40" in why_not_packed(torch.zeros(16, 40, dtype=torch.int8))


@packs
def test_a_packed_copy_is_made_anew_when_codes_change():
    linear, layer = draw(8, 64)
    x = torch.randn(1, 128)
    assert layer.pack()
    first = layer._packed
    assert layer.pack() and layer._packed is first
    layer.set_codes(round_to_nearest(-linear.weight, 8))
    assert layer.pack() and layer._packed is not first
    with torch.no_grad():
        assert_close(layer.product()(x), layer(x), atol=0.05, rtol=0)
    assert copy.deepcopy(layer)._packed is None
    layer.unpack()
    assert not layer.is_packed and torch.equal(layer.product()(x), layer(x))


def test_what_is_not_packed():
    codes = torch.zeros(16, 64, dtype=torch.int8)
    assert "1 to 16 rows, got 17" in why_not_packed(codes, 17)
    assert "on meta" in why_not_packed(codes.to("meta"))
    _, layer = draw(8, 64)
    assert not layer.pack(17) and torch.equal(layer.product()(torch.ones(1, 128)), layer(torch.ones(1, 128)))


def test_scales_keep_their_dtype_when_the_model_is_moved():
    _, layer = draw(4, 32)
    scale = layer.scale.clone()
    for moved in (layer.half(), layer.double(), layer.to("meta")):
        assert moved.scale.dtype == torch.bfloat16 and moved.weight.dtype == torch.uint8
        assert not moved.scale.requires_grad
        assert moved.scale.is_meta or torch.equal(moved.scale, scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be 8 or 4, got 3"),
        ({"bits": 4, "group_size": 48}, "group_size must be one of 32, 64, 128, got 48"),
        ({"bits": 4, "group_size": 128}, r"group_size must divide in_features \(64\), got 128"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(64, 8, **options)
