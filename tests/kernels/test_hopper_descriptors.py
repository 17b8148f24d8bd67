"""A prepared launch with TMA descriptors where kernels are interpreted: Gluon's interpreter runs it, with the tensors of each call."""

from __future__ import annotations

import pytest
import torch

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


def test_a_tensor_that_is_shorter_than_the_launch_was_prepared_for_is_found() -> None:
    launch = prepare(tensors())
    short = [x[:32].clone() for x in tensors()]
    with pytest.raises(KernelFault):
        launch(short, (0,))
