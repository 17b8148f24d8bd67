"""The columns of docs/surfaces.md, each a check of one surface that raises where the property does not hold."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pytransformer
from pytransformer.interop import flash_attn
from pytransformer.interop import torch as interop_torch
from pytransformer.verification import Contract
from tests.support.draws import pool
from tests.surfaces.surfaces import SURFACES, Surface, Tensors

BATCH, SEQLEN = 2, 5


def target_of(surface: Surface, numbers: dict[str, Any] | None = None) -> Any:
    """What is called, in eval mode if it is a module, its weights the same each time."""
    torch.manual_seed(1)
    target = surface.build(**(dict(surface.numbers) if numbers is None else numbers))
    return target.eval() if isinstance(target, nn.Module) else target


def inputs_of(surface: Surface, seed: int = 0, grad: bool = False, batch: int = BATCH, seqlen: int = SEQLEN) -> Tensors:
    torch.manual_seed(seed)
    tensors = surface.inputs(batch, seqlen)
    if grad:
        tensors = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}
    return tensors


def outputs_of(surface: Surface, target: Any, tensors: Tensors) -> list[Tensor]:
    found = torch.utils._pytree.tree_leaves(surface.apply(target, tensors))
    return [each for each in found if isinstance(each, Tensor)]


def in_dtype(target: Any, dtype: torch.dtype) -> Any:
    return copy.deepcopy(target).to(dtype) if isinstance(target, nn.Module) else target


def same_bits(found: list[Tensor], right: list[Tensor]) -> None:
    torch.testing.assert_close(found, right, rtol=0, atol=0)


# --- Columns ----------------------------------------------------------------------------------------------------------------------------


def meta(surface: Surface) -> None:
    """Shapes and dtypes of meta tensors are those of real ones."""
    target = target_of(surface)
    right = outputs_of(surface, target, inputs_of(surface))
    target = copy.deepcopy(target).to("meta") if isinstance(target, nn.Module) else target
    found = outputs_of(surface, target, {name: tensor.to("meta") for name, tensor in inputs_of(surface).items()})
    assert all(each.is_meta for each in found)
    assert [(each.shape, each.dtype) for each in found] == [(each.shape, each.dtype) for each in right]


def empty(surface: Surface) -> None:
    """No sequences, and sequences of no tokens: as many dimensions and dtypes as else, nothing that is not finite, gradients of 0."""
    target = target_of(surface)
    right = outputs_of(surface, target, inputs_of(surface))
    for batch, seqlen in ((0, SEQLEN), (BATCH, 0)):
        tensors = inputs_of(surface, grad=surface.differentiable, batch=batch, seqlen=seqlen)
        found = outputs_of(surface, target, tensors)
        assert [(each.ndim, each.dtype) for each in found] == [(each.ndim, each.dtype) for each in right]
        assert all(each.isfinite().all() for each in found)
        if surface.differentiable:
            torch.stack([each.sum() for each in found]).sum().backward()
            for name, leaf in tensors.items():
                assert leaf.grad is None or not leaf.grad.any(), name


def autocast(surface: Surface) -> None:
    """Within the contract of bfloat16, measured by the same call in bfloat16 throughout."""
    contract = Contract(torch.bfloat16)
    target = target_of(surface)
    low, wide = in_dtype(target, torch.bfloat16), in_dtype(target, torch.float64)

    def add(seed: int) -> None:
        tensors = inputs_of(surface, seed)
        by_dtype = {
            dtype: {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
            }
            for dtype in (torch.bfloat16, torch.float64)
        }
        with torch.autocast("cpu", torch.bfloat16):
            actual = outputs_of(surface, target, tensors)
        plain = outputs_of(surface, low, by_dtype[torch.bfloat16])
        golden = outputs_of(surface, wide, by_dtype[torch.float64])
        for index, (one, other, right) in enumerate(zip(actual, plain, golden, strict=True)):
            contract.add(str(index), actual=one, plain=other, golden=right.double())

    pool(contract, add, 1).check()


def numpy_scalar(surface: Surface) -> None:
    """The bits of Python's numbers."""

    def numpys(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(numpys, value))
        return {bool: np.bool_, int: np.int64, float: np.float64}[type(value)](value)

    given = {name: numpys(value) for name, value in surface.numbers.items()}
    right = outputs_of(surface, target_of(surface), inputs_of(surface))
    for _ in range(2):
        same_bits(outputs_of(surface, target_of(surface, given), inputs_of(surface)), right)


