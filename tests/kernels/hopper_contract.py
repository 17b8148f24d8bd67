"""Runs Hopper's forward kernel in the Gluon interpreter, and collects its errors beside the reference's in the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.gluon_interpreter import EARLY, Schedule
from pytransformer.kernels.hopper.launch import HopperConfig, HopperForward, hopper_config, interpreted_in
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.verification import SEEDS, Contract
from tests.kernels.attention_contract import Case, Inputs, draw
from tests.support.draws import pool

Launch = Callable[[AttentionCall], tuple[Tensor, Tensor]]


def call_of(inputs: Inputs) -> AttentionCall:
    """The call of drawn inputs."""
    return AttentionCall(**inputs.tensors, **inputs.options)


def forward(
    call: AttentionCall, schedule: Schedule = EARLY, config: HopperConfig | None = None, blocks: int | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernel in a schedule; by that many blocks at most, if given."""
    if blocks is not None:
        usual = hopper_config(call.q.shape[-1], call.v.shape[-1], call.q.device)
        config = replace(config or usual, blocks=blocks)
    with interpreted_in(schedule):
        return HopperForward(call, config=config)(call)


def expected(inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """out and lse of the naive implementation in ``dtype``, or in that of the inputs."""
    given = {
        name: value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in {**inputs.tensors, **inputs.options}.items()
    }
    with torch.no_grad():
        out, lse = reference.attention(**given, return_lse=True)
    return {"out": out, "lse": lse}


def check(case: Case, launch: Launch = forward, least: int = SEEDS, most: int = SEEDS) -> None:
    """Whether the launch keeps the contract.

    Args:
        case: what is called.
        launch: the kernel.
        least: draws that are pooled in any case; fewer than the contract's are for tests that go over many cases.
        most: draws that are pooled in doubt.

    Raises:
        ContractError: it does not.
    """
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        inputs = draw(case, seed, torch.device("cpu"))
        actual: dict[str, Any] = dict(zip(("out", "lse"), launch(call_of(inputs))))
        contract.add_all(actual, expected(inputs), expected(inputs, torch.float64))

    pool(contract, add, least, most).check()
