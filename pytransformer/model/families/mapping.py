"""Tensors of a family's file to those of a model and back, by the family's table, with the list of everything that does not fit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TransformerConfig
from .family import Family
from .weights import ROW_FORMS, Weight

# What a floating tensor may be stored as, in the words of the format.
FLOATING = ("F64", "F32", "F16", "BF16")
_OTHER_DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Which tensors of a file make which of ours.

    Attributes:
        weights: without placeholders, each with the names as this file has them. Of tied ones one stands for all.
        repeated: pairs of what makes tied tensors and is in the file twice; whoever reads it must see that they are equal.
        tied: names of ours that stand for one tensor; the one that is in ``weights`` first.
        absent: those of ours that the file may lack and does.
        faults: what is missing, unexpected, of another shape or dtype; empty if everything fits.
    """

    weights: tuple[Weight, ...]
    repeated: tuple[tuple[Weight, Weight], ...]
    tied: tuple[tuple[str, ...], ...]
    absent: tuple[str, ...]
    faults: tuple[str, ...]


def table(family: Family, config: TransformerConfig, ours: Iterable[str]) -> list[Weight]:
    """The family's weights for the layers of a model, of those that it has (``ours``: the names of its state_dict)."""
    names = set(ours)
    return [weight for template in family.weights for weight in template.expand(config) if weight.ours in names]


