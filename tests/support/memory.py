"""What a call asks memory for, counted; and memory that shows when it is read."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of the elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_allocated(function: Callable[[], Any], device: torch.device, folder: Path) -> tuple[int, Any]:
    """(highest total of bytes that were allocated and not yet freed during the call, its result).

    On a CPU every allocation is counted by torch's profiler; on a GPU torch's own counters tell.
    """
    gc.collect()  # what earlier tests left must not be freed, and counted, during this call
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        return torch.cuda.max_memory_allocated(device) - before, result
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        highest = max(highest, held)
    return highest, result


def surrounded(tensor: Tensor) -> Tensor:
    """The same values as a view whose neighbours in memory, on all sides and between the rows, are NaN."""
    widened = [size + 1 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 8]
    memory = torch.full((math.prod(widened) + 16,), math.nan, dtype=tensor.dtype, device=tensor.device)
    view = memory[8 : 8 + math.prod(widened)].view(widened)
    view = view[tuple(slice(0, size) for size in tensor.shape)]
    view.copy_(tensor)
    return view
