"""Kernels with one statement of their protocol removed or made wrong: each is reported by any schedule, none hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pytransformer.gluon_interpreter import LATE, Schedule
from pytransformer.triton_interpreter import KernelFault
from tests.gluon_interpreter import attention_backward, attention_forward
from tests.gluon_interpreter.broken import broken_copies, imported
from tests.gluon_interpreter.names import needs_reductions

SCHEDULES = (Schedule(order="first"), Schedule(order="last", copies="late", products="late"))

FORWARD = dict(
    broken_copies(
        Path(attention_forward.__file__).read_text(),
        (
            (r"warpgroup_mma_wait\(0,", "warpgroup_mma_wait(1,", "one product too many under way"),
            (r"warpgroup_mma_wait\(1,", "warpgroup_mma_wait(2,", "one product too many under way"),
            (r"count=2\)", "count=1)", "one arrival too few"),
            (r"count=1\)(?=\n +mbarrier\.init)", "count=2)", "one arrival too many"),
            (r"\(\(i // 2\) & 1\) \^ 1", "(i // 2) & 1", "other parity"),
            (r"(?<!\()\(i // 2\) & 1\)", "((i // 2) & 1) ^ 1)", "other parity"),
            (r"\(\(i - 1\) // 2\) & 1\)", "(((i - 1) // 2) & 1) ^ 1)", "other parity"),
            (r"2 \* q_desc\.block_type\.nbytes", "q_desc.block_type.nbytes", "half of the bytes"),
            (r"v_full\.index\(stage\), v\.index\(stage\)\)", "v_full.index(stage), v.index(1 - stage))", "other stage"),
        ),
    )
)
# What the forward pass does not have.
BACKWARD = dict(
    broken_copies(
        Path(attention_backward.__file__).read_text(),
        (
            (r"warpgroup_mma_wait\(2,", "warpgroup_mma_wait(3,", "one product too many under way"),
            (r"own_ds\.store\(rounded\)", "pass", "never stored"),
            (
                r"own_dq = .*index\(W\)\n",
                "own_dq = k.index(W), v.index(W), ds.index(W), dq.index(0)\n",
                "shared buffer",
            ),
            (r"(?<=slopes, q\.index\()stage", "1 - stage", "other stage"),
        ),
    )
)


def test_there_are_enough_of_them() -> None:
    assert len(FORWARD) >= 35 and len(BACKWARD) >= 25


@pytest.mark.parametrize("name", FORWARD)
def test_a_fault_in_the_forward_pass_is_reported(name: str, tmp_path: Path) -> None:
    module = imported(FORWARD[name], tmp_path)
    q, k, v = (torch.randn(1, 640, 64).to(torch.bfloat16) for _ in range(3))
    for schedule in SCHEDULES:
        with pytest.raises(KernelFault, match=r"broken\.py:\d+ in "):
            attention_forward.run(q[:, -128:], k, v, False, 128, schedule, module.attention)


@needs_reductions
@pytest.mark.parametrize("name", BACKWARD)
def test_a_fault_in_the_backward_pass_is_reported(name: str, tmp_path: Path) -> None:
    module = imported(BACKWARD[name], tmp_path)
    tensors = [torch.randn(1, 256, 64).to(torch.bfloat16) for _ in range(4)]
    vectors = [torch.zeros(1, 256) for _ in range(2)]
    with pytest.raises(KernelFault, match=r"broken\.py:\d+ in "):
        attention_backward.run(*tensors, *vectors, LATE, module.attention_backward)
