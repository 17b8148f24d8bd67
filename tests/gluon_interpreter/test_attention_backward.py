"""A second whole kernel: generic writes that products read, reductions into global memory, three products under way at
once.
"""

from __future__ import annotations

import torch

from pytransformer.gluon_interpreter import EARLY, SCHEDULES
from pytransformer.verification import Contract
from tests.gluon_interpreter.attention_backward import LOG2_E, run
from tests.gluon_interpreter.names import needs_reductions


def _gradients(
    tensors: list[torch.Tensor], grad: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in tensors)
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    out = scores.softmax(-1) @ v
    out.backward(grad)
    delta = (out.detach() * grad).sum(-1)
    return [x.grad for x in (q, k, v)], scores.detach().logsumexp(-1) * LOG2_E, delta


@needs_reductions
def test_every_schedule_gives_the_same_bits_within_the_contract() -> None:
    # With 128 keys each element of dq is a sum of two parts, whose order does not matter.
    tensors = [torch.randn(1, 128, 64).to(torch.bfloat16) for _ in range(3)]
    grad = torch.randn(1, 128, 64).to(torch.bfloat16)
    golden, lse, delta = _gradients([x.double() for x in tensors], grad.double())
    plain, _, _ = _gradients(tensors, grad)
    first = run(*tensors, grad, lse.float(), delta.float(), EARLY)
    contract = Contract(torch.bfloat16)
    for name, actual, of_plain, of_golden in zip(("dq", "dk", "dv"), first, plain, golden):
        contract.add(name, actual=actual, plain=of_plain, golden=of_golden, kind="gradient")
    contract.check()
    for schedule in SCHEDULES[1:]:
        again = run(*tensors, grad, lse.float(), delta.float(), schedule)
        assert all(torch.equal(a, b) for a, b in zip(first, again)), schedule
