"""The hall: what is checked once and what each time, and that a launch that fails is not tried another way."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pytransformer import layer_norm, use_backend
from pytransformer.ops import checks
from pytransformer.ops.backend import Backend, Limit
from pytransformer.ops.op import Op, forget_launches
from pytransformer.ops.registered import RegisteredOp, like

_numbers = itertools.count()


class ScaleCall(NamedTuple):
    """x times a factor; ``limit``: no element may be above it."""

    x: Tensor
    limit: Tensor | None
    factor: float


class Scale:
    """An op of the tests, with counts of what it did. ``fails``: what its kept launch raises."""

    def __init__(self, *, written: bool = False, values: tuple[str, ...] = (), lengths: tuple[str, ...] = ()) -> None:
        self.checked = self.ran = self.launched = self.looked = 0
        self.fails: Exception | None = None
        backend = Backend("torch", self.run, (Limit("float64", self.exceeds),), plan=self.plan)
        registered = RegisteredOp(
            f"scale_in_tests_{next(_numbers)}",
            ScaleCall,
            (backend, Backend("reference", self.run)),
            lambda call, backend: (like(call.x),),
            1,
            written=("x",) if written else (),
        )
        self.op = Op(
            "scale",
            registered,
            self.check,
            (backend, Backend("reference", self.run)),
            values=values,
            lengths=lengths,
            check_lengths=self.look if lengths else None,
        )

    def exceeds(self, call: ScaleCall) -> str | None:
        return "float64" if call.x.dtype == torch.float64 else None

    def check(self, call: ScaleCall) -> ScaleCall:
        self.checked += 1
        checks.check_tensor("x", call.x)
        if call.limit is not None:
            self.look(call)
        return call._replace(factor=checks.check_float("factor", call.factor))

    def look(self, call: ScaleCall) -> None:
        self.looked += 1
        assert call.limit is not None
        if bool((call.x > call.limit).any()):
            raise ValueError("x must not be above limit")

    def run(self, call: ScaleCall) -> tuple[Tensor]:
        self.ran += 1
        return (call.x * call.factor,)

    def plan(self, call: ScaleCall):
        def launch(given):
            self.launched += 1
            if self.fails is not None:
                raise self.fails
            return given[0] * given[2]

        return launch

    def __call__(self, x, limit=None, factor=2.0, backend=None):
        return self.op((x, limit, factor), backend)


def test_a_call_like_one_before_goes_straight_to_its_launch() -> None:
    scale = Scale()
    for _ in range(3):
        assert torch.equal(scale(torch.ones(3)), torch.full((3,), 2.0))
    assert (scale.checked, scale.ran, scale.launched) == (1, 1, 2)
    scale(torch.ones(4))
    scale(torch.ones(3), factor=3.0)
    scale(torch.ones(3, dtype=torch.float64))
    scale(torch.ones(3), backend="torch")
    assert (scale.checked, scale.ran, scale.launched) == (5, 5, 2)
    with pytest.raises(TypeError, match="factor must be a number"):
        scale(torch.ones(3), factor="2")
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        scale([1.0])


def test_a_failed_launch_is_not_tried_another_way() -> None:
    scale = Scale()
    scale(torch.ones(3))
    scale.fails = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        scale(torch.ones(3))
    assert (scale.ran, scale.launched) == (1, 1)


def test_what_a_launch_leaves_to_others_goes_the_long_way() -> None:
    scale = Scale()
    scale(torch.ones(3))
    scale.fails = ValueError("an offset that this launch does not serve")
    assert torch.equal(scale(torch.ones(3)), torch.full((3,), 2.0))
    assert (scale.checked, scale.ran, scale.launched) == (2, 2, 1)


def test_values_that_the_checks_read_are_read_each_time() -> None:
    scale = Scale(values=("limit",))
    for _ in range(3):
        scale(torch.ones(3), torch.ones(3))
    assert (scale.checked, scale.launched) == (3, 0)
    scale = Scale(lengths=("limit",))
    for _ in range(3):
        scale(torch.ones(3), torch.ones(3))
    assert (scale.checked, scale.launched, scale.looked) == (1, 2, 3)
    with pytest.raises(ValueError, match="x must not be above limit"):
        scale(torch.ones(3), torch.zeros(3))


def test_what_a_kept_launch_writes_to_counts_as_changed() -> None:
    scale, x = Scale(written=True), torch.ones(3)
    versions = []
    for _ in range(3):
        scale(x)
        versions.append(x._version)
    assert scale.launched == 2 and versions[0] < versions[1] < versions[2]


def test_launches_are_forgotten_and_not_kept_while_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Scale()
    scale(torch.ones(3))
    forget_launches()
    scale(torch.ones(3))
    assert (scale.checked, scale.launched) == (2, 0)
    forget_launches()
    monkeypatch.setattr(checks, "DEBUG", True)
    for _ in range(2):
        scale(torch.ones(3))
    assert (scale.checked, scale.launched) == (4, 0)


def test_a_backend_that_is_named_has_launches_of_its_own() -> None:
    scale = Scale()
    for _ in range(2):
        scale(torch.ones(3))
    with use_backend("reference"):
        scale(torch.ones(3))
        scale(torch.ones(3))
    assert (scale.checked, scale.launched) == (3, 1)


def test_a_kept_norm_keeps_its_dtype_under_autocast() -> None:
    """Torch's own norms turn 16-bit results to float32 there."""
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = [layer_norm(x, backend="torch") for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16):
            actual = [layer_norm(x, backend="torch") for _ in range(2)]
    for found in (*expected, *actual):
        assert found.dtype == torch.bfloat16 and torch.equal(found, expected[0])
