"""The stages of `make gpu-hopper` compile for Hopper: what is first started on a GPU is not what is first compiled there."""

from __future__ import annotations

import pytest
import torch

from pytransformer.benchmarks.programs.hopper_stages import STAGES
from pytransformer.kernels.hopper.serves import triton_missing
from tests.support.compile_gate import Case, run_cases
from tests.support.launch_recorder import record

pytestmark = [
    pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing())),
    pytest.mark.compiles,
]

PARTS = ("loads", "product", "softmax")


def _call(name: str) -> None:
    run, _, _ = STAGES[name].cases["d128"](True, torch.device("cpu"))
    run()


_WGMMA = {"product": frozenset({"product_kernel"})}
CASES = [Case(f"bringup-{name}", lambda name=name: _call(name), 90, _WGMMA.get(name, frozenset())) for name in PARTS]


def decided_by() -> list[str]:
    return [launch.key for case in CASES for launch in record(case.call, case.arch)]


def test_the_parts_compile_without_spills_and_with_the_products_they_are_for() -> None:
    for report in run_cases(CASES).values():
        assert not report.complaints, report.case
        assert report.outcomes[0].statistics.spill_bytes == 0
