"""bfloat16 and tf32 in the interpreter against torch, bit by bit where bits are defined."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

BLOCK = 1024


@triton.jit
def _cast_kernel(x_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _truncating_cast_kernel(x_ptr, out_ptr, num_elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    tl.store(out_ptr + offsets, x.to(tl.bfloat16, fp_downcast_rounding="rtz"), mask=mask)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    if OPERATION == "add":
        result = x + y
    elif OPERATION == "subtract":
        result = x - y
    elif OPERATION == "multiply":
        result = x * y
    elif OPERATION == "negative":
        result = -x
    elif OPERATION == "absolute":
        result = tl.abs(x)
    elif OPERATION == "maximum":
        result = tl.maximum(x, y)
    elif OPERATION == "minimum":
        result = tl.minimum(x, y)
    elif OPERATION == "where":
        result = tl.where(x < y, x, y * 2.0)
    elif OPERATION == "less":
        result = (x < y).to(tl.float32)
    elif OPERATION == "less_bf16":
        result = (x < y).to(tl.bfloat16)
    elif OPERATION == "greater_equal_constant":
        result = (x >= 0.5).to(tl.float32)
    elif OPERATION == "equal":
        result = (x == y).to(tl.float32)
    elif OPERATION == "add_float32":
        result = x.to(tl.float32) + y
    else:
        tl.static_assert(False, "unknown operation")
    tl.store(out_ptr + offsets, result)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    inner = tl.arange(0, K)
    x = tl.load(x_ptr + rows[:, None] * K + inner[None, :])
    y = tl.load(y_ptr + inner[:, None] * N + columns[None, :])
    result = tl.dot(x, y, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], result)


@triton.jit
def _add(x, y):
    return x + y


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, index_ptr, OPERATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, M)
    columns = tl.arange(0, N)
    x = tl.load(x_ptr + rows[:, None] * N + columns[None, :])
    if OPERATION == "max":
        result = tl.max(x, axis=1)
    elif OPERATION == "min":
        result = tl.min(x, axis=1)
    elif OPERATION == "max_index":
        result, index = tl.max(x, axis=1, return_indices=True)
        tl.store(index_ptr + rows, index)
    elif OPERATION == "sum":
        result = tl.sum(x, axis=1)
    elif OPERATION == "scan":
        result = tl.max(tl.associative_scan(x, 1, _add), axis=1)
    else:
        result = tl.sum(x.to(tl.float32), axis=1)
    tl.store(out_ptr + rows, result)


def _cast(x: torch.Tensor, dtype: torch.dtype, kernel=_cast_kernel) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=dtype)
    kernel[(triton.cdiv(x.numel(), 65536),)](x, out, x.numel(), BLOCK=65536)
    return out


def _same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit equality, except that one NaN is as good as another."""
    nan = expected.isnan()
    integer = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    return bool((actual.isnan() == nan).all()) and torch.equal(actual.view(integer)[~nan], expected.view(integer)[~nan])


def _all_bfloat16() -> torch.Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_every_bfloat16_widens_exactly():
    values = _all_bfloat16()
    assert _same_bits(_cast(values, torch.float32), values.float())


@pytest.mark.parametrize("offset", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_float32_rounds_to_nearest_even(offset):
    """All upper halves with a lower half that is exact, just above, just below, at and above the middle, and just below the next."""
    bits = (torch.arange(2**16, dtype=torch.int64) << 16) + offset
    values = (bits - (bits >= 2**31) * 2**32).to(torch.int32).view(torch.float32)
    assert _same_bits(_cast(values, torch.bfloat16), values.bfloat16())


def test_truncation_differs_and_is_there_on_request():
    value = torch.tensor([1.0 + 3 * 2.0**-9])
    assert _cast(value, torch.bfloat16).item() == 1.0 + 2.0**-7
    assert _cast(value, torch.bfloat16, _truncating_cast_kernel).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_casts_between_bfloat16_and_others(dtype):
    values = torch.randn(4096).mul(50).to(dtype)
    assert _same_bits(_cast(values, torch.bfloat16), values.to(torch.bfloat16))
    narrow = torch.randn(4096).mul(50).bfloat16()
    assert torch.equal(_cast(narrow, dtype), narrow.to(dtype))


_OPERATIONS = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "negative": lambda x, y: -x,
    "absolute": lambda x, y: x.abs(),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": lambda x, y: torch.where(x < y, x, y * 2),
    "less": lambda x, y: (x < y).float(),
    "less_bf16": lambda x, y: (x < y).bfloat16(),
    "greater_equal_constant": lambda x, y: (x >= 0.5).float(),
    "equal": lambda x, y: (x == y).float(),
    "add_float32": lambda x, y: x.float() + y.float(),
}


