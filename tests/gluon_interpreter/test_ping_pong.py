"""Two consumers that take turns by named barriers, as they would to keep softmax of one beside products of the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pytransformer.gluon_interpreter import EARLY, SCHEDULES, DeadlockError, NamedBarrierError, Trace
from tests.gluon_interpreter import attention_forward
from tests.gluon_interpreter.broken import imported
from tests.gluon_interpreter.names import needs_inline_asm

SOURCE = Path(attention_forward.__file__).read_text()
LOOP = "    for i in range(1, num_tiles):\n        stage = i % 2\n        before = (i - 1) % 2\n"
ISSUED = "        out_next = warpgroup_mma(weights, v.index(before), out, is_async=True)\n"

# Consumer 0 has barrier 8, consumer 1 has 9: each waits for its own before it issues products, and then lets the other.
FIRST = '    if W == 1:\n        gl.inline_asm("bar.arrive 8, 256;")\n'
OWN = '        if W == 0:\n            gl.inline_asm("bar.sync 8, 256;")\n        else:\n            gl.inline_asm("bar.sync 9, 256;")\n'
OTHER = OWN.replace("sync", "arrive").replace("8,", "?,").replace("9,", "8,").replace("?,", "9,")


def _taking_turns(first: str = FIRST, own: str = OWN, other: str = OTHER) -> str:
    assert SOURCE.count(LOOP) == SOURCE.count(ISSUED) == 1
    return SOURCE.replace(LOOP, first + LOOP + own).replace(ISSUED, ISSUED + other)


def _run(source: str, folder: Path, schedule) -> tuple[torch.Tensor, list[Trace]]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, 64).to(torch.bfloat16) for length in (128, 640, 640))
    out, _, traces = attention_forward.run(q, k, v, False, 128, schedule, imported(source, folder).attention)
    return out, traces


@needs_inline_asm
def test_products_are_issued_in_turns(tmp_path: Path) -> None:
    expected, _ = _run(SOURCE, tmp_path, EARLY)
    for schedule in SCHEDULES:
        out, (trace,) = _run(_taking_turns(), tmp_path, schedule)
        assert torch.equal(out, expected), schedule
        turns = [event.task for event in trace.events if event.kind == "named arrive"][1:]
        assert turns == ["partition 0 (consume)", "partition 1 (consume)"] * 4, schedule


@needs_inline_asm
def test_nobody_begins(tmp_path: Path) -> None:
    for schedule in SCHEDULES[:3]:
        with pytest.raises(
            DeadlockError, match=r"named barrier 8: 128 of 256 threads(.|\n)*named barrier 9: 128 of 256"
        ):
            _run(_taking_turns(first=""), tmp_path, schedule)


@needs_inline_asm
def test_one_arrives_twice(tmp_path: Path) -> None:
    # Had the other come in between it would be no fault that shows.
    for schedule in SCHEDULES[:3]:
        with pytest.raises(
            NamedBarrierError, match=r"partition 1 .* at broken\.py:\d+ in consume: both could count in one"
        ):
            _run(_taking_turns(first=FIRST + FIRST), tmp_path, schedule)
