"""Copies of Hopper's backward kernel that are broken on purpose: what is wrong with their protocol is reported with the line; a tile, a
mask or a sum that is wrong breaks the contract or leaves its tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pytransformer.gluon_interpreter import EARLY, LATE
from pytransformer.kernels.hopper import backward as kernels
from pytransformer.kernels.hopper import backward_launch as launch
from pytransformer.kernels.hopper.names import HAS_REDUCTIONS
from pytransformer.triton_interpreter import KernelFault
from pytransformer.verification import ContractError
from tests.conftest import INTERPRETING
from tests.gluon_interpreter.broken import broken_copies, imported
from tests.kernels.attention_contract import Case, draw
from tests.kernels.hopper_backward_contract import CPU, check, given, gradients

pytestmark = [
    pytest.mark.usefixtures("without_overflow_checks"),
    pytest.mark.skipif(not INTERPRETING, reason="the Gluon interpreter runs only where Triton's does"),
    pytest.mark.skipif(not HAS_REDUCTIONS, reason="this Triton's TMA does not reduce"),
]

SOURCE = Path(kernels.__file__).read_text().replace("from ..", "from pytransformer.kernels.")
SOURCE = SOURCE.replace("from .", "from pytransformer.kernels.hopper.")

# Statements of the protocol removed, and made wrong.
PROTOCOL = dict(
    broken_copies(
        SOURCE,
        (
            (r"warpgroup_mma_wait\(0,", "warpgroup_mma_wait(1,", "one product too many under way"),
            (r"warpgroup_mma_wait\(1,", "warpgroup_mma_wait(2,", "one product too many under way"),
            (r"count=1\)(?=\n +mbarrier\.init|\n +at)", "count=2)", "one arrival too many"),
            (r"(?<=empty\.index\(stage\), count=1)\)(?=\n +used)", " + 1)", "two arrivals"),
            (r"\(\(loaded >> 1\) & 1\) \^ 1", "(loaded >> 1) & 1", "other parity"),
            (r"\(used >> 1\) & 1", "((used >> 1) & 1) ^ 1", "other parity"),
            (r"kv_full, 0\)", "kv_full, 1)", "other parity"),
            (r"3 \* shift_desc\.nbytes_per_cta", "2 * shift_desc.nbytes_per_cta", "too few bytes"),
            (r"2 \* k_desc\.nbytes_per_cta", "k_desc.nbytes_per_cta", "half of the bytes"),
            (r"(?<=full, memory\.q\.index\()stage", "1 - stage", "other stage"),
            (r"(?<=full, memory\.delta\.index\()2 \* stage\)", "2 * stage + 1)", "twice the same"),
            (r"(?<=dout = memory\.dout\.index\()stage", "1 - stage", "other stage"),
            (r"memory\.ds\.store\(ds\)", "pass", "never stored"),
            (r"memory\.dq\.store\(part\)", "pass", "never stored"),
            (r"(?<=v_desc, at, barriers\.kv_full, )memory\.v", "memory.k", "other memory"),
        ),
    )
)  # fmt: skip

DENSE = Case((320, 130), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16)


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a source in place of the kernel's."""
    return lambda source: monkeypatch.setattr(
        launch, "attention_backward_kernel", imported(source, tmp_path).attention_backward_kernel
    )


@pytest.fixture(scope="module")
def dense():
    return given(DENSE, draw(DENSE, 0, CPU))


def test_there_are_enough_of_them() -> None:
    assert len(PROTOCOL) >= 25


@pytest.mark.parametrize("name", PROTOCOL)
def test_a_fault_in_the_protocol_is_reported(name: str, broken, dense) -> None:
    broken(PROTOCOL[name])
    for schedule in (EARLY, LATE):
        with pytest.raises(KernelFault, match=r"broken\.py:\d+ in "):
            gradients(dense, schedule)


CAUSAL = Case((130, 200), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"causal": True})
WINDOW = Case((200, 200), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"window": (70, 20)})
LEFT = Case((200, 130), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"window": (40, -1)})
ENDS = Case((70, 65), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, scale_of_q=30.0)
WIDE = Case((320, 320), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"window": (192, 0)})
# All scores of many rows are far below 0, which is the score of a key that is not there.
HIDDEN = Case((70, 3), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, scale_of_q=300.0)
GROUPS = Case((70, 70), dims=(64, 64), heads=(4, 2), dtype=torch.bfloat16)
PACKED = Case(((70, 150), (0, 3), (65, 140)), dims=(64, 64), heads=(2, 1), dtype=torch.bfloat16)
SOFTCAP = Case((65, 70), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"softcap": 1.0})

