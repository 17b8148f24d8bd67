"""Counters for programs that share a task: zero before each launch, because each launch leaves them zero."""

from __future__ import annotations

import torch
from torch import Tensor

from .prepared import current_stream

_kept: dict[tuple[torch.device, int], Tensor] = {}


class Counters:
    """Gives ``count`` int32 zeros for a launch, which must be zeros again when it ends.

    Launches of one stream run one after another and share theirs. A launch that is captured into a CUDA graph gets its own, which the graph
    clears before: two graphs may run beside each other.
    """

    __slots__ = ("_count", "_device", "_index")

    def __init__(self, device: torch.device, count: int) -> None:
        self._device, self._count = device, count
        self._index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index

    def __call__(self) -> Tensor:
        stream = 0
        if self._index is not None and self._device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(self._count, dtype=torch.int32, device=self._device)
            stream = current_stream(self._index)
        kept = _kept.get((self._device, stream))
        if kept is None or kept.shape[0] < self._count:
            kept = torch.zeros(self._count, dtype=torch.int32, device=self._device)
            _kept[self._device, stream] = kept
        return kept