def tied(ours: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of a state_dict (may be on the meta device), those of one tensor together, its name in ``model`` first."""
    groups: dict[object, list[str]] = {}
    for name, tensor in ours.items():
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
        groups.setdefault(key, []).append(name)
    return [sorted(names, key=lambda name: not name.startswith("model.")) for names in groups.values()]


def plan(
    family: Family,
    config: TransformerConfig,
    ours: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str] | None = None,
) -> Plan:
    """How a file with tensors of these names, shapes and dtypes becomes the model whose state_dict is ``ours`` (may be on the meta device).

    A family may list several weights for one of ours (the experts' tensors apart, or all in one): the first whose names are there counts.
    """
    present = known_names(family, shapes)
    options: dict[str, list[Weight]] = {}
    for way in table(family, config, ours):
        options.setdefault(way.ours, []).append(way)
    chosen: list[Weight] = []
    repeated: list[tuple[Weight, Weight]] = []
    groups: list[tuple[str, ...]] = []
    absent: list[str] = []
    faults: list[str] = []
    used = set[str]()
    for names in tied(ours):
        there: list[Weight] = []
        for name in names:
            found = (
                [way for way in _names_of(weight) if present.keys() >= set(way.theirs)]
                for weight in options.get(name, ())
            )
            there += next(filter(None, found), [])
        if not there:
            _explain(family, names, options, present, absent, faults, used)
            continue
        for weight in there:
            faults += [] if used.issuperset(weight.theirs) else _misfits(weight, config, ours, present, shapes, dtypes)
            used.update(weight.theirs)
        actual = [
            dataclasses.replace(weight, theirs=tuple(present[name] for name in weight.theirs)) for weight in there
        ]
        chosen.append(actual[0])
        groups.append((actual[0].ours, *(name for name in names if name != actual[0].ours)))
        repeated += [(actual[0], other) for other in actual[1:] if other.theirs != actual[0].theirs]
    ignored = [re.compile(pattern) for pattern in family.ignored]
    faults += [
        f"unexpected: {name}"
        for known, name in present.items()
        if known not in used and not any(pattern.search(name) for pattern in ignored)
    ]
    return Plan(tuple(chosen), tuple(repeated), tuple(groups), tuple(absent), tuple(faults))


def _names_of(weight: Weight) -> list[Weight]:
    """The weight under its own names and under those of its copies."""
    return [weight, *(dataclasses.replace(weight, theirs=(copy,)) for copy in weight.copies)]


def _explain(
    family: Family,
    names: Sequence[str],
    options: Mapping[str, Sequence[Weight]],
    present: Mapping[str, str],
    absent: list[str],
    faults: list[str],
    used: set[str],
) -> None:
    """Says of a tensor that cannot be made what is missing, in the way of making it that comes nearest."""
    ways = [weight for name in names for weight in options.get(name, ())]
    if not ways:
        faults.append(f"the table of {family.name} has nothing for {names[0]}")
    elif any(way.optional for way in ways):
        absent.append(names[0])
    else:
        nearest = min(ways, key=lambda way: sum(name not in present for name in way.theirs) / len(way.theirs))
        faults += [f"missing: {name}" for name in nearest.theirs if name not in present]
        used.update(nearest.theirs)


def _misfits(
    weight: Weight,
    config: TransformerConfig,
    ours: Mapping[str, Tensor],
    present: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str] | None,
) -> Iterator[str]:
    outline = ours[weight.ours]
    outline = outline if outline.is_meta else outline.to("meta")
    for theirs, part in zip(weight.theirs, weight.form.split(outline, weight.side(config))):
        name = present[theirs]
        if shapes[name] != tuple(part.shape):
            yield f"{name}: shape {shapes[name]}, expected {tuple(part.shape)}"
        if dtypes is not None:
            allowed = FLOATING if part.dtype.is_floating_point else (_OTHER_DTYPES[part.dtype],)
            if dtypes[name] not in allowed:
                yield f"{name}: dtype {dtypes[name]}, expected {' or '.join(allowed).replace(' or ', ', ', len(allowed) - 2)}"


def join(weight: Weight, config: TransformerConfig, get: Callable[[str], Tensor]) -> Tensor:
    """Our tensor, of tensors that ``get`` gives by their names in the file."""
    return weight.form.join([get(name) for name in weight.theirs], weight.side(config))


def to_write(family: Family, config: TransformerConfig, ours: Mapping[str, Tensor]) -> list[Weight]:
    """The weights of a file, of a model's state_dict (may be on the meta device). Of several for one of ours the first; tied ones once.

    A model without a head is a base model, which transformers saves without the prefix where files may lack it.

    Raises:
        ValueError: the family's table has no place for one of ours.
    """
    names = {name: group[0] for group in tied(ours) for name in group}
    chosen: dict[str, Weight] = {}
    for weight in table(family, config, ours):
        chosen.setdefault(names[weight.ours], weight)
    if left := sorted(set(names.values()) - set(chosen)):
        raise ValueError(f"the family {family.name} has no place for {', '.join(left)}")
    prefix = family.prefixes[0] if config.head == "none" and "" in family.prefixes else ""
    return [
        dataclasses.replace(weight, theirs=tuple(name.removeprefix(prefix) for name in weight.theirs))
        for weight in chosen.values()
    ]


def split(weight: Weight, config: TransformerConfig, ours: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Their tensors, of ours or of the row blocks that ours is a pile of."""
    if isinstance(ours, Tensor):
        return weight.form.split(ours, weight.side(config))
    rows = sum(block.shape[0] for block in ours)
    outline = torch.empty(rows, *ours[0].shape[1:], device="meta")
    expected = [part.shape for part in weight.form.split(outline, weight.side(config))]
    if isinstance(weight.form, ROW_FORMS) and expected == [block.shape for block in ours]:
        return list(ours)
    return weight.form.split(torch.cat(list(ours)), weight.side(config))


def theirs_of(family: Family, config: TransformerConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, of a model's state_dict; see :func:`to_write`."""
    tensors: dict[str, Tensor] = {}
    for weight in to_write(family, config, ours):
        tensors.update(zip(weight.theirs, split(weight, config, ours[weight.ours])))
    return tensors


def known_names(family: Family, names: Iterable[str]) -> dict[str, str]:
    """Name as the family's table has it -> name in the file.

    The table's names carry the family's usual prefix. A file has it before all, or has another one or none (a base model saved alone), and
    may have the head beside, which never carries one.
    """
    names = list(names)
    usual, others = family.prefixes[0], family.prefixes[1:]
    if not usual or any(name.startswith(usual) for name in names):
        return {name: name for name in names}
    expected = set(templates(family))
    found = {}
    for name in names:
        for prefix in others:
            if name.startswith(prefix) and numberless(usual + name[len(prefix) :]) in expected:
                found[usual + name[len(prefix) :]] = name
                break
        else:
            found[name] = name
    return found


def templates(family: Family) -> dict[str, Weight]:
    """Every name of the family's table with 0 for the number of a layer or an expert -> the first weight that is made of it."""
    names: dict[str, Weight] = {}
    for weight in family.weights:
        for name in (*weight.theirs, *weight.copies):
            names.setdefault(name.replace("{i}", "0").replace("{e}", "0"), weight)
    return names


def numberless(name: str) -> str:
    """A tensor's name with 0 for every number that stands alone in it."""
    return re.sub(r"\.\d+(?=\.|$)", ".0", name)


def resemblance(family: Family, names: Iterable[str]) -> tuple[float, float]:
    """How much a file with these names looks like the family's: the share of its names that the family has, and the reverse."""
    ignored = [re.compile(pattern) for pattern in family.ignored]
    own = {numberless(name) for name in templates(family)}
    there = {
        plain
        for known, name in known_names(family, names).items()
        if (plain := numberless(known)) in own or not any(pattern.search(name) for pattern in ignored)
    }
    common = len(there & own)
    return common / max(1, len(there)), common / max(1, len(own))


def state_of(
    family: Family, config: TransformerConfig, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A model's state_dict, of all tensors of a file in memory.

    Raises:
        ValueError: they do not fit; the message lists everything.
    """
    found = plan(family, config, ours, {name: tuple(tensor.shape) for name, tensor in theirs.items()})
    if found.faults:
        raise ValueError(f"the tensors do not fit a {family.name} model: " + "; ".join(found.faults))
    names = {group[0]: group for group in found.tied}
    with torch.no_grad():
        return {
            name: tensor
            for weight in found.weights
            for tensor in (join(weight, config, theirs.__getitem__),)
            for name in names[weight.ours]
        }