# Text, what is put in its place wherever it stands, and a call in which that matters.
NUMBERS: dict[str, tuple[str, str, Case]] = {
    "causal mask off by one": ("shift - scores.window_right\n", "shift - scores.window_right + 1\n", CAUSAL),
    "lengths aligned top-left": ("place.start + place.seqlen_q - place.seqlen_k)\n", "place.start)\n", CAUSAL),
    "left edge off by one": ("scores.window_left + scores.window_right\n", "scores.window_left + scores.window_right + 1\n", WINDOW),
    "left edge alone off by one": ("shift + scores.window_left - NO_LIMIT", "shift + scores.window_left - NO_LIMIT - 1", LEFT),
    "a distance with a sign": (").to(gl.uint32) <= width.to(gl.uint32)", ") <= width", WINDOW),
    "end of the keys not masked": ("keys < place.seqlen_k - place.start", "keys < BLOCK_N", HIDDEN),
    "tile of the end taken for whole": ("place.start + BLOCK_N > place.seqlen_k", "place.start > place.seqlen_k", HIDDEN),
    "tile of the diagonal taken for whole": (
        "gl.maximum(last_key - scores.window_right, 0)", "gl.maximum(first_key - scores.window_right, 0)", CAUSAL
    ),
    "tile of the left edge taken for whole": ("whole_end = gl.maximum(first_key +", "whole_end = gl.maximum(last_key +", WINDOW),
    "last tile forgotten": ("whole_begin, whole_end, end)", "whole_begin, whole_end, end - 1)", ENDS),
    "cut tiles behind the whole ones forgotten": ("tile += tiles.whole_end - tiles.whole_begin", "tile += 0", WIDE),
    "one head of the group": ("range(count * traits.HEADS_PER_KV)", "range(count)", GROUPS),
    "heads that take turns wrongly": ("gl.where(was_last, 0, step)", "gl.where(was_last, 1, step)", GROUPS),
    "statistics of another head": ("member * tiles_q * BLOCK_M + row", "row", GROUPS),
    "wrong sequence of queries": ("cu_seqlens_q_ptr + sequence)", "cu_seqlens_k_ptr + sequence)", PACKED),
    "sums of another sequence": ("first_tile += first_q // BLOCK_M + sequence", "first_tile += first_q // BLOCK_M", PACKED),
    "delta not taken off": ("first[None, :], second[None, :])", "0.0 * first[None, :], 0.0 * second[None, :])", ENDS),
    "delta of half of the rows": ("first[None, :], second[None, :])", "first[None, :], 0.0 * second[None, :])", ENDS),
    "softcap's slope forgotten": ("p = p * (1.0 - ratio * ratio)", "p = p * 1.0", SOFTCAP),
    "dk not scaled": ("dk * softmax_scale", "dk", ENDS),
    "dk and dv exchanged": ("async_store(dk_desc, at, memory.k", "async_store(dv_desc, at, memory.k", ENDS),
    "dq never added": ("tma.async_atomic_add(dq_desc, [statistic, 0], memory.dq)", "pass", ENDS),
    "dq stored and not added": ("tma.async_atomic_add(dq_desc", "async_store(dq_desc", CAUSAL),
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_a_broken_kernel_is_caught(name: str, broken, poison_empty: None) -> None:
    text, replacement, case = NUMBERS[name]
    assert text in SOURCE
    broken(SOURCE.replace(text, replacement))
    with pytest.raises((ContractError, KernelFault)):
        check(case, least=1, most=1)


def test_a_copy_that_is_not_broken_passes(broken, dense, poison_empty: None) -> None:
    """Else the tests above would show nothing."""
    broken(SOURCE)
    for schedule in (EARLY, LATE):
        gradients(dense, schedule)
    for case in (CAUSAL, WINDOW, LEFT, WIDE, HIDDEN, ENDS, GROUPS, PACKED, SOFTCAP):
        check(case, least=1, most=1)
