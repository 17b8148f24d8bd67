"""Launches are found for calls that are alike, and for no others."""

from __future__ import annotations

import pytest
import torch

from pytransformer.ops import launches
from pytransformer.ops.launches import Launches


@pytest.fixture(params=[True, False], ids=["torch_guards", "python"])
def kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launches[str]:
    """Launches that tell tensors apart with torch's guards, or where there are none."""
    if not request.param:
        monkeypatch.setattr(launches, "_torch_guards_work", lambda: False)
    return Launches()


def test_this_torch_has_guards_that_work() -> None:
    assert launches._torch_guards_work()


def test_only_a_call_alike_finds_the_launch(kept: Launches[str]) -> None:
    x, weight = torch.zeros(2, 4), torch.zeros(4)
    kept.add((x, weight, None, 1.0, True), "plan")
    assert kept.find((torch.ones(2, 4), torch.ones(4), None, 1.0, True)) == "plan"
    unlike = [
        (torch.zeros(2, 5), weight, None, 1.0, True),
        (torch.zeros(4, 2).t(), weight, None, 1.0, True),
        (torch.zeros(4, 4)[::2], weight, None, 1.0, True),
        (x.half(), weight, None, 1.0, True),
        (x.to("meta"), weight, None, 1.0, True),
        (torch.nn.Parameter(x), weight, None, 1.0, True),
        (x, torch.zeros(8)[::2], None, 1.0, True),
        (x, None, None, 1.0, True),
        (x, weight, weight.clone(), 1.0, True),
        (x, weight, None, 1, True),
        (x, weight, None, True, True),
        (x, weight, None, 2.0, True),
        (x, weight, None, 1.0, False),
        (x, weight, None, 1.0, 1),
    ]
    for arguments in unlike:
        assert kept.find(arguments) is None, arguments


def test_one_tensor_in_two_places(kept: Launches[str]) -> None:
    x = torch.zeros(2, 4)
    kept.add((x, x), "twice")
    assert kept.find((x, x)) == "twice"
    assert kept.find((x, torch.zeros(2, 4))) == "twice"
    assert kept.find((x, torch.zeros(4, 2))) is None


def test_shapes_of_one_kind_are_told_apart(kept: Launches[str]) -> None:
    x = torch.zeros(2, 4)
    for width in range(1, 5):
        kept.add((x, torch.zeros(width)), f"plan {width}")
    for width in range(1, 5):
        assert kept.find((x, torch.zeros(width))) == f"plan {width}"


def test_old_plans_go(kept: Launches[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_MOST_SHAPES", 3)
    monkeypatch.setattr(launches, "_MOST_ALIKE", 2)
    x = torch.zeros(2, 4)
    for number in range(3):
        kept.add((x, number), f"plan {number}")
    assert [kept.find((x, number)) for number in range(3)] == [None, "plan 1", "plan 2"]
    for length in range(3):
        kept.add((torch.zeros(length),), "new")
    assert kept.find((x, 2)) is None
    assert kept.find((torch.zeros(2),)) == "new"
