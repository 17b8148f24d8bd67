"""attention against the reference: every option on every backend, within the contract."""

from __future__ import annotations

import pytest

from pytransformer.verification import measure
from pytransformer.verification.cases import FLOATS
from tests.ops.attention_cases import BY_NAME, CASES

NAMES = [case.name for case in CASES]
# Each case with one dtype, taking turns: the kernels have tests of their own for every dtype.
TAKING_TURNS = [
    pytest.param(name, FLOATS[index % 3], id=f"{name}-{FLOATS[index % 3]}") for index, name in enumerate(NAMES)
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_torch_is_within_the_contract(name, dtype, device):
    measure(BY_NAME[name], dtype, "torch", device).check()


@pytest.mark.parametrize(("name", "dtype"), TAKING_TURNS)
def test_the_reference_backend_is_within_the_contract(name, dtype, device):
    measure(BY_NAME[name], dtype, "reference", device).check()


@pytest.mark.parametrize(("name", "dtype"), TAKING_TURNS)
def test_triton_is_within_the_contract(name, dtype, device):
    measure(BY_NAME[name], dtype, "triton", device).check()
