"""The kernels of linear attention against the reference: the contract, borders of chunks, states, memory, autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer import linear_attention, triton_interpreter
from pytransformer.kernels.linear_attention.policy import FEW_TOKENS, linear_config
from pytransformer.verification import SEEDS
from tests.support.launchers import linear_forward

from .linear_contract import CHUNK, CONFIG, Case, by_kernel, by_reference, measure

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("without_overflow_checks")
GIVEN = {"feature_map": None, "normalize": False}
BASE = Case(CHUNK + 9, decay=(0.9,))
CASES = {
    "decay, GQA": BASE,
    "no decay, several tiles": Case(2 * CHUNK + 1, heads=(1, 1), dims=(36, 40), has_state=False),
    "given features, decay": replace(BASE, options=GIVEN),
    "not normalised": Case(CHUNK + 9, options={"normalize": False}),
    "full": Case(20, CHUNK + 9, options={"causal": False}),
}


# --- the contract -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [3, pytest.param(SEEDS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("name", CASES)
def test_contract(name: str, dtype: torch.dtype, least: int, device: torch.device, poison_empty: None) -> None:
    measure(replace(CASES[name], dtype=dtype), device, least=least).check()


@pytest.mark.parametrize("seqlen", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_borders_of_chunks(seqlen: int, device: torch.device, poison_empty: None) -> None:
    measure(replace(BASE, seqlen=seqlen, dims=(16, 16)), device, seeds=1).check()


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_queries_or_no_keys(lengths: tuple[int, int], device: torch.device, poison_empty: None) -> None:
    measure(Case(*lengths, options={"causal": False}), device, seeds=1).check()


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_ends_of_decay(decay: float, device: torch.device, poison_empty: None) -> None:
    measure(replace(BASE, seqlen=20, dims=(16, 16), decay=(decay,)), device, seeds=1).check()


@pytest.mark.parametrize("seqlen", [1, FEW_TOKENS])
def test_few_tokens(seqlen: int, device: torch.device, poison_empty: None) -> None:
    """The recurrence; the gradient's passes over chunks are those that ship."""
    # The gradient of the decay is two numbers a seed, whose mean error needs all the seeds of the contract.
    case = Case(seqlen, heads=(4, 2), dims=(20, 40), decay=(0.9, 0.5), dtype=BFLOAT16, config=None)
    measure(case, device, SEEDS).check()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_tiles_that_ship(dtype: torch.dtype, device: torch.device, poison_empty: None) -> None:
    dims = (40, 72) if dtype == FLOAT32 else (72, 136)
    case = Case(70, heads=(1, 1), dims=dims, dtype=dtype, decay=(0.95,), config=None)
    measure(case, device, seeds=1).check()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("dim", [1, 16, 64, 128, 256])
def test_policy(dim: int, dtype: torch.dtype) -> None:
    config = linear_config(dim, dim, dtype, 90)
    assert config.chunk % config.block_rows == 0 and min(config.block_rows, config.block_f, config.block_e) >= 16


# --- numbers that are far apart ---------------------------------------------------------------------------------------------------------


def test_sums_beyond_float16(device: torch.device) -> None:
    """States and products of features of 60000, and gradients of results that were divided by their sums."""
    case = Case(CHUNK + 5, dims=(16, 16), has_state=False, dtype=FLOAT16)
    inputs = case.inputs(device, 0)
    inputs["q"].fill_(60000)
    inputs["k"].fill_(60000)
    gradients = [torch.full_like(gradient, place == 0) for place, gradient in enumerate(case.gradients(inputs))]
    golden = by_reference(case, inputs, gradients, torch.float64)
    found = by_kernel(case, inputs, gradients)
    for name in ("out", "S", "z", "grad v"):
        error = (found[name].double() - golden[name]).abs().max() / golden[name].abs().max()
        assert error < torch.finfo(FLOAT16).eps, name


# --- state ------------------------------------------------------------------------------------------------------------------------------


