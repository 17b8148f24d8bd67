"""What a launch asks of CUDA's runtime: once for each device and kernel, not at each launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from pytransformer import rms_norm
from tests.cuda.attention_ops import EMULATED, gradients_of
from tests.kernels.attention_contract import Case, draw
from tests.support.emulator import configure, runtime_calls

KIB = 1024


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    if not EMULATED:
        pytest.skip("the emulator counts them")
    yield
    configure()


def asked(call: Callable[[], object]) -> tuple[int, int]:
    before = runtime_calls()
    call()
    return tuple(after - earlier for after, earlier in zip(runtime_calls(), before, strict=True))  # type: ignore[return-value]


def test_each_device_is_asked_once_and_told_once_of_each_kernel(device: torch.device) -> None:
    # Of 64 features at most, dq takes 50 KB and dk and dv 66; the statistics take none.
    case = Case((40, 40), heads=(1, 1), dims=(16, 16), dtype=torch.bfloat16)
    inputs = draw(case, 0, device)
    for shared_memory in (200 * KIB, 201 * KIB):  # two devices that no test has seen
        configure(shared_memory=shared_memory)
        assert asked(lambda: gradients_of(case, inputs)) == (1, 2)
        assert asked(lambda: gradients_of(case, inputs)) == (0, 0)
    configure(shared_memory=200 * KIB)
    assert asked(lambda: gradients_of(case, inputs)) == (0, 0)  # of one device nothing is forgotten on another


def test_a_kernel_is_allowed_more_when_it_needs_more(device: torch.device) -> None:
    """Rows wider than the registers of a block are staged in shared memory: 66 KB, 117 KB, the same again, and 176 KB."""
    configure(shared_memory=202 * KIB, num_sms=1)
    told = []
    for elements in (17000, 30000, 17000, 30000, 45000):
        x = torch.ones(2, elements, device=device)
        told.append(asked(lambda x=x: rms_norm(x, backend="cuda"))[1])
    assert told == [1, 1, 0, 0, 1]
