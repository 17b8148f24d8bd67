"""What the activation kernels promise of their machine code: nothing but wide accesses, and one compilation for all numbers of rows."""

from __future__ import annotations

import pytest
import torch

from tests.support import compile_gate
from tests.support.launch_recorder import record
from tests.support.launchers import activation_backward, activation_forward
from tests.support.sass import GLOBAL_128_BIT, GLOBAL_ACCESS

WIDTH = 768


def decided_by() -> list[str]:
    return [launch.key for case in compile_gate.cases("activation") for launch in record(case.call, case.arch)]


@pytest.mark.compiles
def test_every_access_is_128_bits_wide():
    for name, report in compile_gate.run_cases(list(compile_gate.cases("activation"))).items():
        assert report.outcomes and not report.complaints
        for outcome in report.outcomes:
            got = outcome.statistics
            assert got.count(GLOBAL_128_BIT) == got.count(GLOBAL_ACCESS) >= 2, f"{name} {outcome.launch.name}"


def _launches(rows: int, form: str) -> set[str]:
    dout = torch.empty(rows, WIDTH, dtype=torch.bfloat16)
    # The packed rows are part of longer ones, so that their stride is a number of its own.
    gate = torch.empty(rows, 2 * WIDTH + 64, dtype=torch.bfloat16)[:, : 2 * WIDTH] if form == "packed" else dout
    up = dout if form == "two tensors" else None
    options = {"activation": "silu", "gated": form != "not gated"}

    def both() -> None:
        activation_forward(gate, up, **options)
        activation_backward(dout, gate, up, **options)

    return {launch.key for launch in record(both, 90)}


@pytest.mark.parametrize("form", ["packed", "two tensors", "not gated"])
def test_another_number_of_rows_compiles_nothing(form):
    # 1 and multiples of 16 are what Triton compiles anew for, if it is not told otherwise.
    keys = [_launches(rows, form) for rows in (1, 2, 3, 16, 48, 4097)]
    assert len(keys[0]) == 2
    # A single row is contiguous whatever its stride, and its alignment that of its width.
    assert all(other == keys[1] for other in keys[1:])
    assert form == "packed" or keys[0] == keys[1]