@pytest.mark.parametrize("operation", _OPERATIONS)
def test_arithmetic_and_comparisons(operation):
    x, y = torch.randn(2, BLOCK).bfloat16()
    y[::7] = x[::7]
    expected = _OPERATIONS[operation](x, y)
    out = torch.empty_like(expected)
    _arithmetic_kernel[(1,)](x, y, out, OPERATION=operation, BLOCK=BLOCK)
    assert torch.equal(out, expected)


def test_dot_of_bfloat16_is_exact_products_summed_in_float32():
    x, y = torch.randn(32, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    out = torch.empty(32, 16)
    _dot_kernel[(1,)](x, y, out, M=32, N=16, K=64, PRECISION="ieee")
    golden = x.double() @ y.double()
    plain = (x.float() @ y.float() - golden).abs().max()
    assert (out - golden).abs().max() <= 2 * plain + 4 * torch.finfo(torch.float32).eps * golden.abs().max()


def test_dot_of_float32_loses_what_tf32_loses_only_if_asked():
    x, y = torch.randn(32, 64), torch.randn(64, 16)
    golden = x.double() @ y.double()
    errors = {}
    for precision in ("ieee", "tf32"):
        out = torch.empty(32, 16)
        _dot_kernel[(1,)](x, y, out, M=32, N=16, K=64, PRECISION=precision)
        errors[precision] = (out - golden).abs().max().item()
    assert errors["ieee"] < 1e-5
    # 64 products with operands rounded to 11 significant bits: each is off by up to 2^-10, they add up like a random walk.
    assert 1e-4 < errors["tf32"] < 64 * 2**-10 * (x.abs().max() * y.abs().max()).item()


def test_tf32_rounds_each_operand_to_the_nearest():
    x = torch.zeros(16, 16)
    x[0, :4] = torch.tensor([1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 1 + 2**-10])
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](x, torch.eye(16), out, M=16, N=16, K=16, PRECISION="tf32")
    assert out[0, :4].tolist() == [1 + 2**-10, 1.0, -1 - 2**-10, 1 + 2**-10]


def test_tf32_can_be_turned_off(harden):
    harden(tf32=False)
    x, out = torch.full((16, 16), 1 + 2**-12), torch.empty(16, 16)
    _dot_kernel[(1,)](x, torch.eye(16), out, M=16, N=16, K=16, PRECISION="tf32")
    assert torch.equal(out, x)


@pytest.mark.parametrize("operation", ["max", "min", "max_index"])
def test_minima_and_maxima_of_bfloat16(operation):
    x = torch.randn(8, 64).bfloat16()
    out, index = torch.empty(8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.int32)
    _reduce_kernel[(1,)](x, out, index, OPERATION=operation, M=8, N=64)
    expected = x.amin(1) if operation == "min" else x.amax(1)
    assert torch.equal(out, expected)
    if operation == "max_index":
        assert torch.equal(index.long(), x.float().argmax(1))


@pytest.mark.parametrize("operation", ["sum", "scan"])
def test_reductions_that_would_round_at_every_step_are_refused(operation):
    x, index = torch.randn(8, 64).bfloat16(), torch.empty(8, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="cast to float32 before"):
        _reduce_kernel[(1,)](x, torch.empty(8), index, OPERATION=operation, M=8, N=64)
    out = torch.empty(8)
    _reduce_kernel[(1,)](x, out, index, OPERATION="sum_float32", M=8, N=64)
    torch.testing.assert_close(out, x.float().sum(1))
