"""The table of a family's tensors: what ours is made of, and how it is taken apart again.

A form is a pair of inverse functions between tensors; nothing else is known of it. What a file must hold is found by taking a tensor
without memory (on the meta device) apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import TransformerConfig


class Form(Protocol):
    """How their tensors become ours, and back. Views where possible: a weight that is a view of a mapped file costs no memory."""

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        """Our tensor."""
        ...

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        """Their tensors, in the order of their names."""
        ...


@dataclass(frozen=True)
class Same:
    """One tensor that is the same on both sides."""

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        return theirs[0]

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        return [ours]


@dataclass(frozen=True)
class Transposed:
    """A matrix stored (in, out), as GPT-2's Conv1D has it, or one for each expert; a vector stays as it is."""

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        return theirs[0].transpose(-2, -1) if theirs[0].ndim > 1 else theirs[0]

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        return [self.join([ours], config)]


@dataclass(frozen=True)
class QKV:
    """q, k and v in tensors of their own, one below the other here."""

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        return torch.cat(theirs)

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        kv_rows = config.num_kv_heads * config.head_dim
        return list(torch.split(ours, [ours.shape[0] - 2 * kv_rows, kv_rows, kv_rows]))


@dataclass(frozen=True)
class Halves:
    """Two tensors of one shape (gate and up, or k and v), one below the other here."""

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        return torch.cat(theirs)

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        return list(ours.chunk(2))


# What is a pile of rows: such a weight can be used as it lies in the file, part by part (see RowBlocks in nn/linear.py).
ROW_FORMS = (QKV, Halves)


@dataclass(frozen=True)
class First:
    """A tensor that stands under several names, of which the first is what the model computes with; all are written."""

    count: int = 2

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        return theirs[0]

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        return [
            ours,
            *(ours.clone() for _ in range(self.count - 1)),
        ]  # a file of safetensors refuses to hold one memory twice


@dataclass(frozen=True)
class Row:
    """A vector stored as a matrix of one row."""

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        return theirs[0][0]

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        return [ours[None]]


@dataclass(frozen=True)
class PerHead:
    """q, k and v of a key head together: (num_kv_heads, group + 2, head_dim) rows (GPT-NeoX, BLOOM, Falcon)."""

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        group = config.num_heads // config.num_kv_heads
        rest = theirs[0].shape[1:]
        together = theirs[0].reshape(config.num_kv_heads, group + 2, config.head_dim, *rest)
        q, k, v = torch.split(together, [group, 1, 1], dim=1)
        return torch.cat([part.reshape(-1, *rest) for part in (q, k, v)])

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        rest = ours.shape[1:]
        parts = QKV().split(ours, config)
        together = torch.cat([part.reshape(config.num_kv_heads, -1, config.head_dim, *rest) for part in parts], dim=1)
        return [together.reshape(-1, *rest)]


@dataclass(frozen=True)
class Experts:
    """The matrices of all experts, ``parts`` of one shape for each (gate and up, or down alone), in one (experts, rows, columns)."""

    parts: int = 1

    def join(self, theirs: list[Tensor], config: TransformerConfig) -> Tensor:
        rows, columns = theirs[0].shape
        return torch.cat(theirs).reshape(-1, self.parts * rows, columns)

    def split(self, ours: Tensor, config: TransformerConfig) -> list[Tensor]:
        experts, rows, columns = ours.shape
        return list(ours.reshape(experts * self.parts, rows // self.parts, columns).unbind())


def always(config: TransformerConfig) -> bool:
    """What a weight without a condition asks of the configuration."""
    return True


@dataclass(frozen=True)
class Weight:
    """One of our tensors.

    Attributes:
        ours: its name in the model's state_dict; ``{i}`` stands for the number of a layer.
        theirs: the names of what it is made of, with ``{i}`` likewise and ``{e}`` for the number of an expert (the name then stands for as
            many tensors as there are experts, experts outermost: all names of expert 0, then those of expert 1, …).
        form: how.
        optional: a file may lack it; the model then keeps what it starts with.
        when: whether the tensor stands under these names in a model of this configuration (Falcon names its norms by their number).
        copies: other names under which a file may hold the same tensor, beside or instead (of one name in ``theirs`` only). They are not
            written, and a file in which they differ is refused.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Form = Same()
    optional: bool = False
    when: Callable[[TransformerConfig], bool] = always
    copies: tuple[str, ...] = ()

    def side(self, config: TransformerConfig) -> TransformerConfig:
        """The configuration of the side of an encoder–decoder that the tensor belongs to."""
        return config.encoder if config.is_encoder_decoder and self.ours.startswith("encoder.") else config

    def expand(self, config: TransformerConfig) -> Iterator[Weight]:
        """The same for each layer, without placeholders; nothing if the configuration names it otherwise."""
        if not self.when(config):
            return
        for layer in range(self.side(config).num_layers) if "{i}" in self.ours else (0,):
            names = [name.replace("{i}", str(layer)) for name in self.theirs]
            if any("{e}" in name for name in names):
                names = [name.replace("{e}", str(expert)) for expert in range(config.num_experts) for name in names]
            ours, copies = (
                self.ours.replace("{i}", str(layer)),
                tuple(copy.replace("{i}", str(layer)) for copy in self.copies),
            )
            yield Weight(ours, tuple(names), self.form, self.optional, copies=copies)


def same(
    ours: str, theirs: str, *, optional: bool = False, when: Callable[[TransformerConfig], bool] = always
) -> Weight:
    """A tensor that is the same on both sides."""
    return Weight(ours, (theirs,), Same(), optional, when)


def affine(
    ours: str, theirs: str, form: Form = Same(), *, when: Callable[[TransformerConfig], bool] = always
) -> tuple[Weight, Weight]:
    """The weight and the bias of a linear layer or a norm, each one tensor on both sides."""
    weight, bias = (Weight(f"{ours}.{name}", (f"{theirs}.{name}",), form, when=when) for name in ("weight", "bias"))
    return weight, bias
