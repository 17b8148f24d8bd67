"""These tests are about the interpreter itself, so they run only where it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import INTERPRETING


@pytest.fixture(autouse=True)
def _interpreter_in_use() -> None:
    if not INTERPRETING:
        pytest.skip("kernels are compiled for a GPU in this process: there is no interpreter to test")


@pytest.fixture
def harden() -> Iterator[Callable[..., None]]:
    """Installs the interpreter with the given options until the end of the test."""
    from pytransformer import triton_interpreter

    def install(**options: Any) -> None:
        triton_interpreter.install(**options)

    yield install
    triton_interpreter.install()
