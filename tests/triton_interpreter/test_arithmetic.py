"""Special values of arithmetic: what PTX says of them, where NumPy says something else."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

INFINITY, NAN = float("inf"), float("nan")
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    if OPERATION == "maximum":
        result = tl.maximum(x, y)
    elif OPERATION == "minimum":
        result = tl.minimum(x, y)
    elif OPERATION == "maximum_nan":
        result = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OPERATION == "minimum_nan":
        result = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OPERATION == "clamp":
        result = tl.clamp(x, y, y + 1)
    elif OPERATION == "clamp_nan":
        result = tl.clamp(x, y, y + 1, propagate_nan=tl.PropagateNan.ALL)
    elif OPERATION == "remainder":
        result = x % y
    elif OPERATION == "quotient":
        result = x // y
    elif OPERATION == "left":
        result = x << y
    elif OPERATION == "right":
        result = x >> y
    tl.store(out_ptr + offsets, result)


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.fma(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), tl.load(z_ptr + offsets)))


@triton.jit
def _unary_kernel(x_ptr, out_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if FUNCTION == "exp":
        result = tl.exp(x)
    elif FUNCTION == "exp2":
        result = tl.exp2(x)
    elif FUNCTION == "log":
        result = tl.log(x)
    elif FUNCTION == "log2":
        result = tl.log2(x)
    elif FUNCTION == "sqrt":
        result = tl.sqrt(x)
    elif FUNCTION == "sqrt_rn":
        result = tl.sqrt_rn(x)
    elif FUNCTION == "rsqrt":
        result = tl.rsqrt(x)
    elif FUNCTION == "floor":
        result = tl.floor(x)
    elif FUNCTION == "ceil":
        result = tl.ceil(x)
    elif FUNCTION == "sin":
        result = tl.sin(x)
    elif FUNCTION == "erf":
        result = tl.math.erf(x)
    tl.store(out_ptr + offsets, result)


def _binary(operation: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _binary_kernel[(1,)](x, y, out, OPERATION=operation, BLOCK=x.numel())
    return out


def _unary(function: str, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _unary_kernel[(1,)](x, out, FUNCTION=function, BLOCK=x.numel())
    return out


def _same(actual: torch.Tensor, expected: list[float]) -> None:
    """Equal numbers with equal signs, also of zeros; NaN where there is NaN."""
    wanted = torch.tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
    number = ~wanted.isnan()
    assert torch.equal(actual.signbit()[number], wanted.signbit()[number]), (actual, wanted)


X = [1.0, NAN, 2.0, NAN, -0.0, 0.0, -0.0, -INFINITY]
Y = [NAN, 1.0, 3.0, NAN, 0.0, -0.0, -0.0, NAN]


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_loses_to_a_number_unless_it_is_to_propagate(dtype):
    x, y = torch.tensor(X, dtype=dtype), torch.tensor(Y, dtype=dtype)
    _same(_binary("maximum", x, y), [1.0, 1.0, 3.0, NAN, 0.0, 0.0, -0.0, -INFINITY])
    _same(_binary("minimum", x, y), [1.0, 1.0, 2.0, NAN, -0.0, -0.0, -0.0, -INFINITY])
    _same(_binary("maximum_nan", x, y), [NAN, NAN, 3.0, NAN, 0.0, 0.0, -0.0, NAN])
    _same(_binary("minimum_nan", x, y), [NAN, NAN, 2.0, NAN, -0.0, -0.0, -0.0, NAN])


@pytest.mark.parametrize("dtype", FLOATS)
def test_clamp_and_nan(dtype):
    x, low = torch.tensor([NAN, 5.0, -5.0, 0.5], dtype=dtype), torch.tensor([0.0, NAN, 0.0, 0.0], dtype=dtype)
    _same(_binary("clamp", x, low), [0.0, 5.0, 0.0, 0.5])
    _same(_binary("clamp_nan", x, low), [NAN, NAN, 0.0, 0.5])


@pytest.mark.parametrize("dtype", FLOATS)
def test_remainder_of_floats_has_the_sign_of_the_dividend(dtype):
    x = torch.tensor([5.5, -5.5, 5.5, -5.5, 1.0, INFINITY, 3.0, 0.75], dtype=dtype)
    y = torch.tensor([2.0, 2.0, -2.0, -2.0, INFINITY, 2.0, 0.0, 0.25], dtype=dtype)
    _same(_binary("remainder", x, y), [1.5, -1.5, 1.5, -1.5, 1.0, NAN, NAN, 0.0])


def test_remainder_of_a_large_quotient_is_what_one_fused_step_leaves():
    """NumPy's is exact; compiled code's quotient has 24 bits, here one too many by rounding."""
    x, y = torch.tensor([2.0**24 + 2, 1e10]), torch.tensor([0.7, 0.3])
    quotient = (x / y).trunc()
    expected = (x.double() - quotient.double() * y.double()).float()
    assert torch.equal(_binary("remainder", x, y), expected)
    assert not torch.equal(expected, torch.fmod(x, y))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_division_of_integers_cuts_and_by_zero_gives_nothing_useful(dtype):
    lowest = torch.iinfo(dtype).min
    x = torch.tensor([7, -7, 7, -7, 0, lowest, 5, -5], dtype=dtype)
    y = torch.tensor([2, 2, -2, -2, 3, 1, 0, 0], dtype=dtype)
    assert _binary("quotient", x, y).tolist() == [3, -3, -3, 3, 0, lowest, -1, -1]
    assert _binary("remainder", x, y).tolist() == [1, -1, 1, -1, 0, 0, -1, -1]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint32])
def test_shifts_by_the_width_or_more_leave_zeros_or_signs(dtype):
    bits = torch.iinfo(dtype).bits
    signed = torch.iinfo(dtype).min < 0
    x = torch.tensor([5, 5, 5, 5] + ([-5] * 4 if signed else [5] * 4)).to(dtype)
    y = torch.tensor([1, bits - 1, bits, bits + 3] * 2).to(dtype)
    wide = [value << amount for value, amount in zip(x.tolist(), y.tolist())]
    assert (
        _binary("left", x, y).tolist()
        == torch.tensor(
            [value % 2**bits - (2**bits if signed and value >> (bits - 1) & 1 else 0) for value in wide]
        ).tolist()
    )
    assert _binary("right", x, y).tolist() == [value >> amount for value, amount in zip(x.tolist(), y.tolist())]


@pytest.mark.parametrize(
    ("dtype", "factor", "tiny", "neighbours"),
    [(torch.float16, 683.0, 2.0**-20, (2048.0, 2050.0)), (torch.bfloat16, 87.0, 2.0**-100, (260.0, 262.0))],
)
def test_a_fused_product_and_sum_rounds_once(dtype, factor, tiny, neighbours):
    """Three times the factor lies midway between the neighbours, and the summand, below what float32 or float64 would keep, decides."""
    x, y = torch.full((4,), 3.0, dtype=dtype), torch.full((4,), factor, dtype=dtype)
    z = torch.tensor([tiny, -tiny, 0.0, 1.0], dtype=dtype)
    out = torch.empty_like(x)
    _fma_kernel[(1,)](x, y, z, out, BLOCK=4)
    low, high = neighbours
    assert 3 * factor == low + 1 == high - 1
    assert out.tolist() == [high, low, low, high]


SUBNORMAL = 1e-40


def test_subnormal_numbers_where_the_instruction_flushes_them():
    x = torch.tensor([SUBNORMAL, -SUBNORMAL, 0.0, -0.0])
    _same(_unary("sqrt", x), [0.0, -0.0, 0.0, -0.0])
    _same(_unary("rsqrt", x), [INFINITY, -INFINITY, INFINITY, -INFINITY])
    _same(_unary("floor", x), [0.0, -0.0, 0.0, -0.0])
    _same(_unary("ceil", x), [0.0, -0.0, 0.0, -0.0])
    _same(_unary("sin", x), [0.0, -0.0, 0.0, -0.0])
    _same(_unary("erf", x), [0.0, -0.0, 0.0, -0.0])
    _same(_unary("exp2", torch.tensor([-126.0, -126.5, -130.0, -INFINITY])), [2.0**-126, 0.0, 0.0, 0.0])


def test_subnormal_numbers_where_it_does_not():
    x = torch.tensor([SUBNORMAL, -SUBNORMAL, 0.0, 4e-39])
    torch.testing.assert_close(_unary("sqrt_rn", x), x.sqrt(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(_unary("log", x), x.log(), equal_nan=True)
    torch.testing.assert_close(_unary("log2", x), x.log2(), equal_nan=True)
    below = _unary("exp", torch.tensor([-90.0, -100.0, -103.0, -104.0]))
    assert (below[:3] > 0).all() and (below[:3] < 2.0**-126).all() and below[3] == 0


def test_infinities_and_nan_through_functions():
    x = torch.tensor([INFINITY, -INFINITY, NAN, -1.0])
    _same(_unary("exp", x[:3].repeat(2)[:4]), [INFINITY, 0.0, NAN, INFINITY])
    _same(_unary("sqrt", x), [INFINITY, NAN, NAN, NAN])
    _same(_unary("rsqrt", x), [0.0, NAN, NAN, NAN])
    _same(_unary("log", x), [INFINITY, NAN, NAN, NAN])


def test_exp_rounds_its_argument_times_the_logarithm():
    """Compiled code is 2^(x · log2 e) with a float32 product: off by |x| · 2^-24 or so, which NumPy's exp is not."""
    x = -torch.linspace(0, 80, 1024)
    scaled = x * torch.tensor(1.4426950408889634)
    torch.testing.assert_close(_unary("exp", x), scaled.double().exp2().float(), rtol=2**-23, atol=0)
    error = ((_unary("exp", x).double() - x.double().exp()) / x.double().exp()).abs()
    assert 2**-21 < error.max() < 80 * 2**-23
