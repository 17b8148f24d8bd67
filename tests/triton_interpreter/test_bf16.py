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
def _dot_float16_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), out_dtype=tl.float16))


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


def test_float64_rounds_to_bfloat16_once():
    """Through float32 the last bit of the first two would be lost before it decides a tie."""
    tie = 1 + 2.0**-8
    values = [
        tie + 2.0**-40,
        -tie - 2.0**-40,
        tie,
        tie - 2.0**-40,
        1e300,
        2.0**128 - 2.0**119,
        2.0**128 - 2.0**120,
        1e-60,
        -0.0,
    ]
    expected = [1 + 2.0**-7, -1 - 2.0**-7, 1.0, 1.0, float("inf"), float("inf"), 2.0**128 - 2.0**120, 0.0, -0.0]
    out = _cast(torch.tensor(values, dtype=torch.float64), torch.bfloat16)
    assert _same_bits(out, torch.tensor(expected).bfloat16())
    assert _cast(torch.tensor([float("nan")], dtype=torch.float64), torch.bfloat16).isnan().item()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_round_to_bfloat16_once(dtype):
    bits = 30 if dtype == torch.int32 else 62
    tie = 2**bits + 2 ** (bits - 8)
    values = torch.tensor([tie + 1, -tie - 1, tie, tie - 1, 257, -259, 0, torch.iinfo(dtype).min], dtype=dtype)
    up = float(2**bits + 2 ** (bits - 7))
    expected = [up, -up, float(2**bits), float(2**bits), 256.0, -260.0, 0.0, float(torch.iinfo(dtype).min)]
    assert _cast(values, torch.bfloat16).double().tolist() == expected


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


def _tf32_dot(x: torch.Tensor, y: torch.Tensor, precision: str = "tf32") -> torch.Tensor:
    out = torch.empty(x.shape[0], y.shape[1])
    _dot_kernel[(1,)](x, y, out, M=x.shape[0], N=y.shape[1], K=x.shape[1], PRECISION=precision)
    return out


def _truncated(x: torch.Tensor) -> torch.Tensor:
    """Without the low 13 bits, by the value: at most 10 bits after the first are kept."""
    quantum = 2.0 ** (x.double().abs().log2().floor() - 10)
    return (torch.sign(x) * (x.double().abs() / quantum).floor() * quantum).float()


def test_dot_of_float32_loses_what_tf32_loses_only_if_asked():
    x, y = torch.randn(32, 64), torch.randn(64, 16)
    golden = x.double() @ y.double()
    errors = {precision: (_tf32_dot(x, y, precision) - golden).abs() for precision in ("ieee", "tf32")}
    assert errors["ieee"].max() < 1e-5
    # An operand cut to 11 significant bits has lost less than 2^-10 of its size, a product of two less than 2^-9 of its own.
    assert errors["tf32"].max() > 1e-4
    assert (errors["tf32"] < 2**-9 * (x.abs().double() @ y.abs().double()) + 1e-5).all()


def test_tf32_drops_the_low_bits_of_each_operand():
    """As the tensor core, which nothing rounds for: see tests/compile/test_instructions.py."""
    x = torch.zeros(16, 16)
    x[0, :6] = torch.tensor([1 + 2**-11, 1 + 2**-10 - 2**-23, -1 - 2**-11, 1 + 2**-10, float("inf"), float("nan")])
    out, reverse = _tf32_dot(x, torch.eye(16)), _tf32_dot(torch.eye(16), x)
    assert out[0].isnan().all() and reverse[0, :4].tolist() == [1.0, 1.0, -1.0, 1 + 2**-10]
    assert reverse[0, 4].isinf() and reverse[0, 5].isnan()
    x = torch.randn(64, 64)
    assert torch.equal(_tf32_dot(x, torch.eye(64)), _truncated(x))
    assert torch.equal(_tf32_dot(torch.eye(64), x), _truncated(x))


def test_a_tf32_product_is_too_small_on_average():
    """Truncation has a bias where rounding has none: products of positive numbers lose 2^-11 of their size or so."""
    x, y = torch.rand(64, 64) + 1, torch.rand(64, 64) + 1
    golden = x.double() @ y.double()
    loss = ((golden - _tf32_dot(x, y)) / golden).mean()
    assert 2**-12 < loss < 2**-10


def test_three_tf32_products_lose_no_more_than_float32():
    x, y = torch.randn(32, 64), torch.randn(64, 16)
    golden = x.double() @ y.double()
    bound = (
        x.abs().double() @ y.abs().double()
    ) * 2**-19  # 64 additions in float32; the small parts' product is 2^-22 at most
    error = (_tf32_dot(x, y, "tf32x3") - golden).abs()
    assert (error < bound).all() and error.max() < (_tf32_dot(x, y) - golden).abs().max() / 100
    single = torch.zeros(16, 16)
    single[0, 0] = 1 + 2**-11 + 2**-12 + 2**-23
    # The large part is rounded, 1 + 2^-10, and the small one, which is then negative, cut: nothing is lost here.
    assert _tf32_dot(single, torch.eye(16), "tf32x3")[0, 0] == single[0, 0]


def test_three_tf32_products_keep_infinity():
    x = torch.zeros(16, 16)
    x[0, 0] = float("inf")
    assert _tf32_dot(x, torch.ones(16, 16), "tf32x3")[0].tolist() == [float("inf")] * 16


def test_tf32_can_be_turned_off(harden):
    harden(tf32=False)
    x, out = torch.full((16, 16), 1 + 2**-12), torch.empty(16, 16)
    _dot_kernel[(1,)](x, torch.eye(16), out, M=16, N=16, K=16, PRECISION="tf32")
    assert torch.equal(out, x)


def test_a_float16_accumulator_is_rounded_after_each_instruction():
    x, out = torch.zeros(32, 32, dtype=torch.float16), torch.empty(32, 32, dtype=torch.float16)
    x[0, 0], x[0, 16:18] = 2048, 0.75
    _dot_float16_kernel[(1,)](x, torch.ones(32, 32, dtype=torch.float16), out, BLOCK=32)
    assert out[0, 0] == 2050  # 2048 + 1.5 to nearest
    x[0, 16:18], x[0, 1] = 0.25, 0.75
    _dot_float16_kernel[(1,)](x, torch.ones(32, 32, dtype=torch.float16), out, BLOCK=32)
    assert out[0, 0] == 2048  # 2048.75, and then 2048.5, while the sum of all is 2049.25
    x = torch.randn(32, 32).half()
    _dot_float16_kernel[(1,)](x, torch.eye(32).half(), out, BLOCK=32)
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
