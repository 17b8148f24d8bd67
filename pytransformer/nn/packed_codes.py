"""Codes reordered for torch's own CPU kernels for few rows, which read them at nearly the speed of memory.

4 bits: bfloat16 inputs; the kernel computes (code - 8) · scale + zero and adds up in float32, takes scale and zero in bfloat16 and rounds
the sum to it.

8 bits, on a CPU that adds products of whole numbers in 32 bits (VNNI): oneDNN multiplies them, four times as many at once as floats. An
input of 8 bits would lose too much, so it is handed over as two, two rows beside each other, for which the weight is read once:

    x ≈ s · (high + low / 254),   s = max |x| / 127,   high and low whole numbers from -127 to 127

That is 16 bits of the row's largest magnitude: more than bfloat16 holds of any value above a hundredth of it, and all sums are exact.

8 bits, on other CPUs, whose sums stop at 16 bits:

* One row: FBGEMM's sums over tables of bytes (bags.py), in float32. All products of GPT-2 124M take 10 ms with two threads, by the next
  kernel 19.
* Several rows: torch's kernel for 8-bit weights, which takes and gives bfloat16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pytransformer.reference import dequantize

from . import bags
from .packed_weight import Product, large_memory

# A step with more rows than these is faster as a product of whole blocks in float32.
MAX_PACKED_ROWS = 16
_ROWS_OF_TILE = 16
_LOW = 254.0
# The 8-bit kernel without VNNI reads rows in whole vectors of these many numbers, behind the end of others too.
_WHOLE_COLUMNS = 32
# x (rows, in_features) and the bias, or None -> (rows, out_features) of any floating dtype.
_Multiply = Callable[[Tensor, "Tensor | None"], Tensor]


class PackedCodes:
    """A packed copy of codes, as of :func:`pytransformer.quantized_linear`."""

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None, rows: int = 1) -> None:
        self._source = _identity(weight, scale)
        self._rows = weight.shape[0]
        weight, scale = weight.detach(), scale.detach()
        # Of 4 bits there is one way.
        self._make = _for_int8(rows) if weight.dtype == torch.int8 else None
        self._multiply = _multiply_int4(weight, scale, zero_point) if self._make is None else self._make(weight, scale)

    def serves(self, rows: int) -> bool:
        """Whether this is what would be packed now for so many rows; it multiplies others too."""
        return self._make is None or self._make is _for_int8(rows)

    def is_of(self, weight: Tensor, scale: Tensor) -> bool:
        """Whether these are still the tensors that were packed, and nothing that torch has counted was written to them."""
        return self._source == _identity(weight, scale)

    def product(self, bias: Tensor | None) -> Product:
        """The layer as a function of x (…, in_features) alone, which checks nothing."""
        multiply, out_features = self._multiply, self._rows
        bias = None if bias is None else bias.detach()

        def product(x: Tensor) -> Tensor:
            y = multiply(x if x.ndim == 2 else x.view(-1, x.shape[-1]), bias).to(x.dtype)
            return y if x.ndim == 2 else y.view(*x.shape[:-1], out_features)

        return product


def why_not_packed(weight: Tensor, rows: int = 1) -> str | None:
    """The reason why codes would be left as they are, or ``None``."""
    if weight.device.type != "cpu":
        return f"packing is for CPUs, the weight is on {weight.device}"
    if not 1 <= rows <= MAX_PACKED_ROWS:
        return f"packing is for 1 to {MAX_PACKED_ROWS} rows, got {rows}"
    if weight.is_inference():
        return "the weight was made under torch.inference_mode(), which does not count writes"
    if weight.dtype == torch.int8 and weight.shape[1] % _WHOLE_COLUMNS and not _adds_in_32_bits():
        return (
            f"the kernel for CPUs without VNNI wants a multiple of {_WHOLE_COLUMNS} in_features, got {weight.shape[1]}"
        )
    if not _works(weight.dtype):
        return f"this build of torch has no kernel on this CPU for codes of {weight.dtype}"
    return None


def _identity(weight: Tensor, scale: Tensor) -> tuple[int, ...]:
    return weight.data_ptr(), weight._version, scale.data_ptr(), scale._version


def _for_int8(rows: int) -> Callable[[Tensor, Tensor], _Multiply]:
    """The fastest way to multiply so many rows with 8-bit codes on this CPU."""
    if _adds_in_32_bits():
        return _multiply_int8
    return _multiply_int8_by_bags if rows == 1 and _has_bags() else _multiply_int8_in_bfloat16


def _multiply_int8(weight: Tensor, scale: Tensor) -> _Multiply:
    """By oneDNN, in float32."""
    codes = torch.ops.onednn.qlinear_prepack(weight, [2, weight.shape[1]])
    scales, zeros = scale.float(), torch.zeros(len(scale), dtype=torch.int64)
    linear = torch.ops.onednn.qlinear_pointwise.default
    shares = torch.tensor([[1 / 127, 1 / 127 / _LOW]])
    norm, float32 = torch.linalg.vector_norm, torch.float32

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        count = x.shape[0]
        # 1e-30: a row of zeros is divided by something.
        largest = norm(x, torch.inf, -1, True, dtype=float32).clamp_(min=1e-30)
        low = torch.div(x, largest).mul_(127.0)
        high = torch.round(low)
        low.sub_(high).mul_(_LOW)
        # Whole numbers from 1 to 255 that stand for those from -127; the conversion cuts off.
        numbers = torch.cat((high, low)).add_(128.5).to(torch.uint8)
        y: Tensor = linear(numbers, 1.0, 128, codes, scales, zeros, None, 1.0, 0, float32, "none", [], "")
        if count > 1:
            y = torch.add(y[:count], y[count:], alpha=1 / _LOW)
            return y * (largest / 127) if bias is None else torch.addcmul(bias, y, largest / 127)
        if bias is None:
            return torch.mm(largest * shares, y)
        return torch.addmm(bias if bias.dtype == float32 else bias.float(), largest * shares, y)

    return multiply


def _multiply_int8_in_bfloat16(weight: Tensor, scale: Tensor) -> _Multiply:
    """By torch's kernel for 8-bit weights, from the codes as they are."""
    codes, scales = weight.contiguous(), scale.to(torch.bfloat16)
    linear, bfloat16 = torch.ops.aten._weight_int8pack_mm.default, torch.bfloat16

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = linear(x.to(bfloat16).contiguous(), codes, scales)
        return y if bias is None else y + bias

    return multiply


