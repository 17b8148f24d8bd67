"""A row times a weight as weighted sums of the rows of tables, which is what recommenders do with "bags" of embeddings.

The row's numbers are the weights of the sum. A table holds some outputs for every input, a row an input, and is a bag: its sums stay in
registers while its rows pass one after another. FBGEMM, which torch has for x86, compiles that loop for the CPU it runs on, for several
dtypes of the table, and adds up in float32. For 16- and 8-bit weights on a CPU with AVX2 alone nothing in torch is as fast
(docs/lab-notes.md).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Outputs of a bag. Of 32 to 192 the fastest with AVX2, whose twelve vectors of float32 they fill.
OUTPUTS = 96


def has_bags() -> bool:
    """Whether torch has FBGEMM's sums for this CPU; elsewhere the same ops are loops over single numbers."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def bags_of(out_features: int) -> int:
    """Tables for so many outputs; the last may have room for more."""
    return -(-out_features // OUTPUTS)


def fill(tables: Tensor, weight: Tensor) -> None:
    """Writes a weight (out_features, rows) to the first columns of tables (bags, rows, OUTPUTS or more)."""
    tables[-1, :, :OUTPUTS] = 0  # behind the last output
    for table, rows in zip(tables, torch.split(weight, OUTPUTS)):
        table[:, : len(rows)] = rows.t()


@functools.lru_cache(maxsize=16)
def places(bags: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The numbers of all rows in order, and where each bag begins: int32, one for all layers of a shape."""
    count = bags * in_features
    return torch.arange(count, dtype=torch.int32), torch.arange(0, count, in_features, dtype=torch.int32)


def repeated(x: Tensor, bags: int) -> Tensor:
    """One row's numbers as the weights of every bag's sum."""
    return x.reshape(-1).expand(bags, x.numel()).reshape(-1)
