"""Hopper's backward kernels in the Gluon interpreter: the contract over shapes and options, every schedule, poison."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from pytransformer.gluon_interpreter import LATE, SCHEDULES, Schedule
from pytransformer.kernels.hopper.names import HAS_REDUCTIONS
from pytransformer.verification import SEEDS
from tests.conftest import INTERPRETING
from tests.kernels.attention_contract import Case, covering, draw
from tests.kernels.hopper_backward_contract import CPU, Gradients, check, given, gradients

pytestmark = [
    pytest.mark.usefixtures("poison_empty", "without_overflow_checks"),
    pytest.mark.skipif(not INTERPRETING, reason="the Gluon interpreter runs only where Triton's does"),
    pytest.mark.skipif(not HAS_REDUCTIONS, reason="this Triton's TMA does not reduce"),
]

# A program has 128 keys, a tile 64 queries: one row, those numbers, one more and one less, more queries than keys, three tiles and so more
# than stages; packed sequences that are shorter than a tile, longer, and empty on one side or on both.
LENGTHS: list[Any] = [
    (1, 1), (1, 129), (63, 64), (64, 128), (65, 129), (129, 65), (127, 1), (70, 260), (200, 64), (193, 127),
    ((5, 0), (64, 64), (0, 3), (1, 140)), ((65, 129), (1, 1)), ((0, 0), (130, 70)), ((63, 128), (65, 66), (2, 2)),
]  # fmt: skip
WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "left": {"window": (5, -1)},
    "right": {"window": (-1, 10)},
    "narrow": {"window": (0, 3)},
    "causal, left": {"causal": True, "window": (20, 7)},
    "wide": {"window": (70, 30)},
    "beyond": {"window": (1000, 1000)},
}


GRID: dict[str, list[Any]] = {
    "lengths": LENGTHS,
    "window": list(WINDOWS),
    "schedule": list(SCHEDULES),
    "heads": [(1, 1), (2, 1), (2, 2), (3, 1)],
    "dims": [(64, 64), (128, 128)],
    "dtype": [torch.bfloat16, torch.float16],
}


def grid_cases() -> list[Any]:
    cases = []
    for choice in covering(GRID):
        window, schedule, lengths = choice.pop("window"), choice.pop("schedule"), choice["lengths"]
        shape = "packed" + str(len(lengths)) if isinstance(lengths[0], tuple) else f"{lengths[0]}x{lengths[1]}"
        name = f"{shape}-d{choice['dims'][0]}-heads{choice['heads'][0]}/{choice['heads'][1]}-{window}"
        cases.append(pytest.param(Case(**choice, options=WINDOWS[window]), schedule, id=name))
    return cases


@pytest.mark.parametrize("least", [1, pytest.param(SEEDS, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "schedule"), grid_cases())
def test_contract(case: Case, schedule: Schedule, least: int) -> None:
    check(case, functools.partial(gradients, schedule=schedule), least)


def sinks(case: Case, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(case.heads[0], generator=generator)


PACKED = ((70, 130), (0, 9), (65, 20))
OPTIONS = {
    "softcap": Case((65, 130), dims=(64, 64), options={"softcap": 2.0}),
    "softcap-causal-packed": Case(PACKED, dims=(128, 128), heads=(1, 1), options={"softcap": 30.0, "causal": True}),
    "sinks": Case((65, 70), dims=(64, 64), heads=(3, 1), options={"sinks": sinks}),
    "sinks-packed": Case(PACKED, dims=(64, 64), options={"sinks": sinks, "window": (40, 0)}),
    "sinks-softcap": Case(
        (130, 65), dims=(128, 128), batch=2, options={"sinks": sinks, "softcap": 2.0, "causal": True}
    ),
    "no-gradient-of-lse": Case((65, 130), dims=(64, 64), lse_gradient=False),
    "negative-scale": Case((64, 128), dims=(64, 64), scale_of_q=-1.0, options={"softmax_scale": -0.3}),
    "large-logits": Case((65, 130), dims=(128, 128), heads=(1, 1), scale_of_q=20.0, options={"causal": True}),
    "batch": Case((65, 70), dims=(64, 64), heads=(2, 2), batch=3, options={"causal": True}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_contract_over_options(name: str) -> None:
    # The gradient of a sink is one number for each head, so that few draws say little of its mean: 1.2 times what is allowed by 8 of
    # them, 0.5 times by 64.
    most = 4 * SEEDS if "sinks" in name else SEEDS
    check(replace(OPTIONS[name], dtype=torch.bfloat16), functools.partial(gradients, schedule=LATE), most=most)


# With at most 256 keys an element of dq is a sum of two parts, whose order does not matter.
SEVERAL = {
    "d64-causal": Case((130, 256), dims=(64, 64), heads=(2, 1), dtype=torch.bfloat16, options={"causal": True}),
    "d128": Case((130, 200), dims=(128, 128), heads=(1, 1), dtype=torch.float16),
    "packed": Case(
        ((70, 130), (0, 9), (65, 200)), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"window": (90, 3)}
    ),
}


@pytest.mark.parametrize("case", SEVERAL.values(), ids=SEVERAL)
def test_every_schedule_gives_the_same_bits(case: Case) -> None:
    arguments = given(case, draw(case, 0, CPU))
    first = gradients(arguments, SCHEDULES[0])
    for schedule in SCHEDULES[1:]:
        assert_same_bits(first, gradients(arguments, schedule))


def assert_same_bits(first: Gradients, second: Gradients) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- What must not be read, and not be written. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128])
def test_nothing_around_the_tensors_is_read(dim: int) -> None:
    """Rows past the end of a sequence and other heads: there NaN would spread, even with weights of 0."""
    case = Case((70, 130), dims=(dim, dim), heads=(2, 1), batch=2, dtype=torch.bfloat16)
    call, dout, out, *rest = given(case, draw(case, 0, CPU))
    around = call._replace(q=within_nan(call.q), k=within_nan(call.k), v=within_nan(call.v))
    assert_same_bits(
        gradients((call, dout, out, *rest)), gradients((around, within_nan(dout), within_nan(out), *rest), LATE)
    )


@pytest.mark.parametrize("window", ["none", "causal", "wide"])
def test_a_packed_sequence_reads_nothing_of_its_neighbours(window: str) -> None:
    lengths = ((70, 65), (70, 66), (3, 5), (70, 140))
    case = Case(lengths, dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options=WINDOWS[window])
    call, dout, out, lse, dlse = given(case, draw(case, 0, CPU))
    first = gradients((call, dout, out, lse, dlse))
    of_queries, of_keys = slice(70, 140), slice(65, 131)
    for tensor, rows in (
        (call.q, of_queries),
        (dout, of_queries),
        (out, of_queries),
        (call.k, of_keys),
        (call.v, of_keys),
    ):
        tensor[rows] = float("nan")
    spoilt = gradients((call, dout, out, lse, dlse))
    for name, rows in (("dq", of_queries), ("dk", of_keys), ("dv", of_keys)):
        kept = torch.ones(len(first[name]), dtype=torch.bool)
        kept[rows] = False
        assert first[name].isfinite().all()
        assert torch.equal(first[name][kept], spoilt[name][kept]), name


def test_tokens_behind_the_last_sequence_have_gradients_of_zero() -> None:
    case = Case(((65, 70), (3, 60)), dims=(64, 64), heads=(2, 1), dtype=torch.bfloat16)
    call, dout, out, lse, dlse = given(case, draw(case, 0, CPU))
    first = gradients((call, dout, out, lse, dlse))

    def longer(tensor: torch.Tensor, value: float = float("nan")) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((20, *tensor.shape[1:]), value)])

    padded = call._replace(q=longer(call.q), k=longer(call.k), v=longer(call.v))
    statistics = [torch.nn.functional.pad(x, (0, 20), value=value) for x, value in ((lse, -torch.inf), (dlse, 0.0))]
    got = gradients((padded, longer(dout, 0.0), longer(out, 0.0), *statistics))
    for name, tensor in first.items():
        assert torch.equal(got[name][:-20], tensor) and not got[name][-20:].any(), name


def within_nan(tensor: torch.Tensor, rows: int = 8) -> torch.Tensor:
    """The same values in a larger tensor of NaN: more heads, rows and features around them."""
    batch, length, heads, dim = tensor.shape
    around = tensor.new_full((batch, length + 2 * rows, heads + 2, dim + 16), float("nan"))
    return around[:, rows : rows + length, 1 : heads + 1, 8 : dim + 8].copy_(tensor)


def test_a_gradient_of_any_strides_is_taken() -> None:
    """``out.sum().backward()`` sends one number for all, heads may come first, and an address may be odd."""
    case = Case((65, 70), dims=(64, 64), heads=(2, 2), batch=2, dtype=torch.bfloat16)
    call, dout, *rest = given(case, draw(case, 0, CPU))
    first = gradients((call, dout, *rest))
    memory = torch.empty(dout.numel() + 1, dtype=dout.dtype)
    odd = memory[1:].view(dout.shape).copy_(dout)
    for other in (dout.transpose(1, 2).contiguous().transpose(1, 2), odd):
        assert_same_bits(first, gradients((call, other, *rest)))
    one = torch.ones((), dtype=dout.dtype).expand_as(dout)
    assert_same_bits(gradients((call, one.contiguous(), *rest)), gradients((call, one, *rest)))


def test_queries_without_keys_have_gradients_of_zero() -> None:
    """More queries than keys, causal: whole tiles of them and part of one see nothing, and NaN flows into their lse."""
    case = Case((200, 10), dims=(64, 64), heads=(1, 1), dtype=torch.bfloat16, options={"causal": True})
    dq = gradients(given(case, draw(case, 0, CPU)))["dq"]
    assert not dq[:, :190].any() and dq[:, 190:].any()