def _multiply_int8_by_bags(weight: Tensor, scale: Tensor) -> _Multiply:
    """One row by FBGEMM's sums of table rows, in float32; several by :func:`_multiply_int8_in_bfloat16`."""
    out_features, in_features = weight.shape
    count = bags.bags_of(out_features)
    table = large_memory((count, in_features, bags.OUTPUTS + 8), torch.uint8)
    # A code plus 128 is a byte, the sign bit the other way round. Behind each row's bytes: their scale and what is added, float32.
    bags.fill(table, weight.view(torch.uint8) ^ 128)
    table[..., bags.OUTPUTS :] = torch.tensor([1.0, -128.0]).view(torch.uint8)
    table = table.view(-1, bags.OUTPUTS + 8)
    indices, starts = bags.places(count, in_features)
    scales = scale.float()
    several = _multiply_int8_in_bfloat16(weight, scale)
    sum_up, repeated = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default, bags.repeated

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) != 1:
            return several(x, bias)
        y: Tensor = sum_up(table, indices, starts, False, 0, False, repeated(x.float(), count))
        y = y.view(1, -1)[:, :out_features]
        return y * scales if bias is None else torch.addcmul(bias, y, scales)

    return multiply


def _multiply_int4(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> _Multiply:
    """By torch's kernel for 4-bit weights, in bfloat16."""
    out_features = weight.shape[0]
    padding = -out_features % _ROWS_OF_TILE  # rows of the head: the kernel wants whole tiles
    ones = torch.ones_like(scale, dtype=torch.float32)
    codes = dequantize(weight, ones, torch.zeros_like(scale, dtype=torch.uint8)).to(torch.int32)
    group_size = codes.shape[1] // scale.shape[1]
    # What is added is rounded by at most 1/64 of a step.
    zero = 0 * ones if zero_point is None else (8 - zero_point.float()) * scale.float()
    table = torch.stack((scale.float().t(), zero.t()), dim=-1)
    table = torch.nn.functional.pad(table, (0, 0, 0, padding)).to(torch.bfloat16).contiguous()
    codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    linear, bfloat16 = torch.ops.aten._weight_int4pack_mm_for_cpu.default, torch.bfloat16

    def multiply(x: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = linear(x.to(bfloat16), codes, group_size, table)
        if padding:
            y = y[:, :out_features]
        return y if bias is None else y + bias

    return multiply


@functools.cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this build of torch has a kernel that multiplies rightly on this CPU, found by trying it."""
    if dtype == torch.int8:
        return _adds_in_32_bits() or _is_right(*_small_int8(), _multiply_int8_in_bfloat16)
    weight = (torch.arange(16 * 16) * 37 % 256).to(torch.uint8).view(16, 16)
    return _is_right(weight, torch.eye(32)[3:5], lambda weight, scale: _multiply_int4(weight, scale[:, None], None))


@functools.cache
def _has_bags() -> bool:
    """Whether a row is multiplied with bags of codes here."""
    return bags.has_bags() and _is_right(*_small_int8(), _multiply_int8_by_bags)


@functools.cache
def _adds_in_32_bits() -> bool:
    """Whether oneDNN's product of whole numbers is exact on this CPU."""
    return _is_right(*_small_int8(), _multiply_int8)


def _is_right(weight: Tensor, x: Tensor, make: Callable[[Tensor, Tensor], _Multiply]) -> bool:
    scale = torch.ones(len(weight))
    try:
        with torch.no_grad():
            expected = x @ dequantize(weight, scale if weight.dtype == torch.int8 else scale[:, None], None).t()
            return torch.allclose(make(weight, scale)(x, None).float(), expected, rtol=1e-5, atol=0.0)
    except (AttributeError, RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False


def _small_int8() -> tuple[Tensor, Tensor]:
    """Codes and x. Sums of two products of the largest numbers are beyond 16 bits, and all of them are numbers that bfloat16 has."""
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    weight[::2] = -128
    return weight, torch.ones(2, 64)
