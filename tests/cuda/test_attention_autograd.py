"""Gradients of ``attention(…, backend="cuda")``: the backward op of the extension behind autograd, torch.compile and opcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.ops.attention import attention
from pytransformer.verification import measure
from tests.cuda.attention_ops import backward, op_options
from tests.kernels.attention_contract import Case, draw
from tests.ops.attention_cases import case, qkv

PACKED = ((5, 7), (0, 3), (17, 33))
CASES = {
    "causal": Case((40, 33), heads=(4, 2), batch=2, dtype=torch.bfloat16, options={"causal": True}),
    "options": Case(
        (20, 33), dims=(24, 40), dtype=torch.float16,
        options={"window": (9, 2), "softcap": 3.0, "alibi_slopes": torch.tensor([0.5, 0.1])},
    ),
    "packed": Case(PACKED, dtype=torch.bfloat16, options={"causal": True}),
}  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    result = attention(q, k, v, **options, return_lse=True, backend="cuda")
    assert isinstance(result, tuple)
    return result


@pytest.mark.parametrize("name", CASES)
def test_autograd_hands_everything_on(name: str, device: torch.device, poison_empty: None) -> None:
    """The same bits as the op itself, given what the forward pass returned; the gradient of lse takes part."""
    inputs = draw(CASES[name], 0, device)
    leaves = inputs.leaves()
    out, lse = attend(**leaves, **inputs.options)
    torch.autograd.backward([out, lse], [inputs.dout, inputs.dlse])
    expected = backward(
        inputs.dout, *inputs.tensors.values(), out.detach(), lse.detach(), inputs.dlse, **inputs.options
    )
    for leaf, gradient in zip(leaves.values(), expected, strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("dims", [(3, 12), (20, 16)], ids=str)
def test_a_head_dim_that_is_no_multiple_of_8(dims: tuple[int, int], device: torch.device, poison_empty: None) -> None:
    """The kernels get copies with zero features; outputs and gradients have the sizes that were given."""
    causal = case("padded", lambda: qkv(1, 9, 9, 4, 2, *dims), causal=True, return_lse=True)
    measure(causal, torch.bfloat16, "cuda", device).check()


def test_any_gradient_of_out(device: torch.device, poison_empty: None) -> None:
    """An expanded scalar, as ``out.sum()`` sends it, and rows that do not begin at a multiple of 16 bytes."""
    inputs = draw(CASES["causal"], 0, device)
    shape, options = inputs.dout.shape, inputs.options
    for dout in (
        torch.ones((), dtype=torch.bfloat16, device=device).expand(shape),
        torch.cat([inputs.dout] * 2, -1)[..., 1:17],
    ):
        gradients = []
        for variant in (dout, dout.contiguous().clone()):
            leaves = inputs.leaves()
            out = attention(**leaves, **options, backend="cuda")
            assert isinstance(out, Tensor)
            out.backward(variant)
            gradients.append([leaf.grad for leaf in leaves.values()])
        for left, right in zip(*gradients, strict=True):
            assert left is not None and right is not None and torch.equal(left, right)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str, device: torch.device) -> None:
    inputs = draw(CASES[name], 0, device)
    out, lse = attend(*inputs.tensors.values(), **inputs.options)
    attend_again = inputs.leaves()
    # Registers the fakes.
    torch.autograd.grad(attend(**attend_again, **inputs.options)[0].sum(), list(attend_again.values()))
    arguments = (inputs.dout, inputs.dlse, out, lse, *inputs.tensors.values(), *op_options(**inputs.options))
    torch.library.opcheck(extension.op("attention_backward"), arguments)


def test_compiled_with_dynamic_lengths(device: torch.device) -> None:
    """One graph, forward and backward, for every length."""

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, causal=True, backend="cuda")
        assert isinstance(out, Tensor)
        return (out.float() ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((20, 33), (37, 40)):
        inputs = draw(Case(lengths, dtype=torch.bfloat16), 0, device)
        gradients = []
        for function in (loss, compiled):
            leaves = inputs.leaves()
            function(**leaves).backward()
            gradients.append([leaf.grad for leaf in leaves.values()])
        for left, right in zip(*gradients, strict=True):
            assert left is not None and right is not None and torch.equal(left, right)
