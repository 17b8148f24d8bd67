"""Copies of Hopper's forward kernel that are broken on purpose: what is wrong with their protocol is reported with the line, whatever the
schedule; a tile, a mask or a sum that is wrong breaks the contract or leaves its tensors."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pytransformer.gluon_interpreter import LATE, Schedule
from pytransformer.kernels.hopper import forward as kernels
from pytransformer.kernels.hopper import launch, places
from pytransformer.triton_interpreter import KernelFault
from pytransformer.verification import ContractError
from tests.conftest import INTERPRETING
from tests.gluon_interpreter.broken import broken_copies, imported
from tests.kernels.attention_contract import Case, draw
from tests.kernels.hopper_contract import call_of, check, forward

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="the Gluon interpreter runs only where Triton's does")


def _source() -> str:
    """Of both files, as one."""
    text = Path(kernels.__file__).read_text().replace("from ..", "from pytransformer.kernels.")
    text = text.replace("from .names", "from pytransformer.kernels.hopper.names")
    without_imports = re.sub(r"^from (__future__|\.places) import .*\n", "", text, flags=re.MULTILINE)
    return Path(places.__file__).read_text() + without_imports


SOURCE = _source()
SCHEDULES = (Schedule(order="first"), Schedule(order="last", copies="late", products="late"))

# Statements of the protocol removed, and made wrong.
PROTOCOL = dict(
    broken_copies(
        SOURCE,
        (
            (r"warpgroup_mma_wait\(0,", "warpgroup_mma_wait(1,", "one product too many under way"),
            (r"warpgroup_mma_wait\(1,", "warpgroup_mma_wait(2,", "one product too many under way"),
            (r"barriers\(traits\.STAGES, CONSUMERS\)", "barriers(traits.STAGES, 1)", "one arrival too few"),
            (r"barriers\(traits\.STAGES, 1\)", "barriers(traits.STAGES, 2)", "one arrival too many"),
            (r"barriers\(1, CONSUMERS\)", "barriers(1, 1)", "one arrival too few"),
            (r"barriers\(1, 1\)", "barriers(1, 2)", "one arrival too many"),
            (r"\(\(n // traits\.STAGES\) & 1\) \^ 1", "(n // traits.STAGES) & 1", "other parity"),
            (r"(?<!\()\(n // traits\.STAGES\) & 1\)", "((n // traits.STAGES) & 1) ^ 1)", "other parity"),
            (r"(?<=parity = )\(walk", "1 ^ (walk", "other parity"),
            (r"(?<=q_full\.index\(0\), )visit & 1", "(visit & 1) ^ 1", "other parity"),
            (r"\(visit & 1\) \^ 1", "visit & 1", "other parity"),
            (r"before \+= walk\.count", "before += 0", "tiles of the place before forgotten"),
            (r"CONSUMERS \* desc\.block_type\.nbytes", "desc.block_type.nbytes", "half of the bytes"),
            (r"(?<=, )desc\.block_type\.nbytes", "2 * desc.block_type.nbytes", "twice the bytes"),
            (r"(?<= )ring\.tiles\.index\(stage\)\)", "ring.tiles.index(1 - stage))", "other stage"),
            (r"ring\.full\.index\(stage\), ring", "ring.empty.index(stage), ring", "other barrier"),
            (r"(?<=k_desc, )k_ring(?=, place)", "v_ring", "other ring"),
            (r"(?<=v_desc, )v_ring(?=, place)", "k_ring", "other ring"),
            (r"copy_tile\(i - 1, v_desc", "copy_tile(i, v_desc", "a tile ahead"),
            (r"(?<=async_store\(out_desc, box, )out_tile", "memory.q_tiles.index(1 - W)", "the other consumer's"),
            (r"(?<=memory\.q_tiles\.index\()w", "0", "twice the same"),
        ),
    )
)

# Two places for one block, with outputs in memory of their own, and in that of the queries.
APART = Case((70, 300), dims=(64, 64), heads=(2, 1), dtype=torch.bfloat16)
SHARED = Case((70, 130), dims=(256, 256), heads=(2, 1), dtype=torch.bfloat16)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a source in place of the kernel's."""
    return lambda source: monkeypatch.setattr(
        launch, "attention_forward_kernel", imported(source, tmp_path).attention_forward_kernel
    )


def test_there_are_enough_of_them() -> None:
    assert len(PROTOCOL) >= 35


@pytest.mark.parametrize("name", PROTOCOL)
def test_a_fault_in_the_protocol_is_reported(name: str, broken) -> None:
    broken(PROTOCOL[name])
    calls = [call_of(draw(case, 0, torch.device("cpu"))) for case in (APART, SHARED)]
    for schedule in SCHEDULES:
        with pytest.raises(KernelFault, match=r"broken\.py:\d+ in "):
            for call in calls:
                forward(call, schedule, blocks=1)


CAUSAL = Case((100, 300), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"causal": True})
MORE_QUERIES = Case((300, 70), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"causal": True})
WINDOW = Case((70, 600), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"window": (300, 100)})
ENDS = Case((70, 200), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16)
GROUPS = Case((70, 70), dims=(64, 64), heads=(4, 2), dtype=torch.bfloat16)
PACKED = Case(((70, 200), (0, 3), (130, 140)), dims=(64, 64), heads=(2, 1), dtype=torch.bfloat16)
QUARTERS = Case((70, 70), dims=(96, 96), heads=(1, 1), dtype=torch.bfloat16)
SOFTCAP = Case((70, 70), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"softcap": 1.0})
SINKS = Case((70, 200), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"sinks": torch.ones(1)})

