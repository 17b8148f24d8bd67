"""Runs Hopper's backward kernels in the Gluon interpreter and collects their errors in the contract."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer.gluon_interpreter import EARLY, Schedule
from pytransformer.kernels.hopper.backward_launch import HopperBackward
from pytransformer.kernels.hopper.launch import interpreted_in
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.verification import SEEDS, Contract
from tests.kernels.attention_contract import Case, Inputs, draw, run_reference
from tests.support.draws import pool

CPU = torch.device("cpu")
Gradients = dict[str, Tensor]


def given(case: Case, inputs: Inputs, golden: dict[str, Tensor] | None = None) -> tuple[Any, ...]:
    """(call, dout, out, lse, dlse): of a forward pass whose results are the reference's (``golden``, if at hand), rounded."""
    golden = golden or run_reference(inputs, torch.float64)[0]
    out, lse = golden["out"].to(case.dtype), golden["lse"].float()
    # What flows into the lse of a row that sees nothing must not matter; a merge of two partial results sends NaN.
    dlse = torch.where(lse == -math.inf, math.nan, inputs.dlse) if case.lse_gradient else None
    return AttentionCall(**inputs.tensors, **inputs.options), inputs.dout, out, lse, dlse


def gradients(arguments: tuple[Any, ...], schedule: Schedule = EARLY) -> Gradients:
    """dq, dk, dv, dsinks of the kernels, run in a schedule."""
    with interpreted_in(schedule):
        results = HopperBackward(*arguments)(*arguments)
    return {name: x for name, x in zip(("dq", "dk", "dv", "dbias", "dsinks"), results) if x is not None}


def check(
    case: Case, launch: Callable[[tuple[Any, ...]], Gradients] = gradients, least: int = SEEDS, most: int = SEEDS
) -> None:
    """Whether the kernels keep the contract.

    Args:
        case: what is called.
        launch: the kernels.
        least: draws that are pooled in any case; fewer than the contract's are for tests that go over many cases.
        most: draws that are pooled in doubt.

    Raises:
        ContractError: they do not.
    """
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        inputs = draw(case, seed, CPU)
        outputs, golden = run_reference(inputs, torch.float64)
        actual = launch(given(case, inputs, outputs))
        _, plain = run_reference(inputs)
        contract.add_all(actual, plain, golden, kind="gradient")

    pool(contract, add, least, most).check()
