"""Every kernel compiles in every shipped configuration, for every architecture, within its limits."""

from __future__ import annotations

from tests.support import compile_gate
from tests.support.launch_recorder import record
from tests.support.listed import all_kernels_of


def test_case_compiles_within_its_limits(case, reports):
    assert not reports[str(case)].complaints


def test_cases_launch_every_kernel_of_the_op(op):
    recorded = {launch.name for case in compile_gate.cases(op) for launch in record(case.call, case.arch)}
    assert recorded
    assert all_kernels_of(op) <= recorded


def test_figures_are_those_committed(reports, record_figures):
    kernels, passed = {}, {}
    for case, report in reports.items():
        for number, outcome in enumerate(report.outcomes):
            name = f"{case} {outcome.launch.name} {number}"
            if outcome.statistics is not None:
                kernels[name] = outcome.statistics
            if not outcome.complaints:
                passed[name] = outcome.launch.key
    record_figures("triton", kernels, passed)
