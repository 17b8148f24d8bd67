"""Tensors of a family's file to those of a model and back, by the family's table, with the list of everything that does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TransformerConfig
from .family import Family
from .weights import Weight


@dataclass(frozen=True)
class Plan:
    """Which tensors of a file make which of ours.

    Attributes:
        weights: without placeholders, each with the names as this file has them.
        faults: what is missing, unexpected or of another shape; empty if everything fits.
    """

    weights: tuple[Weight, ...]
    faults: tuple[str, ...]


def table(family: Family, config: TransformerConfig, ours: Iterable[str]) -> list[Weight]:
    """The family's weights for the layers of a model, of those that it has (``ours``: the names of its state_dict)."""
    names = set(ours)
    return [weight for template in family.weights for weight in template.expand(config) if weight.ours in names]


def plan(
    family: Family, config: TransformerConfig, ours: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Plan:
    """How a file with tensors of these names and shapes becomes the model whose state_dict is ``ours`` (may be on the meta device).

    A family may list several weights for one of ours (the experts' tensors apart, or all in one): the first whose names are there counts.
    """
    present = _known_names(family, shapes)
    candidates: dict[str, list[Weight]] = {}
    for candidate in table(family, config, ours):
        candidates.setdefault(candidate.ours, []).append(candidate)
    chosen: list[Weight] = []
    faults: list[str] = []
    used = set[str]()
    for name, tensor in ours.items():
        options = candidates.get(name, [])
        weight = next((option for option in options if set(option.theirs) <= set(present)), None)
        if weight is None:
            if not options:
                faults.append(f"the table of {family.name} has nothing for {name}")
            elif not options[0].optional:
                faults += [f"missing: {missing}" for missing in options[0].theirs if missing not in present]
            continue
        used.update(weight.theirs)
        expected = weight.form.split(tensor.to("meta"), weight.side(config))
        for theirs, part in zip(weight.theirs, expected):
            if shapes[present[theirs]] != tuple(part.shape):
                faults.append(f"{present[theirs]}: shape {shapes[present[theirs]]}, expected {tuple(part.shape)}")
        chosen.append(Weight(weight.ours, tuple(present[theirs] for theirs in weight.theirs), weight.form))
    faults += [f"unexpected: {name}" for known, name in present.items() if known not in used]
    return Plan(tuple(chosen), tuple(faults))


def join(weight: Weight, config: TransformerConfig, get: Callable[[str], Tensor]) -> Tensor:
    """Our tensor, of tensors that ``get`` gives by their names in the file."""
    return weight.form.join([get(name) for name in weight.theirs], weight.side(config))


def theirs_of(family: Family, config: TransformerConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, of a model's state_dict. Of several weights for one of ours the first is written.

    Raises:
        ValueError: the family's table has no place for one of ours.
    """
    tensors: dict[str, Tensor] = {}
    done = set[str]()
    for weight in table(family, config, ours):
        if weight.ours not in done:
            done.add(weight.ours)
            tensors.update(zip(weight.theirs, weight.form.split(ours[weight.ours], weight.side(config))))
    if left := sorted(set(ours) - done):
        raise ValueError(f"the family {family.name} has no place for {', '.join(left)}")
    return tensors


def _known_names(family: Family, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name as the family's table has it -> name in the file, without what is ignored.

    The table's names carry the family's usual prefix. A file has it before all, or has another one or none (a base model saved alone), and
    may have the head beside, which never carries one.
    """
    ignored = [re.compile(pattern) for pattern in family.ignored]
    names = [name for name in shapes if not any(pattern.search(name) for pattern in ignored)]
    usual, others = family.prefixes[0], family.prefixes[1:]
    if not usual or any(name.startswith(usual) for name in names):
        return {name: name for name in names}
    expected = {name.replace("{i}", "0").replace("{e}", "0") for weight in family.weights for name in weight.theirs}
    found = {}
    for name in names:
        for prefix in others:
            if name.startswith(prefix) and _zeroed(usual + name[len(prefix) :]) in expected:
                found[usual + name[len(prefix) :]] = name
                break
        else:
            found[name] = name
    return found


def _zeroed(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".0", name)


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
    with torch.no_grad():
        return {weight.ours: join(weight, config, theirs.__getitem__) for weight in found.weights}
