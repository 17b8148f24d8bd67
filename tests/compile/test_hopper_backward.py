"""Hopper's backward kernel in machine code: within its limits, its figures, and products that run beside the exponentials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton

from pytransformer.kernels.hopper.backward_launch import HopperBackward
from pytransformer.kernels.hopper.names import HAS_REDUCTIONS
from pytransformer.kernels.hopper.serves import triton_missing
from pytransformer.ops.attention.call import AttentionCall
from tests.compile.cases.attention import NUM_HEADS, NUM_KV_HEADS, SEQLEN
from tests.support import budget
from tests.support.compile_gate import Case, Report, run_cases
from tests.support.hot_loop import Instruction
from tests.support.launch_recorder import Launch, record
from tests.support.sass import Statistics

pytestmark = [
    pytest.mark.skipif(triton_missing() is not None, reason=str(triton_missing())),
    pytest.mark.skipif(not HAS_REDUCTIONS, reason="this Triton's TMA does not reduce"),
    pytest.mark.compiles,
]

NAME = "attention_backward_kernel"


def launch(dim: int, packed: bool = False, num_kv_heads: int = NUM_KV_HEADS, **options: Any) -> None:
    shape = (SEQLEN,) if packed else (1, SEQLEN)
    if packed:
        options["cu_seqlens_q"] = options["cu_seqlens_k"] = torch.tensor([0, 100, SEQLEN], dtype=torch.int32)
    q, k, v, dout, out = (
        torch.empty(*shape, heads, dim, dtype=torch.bfloat16)
        for heads in (NUM_HEADS, num_kv_heads, num_kv_heads, NUM_HEADS, NUM_HEADS)
    )
    lse = torch.empty(*shape[:-1], NUM_HEADS, SEQLEN)
    call = AttentionCall(q, k, v, softmax_scale=0.1, **{"causal": True, **options})
    gradients = (call, dout, out, lse, torch.empty_like(lse))
    HopperBackward(*gradients)(*gradients)


CALLS: dict[str, dict[str, Any]] = {
    "d64-causal": {"dim": 64},
    "d128-causal": {"dim": 128},
    "d128-causal-heads": {"dim": 128, "num_kv_heads": NUM_HEADS},
    "d128-full-packed": {"dim": 128, "packed": True, "causal": False},
    "d64-window-softcap": {"dim": 64, "window": (300, 0), "softcap": 30.0},
}
# Instructions of a whole tile, 64 queries by 128 keys, which two warpgroups share.
MOST = {"d64-causal": 350, "d128-causal": 440, "d128-causal-heads": 440, "d128-full-packed": 440}


CASES = {
    name: Case(f"hopper_backward-bfloat16-{name}", lambda given=given: launch(**given), 90, frozenset({NAME}))
    for name, given in CALLS.items()
}


def decided_by() -> list[str]:
    return [one.key for case in CASES.values() for one in record(case.call, case.arch)]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return dict(zip(CASES, run_cases(list(CASES.values())).values()))


def statistics(report: Report) -> Statistics:
    (found,) = [outcome.statistics for outcome in report.outcomes if outcome.launch.name == NAME]
    return found


def test_it_compiles_within_its_limits(reports) -> None:
    assert not {name: report.complaints for name, report in reports.items() if report.complaints}
    for report in reports.values():
        found = statistics(report)
        assert found.spill_bytes == 0 and not found.warnings
        assert not any(loop.classes.get("local") for loop in found.loops)


def test_no_loop_holds_the_block_up(reports) -> None:
    """The producer's warp waits for barriers in memory alone."""
    for report in reports.values():
        loops = statistics(report).loops
        assert len(loops) == 2 and not any(loop.cta_barriers for loop in loops)


@pytest.mark.skipif(triton.__version__ < "3.9", reason="the figures of the newest compiler that is supported")
@pytest.mark.parametrize("name", MOST)
def test_a_whole_tile_takes_few_instructions(name: str, reports) -> None:
    """A loop has masks, and one has none."""
    assert min(loop.instructions for loop in statistics(reports[name]).loops) <= MOST[name]


def _order(loop: list[Instruction]) -> str:
    """Exponentials, products and waits for products of a loop, a letter or number each."""
    kinds = {"MUFU.EX2": "e", "HGMMA": "m", "WARPGROUP.DEPBAR": "w"}
    letters = []
    for found in loop:
        kind = next((letter for name, letter in kinds.items() if found.name.startswith(name)), "")
        letters.append(found.operands.strip()[-1] if kind == "w" else kind)
    return "".join(letters)


@pytest.mark.parametrize("dim", [64, 128])
def test_products_lie_beside_the_exponentials(dim: int) -> None:
    """dp is waited for when dv is under way, which needs all weights: else ptxas would put that wait in front of them."""
    found: list[Launch] = [one for one in record(lambda: launch(dim), 90) if one.name == NAME]
    orders = [_order(loop) for loop in budget.loops_of(found[0])]
    assert len(orders) == 2
    for order in orders:
        # Two products are issued, the first is waited for, then come all exponentials and dv; dk is under way when dq's part is there.
        assert order.lstrip("m").startswith("1" + "e" * 32 + "mmmm1"), order
        assert order.endswith("mmmm10"), order


def test_figures_are_those_committed(reports, record_figures) -> None:
    record_figures("hopper_backward", {str(report.case): statistics(report) for report in reports.values()})
