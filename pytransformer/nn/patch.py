"""Lets the norms and attention modules of an existing model run here, and gives them back.

A module keeps its identity, parameters, buffers, hooks and place in the model; what changes is its class, and with it ``forward``. So
optimizers, state_dicts, ties between weights and references held elsewhere stay valid, nothing global is touched, and undoing it is exact.
"""

from __future__ import annotations

import inspect
import math
import numbers
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pytransformer.ops.norm import rms_norm

from .multihead_attention import MultiheadAttention, call_forward, leave_forward
from .norm import LayerNorm, RMSNorm

SERVED: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
    nn.MultiheadAttention: MultiheadAttention,
}
# Where libraries keep the epsilon of an RMSNorm.
EPSILONS = ("variance_epsilon", "eps", "epsilon", "norm_eps", "layer_norm_epsilon")
# Agreement by which a formula is recognised, not an accuracy that is promised: another formula is off by the size of its results.
RECOGNITION = 1e-3

# Entries of a patched module's __dict__.
_PATCH = "_pytransformer_patch"
_NESTED = "_pytransformer_use_nested_tensor"


class _Patch(NamedTuple):
    """What a patched module was and is. ``own``: the class of ours; of other libraries' RMSNorms also where their epsilon is, and what is
    added to their weight."""

    original: type[nn.Module]
    own: type[nn.Module]
    eps_name: str = ""
    weight_offset: float = 0.0

    def patched_class(self) -> type[nn.Module]:
        return self.own if SERVED.get(self.original) is self.own else _combined(self.own, self.original)


@dataclass(frozen=True)
class PatchRow:
    """One module of the report.

    Attributes:
        name: within the model; "" is the model itself.
        was: name of its class before.
        now: name of its class after, or ``None`` if it was left.
        reason: why it was left, or what more there is to know.
    """

    name: str
    was: str
    now: str | None
    reason: str = ""


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did. ``print`` shows it as a table, with modules of one kind in one row."""

    rows: tuple[PatchRow, ...] = ()

    @property
    def replaced(self) -> tuple[PatchRow, ...]:
        """The modules that run here now."""
        return tuple(row for row in self.rows if row.now is not None)

    @property
    def left(self) -> tuple[PatchRow, ...]:
        """The norms and attention modules that run as before, each with the reason."""
        return tuple(row for row in self.rows if row.now is None)

    def __str__(self) -> str:
        groups: dict[tuple[str, str | None, str], list[str]] = {}
        for row in self.rows:
            groups.setdefault((row.was, row.now, row.reason), []).append(row.name or "(the model)")
        lines = [("count", "module", "now", "where", "")]
        for (was, now, reason), names in groups.items():
            where = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            lines.append((str(len(names)), was, now or "left", where, reason))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        table = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths)), line[4]]).rstrip() for line in lines
        ]
        return "\n".join([f"{len(self.replaced)} replaced, {len(self.left)} left", *table])


def patch(model: nn.Module) -> PatchReport:
    """Lets this package serve the norms and ``nn.MultiheadAttention`` modules of a model, in place.

    Served are ``nn.LayerNorm``, ``nn.RMSNorm``, ``nn.MultiheadAttention`` (and subclasses that keep their ``forward``), and RMSNorms of
    other libraries: a class named like one, with one weight, whose ``forward(x)`` turns out, when tried on random numbers, to compute
    ``norm(x) · weight`` or ``norm(x) · (1 + weight)``. Where such a module's weight has another dtype than its input its own ``forward``
    still runs, as libraries differ in what that gives. A module that cannot be served is left and listed with the reason.

    Parameters stay the same objects, the state_dict has the same keys and values, hooks stay and run. Patching again finds nothing new.
    The attention of ``nn.TransformerEncoder`` layers is reached in eval mode too, which torch would otherwise compute in one function of
    its own; such an encoder then takes no nested tensors.

    Returns:
        What was replaced, and what was left and why.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    rows = []
    for name, module in model.named_modules():
        found = None if _PATCH in module.__dict__ else _find(module)
        if isinstance(found, str):
            rows.append(PatchRow(name, type(module).__name__, None, found))
        elif found is not None:
            module.__dict__[_PATCH] = found
            module.__class__ = found.patched_class()
            if found.own is MultiheadAttention:
                call_forward(module)
            rows.append(PatchRow(name, found.original.__name__, _shown(found.own)))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and _holds_patched_attention(module):
            # In eval mode it would turn padded input into nested tensors, for a fused function that would go past its layers' forward.
            module.__dict__.setdefault(_NESTED, getattr(module, "use_nested_tensor", False))
            module.use_nested_tensor = False
    return PatchReport(tuple(rows))


def unpatch(model: nn.Module) -> int:
    """Undoes :func:`patch` exactly; returns how many modules were given back. What was not patched is not touched.

    Raises:
        RuntimeError: something else has changed a module's class since; nothing has then been undone.
    """
    patched = [(name, module) for name, module in model.named_modules() if _PATCH in module.__dict__]
    for name, module in patched:
        if type(module) is not module.__dict__[_PATCH].patched_class():
            raise RuntimeError(
                f"{name or 'the model'} has become a {type(module).__name__} since it was patched: undo that before unpatch"
            )
    for _, module in patched:
        if isinstance(module, MultiheadAttention):
            leave_forward(module)
        module.__class__ = module.__dict__.pop(_PATCH).original
    for module in model.modules():
        if _NESTED in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop(_NESTED)
    return len(patched)


def _shown(own: type[nn.Module]) -> str:
    return "pytransformer.rms_norm" if own is OtherRMSNorm else f"pytransformer.nn.{own.__name__}"


