"""The CUDA kernels: on a GPU where the extension is built, else in the host emulator (``python -m tests.support.emulator``)."""

from __future__ import annotations

import os

import pytest

from pytransformer import extension


@pytest.fixture(autouse=True)
def _extension(device) -> None:
    reason = extension.why_not(device.type)
    if reason is not None:
        if "PYTRANSFORMER_CUDA_LIBRARY" in os.environ:
            pytest.fail(reason)  # asked for, so it must be there
        pytest.skip(reason)
