"""Copies of Hopper's forward kernel that are broken on purpose: what is wrong with their protocol is reported with the line, whatever the
schedule; a tile, a mask or a sum that is wrong breaks the contract or leaves its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from pytransformer.gluon_interpreter import LATE, Schedule
from pytransformer.kernels.hopper import forward as kernels
from pytransformer.kernels.hopper import launch
from pytransformer.triton_interpreter import KernelFault
from pytransformer.verification import ContractError
from tests.conftest import INTERPRETING
from tests.gluon_interpreter.broken import broken_copies, imported
from tests.kernels.attention_contract import Case, draw
from tests.kernels.hopper_contract import call_of, check, forward

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="the Gluon interpreter runs only where Triton's does")

SOURCE = Path(kernels.__file__).read_text().replace("from ..", "from pytransformer.kernels.")
SOURCE = SOURCE.replace("from .names", "from pytransformer.kernels.hopper.names")
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
            (r"\(\(i // traits\.STAGES\) & 1\) \^ 1", "(i // traits.STAGES) & 1", "other parity"),
            (r"(?<!\()\(i // traits\.STAGES\) & 1\)", "((i // traits.STAGES) & 1) ^ 1)", "other parity"),
            (r"(?<=index\(0\), )0\)", "1)", "other parity"),
            (r"CONSUMERS \* q_desc\.block_type\.nbytes", "q_desc.block_type.nbytes", "half of the bytes"),
            (r"(?<=, )desc\.block_type\.nbytes", "2 * desc.block_type.nbytes", "twice the bytes"),
            (r"(?<= )ring\.tiles\.index\(stage\)\)", "ring.tiles.index(1 - stage))", "other stage"),
            (r"ring\.full\.index\(stage\), ring", "ring.empty.index(stage), ring", "other barrier"),
            (r"(?<=k_desc, )k_ring(?=, place)", "v_ring", "other ring"),
            (r"(?<=v_desc, )v_ring(?=, place)", "k_ring", "other ring"),
            (r"copy_tile\(i - 1, v_desc", "copy_tile(i, v_desc", "a tile ahead"),
            (r"(?<=async_store\(out_desc, box, )out_tile", "memory.q_tiles.index(1 - W)", "the other consumer's"),
            (r"(?<=q_full\.index\(0\), q_tiles\.index\()w", "0", "twice the same"),
        ),
    )
)

DENSE = Case((70, 640), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16)


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
    call = call_of(draw(DENSE, 0, torch.device("cpu")))
    for schedule in SCHEDULES:
        with pytest.raises(KernelFault, match=r"broken\.py:\d+ in "):
            forward(call, schedule)


CAUSAL = Case((100, 300), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"causal": True})
MORE_QUERIES = Case((300, 70), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"causal": True})
WINDOW = Case((70, 600), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"window": (300, 100)})
ENDS = Case((70, 200), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16)
GROUPS = Case((70, 70), dims=(64, 64), heads=(4, 2), dtype=torch.bfloat16)
PACKED = Case(((70, 200), (0, 3), (130, 140)), dims=(64, 64), heads=(2, 1), dtype=torch.bfloat16)
QUARTERS = Case((70, 70), dims=(96, 96), heads=(1, 1), dtype=torch.bfloat16)
SOFTCAP = Case((70, 70), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"softcap": 1.0})
SINKS = Case((70, 200), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"sinks": torch.ones(1)})

# Text, what is put in its place wherever it stands, and calls in which that matters.
NUMBERS: dict[str, tuple[str, str, Sequence[Case]]] = {
    "causal mask off by one": ("rows + (shift + scores.window_right)", "rows + (shift + scores.window_right + 1)", (CAUSAL,)),
    "lengths aligned top-left": ("last, rows + (shift + ", "last, rows + (", (CAUSAL,)),
    "end of the keys not masked": ("place.other_length - 1, -1)", "place.other_length + 99, -1)", (ENDS,)),
    "left edge off by one": ("(shift - scores.window_left) if", "(shift - scores.window_left + 1) if", (WINDOW,)),
    "values of the other stage": ("before = (i - 1) % traits", "before = i % traits", (WINDOW,)),
    "tile of the diagonal taken for whole": ("end - inside_end, end", "0 * inside_end, end", (CAUSAL,)),
    "tile of the left edge taken for whole": ("end - inside_begin)", "end - begin)", (WINDOW,)),
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
        "(i - 1, v_desc, v_ring, place, walk,", "(i - 1, v_desc, v_ring, place, Walk(2 * (i - 1), 1, 1, 1),", (ENDS,)
    ),
    "two blocks with one tile": ("tile = within // slots_here", "tile = within // slots_here // 2", (MORE_QUERIES,)),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_a_broken_kernel_is_caught(name: str, broken, poison_empty: None) -> None:
    text, replacement, cases = NUMBERS[name]
    assert text in SOURCE
    broken(SOURCE.replace(text, replacement))
    with pytest.raises((ContractError, KernelFault)):
        for case in cases:
            check(case, least=1, most=1)


def test_a_copy_that_is_not_broken_passes(broken, poison_empty: None) -> None:
    """Else the tests above would show nothing."""
    broken(SOURCE)
    for schedule in (*SCHEDULES, LATE):
        forward(call_of(draw(DENSE, 0, torch.device("cpu"))), schedule)
    for case in (CAUSAL, MORE_QUERIES, WINDOW, ENDS, GROUPS, PACKED, QUARTERS, SOFTCAP, SINKS):
        check(case, least=1, most=1)
