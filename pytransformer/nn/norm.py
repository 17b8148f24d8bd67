"""LayerNorm and RMSNorm with torch's constructors and state_dict keys, served by our ops."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer.ops.norm import layer_norm, rms_norm


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``, with an optional residual that is added first.

    Args:
        normalized_shape: the last dimensions that are normalised together.
        eps, elementwise_affine, bias, device, dtype: as torch's.
    """

    def forward(  # type: ignore[override]  # a residual gives two results
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with a residual (y, input + residual); shapes and dtypes of the input."""
        width = _check_shape(input, self.normalized_shape)
        weight, bias = _flat(self.weight, width), _flat(self.bias, width)
        if len(self.normalized_shape) == 1:
            return layer_norm(input, weight, bias, eps=self.eps, residual=residual)
        folded = None if residual is None else _fold(residual, width)
        return _unfold(layer_norm(_fold(input, width), weight, bias, eps=self.eps, residual=folded), input.shape)


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``, with an optional residual that is added first.

    Args:
        normalized_shape: the last dimensions that are normalised together.
        eps: ``None`` = float32's epsilon, whatever the dtype of the input.
        elementwise_affine, device, dtype: as torch's.
        weight_offset: added to the weight (Gemma: 1.0); the weight then starts at ``1 - weight_offset``.
    """

    weight_offset: float = 0.0

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight_offset: float = 0.0,
    ) -> None:
        self.weight_offset = weight_offset
        # As torch's: one of numpy's integers is a width too.
        is_width = isinstance(normalized_shape, numbers.Integral)
        shape: Any = int(normalized_shape) if is_width else list(normalized_shape)  # type: ignore[arg-type]
        super().__init__(shape, eps=eps, elementwise_affine=elementwise_affine, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(  # type: ignore[override]
        self, input: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y, or with a residual (y, input + residual); shapes and dtypes of the input."""
        width = _check_shape(input, self.normalized_shape)
        weight = _flat(self.weight, width)
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        offset = self.weight_offset
        if len(self.normalized_shape) == 1:
            return rms_norm(input, weight, eps=eps, weight_offset=offset, residual=residual)
        folded = None if residual is None else _fold(residual, width)
        return _unfold(
            rms_norm(_fold(input, width), weight, eps=eps, weight_offset=offset, residual=folded), input.shape
        )

    def extra_repr(self) -> str:
        offset = f", weight_offset={self.weight_offset}" if self.weight_offset else ""
        return super().extra_repr() + offset


def _check_shape(x: Tensor, normalized_shape: Sequence[int]) -> int:
    """Number of elements normalised together; RuntimeError, as torch, if the input does not end in ``normalized_shape``."""
    ending = tuple(x.shape[max(x.ndim - len(normalized_shape), 0) :])
    if ending != tuple(normalized_shape):
        raise RuntimeError(f"input must have a shape ending in {tuple(normalized_shape)}, got {tuple(x.shape)}")
    return math.prod(normalized_shape)


def _flat(parameter: Tensor | None, width: int) -> Tensor | None:
    return parameter if parameter is None or parameter.ndim == 1 else parameter.reshape(width)


def _fold(x: Tensor, width: int) -> Tensor:
    return x.reshape(-1, width)


def _unfold(result: Tensor | tuple[Tensor, Tensor], shape: torch.Size) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(result, Tensor):
        return result.reshape(shape)
    return result[0].reshape(shape), result[1].reshape(shape)
