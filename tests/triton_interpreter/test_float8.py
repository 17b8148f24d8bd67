"""8-bit floats: every code, every border between two codes, and what a GPU makes of the rest."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from pytransformer.triton_interpreter import UnsupportedTritonError

FORMATS = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}
RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
INPUTS = [torch.float32, torch.bfloat16, torch.float16]


@triton.jit
def _cast_kernel(x_ptr, out_ptr, num_elements, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=mask)


@triton.jit
def _use_kernel(x_ptr, out_ptr, USE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if USE == "add":
        result = (x + x).to(tl.float32)
    elif USE == "less":
        result = (x < x).to(tl.float32)
    elif USE == "negative":
        result = (-x).to(tl.float32)
    elif USE == "maximum":
        result = tl.maximum(x, x).to(tl.float32)
    elif USE == "sum":
        result = tl.sum(x, 0).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)
    elif USE == "argmax":
        result = tl.argmax(x, 0).to(tl.float32) + tl.zeros((BLOCK,), tl.float32)
    elif USE == "absolute":
        result = tl.abs(x).to(tl.float32)
    elif USE == "divide":
        result = (x / x).to(tl.float32)
    elif USE == "largest":
        result = tl.max(x, 0) + tl.zeros((BLOCK,), tl.float32)
    elif USE == "where":
        result = tl.where(offsets % 2 == 0, x, x).to(tl.float32)
    elif USE == "add_float32":
        result = x + tl.zeros((BLOCK,), tl.float32)
    tl.store(out_ptr + offsets, result)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, OUT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), out_dtype=OUT))


def _cast(x: torch.Tensor, out: torch.Tensor, rounding: str | None = None) -> torch.Tensor:
    pointers = [triton.reinterpret(t, tl.float8e4b15) if t.dtype == torch.uint8 else t for t in (x, out)]
    _cast_kernel[(triton.cdiv(x.numel(), 65536),)](*pointers, x.numel(), ROUNDING=rounding, BLOCK=65536)
    return out


def _to_codes(x: torch.Tensor, name: str, rounding: str | None = None) -> torch.Tensor:
    return _cast(x, torch.empty(x.shape, dtype=FORMATS[name]), rounding).view(torch.uint8)


def _codes(name: str) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(FORMATS[name])


def _borders(name: str) -> torch.Tensor:
    """All finite values, the middles between neighbours and their float32 neighbours, and what lies beyond; of both signs."""
    values = _codes(name).float()
    values = values[values.isfinite()].unique()
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    largest = values.max()
    far = torch.tensor([1.01, 1.03, 1.0625, 1.07, 1.125, 1.2, 2.0, 1e4]) * largest
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-45, 1e-38, 3.4e38, -3.4e38])
    around = [torch.nextafter(border, direction) for border in (values, middles) for direction in (up, down)]
    return torch.cat([values, middles, *around, far, -far, special])


def _nearest(x: torch.Tensor, name: str) -> torch.Tensor:
    """The nearest finite value, by comparing with all of them; of two equally near the one with the even code."""
    codes = torch.arange(128, dtype=torch.uint8)
    values = codes.view(FORMATS[name]).double()
    codes, values = codes[values.isfinite()], values[values.isfinite()]
    distances = (x.double().abs().clamp(max=1e9)[:, None] - values).abs()
    nearest = distances.min(1, keepdim=True).values
    order = torch.where(distances == nearest, codes.long() % 2, 2)
    found = codes[order.argmin(1)]
    return torch.where(x.signbit(), found | 0x80, found)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("target", [torch.float32, torch.float16])
def test_every_code_is_read_as_what_it_means(name, target):
    codes = _codes(name)
    out = _cast(codes, torch.empty(256, dtype=target))
    torch.testing.assert_close(out.float(), codes.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[~out.isnan()], codes.float().signbit()[~out.isnan()])


def test_every_code_of_e4m3_is_read_in_bfloat16():
    codes = _codes("fp8e4nv")
    out = _cast(codes, torch.empty(256, dtype=torch.bfloat16))
    torch.testing.assert_close(out.float(), codes.float(), rtol=0, atol=0, equal_nan=True)


def test_infinity_and_nan_of_e5m2_become_no_bfloat16_as_compiled_code_makes_numbers_of_them():
    finite = _codes("fp8e5")[_codes("fp8e5").float().isfinite()]
    assert torch.equal(_cast(finite, torch.empty(finite.shape, dtype=torch.bfloat16)).float(), finite.float())
    for code in (0x7C, 0x7F, 0xFC):
        x = torch.tensor([code], dtype=torch.uint8).view(torch.float8_e5m2)
        with pytest.raises(UnsupportedTritonError, match="65536 of infinity"):
            _cast(x, torch.empty(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", INPUTS)
def test_rounds_to_the_nearest_code_and_saturates(name, dtype):
    x = _borders(name).to(dtype)
    assert torch.equal(_to_codes(x, name), _nearest(x, name))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_numbers_become_the_nearest_code(name, dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = _to_codes(x, name)
    assert (out[x.isnan()] == 0x7F).all()
    assert torch.equal(out[~x.isnan()], _nearest(x[~x.isnan()], name))


@pytest.mark.parametrize("name", FORMATS)
def test_within_the_range_it_is_what_torch_rounds(name):
    largest = torch.finfo(FORMATS[name]).max
    x = torch.cat([torch.randn(4096), torch.randn(4096) * 1e-3, torch.randn(4096) * 50]).clamp(-largest, largest)
    assert torch.equal(_to_codes(x, name), x.to(FORMATS[name]).view(torch.uint8))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", INPUTS)
def test_nan_stays_nan(name, dtype):
    x = torch.tensor([float("nan"), -float("nan"), 1.0], dtype=dtype)
    assert _to_codes(x, name).view(FORMATS[name]).float().isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("name", FORMATS)
def test_there_and_back_keeps_every_finite_code(name):
    codes = _codes(name)
    finite = codes[codes.float().isfinite()]
    for dtype in INPUTS:
        assert torch.equal(_to_codes(finite.float().to(dtype), name), finite.view(torch.uint8))


def test_float32_to_e5m2_toward_zero():
    x = _borders("fp8e5")
    out = _to_codes(x, "fp8e5", "rtz").view(torch.float8_e5m2).double()
    finite = x.isfinite()
    assert (out[~finite] == x[~finite].double()).all()
    values = _codes("fp8e5").double()
    values = values[values.isfinite() & (values >= 0)].unique()
    below = values[torch.searchsorted(values, x[finite].double().abs(), right=True) - 1]
    assert torch.equal(out[finite], torch.copysign(below, x[finite].double()))
    assert _to_codes(torch.tensor([float("nan")]), "fp8e5", "rtz").view(torch.float8_e5m2).float().isnan()


def test_e4b15_has_neither_infinity_nor_nan():
    codes = torch.arange(256, dtype=torch.uint8)
    exponent, mantissa = (codes.long() >> 3) & 15, (codes.long() & 7).double()
    magnitude = torch.where(exponent > 0, 2.0 ** (exponent - 15) * (1 + mantissa / 8), 2.0**-14 * mantissa / 8)
    expected = torch.where(codes >= 128, -magnitude, magnitude)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(_cast(codes, torch.empty(256, dtype=dtype)).double(), expected)
    half = expected.half()
    # It clips at 1.75 before it rounds, so that the largest code is never made.
    expected_codes = torch.where(codes & 0x7F == 0x7F, codes - 1, codes)
    assert torch.equal(_cast(half, torch.empty(256, dtype=torch.uint8)), expected_codes)
    x = torch.tensor([1.0625, 1.0624, 5.0, -5.0, float("nan"), float("inf")])
    out = _cast(_cast(x, torch.empty(6, dtype=torch.uint8)), torch.empty(6))
    assert out.tolist() == [1.125, 1.0, 1.75, -1.75, 1.75, 1.75]


@pytest.mark.parametrize(
    ("source", "target", "rounding"),
    [
        (torch.float64, torch.float8_e4m3fn, None),
        (torch.float64, torch.float8_e5m2, None),
        (torch.float8_e4m3fn, torch.float64, None),
        (torch.float8_e5m2, torch.float64, None),
        (torch.float8_e4m3fn, torch.float8_e5m2, None),
        (torch.float8_e5m2, torch.float8_e4m3fn, None),
        (torch.float32, torch.float8_e4m3fn, "rtz"),
        (torch.bfloat16, torch.float8_e5m2, "rtz"),
        (torch.float16, torch.float8_e5m2, "rtz"),
        (torch.bfloat16, torch.uint8, None),
    ],
)
def test_a_cast_that_does_not_compile_is_refused(source, target, rounding):
    with pytest.raises(UnsupportedTritonError, match="Triton compiles no cast of"):
        _cast(torch.ones(4).to(source), torch.ones(4).to(target), rounding)


@pytest.mark.parametrize("types", [(torch.float32, torch.float8_e4m3fnuz), (torch.float8_e5m2fnuz, torch.float32)])
def test_types_of_other_gpus_are_refused(types):
    source, target = (torch.ones(4).to(dtype) for dtype in types)
    with pytest.raises((UnsupportedTritonError, InterpreterError), match=r"fp8e4b8|fp8e5b16"):
        _cast(source, target)


@pytest.mark.parametrize("use", ["add", "less", "negative", "maximum", "sum", "argmax"])
@pytest.mark.parametrize("name", FORMATS)
def test_arithmetic_of_8_bit_floats_is_refused(use, name):
    with pytest.raises(
        UnsupportedTritonError, match=r"Triton compiles no (arithmetic|reduction) of fp8e\w+: cast to float32"
    ):
        _use_kernel[(1,)](torch.ones(16).to(FORMATS[name]), torch.empty(16), USE=use, BLOCK=16)


@pytest.mark.parametrize("name", FORMATS)
def test_what_compiles_with_8_bit_floats_is_served(name):
    x = (torch.arange(16) - 7.5).to(FORMATS[name])
    expected = {
        "absolute": x.float().abs(),
        **({"divide": torch.ones(16)} if RELEASE >= (3, 9) else {}),
        "largest": torch.full((16,), x.float().max().item()),
        "where": x.float(),
        "add_float32": x.float(),
    }
    for use, result in expected.items():
        out = torch.empty(16)
        _use_kernel[(1,)](x, out, USE=use, BLOCK=16)
        assert torch.equal(out, result), use


@pytest.mark.parametrize("name", FORMATS)
def test_a_product_of_8_bit_floats_is_exact_and_keeps_nan_and_infinity(name):
    x, y = (torch.randn(2, 32, 32) * 4).to(FORMATS[name])
    out = torch.empty(32, 32)
    _dot_kernel[(1,)](x, y, out, OUT=tl.float32, BLOCK=32)
    torch.testing.assert_close(out, x.float() @ y.float())
    x.view(torch.uint8)[3, 5] = 0x7F
    y.view(torch.uint8)[4, 6] = 0x01  # subnormal
    _dot_kernel[(1,)](x, y, out, OUT=tl.float32, BLOCK=32)
    torch.testing.assert_close(out, x.float() @ y.float(), equal_nan=True)
    assert out[3].isnan().all() and not out[4].isnan().any()
