"""A linear layer whose weight is held as 8- or 4-bit codes, made from one in full precision.

Weights are rounded to the nearest code here; ``model/gptq.py`` chooses codes by what the layer's inputs make of them. On a CPU the layer
can be prepared for decoding like :class:`pytransformer.nn.Linear`: its codes are packed for torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytransformer.ops.quantized_linear import quantized_linear
from pytransformer.ops.quantized_linear.call import GROUP_SIZES
from pytransformer.reference import dequantize

from .linear import RowBlocks
from .packed_codes import PackedCodes, why_not_packed

BITS = (8, 4)


class Codes(NamedTuple):
    """A weight as codes: what :func:`pytransformer.quantized_linear` takes."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None


class QuantizedLinear(nn.Module):
    """A linear layer over codes: 8 bits with a scale for each row, or 4 bits with a scale and zero point for each group of columns.

    The codes are frozen; gradients flow to the input and to the bias, as adapters beside the layer need them.

    Args:
        in_features, out_features: widths; with 4 bits ``in_features`` is a multiple of ``group_size``.
        bias: whether there is one.
        bits: 8 or 4.
        group_size: 32, 64 or 128 columns that share a scale, with 4 bits.
        device, dtype: of the bias; scales are bfloat16 whatever the model is moved to, as codes are chosen for the rounded ones.

    Weights: ``weight`` int8 (out, in), or uint8 (out, in / 2) with the layout of :func:`pytransformer.quantized_linear`; ``scale``
    bfloat16 (out), or (out, in / group_size); with 4 bits ``zero_point`` uint8 like ``scale``; ``bias`` (out). They start as zeros: codes
    come from :meth:`of`, :meth:`set_codes` or a state_dict.

    Raises:
        ValueError: bits or a group size that there are not, or that do not divide ``in_features``.
    """

    bias: nn.Parameter | None
    zero_point: nn.Parameter | None
    _packed: PackedCodes | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        bits: int = 8,
        group_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_bits(bits, group_size, in_features)
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        self.group_size = group_size if bits == 4 else in_features

        def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)

        groups = (out_features, in_features // self.group_size) if bits == 4 else (out_features,)
        columns, code = (in_features // 2, torch.uint8) if bits == 4 else (in_features, torch.int8)
        self.weight = frozen(out_features, columns, dtype=code)
        self.scale = frozen(*groups, dtype=torch.bfloat16)
        self.register_parameter("zero_point", frozen(*groups, dtype=torch.uint8) if bits == 4 else None)
        new_bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", new_bias)

    @classmethod
    def of(cls, linear: nn.Linear | RowBlocks, bits: int = 8, group_size: int = 64) -> QuantizedLinear:
        """The layer with each weight rounded to the nearest code; the bias is shared with ``linear``."""
        layer = cls.like(linear, bits, group_size)
        return layer.set_codes(round_to_nearest(linear.weight, bits, group_size))

    @classmethod
    def like(cls, linear: nn.Linear | RowBlocks, bits: int, group_size: int, **options: Any) -> QuantizedLinear:
        """A layer of these widths without codes yet, with the bias of ``linear``."""
        # Of RowBlocks, ``weight`` is a copy of all.
        some = linear.weight_0 if isinstance(linear, RowBlocks) else linear.weight
        widths = (linear.in_features, linear.out_features)
        layer = cls(*widths, bias=False, bits=bits, group_size=group_size, device=some.device, **options)  # type: ignore[arg-type]
        layer.bias = linear.bias
        return layer.train(linear.training)

    @torch.no_grad()
    def set_codes(self, codes: Codes) -> QuantizedLinear:
        """Takes codes as its own; returns the layer."""
        self.weight.copy_(codes.weight)
        self.scale.copy_(codes.scale)
        if self.zero_point is not None and codes.zero_point is not None:
            self.zero_point.copy_(codes.zero_point)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return quantized_linear(input, self.weight, self.scale, zero_point=self.zero_point, bias=self.bias)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out_features, in_features) that the codes stand for."""
        return dequantize(self.weight, self.scale, self.zero_point, dtype)

    def pack(self, rows: int = 1) -> bool:
        """Packs the codes for inputs of few rows on a CPU, unless that has been done; returns whether a packed copy is there now."""
        packed = self._packed
        if packed is None or not packed.serves(rows) or not packed.is_of(self.weight, self.scale):
            self._packed = None
            if why_not_packed(self.weight, rows) is None:
                self._packed = PackedCodes(self.weight, self.scale, self.zero_point, rows)
        return self._packed is not None

    @property
    def is_packed(self) -> bool:
        """Whether there is a packed copy, up to date or not."""
        return self._packed is not None

    def unpack(self) -> None:
        """Frees the packed copy."""
        self._packed = None

    def product(self, *, packed: bool = True) -> Callable[[Tensor], Tensor]:
        """x (…, in_features) -> x Wᵀ + bias, without autograd; with packed codes x is rounded: see packed_codes.py.

        ``packed=False`` leaves those alone, as of :meth:`Linear.product`.
        """
        return self._packed.product(self.bias) if packed and self._packed is not None else self.forward

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        scale = self.scale.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != scale.dtype:
            self.scale = nn.Parameter(scale.to(self.scale.device), requires_grad=False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}  # as of Linear

    def extra_repr(self) -> str:
        groups = f", group_size={self.group_size}" if self.bits == 4 else ""
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={has_bias}, bits={self.bits}{groups}"


def check_bits(bits: int, group_size: int, in_features: int | None = None) -> None:
    """ValueError unless there are codes of so many bits, and groups of this size that divide the columns."""
    if bits not in BITS:
        raise ValueError(f"bits must be 8 or 4, got {bits!r}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}, got {group_size!r}")
    if bits == 4 and in_features is not None and in_features % group_size:
        raise ValueError(f"group_size must divide in_features ({in_features}), got {group_size}")


@torch.no_grad()
def round_to_nearest(weight: Tensor, bits: int = 8, group_size: int = 64) -> Codes:
    """The codes nearest to a weight (out_features, in_features).

    8 bits: the largest magnitude of a row is code ±127. 4 bits: the range of a group, 0 included, is divided into 15 steps.

    Raises:
        ValueError: bits or a group size that there are not; a weight that is not finite.
    """
    check_bits(bits, group_size, weight.shape[1])
    weight = weight.detach().float().contiguous()
    if not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite to be quantised, and it holds infinity or NaN")
    if bits == 8:
        scale = _steps(weight.abs().amax(dim=1), 127)
        return Codes(_nearest(weight, scale[:, None], 0, -127, 127).to(torch.int8), scale, None)
    groups = weight.view(len(weight), -1, group_size)
    scale, zero = grid_of(groups)
    codes = _nearest(groups, scale[..., None], zero[..., None], 0, 15)
    return Codes(packed_halves(codes), scale, zero.to(torch.uint8))


def grid_of(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, zero point as floats) of groups (…, group_size), for codes 0 to 15 that reach from the least to the largest, and 0."""
    low, high = groups.amin(dim=-1).clamp(max=0), groups.amax(dim=-1).clamp(min=0)
    scale = _steps(high - low, 15)
    return scale, (-low / scale.float()).round().clamp(0, 15)


def packed_halves(codes: Tensor) -> Tensor:
    """Codes 0 to 15 (out_features, groups, group_size) in bytes (out_features, in_features / 2)."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).flatten(1)


def _steps(extent: Tensor, count: int) -> Tensor:
    """bfloat16 sizes of a step of which ``count`` make the extent; 1 where that is 0."""
    scale = (extent / count).to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor | int, low: int, high: int) -> Tensor:
    return ((weight / scale.float()).round() + zero).clamp(low, high)
