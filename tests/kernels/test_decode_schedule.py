"""Decode attention's shared work: bits do not depend on who computes what, nothing on the cache's capacity, and broken ways are caught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from pytransformer.kernels import counters
from pytransformer.kernels.decode_attention import launcher
from pytransformer.triton_interpreter import KernelFault, program_order
from tests.conftest import INTERPRETING
from tests.kernels.decode_contract import Decode, call_of, draw, run
from tests.support.broken_kernel import load_broken

pytestmark = [
    pytest.mark.usefixtures("poison_empty", "without_overflow_checks"),
    pytest.mark.skipif(not INTERPRETING, reason="a GPU chooses its own order of programs"),
]
# One program shares a task with up to four others, and many tasks are one program's.
RAGGED = Decode(lengths=(100, 0, 33, 16), heads=(2, 2))
PROGRAMS = (3, 5, 11)
# Two tasks, so that three programs share one of four splits and compute the other.
SMALL = Decode(lengths=(70, 16), heads=(1, 1))


@pytest.fixture
def with_programs(monkeypatch):
    """Sets how many programs a launch has."""

    def chosen(count: int) -> None:
        monkeypatch.setattr(launcher, "num_programs", lambda *_: count)

    return chosen


def same(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        RAGGED,
        replace(RAGGED, lengths=(100, 33), seqlen_q=9, heads=(4, 2), dtype=torch.bfloat16),
        replace(RAGGED, queries=(1, 9, 0, 2), options={"window": (40, -1), "sinks": torch.tensor([0.5, -1.0])}),
    ],
    ids=["one query", "two tiles", "packed"],
)
def test_number_and_order_of_programs_do_not_change_a_result(case, with_programs, device):
    inputs = draw(case, 1, device)
    with_programs(1)
    expected = run(inputs, case)
    for seed, programs in enumerate(PROGRAMS):
        with_programs(programs)
        with program_order(seed):
            assert same(run(inputs, case), expected), programs


def test_counters_are_zero_again(with_programs, device):
    with_programs(5)
    run(draw(RAGGED, 1, device), RAGGED)
    assert counters._kept
    assert all(not bool(kept.any()) for kept in counters._kept.values())


class Recorder:
    """Takes the place of a prepared launch, and notes what it was made and called with."""

    launches: ClassVar[list[tuple[int, int]]] = []  # (programs, bytes of scratch)

    def __init__(self, kernel, grid, *arguments) -> None:
        self.programs = grid[0]

    def __call__(self, pointers) -> None:
        *_, scratch, _ = pointers
        self.launches.append((self.programs, 0 if scratch is None else scratch.nbytes))


def recorded(monkeypatch, batch: int, capacity: int, num_kv_heads: int = 8) -> tuple[int, int]:
    """(programs, bytes of scratch) of the one launch of a call: 4 heads of 128 features to a key head, a table of pages of 16."""
    monkeypatch.setattr(launcher, "PreparedLaunch", Recorder)
    monkeypatch.setattr(Recorder, "launches", [])
    cache = torch.empty(1, dtype=torch.bfloat16).expand(8, 16, num_kv_heads, 128)
    table = torch.zeros(1, dtype=torch.int32).expand(batch, capacity // 16)
    q, lengths = (
        torch.empty(batch, 1, 4 * num_kv_heads, 128, dtype=torch.bfloat16),
        torch.empty(batch, dtype=torch.int32),
    )
    launcher.decode_attention_forward(call_of(q, cache, cache, lengths, block_table=table))
    (launch,) = Recorder.launches
    return launch


def test_a_long_table_costs_nothing(monkeypatch):
    """64 sequences of 1k tokens, or of any length, with a table for 128k: what runs follows from the GPU and not from the table."""
    programs, scratch = recorded(monkeypatch, 64, 2**17)
    assert programs <= 3 * 132
    assert scratch <= 17e6
    assert recorded(monkeypatch, 256, 2**17) == (programs, scratch)
    assert recorded(monkeypatch, 64, 2**20) == (programs, scratch)


def test_one_sequence_of_1k_fills_the_gpu(monkeypatch):
    assert recorded(monkeypatch, 1, 2**10)[0] >= 128


COUNTED = "if counted + end_split - begin_split == splits:"
SLOT = "slot = tl.where(whole, own_slot, owner * max_splits + split)"
END = "end = (program + 1) * total // tl.num_programs(0)"
FAULTS = {
    "counter not reset": (
        "split",
        "tl.atomic_xchg(counters_ptr + owner, 0,",
        "tl.atomic_xchg(counters_ptr + owner, 1,",
    ),
    "merged before all have arrived": ("split", COUNTED, "if counted + end_split >= 1:"),
    "nobody merges": ("split", COUNTED, "if counted == splits:"),
    "release forgotten": ("split", 'end_split - begin_split, sem="acq_rel"', 'end_split - begin_split, sem="acquire"'),
    "acquire forgotten": ("split", 'end_split - begin_split, sem="acq_rel"', 'end_split - begin_split, sem="release"'),
    "data written to another slot": ("split", SLOT, SLOT.replace("+ split", "+ (split + 1) % splits")),
    "merged in another order": (
        "merge",
        "first_slot + first + place, scratch",
        "first_slot + count - 1 - first - place, scratch",
    ),
    "last split not merged": ("split", "count = splits\n", "count = splits - 1\n"),
    "folded from the wrong turn": (
        "split",
        "before_slot = own_slot + 2 - split % 2",
        "before_slot = own_slot + 1 + split % 2",
    ),
    "a neighbour's slots": ("split", "owner = program_at(task_place, total)", "owner = program"),
    "stretches that overlap": ("schedule", END, END + " + 2"),
    "splits that begin elsewhere": ("schedule", " + tl.minimum(split, steps % splits)", ""),
}


def broken(folder: Path, monkeypatch, file: str, good: str, bad: str) -> None:
    """The launcher takes a kernel with a fault."""
    changed = load_broken(folder, f"decode_attention/{file}", (good, bad))
    kernel = changed
    if file != "split":
        names = {"merge": ("fold_slots", "finish_rows"), "schedule": ("stretch_of", "split_start")}[file]
        kernel = load_broken(folder, "decode_attention/split")
        for name in names:
            setattr(kernel, name, getattr(changed, name))
    monkeypatch.setattr(launcher, "_decode_kernel", kernel._decode_kernel)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault, with_programs, tmp_path, monkeypatch, device):
    """By a race, or by bits that differ from those of one program, in the first call or the second."""
    monkeypatch.setattr(counters, "_kept", {})
    inputs = draw(SMALL, 1, device)
    with_programs(1)
    expected = run(inputs, SMALL)
    broken(tmp_path, monkeypatch, *FAULTS[fault])
    caught = None
    for programs in (1, 3, 3):
        with_programs(programs)
        try:
            if not same(run(inputs, SMALL), expected):
                caught = caught or "other bits"
        except KernelFault as error:
            caught = caught or type(error).__name__
    assert caught is not None
    print(f"caught: {fault} ({caught})")