def _holds_patched_attention(module: nn.Module) -> bool:
    return any(isinstance(each, MultiheadAttention) and _PATCH in each.__dict__ for each in module.modules())


# --- Which class a module gets ----------------------------------------------------------------------------------------------------------


def _find(module: nn.Module) -> _Patch | str | None:
    """What to make of a module; or why it is left; or ``None`` if it is neither a norm nor attention, or is ours."""
    kind = type(module)
    if kind.__module__.startswith("pytransformer."):
        return None
    theirs = next((theirs for theirs in SERVED if isinstance(module, theirs)), None)
    if theirs is None and (not _is_named_like_one(module) or _attends_here(module)):
        return None
    reason = _why_not_at_all(module)
    if reason is not None:
        return reason
    if theirs is None:
        return _find_other(module)
    if kind.forward is not theirs.forward:
        return f"a subclass of {theirs.__name__} with a forward of its own"
    return _Patch(kind, SERVED[theirs])


def _is_named_like_one(module: nn.Module) -> bool:
    """A norm without modules inside, or attention without attention inside: not the layers and models that are named after theirs."""
    name, inner = type(module).__name__, list(module.modules())[1:]
    if "Attention" in name:
        return not any("Attention" in type(each).__name__ for each in inner)
    return "Norm" in name and not inner


def _attends_here(module: nn.Module) -> bool:
    """Whether transformers has been told to use this package for the attention of the model."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None) == "pytransformer"


def _why_not_at_all(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if module.__dict__.get("_compiled_call_impl") is not None:
        return "compiled by module.compile(): patch first"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
    return None


_combined_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _combined(own: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the module's class, so that ``isinstance`` holds, that computes as ours does; one for all modules of a class."""
    if (own, kind) not in _combined_classes:
        members = {"__reduce_ex__": _reduce, "__module__": __name__, "__doc__": own.__doc__}
        _combined_classes[own, kind] = type(kind.__name__, (own, kind), members)
    return _combined_classes[own, kind]


def _reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
    """Pickles and copies a module whose class was made by :func:`_combined`, which no import finds."""
    patch = self.__dict__[_PATCH]
    return _rebuild, (patch.own, patch.original), self.__dict__


def _rebuild(own: type[nn.Module], kind: type[nn.Module]) -> nn.Module:
    combined = _combined(own, kind)
    return combined.__new__(combined)


# --- RMSNorms of other libraries --------------------------------------------------------------------------------------------------------


class OtherRMSNorm(nn.Module):
    """What an RMSNorm of another library becomes: our op with its weight and epsilon. Comes before its class among the bases."""

    def forward(self, x: Tensor) -> Tensor:
        """norm(x) · (weight + offset), of x's shape and dtype; another dtype than the weight's is left to the library's own forward."""
        weight = self.weight
        patch = self.__dict__[_PATCH]
        assert isinstance(weight, Tensor)
        if weight.dtype != x.dtype:
            theirs: Tensor = patch.original.forward(self, x)
            return theirs
        y = rms_norm(x, weight, eps=getattr(self, patch.eps_name), weight_offset=patch.weight_offset)
        assert isinstance(y, Tensor)
        return y


def _find_other(module: nn.Module) -> _Patch | str:
    kind = type(module)
    if "Attention" in kind.__name__:
        return "attention of another library (transformers' takes attn_implementation='pytransformer')"
    if "RMSNorm" not in kind.__name__ and "LayerNorm" not in kind.__name__:
        return "another kind of norm"
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    if set(state) != {"weight"} or state["weight"].ndim != 1 or state["weight"].numel() == 0:
        return f"not a norm with one weight: it has {', '.join(f'{name} {tuple(t.shape)}' for name, t in state.items()) or 'none'}"
    arguments = list(inspect.signature(kind.forward).parameters)[1:]
    if len(arguments) != 1:
        return f"its forward takes ({', '.join(arguments)})"
    eps_name = next((name for name in EPSILONS if _is_number(getattr(module, name, None))), None)
    if eps_name is None:
        return "its epsilon is not found"
    offset = _recognise(module, getattr(module, eps_name))
    return offset if isinstance(offset, str) else _Patch(kind, OtherRMSNorm, eps_name, offset)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, numbers.Integral))


@torch.no_grad()
def _recognise(module: nn.Module, eps: float) -> float | str:
    """What the module adds to its weight, 0 or 1, found by trying its forward with random numbers; or why it is no such RMSNorm."""
    parameters = module._parameters
    assert parameters["weight"] is not None
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(parameters["weight"].shape, generator=generator, device="cpu")
    # Rows of several sizes, one so small that epsilon decides.
    sizes = torch.tensor([1.0, 30.0, math.sqrt(eps)], device="cpu")
    x = torch.randn(3, weight.shape[0], generator=generator, device="cpu") * sizes[:, None]
    stand_in = type(module).__new__(type(module))
    stand_in.__dict__.update(module.__dict__, _parameters={"weight": nn.Parameter(weight)})
    try:
        actual = type(module).forward(stand_in, x)
    except Exception as error:  # whatever another library's code does with a tensor of this shape
        return f"its forward could not be tried: {type(error).__name__}: {error}"
    if not isinstance(actual, Tensor) or actual.shape != x.shape:
        return "its forward does not return a tensor of the shape of x"
    normalised = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    for offset in (0.0, 1.0):
        expected = normalised * (weight.double() + offset)
        if float((actual.double() - expected).abs().max()) <= RECOGNITION * float(expected.abs().max()):
            return offset
    return "its forward computes neither norm(x) · weight nor norm(x) · (1 + weight)"
