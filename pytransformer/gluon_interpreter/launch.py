"""Launches of a Gluon kernel in the interpreter."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import interpreter

from pytransformer import triton_interpreter
from pytransformer.triton_interpreter import KernelFault

from . import machine as machines
from .copies import Descriptor
from .faults import ProtocolFault
from .language import translate
from .machine import Machine, Program
from .operations import descriptor_value
from .schedules import EARLY, Schedule
from .source import line_of
from .trace import Trace
from .values import SEMANTIC, Handle, Tensor, scalar

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


def launch(
    kernel: Any, grid: Grid, *args: Any, schedule: Schedule = EARLY, num_warps: int = 4, **kwargs: Any
) -> list[Trace]:
    """Runs a kernel as ``kernel[grid](*args, num_warps=num_warps, **kwargs)`` would on a GPU, one program after the other.

    Args:
        kernel: what ``@gluon.jit`` made.
        grid: one to three numbers of programs, or a function of the arguments that gives them.
        args, kwargs: the kernel's; tensors and descriptors on the CPU, which it changes.
        schedule: in which order tasks run and when asynchronous work happens.
        num_warps: of the default partition.

    Returns:
        What happened, per program.

    Raises:
        KernelFault: a rule was broken (see :mod:`.faults`), or memory accessed outside of a tensor or in no order.
        TypeError: an argument is missing or of a type that no kernel takes.
        NotImplementedError: the kernel asks for something that the interpreter does not know.
    """
    bound = _bind(kernel, args, kwargs)
    lengths = _lengths(grid(bound) if callable(grid) else grid)
    function = translate(kernel)
    traces = []
    with triton_interpreter.launched(bound.items()) as memory, np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        values = {name: _value(name, value, memory, constant) for name, value, constant in _parameters(kernel, bound)}
        total = lengths[0] * lengths[1] * lengths[2]
        for number, program in enumerate(itertools.product(range(lengths[0]), range(lengths[1]), range(lengths[2]))):
            memory.order.enter(number, total)
            for builder in (SEMANTIC.builder, interpreter.interpreter_builder):
                builder.grid_dim, builder.grid_idx = lengths, program
            running = Machine(program, schedule, memory, num_warps)
            machines.enter(running)
            try:
                running.run(function(**values))
            except KernelFault as fault:
                if isinstance(fault, ProtocolFault):
                    raise
                raise type(fault)(f"{fault}, at {line_of(fault.__traceback__)}") from None
            finally:
                machines.leave()
            traces.append(running.trace)
    return traces


def _lengths(grid: tuple[int, ...]) -> Program:
    if not 1 <= len(grid) <= 3 or any(length < 1 for length in grid):
        raise ValueError(f"grid must be one to three positive numbers, got {grid}")
    x, y, z = (*grid, 1, 1)[:3]
    return x, y, z


def _bind(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = kernel.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _parameters(kernel: Any, bound: dict[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    for parameter in kernel.params:
        yield parameter.name, bound[parameter.name], parameter.is_constexpr


def _value(name: str, value: Any, memory: Any, constant: bool) -> Any:
    """An argument as the kernel holds it."""
    if isinstance(value, gl.constexpr):
        return value.value
    if constant or value is None:
        return value
    if isinstance(value, torch.Tensor):
        kind = gl.pointer_type(_element(value.dtype))
        return Tensor(Handle(np.array([value.data_ptr() + memory.tag(value)], np.uint64), kind), kind)
    if isinstance(value, TensorDescriptor):
        return descriptor_value(_descriptor(value, memory))
    if isinstance(value, (tuple, list)):
        items = [_value(name, item, memory, False) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else gl.tuple(items)
    if isinstance(value, (bool, int, float)):
        return scalar(value, _scalar_type(name, value))
    raise TypeError(f"argument {name} is a {type(value).__name__}, and a kernel takes tensors, descriptors and numbers")


def _scalar_type(name: str, value: float) -> Any:
    if isinstance(value, bool):
        return gl.int1
    if isinstance(value, float):
        return gl.float32
    for kind, low, high in ((gl.int32, -(2**31), 2**31), (gl.int64, -(2**63), 2**63), (gl.uint64, 0, 2**64)):
        if low <= value < high:
            return kind
    raise ValueError(f"argument {name} must fit into 64 bits, got {value}")


def _element(dtype: torch.dtype) -> Any:
    known = {
        torch.bfloat16: gl.bfloat16,
        torch.float16: gl.float16,
        torch.float32: gl.float32,
        torch.float64: gl.float64,
        torch.bool: gl.int1,
        torch.int8: gl.int8,
        torch.uint8: gl.uint8,
        torch.int16: gl.int16,
        torch.int32: gl.int32,
        torch.int64: gl.int64,
        torch.float8_e4m3fn: gl.float8e4nv,
        torch.float8_e5m2: gl.float8e5,
    }
    if dtype not in known:
        raise TypeError(f"a kernel takes no tensor of {dtype}")
    return known[dtype]


def _descriptor(value: TensorDescriptor, memory: Any) -> Descriptor:
    element = _element(value.base.dtype)
    return Descriptor(
        value.base.data_ptr() + memory.tag(value.base),
        tuple(value.shape),
        tuple(value.strides),
        tuple(value.block_shape),
        element,
        interpreter._get_np_dtype(element),
        value.layout,
        getattr(value, "padding", "zero") == "nan",  # Triton 3.6 has none
    )
