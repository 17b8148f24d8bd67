"""How a kernel that breaks a rule, and its twin that does not, are run and judged."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pytransformer.gluon_interpreter import EARLY, LATE, SCHEDULES, Schedule, launch
from pytransformer.triton_interpreter import KernelFault

SIDE = 64
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def tiles(count: int = 4) -> torch.Tensor:
    """That many tiles of 64 × 64 bfloat16, one below the other."""
    return torch.randn(count * SIDE, SIDE).to(torch.bfloat16)


def descriptor(tensor: torch.Tensor, rows: int = SIDE, padding: str = "zero") -> TensorDescriptor:
    """Boxes of 64 columns."""
    options = {} if padding == "zero" else {"padding": padding}  # Triton 3.6 knows no other
    return TensorDescriptor.from_tensor(tensor, [rows, SIDE], LAYOUT, **options)


def run(
    kernel: Any, broken: bool, schedule: Schedule, grid: tuple[int, ...] = (1,)
) -> tuple[torch.Tensor, torch.Tensor]:
    """(source, result) of ``kernel(source descriptor, result descriptor, BROKEN)``."""
    source = tiles()
    result = torch.zeros_like(source)
    launch(kernel, grid, descriptor(source), descriptor(result), broken, schedule=schedule)
    return source, result


def lines(kernel: Any, mark: str) -> list[str]:
    """The lines of the kernel's file with the comment ``# <mark>``, as faults name them."""
    path = inspect.getfile(kernel.fn)
    with open(path) as file:
        found = [number for number, line in enumerate(file, start=1) if line.rstrip().endswith(f"# {mark}")]
    assert found, mark
    return [f"{os.path.basename(path)}:{number} in " for number in found]


def check(
    kernel: Any,
    mark: str,
    *faults: type[KernelFault],
    grid: tuple[int, ...] = (1,),
    schedules: Sequence[Schedule] = SCHEDULES,
) -> list[KernelFault]:
    """The twin passes; the broken one faults in every schedule, by the line with the mark.

    Args:
        faults: the first is seen in one schedule at least; another may be seen instead where the order of events hides it.
    """
    for schedule in (EARLY, LATE, SCHEDULES[-1]):
        run(kernel, False, schedule, grid)
    seen = []
    for schedule in schedules:
        with pytest.raises(KernelFault) as caught:
            run(kernel, True, schedule, grid)
        assert type(caught.value) in faults, (schedule, caught.value)
        if type(caught.value) is faults[0]:
            assert any(line in str(caught.value) for line in lines(kernel, mark)), (schedule, caught.value)
            seen.append(caught.value)
    assert seen, f"no schedule shows {faults[0].__name__}"
    return seen
