"""Hopper's forward kernel in the Gluon interpreter: the contract over shapes and options, the same bits in every schedule, poison."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from pytransformer.gluon_interpreter import LATE, SCHEDULES, Schedule
from pytransformer.kernels.hopper.launch import HopperConfig, HopperForward
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.verification import SEEDS
from tests.conftest import INTERPRETING
from tests.kernels.attention_contract import Case, covering, draw
from tests.kernels.hopper_contract import call_of, check, expected, forward

pytestmark = [
    pytest.mark.usefixtures("poison_empty"),
    pytest.mark.skipif(not INTERPRETING, reason="the Gluon interpreter runs only where Triton's does"),
]

# A consumer has 64 queries, a block 128, a tile 128 keys, or 64 of more than 128 features: one row, those numbers, one more and one less,
# more queries than keys, three tiles and so more than stages; packed sequences that are shorter than a tile, longer, and empty on one side.
LENGTHS: list[Any] = [
    (1, 1), (1, 65), (63, 64), (64, 63), (65, 129), (127, 128), (128, 127), (129, 65), (70, 1), (64, 257), (130, 300), (200, 64),
    ((5, 0), (64, 64), (0, 3), (1, 140)), ((129, 65), (1, 1)), ((0, 0), (70, 130)), ((63, 64), (65, 66), (2, 2)), ((30, 300),),
]  # fmt: skip
WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "left": {"window": (5, -1)},
    "right": {"window": (-1, 10)},
    "narrow": {"window": (0, 3)},
    "causal, left": {"causal": True, "window": (20, 7)},
    "far left": {"window": (100, -1)},
    "wide": {"window": (70, 30)},
    "beyond": {"window": (1000, 1000)},
}


def sinks(case: Case, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(case.heads[0], generator=generator)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": sinks},
    "softcap, sinks": {"softcap": 30.0, "sinks": sinks},
}
GRID: dict[str, list[Any]] = {
    "lengths": LENGTHS,
    "window": list(WINDOWS),
    "dims": [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)],
    "schedule": list(SCHEDULES),
    "options": list(OPTIONS),
    "heads": [(1, 1), (2, 1), (2, 2)],
    "dtype": [torch.bfloat16, torch.float16],
    # A block for all places, two or three places for some of three, one for each.
    "blocks": [1, 3, 132],
}


def grid_cases() -> list[Any]:
    cases = []
    for choice in covering(GRID):
        window, options, schedule, blocks = (choice.pop(name) for name in ("window", "options", "schedule", "blocks"))
        lengths, dims, heads = choice["lengths"], choice["dims"], choice["heads"]
        shape = "packed" + str(len(lengths)) if isinstance(lengths[0], tuple) else f"{lengths[0]}x{lengths[1]}"
        name = f"{shape}-d{dims[0]}-dv{dims[1]}-heads{heads[0]}/{heads[1]}-{window}-{options}-{blocks}"
        options = {**WINDOWS[window], **OPTIONS[options]}
        cases.append(pytest.param(Case(**choice, options=options, differentiable=()), schedule, blocks, id=name))
    return cases


@pytest.mark.parametrize("least", [1, pytest.param(SEEDS, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "schedule", "blocks"), grid_cases())
def test_contract(case: Case, schedule: Schedule, blocks: int, least: int) -> None:
    check(case, functools.partial(forward, schedule=schedule, blocks=blocks), least)


PACKED = ((70, 130), (0, 9), (130, 200))
SEVERAL = {
    "d64": Case((130, 300), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"causal": True}),
    "d128-packed": Case(PACKED, dims=(128, 128), heads=(1, 1), dtype=torch.float16, options={"causal": True}),
    "d256-window": Case((100, 300), dims=(256, 256), heads=(1, 1), dtype=torch.bfloat16, options={"window": (150, 40)}),
    "d192-dv128": Case((70, 300), dims=(192, 128), heads=(1, 1), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", SEVERAL.values(), ids=SEVERAL)
def test_every_schedule_gives_the_same_bits(case: Case) -> None:
    call = call_of(draw(case, 0, torch.device("cpu")))
    out, lse = forward(call, SCHEDULES[0])
    for schedule in SCHEDULES[1:]:
        again, lse_again = forward(call, schedule, blocks=1)
        assert torch.equal(out, again), schedule
        assert torch.equal(lse, lse_again), schedule


def test_three_stages_keep_the_contract() -> None:
    case = Case((70, 600), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16)
    check(case, functools.partial(forward, schedule=LATE, config=HopperConfig(64, 3, 2)))


def test_large_logits_keep_the_contract() -> None:
    check(Case((65, 200), dims=(128, 128), dtype=torch.bfloat16, scale_of_q=30.0, options={"causal": True}))


def test_a_sink_of_minus_infinity_is_none_and_a_row_without_keys_has_its_sink_alone() -> None:
    case = Case((130, 65), dims=(64, 64), heads=(2, 2), dtype=torch.bfloat16, options={"causal": True})
    inputs = draw(case, 0, torch.device("cpu"))
    _, without = forward(call_of(inputs))
    out, lse = forward(call_of(inputs)._replace(sinks=torch.tensor([-torch.inf, 2.0])))
    assert torch.equal(lse[:, 0], without[:, 0])
    assert (lse[:, 1, :65] == 2.0).all() and not out[:, :65].any()


# --- What must not be read, and not be written. -----------------------------------------------------------------------------------------


def within_nan(tensor: torch.Tensor, before: int = 8, after: int = 8) -> torch.Tensor:
    """The same values in a larger tensor of NaN: more heads, rows and features around them."""
    *batch, rows, heads, dim = tensor.shape
    around = tensor.new_full((*batch, before + rows + after, heads + 2, dim + 16), float("nan"))
    inside = around[..., before : before + rows, 1 : heads + 1, 8 : dim + 8]
    return inside.copy_(tensor)


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (192, 128)], ids=str)
def test_nothing_around_the_tensors_is_read(dims: tuple[int, int]) -> None:
    """Rows past the end of a sequence, features behind the last, other heads: there NaN would spread, even with weights of 0."""
    case = Case((70, 130), dims=dims, heads=(2, 1), batch=2, dtype=torch.bfloat16)
    call = call_of(draw(case, 0, torch.device("cpu")))
    surrounded = call._replace(q=within_nan(call.q), k=within_nan(call.k), v=within_nan(call.v))
    for one, other in zip(forward(call), forward(surrounded, LATE)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", ["none", "causal", "far left"])
def test_a_packed_sequence_reads_nothing_of_its_neighbours(window: str) -> None:
    lengths = ((70, 65), (70, 66), (3, 5), (70, 100))
    case = Case(lengths, dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options=WINDOWS[window], differentiable=())
    inputs = draw(case, 0, torch.device("cpu"))
    expect = expected(inputs)["out"].isnan()
    out, lse = forward(call_of(inputs))
    assert not expect.any()
    for name, slices in (("q", (70, 140)), ("k", (65, 131)), ("v", (65, 131))):
        inputs.tensors[name][slice(*slices)] = float("nan")
    spoilt, lse_spoilt = forward(call_of(inputs))
    kept = torch.ones(213, dtype=torch.bool)
    kept[70:140] = False
    assert torch.equal(out[kept], spoilt[kept]) and torch.equal(lse[:, kept], lse_spoilt[:, kept])
    assert spoilt[~kept].isnan().all()


def test_a_sequence_of_nan_stays_alone_in_its_batch() -> None:
    case = Case((70, 65), dims=(64, 64), heads=(1, 1), batch=3, dtype=torch.bfloat16)
    call = call_of(draw(case, 0, torch.device("cpu")))
    out, _ = forward(call)
    for tensor in (call.q, call.k, call.v):
        tensor[1] = float("nan")
    spoilt, _ = forward(call)
    assert torch.equal(out[[0, 2]], spoilt[[0, 2]])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_nothing_behind_the_output_is_written(packed: bool) -> None:
    """The interpreter knows where tensors end; here more memory belongs to them."""
    case = Case(((70, 65), (9, 9)) if packed else (70, 65), dims=(96, 96), heads=(2, 1), dtype=torch.bfloat16)
    call = call_of(draw(case, 0, torch.device("cpu")))
    launch = HopperForward(call)
    behind = torch.full((100000,), -7.0, dtype=torch.bfloat16)
    shape = call.q.shape
    launch._new_out = lambda like: behind[: shape.numel()].view(shape)  # type: ignore[method-assign]
    out, _ = launch(call)
    assert torch.equal(out, forward(call)[0])
    assert (behind[shape.numel() :] == -7.0).all()


def test_inputs_need_not_be_contiguous() -> None:
    case = Case((70, 130), dims=(64, 64), heads=(2, 2), batch=2, dtype=torch.bfloat16, options={"causal": True})
    call = call_of(draw(case, 0, torch.device("cpu")))
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in call[:3]]
    for one, other in zip(forward(call), forward(AttentionCall(*heads_first, *call[3:]))):
        assert torch.equal(one, other)
