"""An eager call costs the host at most twice what torch's own layer_norm does through the extension, four times through Triton."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pytransformer.benchmarks.programs.host_cost import BACKENDS, run_in_emulator


@pytest.mark.slow  # builds one more flavor of the extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch can be stubbed on a machine without a GPU only")
def test_an_eager_call_stays_within_its_limit(tmp_path: Path) -> None:
    # In a process of its own: the sanitizers, and pytest's tracing for coverage, would be measured with it.
    output = tmp_path / "host_cost.json"
    for attempt in range(3):  # a busy machine can spoil a run, but makes no slow call fast
        arguments = ["--repeats", str(100 * (attempt + 1)), "--limited-only", "--output", str(output)]
        result = run_in_emulator(arguments, capture_output=True)
        assert result.returncode == 0, result.stderr
        rows = [row for row in json.loads(output.read_text())["rows"] if row["limit"] is not None]
        assert {row["backend"] for row in rows} == set(BACKENDS)
        beyond = [row for row in rows if row["of_base"] > row["limit"]]
        if not beyond:
            return
    pytest.fail(f"host cost beside torch's layer_norm: {beyond}")
