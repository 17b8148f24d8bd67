"""quantized_linear by torch: a block of rows of the weight at a time is taken from its codes and multiplied.

So a second weight in full precision never exists; what does is small enough for a core's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.backend import Backend, Outputs, always
from pytransformer.ops.quantized_linear.call import QuantizedLinearCall, QuantizedLinearGradientCall, in_features

# Elements of a block: 1 MB in float32 stays in a core's second cache; a GPU wants products that fill it.
_BLOCK, _BLOCK_ON_GPU = 1 << 18, 1 << 24


def forward(call: QuantizedLinearCall) -> Outputs:
    """(y)."""
    x, weight, scale, zero_point, bias = call
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows in _blocks(weight):
        block = _dequantized(weight, scale, zero_point, rows, x.dtype).t()
        if bias is None:
            y[:, rows] = x @ block
        else:
            y[:, rows] = torch.addmm(bias[rows], x, block)
    return (y,)


def backward(call: QuantizedLinearGradientCall) -> Outputs:
    """(dx)."""
    dy, weight, scale, zero_point = call
    # Sums over blocks are kept in float32, or each block would be rounded.
    wide = torch.float32 if dy.dtype.itemsize < 4 else dy.dtype
    dx = torch.zeros(dy.shape[0], in_features(weight), dtype=wide, device=dy.device)
    for rows in _blocks(weight):
        dx.addmm_(dy[:, rows].to(wide), _dequantized(weight, scale, zero_point, rows, wide))
    return (dx.to(dy.dtype),)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of the weight that are taken from their codes at a time."""
    height = max(16, (_BLOCK_ON_GPU if weight.is_cuda else _BLOCK) // in_features(weight))
    return (slice(start, start + height) for start in range(0, weight.shape[0], height))


def _dequantized(weight: Tensor, scale: Tensor, zero_point: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    return reference.dequantize(weight[rows], scale[rows], None if zero_point is None else zero_point[rows], dtype)


def _by_reference(call: QuantizedLinearCall) -> Outputs:
    x, weight, scale, zero_point, bias = call
    return (reference.quantized_linear(x, weight, scale, zero_point=zero_point, bias=bias),)


BACKEND = Backend("torch", forward)
BACKWARD = Backend("torch", backward)
REFERENCE = Backend("reference", _by_reference, is_transparent=always)
