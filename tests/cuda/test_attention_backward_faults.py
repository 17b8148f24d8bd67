"""Faults put into the backward kernels of attention must be found by the tools that watch the sound ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.broken_cuda import run_broken

FLAVOR = os.environ.get("PYTRANSFORMER_TEST_CUDA", "address")
KEY_KERNEL = ("attention/backward_dkv.cuh", "attention/backward_bfloat16_64.cu")
QUERY_KERNEL = ("attention/backward_dq.cuh", "attention/backward_bfloat16_64.cu")
# Several tiles on both sides, the last of them not whole; then the contract, in every order of threads, warps and blocks.
SCRIPT = """
import torch
from tests.cuda.attention_ops import check_case
from tests.kernels.attention_contract import Case
case = Case((150, 140), heads=(2, 1), dims=(16, 16), dtype=torch.bfloat16, options={"causal": True})
check_case(case, torch.device("cpu"), every_schedule=True)
print("nothing found")
"""
FAULTS = {
    "weights read before they have passed": (
        *KEY_KERNEL,
        "    __syncthreads();  // the weights have passed\n",
        "",
        "ContractError|AssertionError|data race",
    ),
    "a stage read before it has landed": (
        *KEY_KERNEL,
        "ptx::cp_async_wait<0>();\n    __syncthreads();  // this stage has landed",
        "ptx::cp_async_wait<1>();\n    __syncthreads();  // this stage has landed",
        "ContractError|AssertionError|never waited for|data race",
    ),
    "a stage overwritten while it is read": (
        *QUERY_KERNEL,
        "__syncthreads();  // this stage has landed for every thread, and none reads the other any more",
        "",
        "ContractError|AssertionError|data race",
    ),
    "one row written too many": (
        *QUERY_KERNEL,
        "place.length - start_m - warp_row, call.head_dim, sums",
        "place.length - start_m - warp_row + 1, call.head_dim, sums",
        "heap-buffer-overflow",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, tmp_path: Path, device) -> None:
    if device.type == "cuda":
        pytest.skip("faults are put into what the host emulator runs")
    if name == "one row written too many" and FLAVOR != "address":
        pytest.skip("AddressSanitizer knows where memory ends")
    source, unit, good, bad, report = FAULTS[name]
    result = run_broken(tmp_path, source, [(good, bad)], SCRIPT, flavor=FLAVOR, recompile=[unit])
    output = result.stdout + result.stderr
    assert result.returncode != 0 and "nothing found" not in output
    assert any(text in output for text in report.split("|")), output[-3000:]
