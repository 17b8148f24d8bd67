"""Where no CUDA toolkit is installed the headers that come with triton serve as well."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.emulator import builder

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("source", ["engine/emulator.cpp", "codes.cu"])
def test_triton_brings_the_headers(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = builder()

    def find_nvcc() -> Path:
        raise build.BuildError("there is none")

    monkeypatch.setattr(build, "find_nvcc", find_nvcc)
    try:
        assert "triton" in str(build.find_cuda_headers())
    except build.BuildError as error:
        pytest.skip(f"the emulator cannot be built here: {error}")
    plan = build.emulated_plan(build.find_torch(), "emulated", ())
    flags = plan.kernel_flags if source.endswith(".cu") else plan.engine_flags
    command = [plan.cxx, *flags, "-fsyntax-only", str(FOLDER / source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[:3000]
