"""Keys and values, plain or quantised, as four tensors that go together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class CachePart(NamedTuple):
    """Keys and values (…, num_kv_heads, head_dim), and of quantised ones the scales (…, num_kv_heads), float32: key = code · scale."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def quantised(self) -> str | None:
        """ "int8", "fp8" or ``None``."""
        return next((name for name, dtype in QUANTISED.items() if dtype == self.k.dtype), None)

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that are there."""
        return tuple(tensor for tensor in self if tensor is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> CachePart:
        """Each of them changed."""
        k_scale, v_scale = (None if tensor is None else change(tensor) for tensor in (self.k_scale, self.v_scale))
        return CachePart(change(self.k), change(self.v), k_scale, v_scale)


def new_part(
    shape: tuple[int, ...], device: torch.device | str | None, dtype: torch.dtype, quantised: str | None
) -> CachePart:
    """Uninitialised memory for keys and values of ``shape``; a cell is written before it is read."""
    if quantised is None:
        return CachePart(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))
    if quantised not in QUANTISED:
        raise ValueError(f"quantised must be {', '.join(map(repr, QUANTISED))} or None, got {quantised!r}")
    codes = (torch.empty(shape, device=device, dtype=QUANTISED[quantised]) for _ in range(2))
    scales = (torch.empty(shape[:-1], device=device, dtype=torch.float32) for _ in range(2))
    return CachePart(*codes, *scales)


def raw(tensor: Tensor) -> Tensor:
    """float8 as its bytes, which can be indexed and copied anywhere."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
