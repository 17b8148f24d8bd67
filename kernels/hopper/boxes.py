"""How q, k, v and their gradients are seen by the copy engine, dense or packed, so that copies end where a sequence does.

A descriptor has four dimensions, (outer, inner, row, column), and a box is rows of one head: column ``head · stride of heads`` and on. Dense,
``inner`` is the batch and ``row`` the position. Packed, sequences end anywhere, and a box must not reach into the next one: rows are counted
so that the end of the sequence is the end of the dimension, 2^30, and ``inner`` is the row of the tensor at which it ends. That the
dimension ``outer`` takes 2^30 rows back is arithmetic of 64-bit addresses that wrap around, by the technique of Triton's own
``triton.tools.ragged_tma``: its stride is 2^34 elements less one row, of which 2^30 are a multiple of 2^64 bytes less 2^30 rows.
"""

from __future__ import annotations

import torch

BILLION = 2**30
_ENDLESS = 0x7FFF0000
_WRAPPED = 2**34
# Bytes that the copy engine's addresses and strides are multiples of.
ALIGNMENT = 16


def is_walkable(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can walk a tensor (batch, seqlen, heads, features), or (tokens, heads, features), as it lies."""
    *strides, last = tensor.stride()
    sizes = tensor.shape[:-1]
    aligned = all(
        size == 1 or (stride > 0 and stride * tensor.element_size() % ALIGNMENT == 0) for size, stride in zip(sizes, strides)
    )
    return last == 1 and aligned


def rows_and_columns(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(shape, strides) of such a tensor for a descriptor, and how many columns lie from one head to the next.

    Raises:
        ValueError: the copy engine cannot walk it.
    """
    if not is_walkable(tensor):
        raise ValueError(f"no box can be copied of a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}")
    *sizes, dim = tensor.shape
    # The stride of a dimension of one element counts for nothing, and may be anything.
    *batch, row, head = (stride if size > 1 else dim for size, stride in zip(sizes, tensor.stride()))
    columns = (sizes[-1] - 1) * head + dim
    if batch:
        return (1, *sizes[:2], columns), (row, *batch, row, 1), head
    return (_ENDLESS, _ENDLESS, BILLION, columns), (_WRAPPED - row, row, row, 1), head
