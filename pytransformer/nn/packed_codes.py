"""Codes reordered for torch's own CPU kernel for few rows: 4-bit weights times bfloat16 inputs.

It reads codes at nearly the speed of memory; its 8-bit sibling does not: on the chain of a GPT-2's weights it takes more than twice as long
per byte. So an 8-bit code is handed over as two of 4 bits, u = 16 h + l, in a weight of twice the columns whose input stands there twice:

    (u - 128) · s = (h - 8) · 16 s + (l - 8) · s + 8 s

The kernel computes (code - 8) · scale + zero in float32, adds up in float32, and takes scale and zero in bfloat16; 16 s, s and 8 s are as
exact as s is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pytransformer.reference import dequantize

# A step with more rows than these is faster as a product of whole blocks in float32.
MAX_PACKED_ROWS = 16
# Groups that the kernel knows; 8-bit codes have a scale per row and take the largest.
_KERNEL_GROUPS = (256, 128, 64, 32)
_ROWS_OF_TILE = 16


class PackedCodes:
    """A packed copy of codes, as of :func:`pytransformer.quantized_linear`."""

    def __init__(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        self._source = _identity(weight, scale)
        self._is_doubled = weight.dtype == torch.int8
        split = _split_int8 if self._is_doubled else functools.partial(_split_int4, zero_point=zero_point)
        codes, scales, zeros, self._group_size = split(weight.detach(), scale.detach())
        padding = -weight.shape[0] % _ROWS_OF_TILE  # rows of the head: the kernel wants whole tiles
        codes = torch.nn.functional.pad(codes, (0, 0, 0, padding))
        table = torch.stack((scales.t(), zeros.t()), dim=-1)
        table = torch.nn.functional.pad(table, (0, 0, 0, padding))
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self._table = table.to(torch.bfloat16).contiguous()

    def is_of(self, weight: Tensor, scale: Tensor) -> bool:
        """Whether these are still the tensors that were packed, and nothing that torch has counted was written to them."""
        return self._source == _identity(weight, scale)

    def product(self, out_features: int, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """The layer as a function of x alone, which checks nothing."""
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        codes, table, group_size, is_doubled = self._codes, self._table, self._group_size, self._is_doubled
        is_padded = table.shape[1] > out_features
        cat = torch.cat

        def product(x: Tensor) -> Tensor:
            rows = x.to(torch.bfloat16).view(-1, x.shape[-1])
            if is_doubled:
                rows = cat((rows, rows), dim=1)
            y = multiply(rows, codes, group_size, table)
            if is_padded:
                y = y[:, :out_features]
            y = y.view(*x.shape[:-1], out_features).to(x.dtype) if x.ndim != 2 else y.to(x.dtype)
            result: Tensor = y if bias is None else y + bias
            return result

        return product


def why_not_packed(weight: Tensor, rows: int = 1) -> str | None:
    """The reason why codes would be left as they are, or ``None``."""
    if weight.device.type != "cpu":
        return f"packing is for CPUs, the weight is on {weight.device}"
    if not 1 <= rows <= MAX_PACKED_ROWS:
        return f"packing is for 1 to {MAX_PACKED_ROWS} rows, got {rows}"
    if weight.dtype == torch.int8 and weight.shape[1] % _KERNEL_GROUPS[-1]:
        return f"packing is for multiples of {_KERNEL_GROUPS[-1]} columns, the weight has {weight.shape[1]}"
    if weight.is_inference():
        return "the weight was made under torch.inference_mode(), which does not count writes"
    if not _works():
        return "this build of torch has no 4-bit kernel for this CPU"
    return None


def _identity(weight: Tensor, scale: Tensor) -> tuple[int, ...]:
    return weight.data_ptr(), weight._version, scale.data_ptr(), scale._version, torch.get_num_threads()


def _split_int8(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """(codes int32 (out, 2 · in), scales and zeros (out, groups), group size) of codes with a scale for each row."""
    columns = weight.shape[1]
    group_size = next(size for size in _KERNEL_GROUPS if columns % size == 0)
    groups = columns // group_size
    shifted = weight.to(torch.int32) + 128
    codes = torch.cat((shifted >> 4, shifted & 15), dim=1)
    scale = scale.float()[:, None].expand(-1, groups)
    return codes, torch.cat((16 * scale, scale), dim=1), torch.cat((0 * scale, 8 * scale), dim=1), group_size


def _split_int4(weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """The same of 4-bit codes, whose zero points become what is added: its rounding to bfloat16 is at most 1/64 of a step."""
    ones = torch.ones_like(scale, dtype=torch.float32)
    codes = dequantize(weight, ones, torch.zeros_like(scale, dtype=torch.uint8)).to(torch.int32)
    scale = scale.float()
    zero = 0 * scale if zero_point is None else (8 - zero_point.float()) * scale
    return codes, scale, zero, codes.shape[1] // scale.shape[1]


@functools.cache
def _works() -> bool:
    """Whether this build of torch has the kernel and it multiplies rightly, found by trying it."""
    try:
        with torch.no_grad():
            weight = torch.arange(16 * 32).view(16, 32).mul(37).sub(100).to(torch.int8)
            x, scale = torch.eye(32)[3:5], torch.ones(16)
            return torch.equal(PackedCodes(weight, scale, None).product(16, None)(x), x @ weight.float().t())
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return False
