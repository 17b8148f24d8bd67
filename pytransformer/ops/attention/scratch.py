"""Memory that the tiles of a call use one after another: on a CPU the pages of a fresh buffer cost more than what is computed in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Named buffers.

    Args:
        dtype: of tensors that are taken without one.
        device: of all.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised contiguous tensor; what was taken under this name before is overwritten."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype or self._dtype, device=self._device)
        return buffer[:size].view(shape)
