"""An eager call through the extension costs the host at most twice what torch's own layer_norm does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pytransformer.benchmarks.host_cost import BASE, run_in_emulator

LIMIT = 2.0


@pytest.mark.slow  # builds one more flavor of the extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="the launch can be stubbed in the emulator only")
def test_an_eager_call_costs_at_most_twice_torchs(tmp_path: Path) -> None:
    # In a process of its own: the sanitizers, and pytest's tracing for coverage, would be measured with it.
    output = tmp_path / "host_cost.json"
    for attempt in range(3):  # a busy machine can spoil a run, but makes no slow call fast
        result = run_in_emulator(["--repeats", str(100 * (attempt + 1)), "--output", str(output)], capture_output=True)
        assert result.returncode == 0, result.stderr
        costs = {row["name"]: row["of_base"] for row in json.loads(output.read_text())["rows"]}
        assert costs.pop(BASE) == 1.0 and costs
        if max(costs.values()) <= LIMIT:
            return
    pytest.fail(f"host cost beside {BASE}: {costs}")
