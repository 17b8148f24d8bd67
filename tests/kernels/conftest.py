"""What tests of several kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import INTERPRETING


@pytest.fixture(autouse=True)
def _counters_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken kernel leaves counters behind that no later launch may find."""
    from pytransformer.kernels import counters

    monkeypatch.setattr(counters, "_kept", {})


@pytest.fixture
def without_overflow_checks() -> Iterator[None]:
    """Checking each integer operation for overflow doubles the time; tests of large offsets keep the checks."""
    if not INTERPRETING:
        yield
        return
    from pytransformer import triton_interpreter

    triton_interpreter.install(debug=False)
    yield
    triton_interpreter.install()
