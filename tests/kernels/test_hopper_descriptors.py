"""A prepared launch with TMA descriptors where kernels are interpreted: Gluon's interpreter runs it, with the tensors of each call."""

from __future__ import annotations

import pytest
import torch

from pytransformer.kernels.hopper.backward_launch import HopperBackward
from pytransformer.kernels.hopper.launch import HopperForward
from pytransformer.kernels.hopper.names import HAS_REDUCTIONS
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.triton_interpreter import KernelFault
from tests.conftest import INTERPRETING
from tests.support.copy_kernel import ROWS, prepare, tensors

pytestmark = pytest.mark.skipif(not INTERPRETING, reason="kernels are compiled for a GPU in this process")


def test_each_call_copies_between_its_own_tensors() -> None:
    launch = prepare(tensors())
    for row in (0, 64):
        given = tensors()
        q, _, lse, v, out = given
        v.copy_(torch.randn_like(v))
        launch(given, (row,))
        assert torch.equal(out[row : row + ROWS], v[row : row + ROWS])
        assert int(out.count_nonzero()) == int(v[row : row + ROWS].count_nonzero())
        assert torch.equal(lse[row : row + ROWS], torch.arange(ROWS) * 0.5)
        assert not q.any()


@pytest.mark.skipif(not HAS_REDUCTIONS, reason="this Triton's TMA does not reduce")
def test_an_output_gradient_at_an_odd_address_with_gaps_between_its_rows() -> None:
    q, k = torch.randn(1, 70, 2, 64).bfloat16(), torch.randn(1, 70, 1, 64).bfloat16()
    call = AttentionCall(q, k, k.clone(), softmax_scale=0.125, causal=True)
    out, lse = HopperForward(call)(call)
    memory = torch.randn(70 * 2 * 96 + 8).bfloat16()
    start = next(start for start in range(1, 9) if memory[start:].data_ptr() % 16)
    dout = memory[start : start + 70 * 2 * 96].view(1, 70, 2, 96)[..., :64]
    odd, plain = ((call, given, out, lse, None) for given in (dout, dout.contiguous()))
    for found, expected in zip(HopperBackward(*odd)(*odd)[:3], HopperBackward(*plain)(*plain)[:3]):
        assert torch.equal(found, expected)


def test_a_tensor_that_is_shorter_than_the_launch_was_prepared_for_is_found() -> None:
    launch = prepare(tensors())
    short = [x[:32].clone() for x in tensors()]
    with pytest.raises(KernelFault):
        launch(short, (0,))