def without_gradients(surface: Surface, context: Callable[[], Any]) -> list[Tensor]:
    """The results of a call on tensors that require grad, in a context in which none is wanted."""
    right = outputs_of(surface, target_of(surface), inputs_of(surface))
    target = target_of(surface)
    with context():
        found = outputs_of(surface, target, inputs_of(surface, grad=True))
    assert not any(each.requires_grad for each in found)
    torch.testing.assert_close(found, right)
    return found


def no_grad(surface: Surface) -> None:
    """On tensors that require grad: the results of tensors that do not, and none that requires grad."""
    without_gradients(surface, torch.no_grad)


def inference_mode(surface: Surface) -> None:
    """The same, and the results are inference tensors."""
    assert all(each.is_inference() for each in without_gradients(surface, torch.inference_mode))


def vmap(surface: Surface) -> None:
    """Mapped over a new dimension of the floating tensors (of all, where there are none), against one call after another."""
    target = target_of(surface)
    parts = [inputs_of(surface, seed) for seed in (0, 1, 2)]
    mapped = [name for name, tensor in parts[0].items() if tensor.is_floating_point()] or list(parts[0])
    dims = {name: 0 if name in mapped else None for name in parts[0]}
    stacked = {name: torch.stack([part[name] for part in parts]) if name in mapped else parts[0][name] for name in dims}
    call = torch.func.vmap(lambda tensors: tuple(outputs_of(surface, target, tensors)), in_dims=(dims,))
    found = call(stacked)
    right = [torch.stack(each) for each in zip(*(outputs_of(surface, target, part) for part in parts), strict=True)]
    torch.testing.assert_close(list(found), right)


def compiled(surface: Surface) -> None:
    """One graph, and the results of an eager call. (What else a compiler may ask of them is in the tests of each.)"""
    target = target_of(surface)
    torch._dynamo.reset()
    call = torch.compile(lambda tensors: surface.apply(target, tensors), fullgraph=True, backend="eager")
    with torch.no_grad():
        found = torch.utils._pytree.tree_leaves(call(inputs_of(surface)))
        right = outputs_of(surface, target, inputs_of(surface))
    torch.testing.assert_close([each for each in found if isinstance(each, Tensor)], right)


def copied(surface: Surface, make: Callable[[Any], Any]) -> None:
    """What ``make`` makes of a surface is as it was."""
    target = target_of(surface)
    if not isinstance(target, nn.Module):
        name = next(name for name, other in SURFACES.items() if other is surface).partition(",")[0]
        function = next(
            getattr(place, name) for place in (pytransformer, interop_torch, flash_attn) if hasattr(place, name)
        )
        assert make(function) is function
        return
    other = make(target)
    assert type(other) is type(target)
    for (name, mine), (theirs_name, theirs) in zip(target.named_parameters(), other.named_parameters(), strict=True):
        assert name == theirs_name and torch.equal(mine, theirs) and mine is not theirs
    same_bits(outputs_of(surface, other, inputs_of(surface)), outputs_of(surface, target, inputs_of(surface)))


def deepcopy(surface: Surface) -> None:
    """A module's copy has its class, copies of its weights and its results; a function is itself."""
    copied(surface, copy.deepcopy)


def pickled(surface: Surface) -> None:
    """The same of what is written and read."""
    copied(surface, lambda target: pickle.loads(pickle.dumps(target)))


PROPERTIES: dict[str, Callable[[Surface], None]] = {
    "meta": meta,
    "empty": empty,
    "autocast": autocast,
    "numpy scalar": numpy_scalar,
    "no_grad": no_grad,
    "inference_mode": inference_mode,
    "vmap": vmap,
    "compile": compiled,
    "deepcopy": deepcopy,
    "pickle": pickled,
}


def cell(surface: Surface, name: str) -> str:
    """What the page says of a surface and a property, found now: "yes", or the reason why not, which an exception shows where one can.

    Raises:
        Whatever the check raises of a property that holds; AssertionError where a reason is given and nothing is refused.
    """
    check, reason = PROPERTIES[name], surface.without.get(name)
    if reason is None:
        check(surface)
        return "yes"
    if name in surface.refusals:
        kind, message = surface.refusals[name]
        try:
            check(surface)
        except kind as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{name} holds after all: the page says {reason!r}")
    return reason
