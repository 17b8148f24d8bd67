"""attention against the reference: every option on every backend, within the contract."""

from __future__ import annotations

import pytest

from pytransformer.verification import measure
from pytransformer.verification.cases import FLOATS
from tests.ops.attention_cases import BY_NAME, CASES, UNSERVED_BY_TORCH, refused_on_a_gpu

NAMES = [case.name for case in CASES]
# Each case with one dtype, taking turns: the kernels have tests of their own for every dtype.
TAKING_TURNS = [
    pytest.param(name, FLOATS[index % 3], id=f"{name}-{FLOATS[index % 3]}") for index, name in enumerate(NAMES)
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNSERVED_BY_TORCH])
def test_torch_is_within_the_contract(name, dtype, device):
    if refused_on_a_gpu(name, dtype, device):
        with pytest.raises(NotImplementedError, match="backend 'torch' cannot serve"):
            measure(BY_NAME[name], dtype, "torch", device)
        return
    measure(BY_NAME[name], dtype, "torch", device).check()


@pytest.mark.parametrize(("name", "dtype"), TAKING_TURNS)
def test_the_reference_backend_is_within_the_contract(name, dtype, device):
    measure(BY_NAME[name], dtype, "reference", device).check()


@pytest.mark.parametrize(("name", "dtype"), TAKING_TURNS)
def test_triton_is_within_the_contract(name, dtype, device):
    measure(BY_NAME[name], dtype, "triton", device).check()


@pytest.mark.parametrize("name", UNSERVED_BY_TORCH)
def test_what_torch_cannot_do_it_refuses_with_the_reason(name, device):
    tensors = {key: value.to(device) for key, value in BY_NAME[name].inputs(1).items()}
    with pytest.raises(
        NotImplementedError, match=f"backend 'torch' cannot serve this call: .*{UNSERVED_BY_TORCH[name]}"
    ):
        BY_NAME[name].actual(tensors, "torch")
