"""Options of `pytest benchmarks/pytest_suites`."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of pytransformer")
    group.addoption(
        "--grid", choices=("tiny", "quick", "full"), help="which rows (default: quick on a GPU, tiny on a CPU)"
    )
    group.addoption("--suite", action="append", metavar="NAME", help="only this suite (may be repeated)")
    group.addoption("--peers", action="store_true", help="also the kernels of other packages, where they are installed")
