"""Faults put into the CUDA decode kernels: the emulator or the checks report each of them."""

from __future__ import annotations

import os
import re

import pytest

from tests.support.broken_cuda import run_broken

CALL = """
import torch
from pytransformer.ops.decode_attention import decode_attention
from tests.support.emulator import in_every_schedule

generator = torch.Generator().manual_seed(0)
for seqlen_q in (1, 5):  # 4 rows, whose warps share them, and 20
    q = torch.randn(1, seqlen_q, 4, 16, generator=generator).bfloat16()
    cache = torch.randn(2, 1, 200, 1, 16, generator=generator).bfloat16()
    lengths = torch.tensor([200], dtype=torch.int32)
    call = lambda: decode_attention(q, cache[0], cache[1].clone(), lengths, backend="cuda", return_lse=True)
    for result in in_every_schedule(call):
        assert bool(result.isfinite().all()), "results are not finite"
"""
FAULTS = {
    "copies not waited for": ("ptx::cp_async_wait<1>();", "", "results are not finite"),
    "a key too many": ("key >= range.low && key < end);", "key >= range.low && key <= end);", "AddressSanitizer: heap-buffer-overflow"),
    "no barrier before a stage is filled again": (
        "sync_tiles(shares_rows);  // the next copies", "//", "results are not finite|differs between schedules",
    ),
    "no barrier before outputs overwrite tiles": (
        "ptx::cp_async_wait<0>();\n  __syncthreads();", "ptx::cp_async_wait<0>();", "results are not finite|differs between schedules",
    ),
}  # fmt: skip
# Each costs a compilation.
SLOW_FAULTS = ("copies not waited for", "no barrier before outputs overwrite tiles")


EMULATED = "PYTRANSFORMER_CUDA_LIBRARY" in os.environ


@pytest.mark.skipif(not EMULATED, reason="the emulator's checks")
@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_FAULTS)) for name in FAULTS]
)
def test_fault_is_caught(fault, tmp_path):
    flavor = os.environ["PYTRANSFORMER_TEST_CUDA"]
    if flavor != "address":
        pytest.skip("found by AddressSanitizer, or by what it fills memory with")
    good, bad, report = FAULTS[fault]
    exec(CALL, {})
    unit = "decode_attention/split_bfloat16_plain.cu"
    result = run_broken(tmp_path, "decode_attention/split.cuh", [(good, bad)], CALL, recompile=[unit])
    assert result.returncode != 0
    assert re.search(report, result.stderr), result.stderr[-2000:]
    print(f"caught: {fault}")
