"""What the differentiable ops share: a loop as vmap rule, and a clear refusal of double backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor


def vmap_by_loop(function: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """A vmap rule for a ``torch.autograd.Function``: applies it to one slice after another and stacks the results.

    Returns:
        The stacked outputs and their batch dimensions (all 0), as the ``vmap`` staticmethod of a Function must.
    """
    results = []
    for index in range(info.batch_size):
        sliced = [arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, in_dims)]
        results.append(function.apply(*sliced))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(outputs) for outputs in zip(*results)), (0,) * len(results[0])


def refuse_double_backward(op: str) -> NoReturn:
    """RuntimeError: the gradient of ``op`` was asked for a gradient of its own."""
    raise RuntimeError(
        f"{op} has no double backward: its gradient was computed by a fused kernel; use backend='reference' "
        "where second derivatives are needed"
    )


def records_backward() -> bool:
    """Whether a backward pass is itself being recorded (create_graph=True, functorch); the compiler differentiates once only."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def requires_grad(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors requires a gradient; whether grad mode is on is the caller's to ask, first, in a small op."""
    for tensor in tensors:  # noqa: SIM110 (a generator takes longer than the questions)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def is_recorded(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors must go through an autograd.Function: one requires grad, or torch.func is at work, inside which a
    tensor does not always know that it is differentiated."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and requires_grad(*tensors)


_increment_version = torch._C._increment_version


def mark_changed(*tensors: Tensor) -> None:
    """A kernel writes behind autograd's back; a tensor saved for some backward pass must be seen to have changed."""
    try:
        _increment_version(tensors)
    except (
        RuntimeError
    ):  # one was made under inference mode and has no version; asking each beforehand takes longer than all else here
        _increment_version([tensor for tensor in tensors if not tensor.is_inference()])


@contextlib.contextmanager
def autograd_inside_an_op() -> Iterator[None]:
    """Lets the implementation of an op use autograd: inside a dispatch mode it runs below it, where nothing is recorded."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield
