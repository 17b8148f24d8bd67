"""Where kernels run in the tests: on a GPU if there is one, else in Triton's interpreter, hardened.

Interpreting and compiling do not mix in one process: ``PYTRANSFORMER_TEST_COMPILE=1`` marks the process that compiles (tests/compile).
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

COMPILING = os.environ.get("PYTRANSFORMER_TEST_COMPILE") == "1"
INTERPRETING = not COMPILING and not torch.cuda.is_available()


def _untraced_launches() -> None:
    """Interprets kernels without coverage's trace function.

    It would be called for each of the interpreter's many Python calls and make launches 2.4 times slower (Python 3.11), only to find
    that they are not to be measured. The interpreter's own tests keep it.
    """
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def untraced(self, *args_dev, **kwargs):
        tracer = sys.gettrace()
        if tracer is None or "triton_interpreter" in os.environ.get("PYTEST_CURRENT_TEST", ""):
            return call(self, *args_dev, **kwargs)
        sys.settrace(None)
        try:
            return call(self, *args_dev, **kwargs)
        finally:
            sys.settrace(tracer)

    GridExecutor.__call__ = untraced


if INTERPRETING:
    os.environ["TRITON_INTERPRET"] = "1"
    from pytransformer import triton_interpreter

    _untraced_launches()
    triton_interpreter.install()

# One thread per test process: the shapes are small, and results do not change with the number of cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test: the same tests run on "cuda" where there is a GPU and on "cpu" elsewhere."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poison_empty():
    """Uninitialised memory is NaN (or the largest integer) in the test, so an element that a kernel forgets to write is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture
def kernels_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels are interpreted their launches return at once: for what is asked of memory at sizes that would take hours."""
    if INTERPRETING:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", lambda *arguments, **options: None)


def pytest_terminal_summary(terminalreporter) -> None:
    """Names the injected faults that were caught: a test-suite that cannot fail proves nothing."""
    caught = sorted(
        {_fault_name(report.nodeid) for report in terminalreporter.stats.get("passed", []) if _is_fault(report)}
    )
    if caught:
        terminalreporter.section(f"{len(caught)} injected faults, all caught")
        terminalreporter.write_line(textwrap.fill("; ".join(caught), width=140))


def _is_fault(report) -> bool:
    test = report.nodeid.partition("::")[2]
    return (
        report.when == "call"
        and re.match(r"test_(a_fault_in|fault_is|race_is|a_broken_kernel_is_caught)", test) is not None
    )


def _fault_name(nodeid: str) -> str:
    path, _, test = nodeid.partition("::")
    name = test.partition("[")[2].rstrip("]") or test.removeprefix("test_").replace("_", " ")
    return f"{Path(path).stem.removeprefix('test_')}: {name}"
