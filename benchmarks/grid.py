"""The rows of the benchmark: for each op the shapes of the targets, ours and the peers that a plain PyTorch installation brings.

``tiny=True`` gives the same rows at sizes that a CPU can run: for the smoke run in CI and for rehearsing a GPU run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pytransformer.benchmarks.rows import Row
from pytransformer.benchmarks.suites import attention, decode_attention, kv_append, norm, rope

SUITES = {
    "attention": attention.rows,
    "decode_attention": decode_attention.rows,
    "norm": norm.rows,
    "rope": rope.rows,
    "kv_append": kv_append.rows,
}


def rows(device: torch.device, *, tiny: bool = False, suites: tuple[str, ...] = ()) -> Iterator[Row]:
    """Rows of the named suites (all if none is named), the most important of every suite first."""
    generators = [list(SUITES[name](device, tiny)) for name in (suites or tuple(SUITES))]
    longest = max(map(len, generators), default=0)
    for index in range(longest):
        for generator in generators:
            if index < len(generator):
                yield generator[index]
