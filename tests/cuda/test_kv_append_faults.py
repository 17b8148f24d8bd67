"""Faults put into the CUDA append kernel: the emulator or the checks report each of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.broken_cuda import run_broken

EMULATED = pytest.mark.skipif(
    "PYTRANSFORMER_CUDA_LIBRARY" not in os.environ, reason="a fault would corrupt other tests on a GPU"
)


SCRIPT = """
import torch
from pytransformer import extension
from tests.support.emulator import configure
op = extension.op("kv_append")
k, cos = torch.randn(2, 3, 2, 40), torch.randn(16, 12)
results = []
for schedule in range(6):
    configure(schedule)
    cache = torch.zeros(2, 4, 2, 40)
    lengths = torch.tensor([3, 0], dtype=torch.int32)  # two tokens of the first sequence have no place
    q = op(k, k, cache, cache.clone(), None, None, lengths, *[None] * 5, cos, cos, k, None, None, False, 1e-6, 0.0)
    results.append((cache, q))
assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0])), "schedules differ"
print("finished")
"""
FAULTS = {
    "a row behind the cache": ("place.position < (call.block_table", "place.position <= (call.block_table", "schedules differ"),
    "a token too many": ("const bool is_token = token < call.tokens;", "const bool is_token = token <= call.tokens;", "AddressSanitizer"),
    "no barrier before the partner is read": ("  __syncwarp();\n  const float* cos_row", "  const float* cos_row", "schedules differ"),
    "a feature group too many": ("&& col < from.dim;", "&& col <= from.dim;", "AddressSanitizer"),
}  # fmt: skip


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernel_is_reported(fault, tmp_path: Path):
    good, bad, report = FAULTS[fault]
    result = run_broken(tmp_path, "kv_cache/kv_append.cu", [(good, bad)], SCRIPT)
    assert "finished" not in result.stdout
    assert report in result.stderr
