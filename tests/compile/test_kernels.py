"""Every kernel compiles in every shipped configuration, for every architecture, within its limits."""

from __future__ import annotations

import importlib

from triton.runtime.jit import JITFunction

from tests.support import compile_gate
from tests.support.launch_recorder import record


def test_case_compiles_within_its_limits(case, reports):
    assert not reports[str(case)].complaints


def test_cases_launch_every_kernel_of_the_module(module_name):
    module = importlib.import_module(f"pytransformer.kernels.{module_name}")
    assert hasattr(module, "compile_cases"), f"kernels/{module_name}.py launches kernels but has no compile_cases()"
    names = compile_gate.launched_kernels(compile_gate.KERNELS / f"{module_name}.py")
    launched_by_name = {name for name in names if isinstance(getattr(module, name, None), JITFunction)}
    recorded = {launch.name for case in compile_gate.cases(module) for launch in record(case.call, case.arch)}
    assert recorded
    assert launched_by_name <= recorded


def test_figures_are_those_committed(reports, record_figures):
    kernels = {}
    for case, report in reports.items():
        for number, outcome in enumerate(report.outcomes):
            kernels[f"{case} {outcome.launch.name} {number}"] = outcome.statistics
    record_figures("triton", kernels)
