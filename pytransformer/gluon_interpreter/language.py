"""Gluon's functions as the interpreter does them, and how the functions of a kernel come to call them.

A kernel's functions are run as the Python that they are (functions.py), with other globals: modules of Triton give
out what stands here, builtins are called with the semantic that computes at once, and functions of Gluon are run in
the same way. Nothing of Triton is patched.
"""

from __future__ import annotations

import builtins
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental.gluon.language import _core as core
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from pytransformer.triton_interpreter.reductions import _SELECTIONS

from . import operations
from .functions import as_steps, now
from .tasks import Steps
from .values import REPLAY, SEMANTIC, Handle, Tensor, scalar

_FUNCTIONS = (JITFunction, interpreter.InterpretedFunction)
# Reductions that the hardened interpreter makes as a GPU does.
_KNOWN = (*_SELECTIONS, tl.standard._sum_combine)


def device_range(*args: Any) -> Iterator[Tensor]:
    """``range`` of a kernel: its numbers are int32 scalars, so that what is computed of them is computed as a GPU does."""
    numbers = builtins.range(*[int(core._unwrap_if_constexpr(arg)) for arg in args])
    return map(functools.partial(scalar, kind=gl.int32), numbers)


def static_range(*args: Any) -> Iterator[int]:
    """``gl.static_range``: compile-time integers."""
    return iter(builtins.range(*[int(core._unwrap_if_constexpr(arg)) for arg in args]))


def reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: bool = False, **_: Any) -> Any:
    """``gl.reduce``."""
    return SEMANTIC.reduce(input, core._unwrap_if_constexpr(axis), combine_fn, bool(keep_dims), _reduced)


def _reduced(inputs: tuple[Any, ...], axis: int | None, combine: Any) -> list[tuple[Any, Any]]:
    combine = getattr(combine, "original", combine)
    if combine in _KNOWN:
        results = interpreter.ReduceOps(axis, combine, False).apply(inputs)
        return [(result.handle.data, tensor) for result, tensor in zip(results, inputs)]
    arrays = [x.handle.data.reshape(-1) if axis is None else np.moveaxis(x.handle.data, axis, 0) for x in inputs]
    function = translate(combine)
    while len(arrays[0]) > 1:
        half = len(arrays[0]) // 2
        first, second = ([_auto(array[part], x.dtype) for array, x in zip(arrays, inputs)] for part in _halves(half))
        outcome = now(function(*first, *second))
        arrays = [result.handle.data for result in (outcome if isinstance(outcome, tuple) else (outcome,))]
    return [(array[0], x) for array, x in zip(arrays, inputs)]


def _halves(half: int) -> tuple[slice, slice]:
    return slice(0, half), slice(half, 2 * half)


def _auto(array: Any, kind: Any) -> Tensor:
    return Tensor(Handle(array, kind), gl.distributed_type(kind, list(array.shape), gl.AutoLayout()))


class KernelFunction:
    """A function of Gluon as one that Python can call; what it returns is a generator of its steps.

    Args:
        original: what ``@gluon.jit`` made.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.__name__ = original.fn.__name__
        self._steps: Callable[..., Steps] | None = None

    def __call__(self, *args: Any, _semantic: Any = None, **kwargs: Any) -> Steps:
        if self._steps is None:
            self._steps = as_steps(self.original.fn, translate, {"range": device_range})
        return self._steps(*args, **kwargs)


class ModuleView:
    """A module of Triton whose members are translated when they are asked for."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = translate(getattr(self._module, name))
        setattr(self, name, value)
        return value


_translated: dict[int, tuple[Any, Any]] = {}


def translate(value: Any) -> Any:
    """What a kernel sees in place of a global value."""
    try:
        return _translated[id(value)][1]
    except KeyError:
        pass
    result = _translate(value)
    _translated[id(value)] = (value, result)
    return result


def _translate(value: Any) -> Any:
    if isinstance(value, gl.constexpr):
        return value.value
    if isinstance(value, types.ModuleType) and value.__name__.startswith("triton."):
        return ModuleView(value)
    if isinstance(value, _FUNCTIONS):
        return KernelFunction(value)
    if getattr(value, core.GLUON_BUILTIN, False) and not isinstance(value, type):
        return _builtin(value)
    return value


def _builtin(member: Callable[..., Any]) -> Callable[..., Any]:
    call = REPLAY.replayed(member)
    call.__name__ = getattr(member, "__name__", "builtin")
    return call


def _known() -> Iterator[tuple[Any, Any]]:
    yield builtins.range, device_range
    for static in (gl.static_range, tl.static_range):
        yield static, static_range
    for constexpr in (gl.constexpr, tl.constexpr):
        yield constexpr, core._unwrap_if_constexpr  # as in Triton's interpreter: compile-time values are plain ones
    for reduction in (gl.reduce, tl.reduce, tl.core.reduce):
        yield reduction, reduce
    yield from operations.REPLACED


_translated.update({id(original): (original, by) for original, by in _known()})