def test_pieces_with_the_state_handed_on_equal_the_whole(device: torch.device, poison_empty: None) -> None:
    """Prefill, then tokens one at a time, then a longer piece."""
    case = replace(BASE, dims=(16, 16), has_state=False)
    inputs = case.inputs(device, 0)
    whole = by_reference(case, inputs, case.gradients(inputs), torch.float64)
    state: dict[str, Tensor] = {}
    outputs, start = [], 0
    for length, config in ((CHUNK + 2, CONFIG), (1, None), (0, CONFIG), (1, None), (5, CONFIG)):
        piece = {name: inputs[name][:, start : start + length] for name in "qkv"}
        _, (out, last, normalizer, _) = linear_forward(**piece, decay=inputs["decay"], **state, config=config)
        outputs.append(out)
        state = {"S": last, "z": normalizer}
        start += length
    found = {"out": torch.cat(outputs, 1), **state}
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name].to(value.dtype))


# --- memory -----------------------------------------------------------------------------------------------------------------------------


def test_padding_is_never_read_and_strides_are_followed(device: torch.device, poison_empty: None) -> None:
    """q, k and v as parts of one tensor, with NaN behind and between them."""
    case = replace(BASE, dims=(20, 20), dtype=BFLOAT16)
    inputs = case.inputs(device, 0)
    gradients = case.gradients(inputs)
    expected = by_kernel(case, inputs, gradients)
    holder = torch.full((1, case.seqlen + 3, 5, 32), float("nan"), dtype=BFLOAT16, device=device)
    strided = dict(inputs)
    for name, heads in (("q", slice(0, 2)), ("k", slice(3, 4)), ("v", slice(4, 5))):
        strided[name] = holder[:, : case.seqlen, heads, :20].copy_(inputs[name])
    strided["S"] = torch.full((1, 1, 20, 32), float("nan"), device=device)[..., :20].copy_(inputs["S"])
    strided["decay"] = torch.full((4,), float("nan"), device=device)[1::3].copy_(inputs["decay"])
    for name, value in by_kernel(case, strided, gradients).items():
        assert torch.equal(value, expected[name]), name


def test_the_same_bits_each_run(device: torch.device) -> None:
    case = replace(BASE, dims=(16, 16), dtype=BFLOAT16)
    inputs = case.inputs(device, 0)
    gradients = case.gradients(inputs)
    first = by_kernel(case, inputs, gradients)
    for _ in range(1 if triton_interpreter.installed() else 200):
        assert all(torch.equal(value, first[name]) for name, value in by_kernel(case, inputs, gradients).items())


def test_scratch_grows_with_the_length_alone(device: torch.device, kernels_do_nothing: None) -> None:
    """No matrix of a length by a length, and states of whole chunks."""

    def made(seqlen: int) -> int:
        sizes: list[int] = []
        empty_strided, empty_like = torch.empty_strided, torch.empty_like
        inputs = Case(seqlen, dims=(64, 64), dtype=BFLOAT16).inputs(device, 0)

        def note(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*given: Any, **options: Any) -> Tensor:
                tensor = make(*given, **options)
                sizes.append(tensor.nbytes)
                return tensor

            return call

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty_strided", note(empty_strided))
            patch.setattr(torch, "empty_like", note(empty_like))
            linear_forward(**inputs)
        return sum(sizes)

    assert made(8192) < 4.2 * made(2048)


# --- the public function ----------------------------------------------------------------------------------------------------------------


def test_autograd_reaches_the_kernels(device: torch.device) -> None:
    """Gradients through both results, a second derivative refused, and a loss of the state alone."""
    case = Case(9, dims=(16, 16), decay=(0.9,))
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs(device, 0).items()}

    def call(backend: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return linear_attention(
            *(leaves[name] for name in "qkv"), decay=leaves["decay"], initial_state=(leaves["S"], leaves["z"]),
            return_state=True, backend=backend,
        )  # type: ignore[return-value]  # fmt: skip

    found = {}
    for backend in ("triton", "torch"):
        out, (state, normalizer) = call(backend)
        total = out.square().sum() + state.square().sum() + normalizer.sum()
        found[backend] = torch.autograd.grad(total, list(leaves.values()))
    torch.testing.assert_close(found["triton"], found["torch"])
    _, (state, _) = call("triton")
    dq, dk = torch.autograd.grad(state.sum(), [leaves["q"], leaves["k"]], materialize_grads=True)
    assert bool((dq == 0).all()) and bool((dk != 0).any())
    out, _ = call("triton")
    (dq,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention has no double backward"):
        torch.autograd.grad(dq.sum(), leaves["q"])
