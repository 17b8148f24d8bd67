"""Hopper's forward kernel in machine code: within its limits, its figures, and products that run beside the softmax."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from pytransformer.kernels.hopper.launch import HopperForward
from pytransformer.kernels.hopper.names import OLD
from pytransformer.kernels.hopper.serves import triton_missing
from pytransformer.ops.attention.call import AttentionCall
from tests.compile.cases.attention import NUM_HEADS, NUM_KV_HEADS, SEQLEN
from tests.support import budget, gate_figures
from tests.support.compile_gate import Case, Report, run_cases
from tests.support.hot_loop import Instruction
from tests.support.launch_recorder import record

pytestmark = [
    pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing())),
    pytest.mark.compiles,
]

NAME = "attention_forward_kernel"


def call(head_dim: int, value_dim: int, packed: bool = False, **options: Any) -> AttentionCall:
    shape = (SEQLEN,) if packed else (1, SEQLEN)
    if packed:
        options["cu_seqlens_q"] = options["cu_seqlens_k"] = torch.tensor([0, 100, SEQLEN], dtype=torch.int32)
    q, k, v = (
        torch.empty(*shape, heads, dim, dtype=torch.bfloat16)
        for heads, dim in ((NUM_HEADS, head_dim), (NUM_KV_HEADS, head_dim), (NUM_KV_HEADS, value_dim))
    )
    return AttentionCall(q, k, v, softmax_scale=0.1, **{"causal": True, **options})


CALLS = {
    "d64-causal": call(64, 64),
    "d128-causal": call(128, 128),
    "d256-full-packed-sinks": call(256, 256, packed=True, causal=False, sinks=torch.empty(NUM_HEADS)),
}
# Instructions of a whole tile, 64 queries by 128 keys.
MOST = {"d64-causal": 416, "d128-causal": 460}
# Bytes on the stack, outside of the loops.
MOST_SPILLED = 52 if OLD else 0


CASES = {
    name: Case(f"hopper-bfloat16-{name}", lambda given=given: HopperForward(given)(given), 90, frozenset({NAME}))
    for name, given in CALLS.items()
}


def portable_instructions() -> int | None:
    """Of the portable kernel's loop without masks; None if that is known of another compiler only."""
    committed = json.loads((gate_figures.FOLDER / "triton.json").read_text())
    if committed["compiler"] != gate_figures.compiler("triton"):
        return None
    return int(
        committed["kernels"][f"attention_forward-bfloat16-d128-causal-sm_90 {NAME} 0"]["loops"][0]["instructions"]
    )


def decided_by() -> list[str]:
    keys = [launch.key for case in CASES.values() for launch in record(case.call, case.arch)]
    return [*keys, str(portable_instructions()), Path(budget.__file__).read_text()]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return dict(zip(CASES, run_cases(list(CASES.values())).values()))


def test_it_compiles_within_its_limits(reports) -> None:
    for report in reports.values():
        assert report.outcomes[0].statistics.spill_bytes <= MOST_SPILLED
        assert [text for text in report.complaints if not text.startswith(f"{NAME}: spills")] == []


def test_no_loop_holds_the_block_up(reports) -> None:
    """Warpgroups meet in barriers of their own."""
    for report in reports.values():
        loops = report.outcomes[0].statistics.loops
        assert len(loops) >= 2 and not any(loop.cta_barriers for loop in loops)


@pytest.mark.parametrize("name", MOST)
def test_a_whole_tile_takes_few_instructions(name: str, reports) -> None:
    loops = reports[name].outcomes[0].statistics.loops
    # Of each of the two consumers: a loop with masks and one without.
    assert max(sorted(loop.instructions for loop in loops)[:2]) <= MOST[name]


def test_it_takes_a_sixth_fewer_instructions_than_the_portable_kernel(reports) -> None:
    """Both loops have 16 queries of a tile of 128 keys to each warp."""
    portable = portable_instructions()
    if portable is None:
        pytest.skip("the portable kernel's figures are of another compiler")
    ours = [loop.instructions for loop in reports["d128-causal"].outcomes[0].statistics.loops]
    assert max(sorted(ours)[:2]) <= (1 - 0.17) * portable


def _hot_loops(name: str) -> list[list[Instruction]]:
    (launch,) = record(CASES[name].call, CASES[name].arch)
    return budget.loops_of(launch)


def _softmax_beside_products(loop: list[Instruction]) -> list[float]:
    """The part of a loop's exponentials between the wait for the scores and that for the product with v, after each of its products."""
    text = "".join(
        "e" if found.name.startswith("MUFU.EX2") else operands[-1]
        for found in loop
        if found.name.startswith("MUFU.EX2")
        or (found.name.startswith("WARPGROUP.DEPBAR") and (operands := found.operands.strip()))
    )
    return [len(found.group(1)) / text.count("e") for found in re.finditer(r"1(e*)0", text)]


@pytest.mark.parametrize("name", ["d64-causal", "d128-causal"])
def test_the_softmax_lies_beside_the_product_with_v(name: str, reports) -> None:
    """ptxas likes to put the wait for that product in front of the exponentials."""
    hot = _hot_loops(name)
    assert len(hot) == 4
    for loop in hot:
        (part,) = _softmax_beside_products(loop)
        assert part > 0.9


@pytest.mark.parametrize(("dim", "cores"), [(64, 512), (128, 1024)])
def test_issue_is_not_what_a_whole_tile_waits_for(dim: int, cores: int) -> None:
    """The exponentials of 64 × 128 scores and of two statistics for each row, 66 a lane, take 528 clocks; products as many as they have
    operations. All others have some of that time left."""
    whole, *_ = sorted(_hot_loops(f"d{dim}-causal"), key=len)
    clocks = budget.clocks(whole)
    assert clocks.pop("tensor cores") == cores and clocks.pop("exponentials") == 528
    assert clocks["issue"] == len(whole)
    assert max(clocks.values()) < 0.85 * max(cores, 528)


def test_figures_are_those_committed(reports, record_figures) -> None:
    record_figures("hopper_forward", {str(report.case): report.outcomes[0].statistics for report in reports.values()})
