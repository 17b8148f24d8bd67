"""The kernels on GPUs with little shared memory (sm_86, sm_89, sm_120): the backward pass of attention has a single stage there, which is
loaded when all threads are done with what was in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pytransformer import decode_attention, rms_norm
from tests.cuda.attention_ops import EMULATED, check_case, gradients_of
from tests.kernels.attention_contract import Case, draw
from tests.support.broken_cuda import run_broken
from tests.support.emulator import LEAST_SHARED_MEMORY, MOST_SHARED_MEMORY, configure

FLAVOR = os.environ.get("PYTRANSFORMER_TEST_CUDA", "address")
BFLOAT16 = {"dtype": torch.bfloat16}
# 99 KB leave one stage to dq up to 64 features, to dk and dv up to 128, to both up to 256; tiles of 32 are loaded three times and more.
CASES = {
    "dq": Case((40, 110), heads=(1, 1), dims=(16, 64), **BFLOAT16, options={"causal": True}),
    "dk and dv": Case((100, 40), heads=(2, 1), dims=(72, 80), dtype=torch.float16, options={"window": (60, 9)}),
    "both": Case((40, 100), heads=(1, 1), dims=(136, 144), **BFLOAT16, options={"causal": True}),
    "packed, softcap": Case(
        ((5, 70), (0, 3), (40, 33), (4, 0)), heads=(1, 1), dims=(24, 16), **BFLOAT16, options={"softcap": 2.0}
    ),
}


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    if not EMULATED:
        pytest.skip("a GPU has the shared memory that it has")
    yield
    configure()


@pytest.mark.parametrize("name", CASES)
def test_contract_with_one_stage(name: str, device: torch.device, poison_empty: None) -> None:
    check_case(CASES[name], device, every_schedule=name.startswith("d"), shared_memory=LEAST_SHARED_MEMORY)


@pytest.mark.parametrize("name", CASES)
def test_stages_change_no_bit(name: str, device: torch.device, poison_empty: None) -> None:
    inputs = draw(CASES[name], 0, device)
    results = []
    for shared_memory in (MOST_SHARED_MEMORY, LEAST_SHARED_MEMORY):
        configure(shared_memory=shared_memory)
        results.append(gradients_of(CASES[name], inputs))
    for gradient, tensor in results[0].items():
        assert torch.equal(tensor, results[1][gradient]), gradient


def test_the_widest_heads_and_rows_fit(device: torch.device) -> None:
    """What takes most of it beside the backward pass of attention: a cache of 256 features, and rows that are staged."""
    q, k, v = (torch.randn(1, size, 1, 256, **BFLOAT16) for size in (1, 40, 40))
    lengths, x = torch.tensor([33], dtype=torch.int32), torch.randn(5, 40000)
    results = []
    for shared_memory in (MOST_SHARED_MEMORY, LEAST_SHARED_MEMORY):
        configure(shared_memory=shared_memory)
        results.append((decode_attention(q, k, v, lengths, backend="cuda"), rms_norm(x, backend="cuda")))
    assert all(map(torch.equal, *results))


def test_a_launch_that_asks_for_more_fails(device: torch.device) -> None:
    inputs = draw(CASES["dq"], 0, device)
    configure(shared_memory=40 * 1024)
    with pytest.raises(RuntimeError, match=r"attention_backward_dq_kernel: 42016 bytes .* a block may have 40960"):
        gradients_of(CASES["dq"], inputs)
    with pytest.raises(ValueError, match="shared_memory must be from 0 to 232448, got 300000"):
        configure(shared_memory=300000)


# Of the narrowest instance dq has one stage with 99 KB, dk and dv with 64. All faults are compiled in, and chosen by the environment.
FAULTS = ("dq, loaded over", "dkv, loaded over", "dkv, not landed")
SCRIPT = f"""
import os, torch
from tests.cuda.attention_ops import check_case
from tests.kernels.attention_contract import Case
case = Case((40, 110), heads=(1, 1), dims=(16, 16), dtype=torch.bfloat16, options={{"causal": True}})
for fault in ("", *{FAULTS!r}):
    os.environ["FAULT"] = fault
    try:
        shared_memory = (99 if fault.startswith("dq") else 64) * 1024
        check_case(case, torch.device("cpu"), every_schedule=True, shared_memory=shared_memory)
    except (AssertionError, RuntimeError) as error:
        print(f"{{fault}}: {{type(error).__name__}} {{error}}")
print("done")
"""


def _unless(fault: str, statement: str) -> str:
    return f'if (std::string(std::getenv("FAULT")) != "{fault}") {statement}'


def test_faults_of_the_only_stage_are_found(tmp_path: Path) -> None:
    if FLAVOR == "thread":
        pytest.skip("ThreadSanitizer ends the process at the first one")
    over, landed = "__syncthreads();  // no thread reads the only stage any more", "ptx::cp_async_wait<0>();\n"
    result = run_broken(
        tmp_path,
        "attention/backward_dq.cuh",
        [(over, _unless(FAULTS[0], over))],
        SCRIPT,
        flavor=FLAVOR,
        recompile=["attention/backward_bfloat16_64.cu"],
        others={
            "attention/backward_dkv.cuh": [
                (over, _unless(FAULTS[1], over)),
                (landed, _unless(FAULTS[2], landed)),
            ],
            # Calls without score terms are all there are, and half of what is to be compiled.
            "attention/backward_instances.cu": [
                ("(has_terms ? launch_dq<T, WIDTH, true> : launch_dq<T, WIDTH, false>)", "launch_dq<T, WIDTH, false>"),
                (
                    "(has_terms ? launch_dkv<T, WIDTH, true> : launch_dkv<T, WIDTH, false>)",
                    "launch_dkv<T, WIDTH, false>",
                ),
                ("  const bool has_terms = backward.call.has_score_terms();\n", ""),
            ],
        },
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and lines[-1] == "done", result.stdout + result.stderr[-3000:]
    assert [fault for fault in ("", *FAULTS) if any(line.startswith(f"{fault}: ") for line in lines)] == list(FAULTS)
