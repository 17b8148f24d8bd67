"""Casts of floats to integers and toward zero, where NumPy and a GPU part."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pytransformer.triton_interpreter import UnsupportedTritonError

INFINITY, NAN = float("inf"), float("nan")
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64]


@triton.jit
def _cast_kernel(x_ptr, out_ptr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def _compared_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, (x >= 0.5).to(out_ptr.dtype.element_ty) * 2)


@triton.jit
def _to_bool_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(tl.int1).to(tl.int32))


def _cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, out, ROUNDING=rounding, BLOCK=x.numel())
    return out


def _integer(value: float, dtype: torch.dtype, source: torch.dtype) -> int:
    """What PTX says of ``cvt.rzi``; 8 bits are the low ones of a conversion to 16."""
    limits = torch.iinfo(dtype)
    bits = max(limits.bits, 16)
    signed = limits.min < 0
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if value != value:
        number = 1 << bits - 1 if source == torch.float64 or bits == 64 else 0
        number -= (1 << bits) if signed and number > high else 0
    else:
        number = high if value == INFINITY else low if value == -INFINITY else max(low, min(high, int(value)))
    number &= (1 << limits.bits) - 1
    return number - (1 << limits.bits) if signed and number >> limits.bits - 1 else number


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_floats_that_no_integer_holds_saturate(dtype, source):
    powers = [float(2**exponent) for exponent in (7, 8, 15, 16, 31, 32, 63, 64)]
    values = [0.0, -0.0, 0.99, -0.99, 1.5, -1.5, 127.5, 254.9, 300.0, -129.0, 1e-40, 65504.0, 1e30, INFINITY, NAN]
    values += [sign * (power - 1) for power in powers for sign in (1, -1)] + [-INFINITY, *powers]
    values += [-power for power in powers] + [3e9, -3e9, 1e19, 1.9e19, -1e19, 2.0**31 - 256, 2.0**63 - 1024, 100.7][
        : 64 - 8 - 15 - 16 - 9
    ]
    values += [1.0] * (64 - len(values))
    x = torch.tensor(values, dtype=torch.float64).to(source)
    assert _cast(x, dtype).tolist() == [_integer(value, dtype, source) for value in x.double().tolist()]


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_only_zeros_are_false(source):
    x = torch.tensor([0.0, -0.0, 0.3, -0.3, NAN, INFINITY, 1.0, torch.finfo(source).smallest_normal], dtype=source)
    out = torch.empty(8, dtype=torch.int32)
    _to_bool_kernel[(1,)](x, out, BLOCK=8)
    assert out.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "target", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int8]
)
def test_the_outcome_of_a_comparison_becomes_one_or_zero(source, target):
    x, out = torch.tensor([0.25, 0.5, 1.0, NAN], dtype=source), torch.empty(4, dtype=target)
    _compared_kernel[(1,)](x, out, BLOCK=4)
    assert out.tolist() == [0, 2, 2, 0]


def test_float32_to_float16_toward_zero_stays_finite():
    values = [
        65504.0,
        65519.0,
        1e6,
        -1e30,
        INFINITY,
        -INFINITY,
        1 + 2**-10 + 2**-11,
        -1 - 2**-11,
        2.0**-24,
        2.0**-25,
        -(2.0**-25),
        1.5 * 2**-24,
    ]
    expected = [
        65504.0,
        65504.0,
        65504.0,
        -65504.0,
        INFINITY,
        -INFINITY,
        1 + 2**-10,
        -1.0,
        2.0**-24,
        0.0,
        -0.0,
        2.0**-24,
    ]
    padded = torch.tensor(values + [NAN] * 4)
    out = _cast(padded, torch.float16, "rtz")
    assert out[:12].tolist() == expected and out[12:].isnan().all() and out[10].signbit()
    x = torch.randn(4096) * 100
    cut = _cast(x, torch.float16, "rtz").float()
    assert (cut.abs() <= x.abs()).all() and ((x - cut).abs() < x.abs() * 2**-10 + 2**-24).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float64_toward_zero_does_not_compile_and_is_refused(dtype):
    with pytest.raises(
        UnsupportedTritonError, match=r'Triton compiles no cast of fp64 to \w+ with fp_downcast_rounding="rtz"'
    ):
        _cast(torch.ones(4, dtype=torch.float64), dtype, "rtz")
