"""Which gradients go to Hopper's backward kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pytransformer
from pytransformer.kernels.hopper import names
from pytransformer.kernels.hopper.names import HAS_REDUCTIONS
from pytransformer.kernels.hopper.serves import refusal, refusal_backward
from pytransformer.ops.attention.by_triton import hopper
from pytransformer.ops.attention.call import AttentionCall
from tests.conftest import INTERPRETING

needs_reductions = pytest.mark.skipif(not HAS_REDUCTIONS, reason="this Triton's TMA does not reduce")


def call(dim: int = 64, value_dim: int | None = None, **options: Any) -> AttentionCall:
    q, k, v = (torch.zeros(2, 70, 2, size, dtype=torch.bfloat16) for size in (dim, dim, value_dim or dim))
    return AttentionCall(**{"q": q, "k": k, "v": v, "softmax_scale": 0.125, **options})


@needs_reductions
@pytest.mark.parametrize(
    "options", [{}, {"dim": 128}, {"causal": True}, {"window": (3, 5)}, {"softcap": 30.0}], ids=str
)
def test_it_is_served(options: dict[str, Any]) -> None:
    assert refusal_backward(call(**options), 90) is None


# What the forward kernel serves and this one does not, in the order of the list.
REFUSED = {
    "determinism": ({"deterministic": True}, "the call asks for determinism"),
    "head_dim": ({"dim": 96}, "head_dim 96 with 96 of v is none of ((64, 64), (128, 128))"),
    "values' head_dim": ({"dim": 192, "value_dim": 128}, "head_dim 192 with 128 of v"),
}


@needs_reductions
@pytest.mark.parametrize("name", REFUSED)
def test_it_falls_to_the_portable_kernels(name: str) -> None:
    options, reason = REFUSED[name]
    assert refusal(call(**options), 90) is None
    assert reason in (refusal_backward(call(**options), 90) or "")


@needs_reductions
def test_more_rows_than_a_coordinate_counts_fall_to_the_portable_kernels() -> None:
    large = torch.empty(1, 2**26, 33, 64, dtype=torch.bfloat16, device="meta")
    assert "rows of dq, of all heads, are more than" in (refusal_backward(call(q=large, k=large, v=large), 90) or "")


def test_a_triton_without_reductions_has_the_portable_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "HAS_REDUCTIONS", False)
    assert "adds nothing up" in (refusal_backward(call(), 90) or "")


def test_what_the_forward_kernel_does_not_serve_this_one_does_not() -> None:
    assert refusal_backward(call(), 100) == refusal(call(), 100) is not None
    assert refusal_backward(call(dropout_p=0.5), 90) == "dropout"


@needs_reductions
@pytest.mark.skipif(not INTERPRETING, reason="Hopper's kernels run in the interpreter, or on a GPU of theirs")
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_go_to_it_unless_they_must_be_the_same_each_run(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pytransformer.kernels.hopper.backward_launch import HopperBackward

    launched: list[object] = []
    original = HopperBackward.__call__

    def counted(self: HopperBackward, *arguments: Any) -> Any:
        launched.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(HopperBackward, "__call__", counted)
    tensors = [torch.randn(1, 65, heads, 64).to(torch.bfloat16).requires_grad_() for heads in (2, 1, 1)]
    gradients = []
    for on in (False, True):
        with hopper(on):
            out = pytransformer.attention(*tensors, causal=True, deterministic=deterministic, backend="triton")
            gradients.append(torch.autograd.grad(out.float().square().sum(), tensors))
    assert len(launched) == (0 if deterministic else 1)
    for portable, ours in zip(*gradients):
        torch.testing.assert_close(portable, ours)
