"""Any options at any lengths: what hypothesis draws must be within the contract. A failing example becomes an ``@example``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytransformer.verification import SEEDS, Contract
from tests.combinations import attention_rows as options
from tests.combinations.pairwise import Row
from tests.kernels.attention_contract import Case, run_reference
from tests.support.draws import pool

pytestmark = pytest.mark.usefixtures("without_overflow_checks", "small_tiles")


@st.composite
def calls(draw: st.DrawFn) -> tuple[Row, Case]:
    """A level of each factor, and lengths up to a tile and a bit."""
    row = {factor: draw(st.sampled_from(levels)) for factor, levels in options.FACTORS.items()}
    # The lengths are drawn instead; float32's limits hold for few numbers too; wide heads are the covering array's.
    row |= {"lengths": "Lq = Lk", "dtype": "float32", "head_dim": draw(st.sampled_from(["8", "40"]))}
    pair = st.tuples(st.integers(1, 34), st.integers(1, 34))
    lengths = draw(st.tuples(pair, pair)) if row["layout"] == "packed" else draw(pair)
    return row, replace(options.case_of(row), lengths=lengths)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls())
def test_any_options_at_any_lengths(call: tuple[Row, Case], device: torch.device) -> None:
    row, case = call
    contract = Contract(torch.float32)

    def add(seed: int) -> None:
        inputs = options.inputs_of(row, seed, device, case)
        exact, plain = run_reference(inputs, torch.float64), run_reference(inputs)
        outputs, gradients = options.run_op(row, inputs, "triton")
        contract.add_all(outputs, plain[0], exact[0])
        contract.add_all(gradients, plain[1], exact[1], kind="gradient")

    pool(contract, add, 1, SEEDS // 2).check()
