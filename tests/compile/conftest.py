"""Kernels are compiled here, which does not mix with interpreting them: only with PYTRANSFORMER_TEST_COMPILE=1, in a run of its own.

A first run compiles everything, a repeat finds what has not changed in Triton's cache. PYTRANSFORMER_COMPILE_ARCHS=90 (or 80,90)
narrows the architectures down. PYTRANSFORMER_COMPILE_CHANGED=1 compiles what the committed figures do not know, and one launch of
each kernel that they do; tests marked ``compiles`` that have passed with the same are skipped (tests/support/passed.py).
"""

from __future__ import annotations

import os
import warnings

import pytest

from tests.conftest import COMPILING

UPDATES_FIGURES = os.environ.get("PYTRANSFORMER_UPDATE_FIGURES") == "1"
CHANGED_ALONE = os.environ.get("PYTRANSFORMER_COMPILE_CHANGED") == "1" and not UPDATES_FIGURES

collect_ignore_glob = [] if COMPILING else ["test_*.py"]


_passed = pytest.StashKey[list[pytest.Function]]()


def pytest_runtest_setup(item: pytest.Function) -> None:
    if CHANGED_ALONE and item.get_closest_marker("compiles"):
        from tests.support import passed

        if passed.is_known(item):
            pytest.skip("has passed with this compiler, code and rules")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo[None]):
    report = yield
    if report.when == "call" and report.passed and item.get_closest_marker("compiles"):
        item.session.stash.setdefault(_passed, []).append(item)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if UPDATES_FIGURES and _passed in session.stash:
        from tests.support import passed

        passed.write(session.stash[_passed])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    from tests.support import compile_gate

    if "op" in metafunc.fixturenames:
        metafunc.parametrize("op", compile_gate.ops())
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", _cases_of_importable_ops(), ids=str)


def _cases_of_importable_ops() -> list[object]:
    """A module that cannot be imported, or offers no cases, fails a test of its own and not the collection of all."""
    from tests.support import compile_gate

    chosen = os.environ.get("PYTRANSFORMER_COMPILE_ARCHS")
    architectures = [int(arch) for arch in chosen.split(",")] if chosen else compile_gate.ARCHITECTURES
    found: list[object] = []
    for op in compile_gate.ops():
        try:
            found += compile_gate.cases(op, architectures)
        except Exception:
            continue
    return found


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest):
    """Reports of all cases that were chosen for this run: compiled together, so that all cores have work."""
    from tests.support import compile_gate, gate_figures

    chosen = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    known = gate_figures.known_keys() if CHANGED_ALONE else frozenset()
    return compile_gate.run_cases([case for case in chosen if case is not None], known=known)


@pytest.fixture
def record_figures():
    """Compares compiled kernels with the committed figures, or commits them if PYTRANSFORMER_UPDATE_FIGURES=1."""
    from tests.support import gate_figures

    def compare(kind, kernels, passed=None) -> None:
        if UPDATES_FIGURES:
            gate_figures.write(kind, kernels, passed or {})
            return
        wrong, changes = gate_figures.compare(kind, kernels)
        for change in changes:
            warnings.warn(change, stacklevel=2)
        assert not wrong, "\n".join(wrong)

    return compare
