"""The rows of the benchmark, in the order in which a run with little time should take them.

``tiny=True`` gives every kind of row at a size that a CPU can run: for the smoke run in CI and for rehearsing a GPU run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

import torch

from pytransformer.benchmarks.harness.rows import Measurement, Row, is_ours
from pytransformer.benchmarks.peers import overview
from pytransformer.benchmarks.suites import (
    activation,
    attention,
    decode_attention,
    end_to_end,
    kv_append,
    linear_attention,
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
    "linear_attention": linear_attention.rows,
    "end_to_end": end_to_end.rows,
    "launch": overheads.launch,
    "compile": overheads.compile_time,
    "install": overheads.install,
}
# Suites of rows that measure themselves.
WHOLE = frozenset({"end_to_end", "launch", "compile", "install"})
SLOW = ", beside peers that compile for long"
MOST_SLOW_ROWS = 6


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
    first = {name: _quick_rows(wanted, name) for name in names}
    # The ops come first, as the targets list them.
    yield from _in_turns([found for name, found in first.items() if name not in WHOLE])
    yield from _in_turns([found for name, found in first.items() if name in WHOLE])
    if not quick:
        later = {name: _later_rows(wanted, name, first[name]) for name in names}
        whole = list(_in_turns([found for name, found in later.items() if name in WHOLE]))
        yield from _in_turns([*(found for name, found in later.items() if name not in WHOLE), whole])


def peers(device: torch.device) -> list[dict[str, Any]]:
    """Everybody the rows compare with, for the record of a run."""
    return overview(device)


def _in_turns(suites: list[list[Row | Measurement]]) -> Iterator[Row | Measurement]:
    """One row of each suite, then the next of each."""
    return (row for row in chain.from_iterable(zip_longest(*suites)) if row is not None)


def _quick_rows(wanted: Wanted, name: str) -> list[Row | Measurement]:
    """The quick grid of a suite: in a full run the same rows with the same variants, so that one goes on where the other ended."""
    return [row for row in SUITES[name](replace(wanted, quick=not wanted.tiny)) if row.priority == 0]


def _later_rows(wanted: Wanted, name: str, quick: list[Row | Measurement]) -> list[Row | Measurement]:
    """The rest of a suite; after every third row one of the first quick rows again, ours beside peers that compile for long."""
    had = {(row.op, row.shape): row.variants.keys() for row in quick}
    new: list[Row | Measurement] = []
    again: list[Row | Measurement] = []
    for row in SUITES[name](wanted):
        slow = row.variants.keys() - had.get((row.op, row.shape), ())
        if row.priority > 0:
            new.append(row)
        elif slow:
            again.append(_narrowed(row, slow))
    again = again[:MOST_SLOW_ROWS]
    triples = [new[start : start + 3] for start in range(0, len(new), 3)]
    mixed: list[Row | Measurement] = []
    for triple, slow_one in zip_longest(triples, again):
        mixed += [*(triple or []), *([slow_one] if slow_one is not None else [])]
    return mixed


def _narrowed(row: Row | Measurement, slow: Collection[str]) -> Row | Measurement:
    variants = {name: call for name, call in row.variants.items() if name in slow or is_ours(name)}
    changes: dict[str, Any] = {"shape": f"{row.shape}{SLOW}", "variants": variants, "priority": 1}
    return replace(row, **changes)
