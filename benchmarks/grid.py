"""The rows of the benchmark, in the order in which a run with little time should take them.

``tiny=True`` gives every kind of row at a size that a CPU can run: for the smoke run in CI and for rehearsing a GPU run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest

import torch

from pytransformer.benchmarks.rows import Measurement, Row
from pytransformer.benchmarks.suites import (
    activation,
    attention,
    decode_attention,
    end_to_end,
    kv_append,
    linear_cross_entropy,
    norm,
    overheads,
    rope,
)
from pytransformer.benchmarks.suites.common import Wanted

Suite = Callable[[Wanted], Iterable[Row | Measurement]]

# In the order of what their rows are worth.
SUITES: dict[str, Suite] = {
    "attention": attention.rows,
    "decode_attention": decode_attention.rows,
    "norm": norm.rows,
    "rope": rope.rows,
    "kv_append": kv_append.rows,
    "linear_cross_entropy": linear_cross_entropy.rows,
    "activation": activation.rows,
    "end_to_end": end_to_end.rows,
    "launch": overheads.launch,
    "compile": overheads.compile_time,
    "install": overheads.install,
}
# Suites of rows that measure themselves.
WHOLE = frozenset({"end_to_end", "launch", "compile", "install"})


def rows(
    device: torch.device,
    *,
    tiny: bool = False,
    suites: tuple[str, ...] = (),
    peers: bool = False,
    quick: bool = False,
) -> Iterator[Row | Measurement]:
    """Rows of the named suites (all if none is named): those of the quick grid first, and of each suite the most important first.

    Args:
        peers: with every peer that is installed; otherwise with PyTorch's own.
        quick: the quick grid only, without the peers that compile for long.
    """
    wanted = Wanted(device, tiny, peers, quick)
    names = suites or tuple(SUITES)
    found = {name: list(SUITES[name](wanted)) for name in names}
    for priority in (0,) if quick else (0, 1):
        ops = [[row for row in found[name] if row.priority == priority] for name in names if name not in WHOLE]
        whole = [[row for row in found[name] if row.priority == priority] for name in names if name in WHOLE]
        # In the quick grid the ops come first, as the targets list them; later a few whole models say more than another 200 shapes.
        for group in (ops, whole) if priority == 0 else (whole, ops):
            yield from (row for row in chain.from_iterable(zip_longest(*group)) if row is not None)