# Some of three blocks go to a place more than others.
BY_THREE = functools.partial(forward, blocks=3)

# Text, what is put in its place wherever it stands, and calls in which that matters.
NUMBERS: dict[str, tuple[str, str, Sequence[Case]]] = {
    "causal mask off by one": ("rows + (shift + scores.window_right)", "rows + (shift + scores.window_right + 1)", (CAUSAL,)),
    "lengths aligned top-left": ("last, rows + (shift + ", "last, rows + (", (CAUSAL,)),
    "end of the keys not masked": ("place.other_length - 1, -1)", "place.other_length + 99, -1)", (ENDS,)),
    "left edge off by one": ("(shift - scores.window_left) if", "(shift - scores.window_left + 1) if", (WINDOW,)),
    "values of the other stage": ("before = (n - 1) % traits", "before = n % traits", (WINDOW,)),
    "tile of the diagonal taken for whole": ("end - inside_end, end", "0 * inside_end, end", (CAUSAL,)),
    "tile of the left edge taken for whole": ("end - inside_begin, before)", "end - begin, before)", (WINDOW,)),
    "last tile forgotten": ("return Walk(end - 1, ", "return Walk(end - 2, ", (ENDS,)),
    "first tile forgotten": ("end - begin, end - inside_end", "end - begin - 1, end - inside_end", (ENDS,)),
    "rows that see nothing not guarded": ('gl.where(largest == float("-inf"), 0.0, largest)', "largest", (MORE_QUERIES,)),
    "rows of no key not guarded": ("total = gl.where(nothing, 1.0, total)", "total = total", (MORE_QUERIES,)),
    "output not rescaled": ("out = out * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]", "out = out", (ENDS,)),
    "sum not rescaled": ("total * shrink + gl.sum(p, 1)", "total + gl.sum(p, 1)", (ENDS,)),
    "lse in base 2": ("gl.log2(total)) * LN2", "gl.log2(total))", (ENDS,)),
    "rows of the other consumer": ("rows = place.start + W * ROWS", "rows = place.start + (1 - W) * ROWS", (CAUSAL,)),
    "lse of rows past the end": ("lse, mask=rows < place.length", "lse, mask=rows < place.length + 1", (ENDS,)),
    "output never stored": ("    async_store(out_desc, box, out_tile)\n", "", (ENDS,)),
    "keys of the wrong head": ("head // traits.HEADS_PER_KV", "head % traits.HEADS_PER_KV", (GROUPS,)),
    "wrong sequence found": ("// BLOCK + middle <= tile", "// BLOCK + middle < tile", (PACKED,)),
    "box ends one row early": ("RAGGED - length + row, head", "RAGGED - length + row + 1, head", (PACKED,)),
    "box ends with the neighbour": (
        "RAGGED, first + length, RAGGED - length +", "RAGGED, first + length + 9, RAGGED - length - 9 +", (PACKED,)
    ),
    "features of another quarter": ("keys.slice(HALF, QUARTER", "keys.slice(HALF + QUARTER, QUARTER", (QUARTERS,)),
    "softcap of half the score": ("scores.factor * 2.0 / scores.softcap", "scores.factor / scores.softcap", (SOFTCAP,)),
    "sink in base e": ("gl.float32) * LOG2E", "gl.float32)", (SINKS,)),
    "values walked the other way": (
        "(i - 1, v_desc, v_ring, place, walk,", "(i - 1, v_desc, v_ring, place, Walk(2 * (i - 1), 1, 1, 1, walk.before),", (ENDS,)
    ),
    "a place left out": ("number(rounds) < count", "number(rounds) < count - 1", (GROUPS,)),
    "a place gone to twice": ("turn = gl.program_id(0)", "turn = gl.program_id(0) // 2", (GROUPS,)),
    "two blocks with one tile": ("tile = within // slots_here", "tile = within // slots_here // 2", (MORE_QUERIES,)),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_a_broken_kernel_is_caught(name: str, broken, poison_empty: None) -> None:
    text, replacement, cases = NUMBERS[name]
    assert text in SOURCE
    broken(SOURCE.replace(text, replacement))
    with pytest.raises((ContractError, KernelFault)):
        for case in cases:
            check(case, BY_THREE, least=1, most=1)


def test_a_copy_that_is_not_broken_passes(broken, poison_empty: None) -> None:
    """Else the tests above would show nothing."""
    broken(SOURCE)
    for schedule in (*SCHEDULES, LATE):
        forward(call_of(draw(APART, 0, torch.device("cpu"))), schedule, blocks=1)
        forward(call_of(draw(SHARED, 0, torch.device("cpu"))), schedule, blocks=1)
    for case in (CAUSAL, MORE_QUERIES, WINDOW, ENDS, GROUPS, PACKED, QUARTERS, SOFTCAP, SINKS):
        check(case, BY_THREE, least=1, most=1)
