"""The peer compiles within the same limits, and its figures are kept beside ours: docs/kernels.md has both."""

from __future__ import annotations

import pytest

from tests.compile import peer_attention
from tests.support.compile_gate import Case, Report, run_cases
from tests.support.launch_recorder import record

CASES = [Case(name, call, 90, frozenset({peer_attention.NAME})) for name, call in peer_attention.compile_cases()]


def decided_by() -> list[str]:
    return [launch.key for case in CASES for launch in record(case.call, case.arch)]


@pytest.fixture(scope="module")
def peers() -> dict[str, Report]:
    return run_cases(CASES)


@pytest.mark.compiles
def test_the_peer_compiles_within_its_limits(peers):
    assert not {name: report.complaints for name, report in peers.items() if report.complaints}


def test_tiles_come_by_descriptors():
    for _, call in peer_attention.compile_cases():
        (launch,) = record(call, 90)
        assert sum(kind.startswith("tensordesc") for kind in launch.signature.values()) == 4


@pytest.mark.compiles
def test_figures_are_those_committed(peers, record_figures):
    kernels = {f"{name} {peer_attention.NAME} 0": report.outcomes[0].statistics for name, report in peers.items()}
    assert all(statistics.loops[0].classes["matrix"] > 0 for statistics in kernels.values())
    record_figures("peer", kernels)
