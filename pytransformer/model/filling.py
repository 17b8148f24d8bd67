"""A model out of tensor files: made without memory, compared with what the files hold, and filled."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pytransformer.nn import Linear, RowBlocks

from .config import TransformerConfig
from .families import FAMILIES, CheckpointError, Family, mapping
from .families.weights import ROW_FORMS, same
from .quantized import names_of_codes
from .tensor_files import TensorFiles
from .transformer import Transformer

OWN = "pytransformer"
_HEAD = "lm_head.weight"
_DRAWING = ("normal_", "uniform_")


def own_family(ours: Mapping[str, Tensor]) -> Family:
    """Our own layout as a family: every tensor as it is, tied ones once."""
    names = [group[0] for group in mapping.tied(ours)]
    return Family(OWN, {}, {}, dict, lambda config: {}, tuple(same(name, name) for name in names))


def fit(
    place: Path, config: TransformerConfig, family: Family | None, files: TensorFiles
) -> tuple[Transformer, mapping.Plan]:
    """A model without memory and how the files fill it.

    Head and embedding that are to be tied but differ in the files are two matrices in the model: so does transformers.
    """
    if family is not None:
        config = family.settle(config, mapping.known_names(family, files.tensors).keys())
    with _WithoutInitialValues():
        model = Transformer(config, device="meta")
    ours = model.state_dict()
    shapes = {name: tensor.shape for name, tensor in files.tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in files.tensors.items()}
    found = mapping.plan(family or own_family(ours), config, ours, shapes, dtypes)
    faults = list(found.faults)
    if not faults:
        for first, second in found.repeated:
            one, other = (mapping.join(weight, config, files.tensor) for weight in (first, second))
            if torch.equal(one, other):
                continue
            if _HEAD in (first.ours, second.ours) and config.tie_embeddings:
                return fit(place, dataclasses.replace(config, tie_embeddings=False), family, files)
            faults.append(f"{', '.join(second.theirs)} must equal {', '.join(first.theirs)}")
    if faults:
        order = ("missing", "unexpected")
        faults.sort(key=lambda fault: (order.index(kind) if (kind := fault.split(":")[0]) in order else 2, fault))
        likeness = "" if family is None else _unlike(family, files, faults)
        raise CheckpointError(f"{place} does not fit its config.json: " + "; ".join(faults) + likeness)
    return model, found


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """The garbage collector rests: it would walk all that torch has made, time and again, for thousands of modules that are to stay."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


class _WithoutInitialValues(TorchFunctionMode):
    """Modules are made as they are, and nothing is drawn: on the meta device that would be for nothing, and takes seconds.

    (A normal distribution has no kernel there; torch takes it apart in Python, for which it imports its compiler.)
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__ or getattr(func, "__name__", None) in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def likeness(files: TensorFiles) -> tuple[float, list[str]]:
    """How much the tensors look by their names like those of the families that they resemble most, and which those are."""
    scores = {name: mapping.resemblance(family, files.tensors) for name, family in FAMILIES.items()}
    best = max(share for share, _ in scores.values())
    return best, sorted((name for name in scores if scores[name][0] == best), key=lambda name: -scores[name][1])


def _unlike(family: Family, files: TensorFiles, faults: Sequence[str]) -> str:
    """What family the tensors seem to be of, where that is another one: it has more of their names, or lacks what no layer has."""
    own, _ = mapping.resemblance(family, files.tensors)
    best, alike = likeness(files)
    if own >= best:
        there = {mapping.numberless(name) for name in mapping.known_names(family, files.tensors)}
        missing = {
            mapping.numberless(fault.removeprefix("missing: ")) for fault in faults if fault.startswith("missing: ")
        }
        absent = missing - there
        alike = [
            name for name in alike if absent.isdisjoint(map(mapping.numberless, mapping.templates(FAMILIES[name])))
        ]
        if not absent or not alike:
            return ""
    return f". By their names the tensors are not of {family.name} but of {' or '.join(alike[:4])}"


def fill(
    model: Transformer,
    found: mapping.Plan,
    files: TensorFiles,
    device: torch.device,
    dtype: torch.dtype | None,
    mapped: bool,
) -> None:
    """Puts the files' tensors into a model on the meta device."""
    names = {group[0]: group for group in found.tied}
    modules = dict(model.named_modules(remove_duplicate=False))
    fixed = names_of_codes(model)
    dtypes = []
    for weight in found.weights:
        stored = [files.tensor(name) for name in weight.theirs]
        wanted = None if weight.ours in fixed else dtype
        parts = [part.to(device, wanted if part.is_floating_point() else None) for part in stored]
        in_place = mapped and all(part.data_ptr() == before.data_ptr() for part, before in zip(parts, stored))
        if in_place and isinstance(weight.form, ROW_FORMS) and _put_blocks(modules, weight.ours, parts):
            continue
        tensor = weight.form.join(parts, weight.side(model.config))
        if wanted is not None and tensor.is_floating_point():
            tensor = tensor.to(wanted)
        if not in_place:
            shared = any(tensor.untyped_storage()._cdata == part.untyped_storage()._cdata for part in stored)
            tensor = tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()
        place, _, kind = names[weight.ours][0].rpartition(".")
        parameter = nn.Parameter(tensor, requires_grad=modules[place]._parameters[kind].requires_grad)
        if parameter.requires_grad:
            dtypes.append(parameter.dtype)
        for name in names[weight.ours]:
            place, _, kind = name.rpartition(".")
            modules[place]._parameters[kind] = parameter  # nothing that setattr checks can be wrong here
    _start(model, device, dtypes[0] if dtype is None else dtype)


def _put_blocks(modules: dict[str, nn.Module], name: str, blocks: list[Tensor]) -> bool:
    """Puts row blocks in the place of a linear layer, where ``name`` is the weight of one."""
    place, _, kind = name.rpartition(".")
    parent, _, leaf = place.rpartition(".")
    layer = modules[place]
    if type(layer) is not Linear or kind != "weight" or len({block.dtype for block in blocks}) > 1:
        return False
    modules[place] = RowBlocks(blocks, layer.bias)
    setattr(modules[parent], leaf, modules[place])
    return True


@torch.no_grad()
def _start(model: Transformer, device: torch.device, dtype: torch.dtype) -> None:
    """Gives what the files may lack and do lack its initial value, and warns where that is a random one."""
    drawn = []
    for place, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            fresh = torch.zeros(parameter.shape, device=device, dtype=dtype)
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and kind == "weight":
                fresh += 1.0 - getattr(module, "weight_offset", 0.0)
            elif parameter.ndim > 1:
                nn.init.normal_(fresh, std=model.config.initializer_range)
                drawn.append(f"{place}.{kind}")
            setattr(module, kind, nn.Parameter(fresh))
    if drawn:
        warnings.warn(f"the files have nothing for {', '.join(drawn)}: started with random values", stacklevel=3)
