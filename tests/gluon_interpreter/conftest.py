"""These tests are about the Gluon interpreter, which stands on Triton's: they run only where that does."""

from __future__ import annotations

import pytest

from tests.conftest import INTERPRETING


@pytest.fixture(autouse=True)
def _interpreter_in_use() -> None:
    if not INTERPRETING:
        pytest.skip("kernels are compiled for a GPU in this process: there is no interpreter to test")
