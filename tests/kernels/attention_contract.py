"""Runs the attention kernels and the reference on the same random inputs and collects their errors in the contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.kernels.attention.backward import BackwardConfig, attention_backward
from pytransformer.kernels.attention.forward import ForwardConfig, attention_forward
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.verification import SEEDS, Contract
from tests.support.draws import pool

# Small tiles make several of them of few rows; both axes differ, so that a swap shows.
FORWARD_TILES = ForwardConfig(16, 32, 4, 1)
BACKWARD_TILES = BackwardConfig(16, 32, 4, 1, 16, 32, 4, 1)
# The interpreter's time goes by the number of programs and steps, so where there are many cases tiles are a little larger.
SQUARE_FORWARD_TILES = ForwardConfig(32, 32, 4, 1)
SQUARE_BACKWARD_TILES = BackwardConfig(32, 32, 4, 1, 32, 32, 4, 1)
DIFFERENTIABLE_OPTIONS = ("bias", "sinks")
WITH_SLOPES = (*DIFFERENTIABLE_OPTIONS, "alibi_slopes")


@dataclass(frozen=True)
class Case:
    """Shapes and options of a call. ``lengths``: (seqlen_q, seqlen_k), or for packed input one such pair per sequence.

    ``options`` maps a name to a value, or to a function that draws the value: it is given the case and the generator's seed is set.
    """

    lengths: tuple[int, int] | tuple[tuple[int, int], ...] = (40, 40)
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    batch: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    scale_of_q: float | Tensor = 1.0
    lse_gradient: bool = True
    differentiable: tuple[str, ...] = DIFFERENTIABLE_OPTIONS
    forward_tiles: ForwardConfig | None = FORWARD_TILES
    backward_tiles: BackwardConfig | None = BACKWARD_TILES

    @property
    def packed(self) -> bool:
        return isinstance(self.lengths[0], tuple)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(seqlen_q, seqlen_k) of each sequence."""
        return list(self.lengths) if self.packed else [self.lengths] * self.batch  # type: ignore[arg-type, list-item]

    @property
    def longest(self) -> tuple[int, int]:
        return max(pair[0] for pair in self.pairs), max(pair[1] for pair in self.pairs)

    @property
    def softmax_scale(self) -> float:
        return 1.0 / math.sqrt(self.dims[0])


@dataclass
class Inputs:
    """Arguments of one call: tensors that gradients flow to, other options, and the gradients of the results."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Copies that require gradients, in ``dtype`` or their own."""
        return {
            name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in self.tensors.items()
        }


def draw(case: Case, seed: int, device: torch.device) -> Inputs:
    """Random inputs: normal q (times ``scale_of_q``), k, v and result gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, case.dtype)

    options: dict[str, Any] = {"causal": False, "softmax_scale": case.softmax_scale}
    if case.packed:
        rows_q, rows_k = ([pair[axis] for pair in case.pairs] for axis in (0, 1))
        for name, rows in (("cu_seqlens_q", rows_q), ("cu_seqlens_k", rows_k)):
            options[name] = torch.tensor([0, *rows]).cumsum(0).to(device, torch.int32)
        shape_q, shape_k = (sum(rows_q),), (sum(rows_k),)
        lse_shape = (case.heads[0], *shape_q)
    else:
        shape_q, shape_k = ((case.batch, rows) for rows in case.lengths)  # type: ignore[assignment]
        lse_shape = (case.batch, case.heads[0], case.lengths[0])  # type: ignore[assignment]
    tensors = {
        "q": (normal(*shape_q, case.heads[0], case.dims[0]).cpu() * case.scale_of_q).to(device, case.dtype),
        "k": normal(*shape_k, case.heads[1], case.dims[0]),
        "v": normal(*shape_k, case.heads[1], case.dims[1]),
    }
    for name, value in case.options.items():
        value = value(case, generator) if callable(value) else value
        if isinstance(value, Tensor):
            value = value.to(device)
        if name in case.differentiable:
            tensors[name] = value
        else:
            options[name] = value
    dlse = torch.randn(lse_shape, generator=generator).to(device) * case.lse_gradient
    return Inputs(tensors, options, dout=normal(*shape_q, case.heads[0], case.dims[1]), dlse=dlse)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    allow_tf32: bool = False,
    config: ForwardConfig | None = None,
    launch: Callable[..., tuple[Tensor, Tensor]] = attention_forward,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call made of these arguments."""
    return launch(AttentionCall(q, k, v, **options), allow_tf32=allow_tf32, config=config)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    *,
    want_dbias: bool = True,
    want_dslopes: bool = False,
    allow_tf32: bool = False,
    config: BackwardConfig | None = None,
    launch: Callable[..., tuple[Tensor | None, ...]] = attention_backward,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbias, dsinks, dslopes) of such a call."""
    call = AttentionCall(q, k, v, **options)
    wanted = {"want_dbias": want_dbias, "want_dslopes": want_dslopes}
    return launch(call, dout, out, lse, dlse, **wanted, allow_tf32=allow_tf32, config=config)


def run_reference(inputs: Inputs, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(out and lse, gradients) of the naive implementation in ``dtype``, or in the dtype of the inputs."""
    leaves = inputs.leaves(dtype)
    options = {
        name: value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.options.items()
    }
    out, lse = reference.attention(**leaves, **options, return_lse=True)
    torch.autograd.backward([out, lse], [inputs.dout.to(out.dtype), inputs.dlse.to(lse.dtype)])
    gradients = {
        f"d{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
    }
    return {"out": out.detach(), "lse": lse.detach()}, gradients


def _arguments(case: Case, inputs: Inputs) -> tuple[list[Tensor], dict[str, Any]]:
    """(q, k and v, options) as the launchers take them."""
    options = {**inputs.options, **{name: inputs.tensors.get(name) for name in case.differentiable}}
    return [inputs.tensors[name] for name in ("q", "k", "v")], options


def run_forward(
    case: Case, inputs: Inputs, forward: Callable[..., tuple[Tensor, Tensor]] = forward
) -> dict[str, Tensor]:
    """out and lse of the kernel."""
    qkv, options = _arguments(case, inputs)
    return dict(zip(("out", "lse"), forward(*qkv, **options, config=case.forward_tiles)))


def run_backward(
    case: Case,
    inputs: Inputs,
    outputs: dict[str, Tensor],
    backward: Callable[..., tuple[Tensor | None, ...]] = backward,
) -> dict[str, Tensor]:
    """Gradients of the kernels, given what the forward pass returned."""
    qkv, options = _arguments(case, inputs)
    out, lse = outputs["out"], outputs["lse"]
    # What flows into the lse of a row that sees nothing must not matter; a merge of two partial results sends NaN.
    dlse = torch.where(lse == -math.inf, math.nan, inputs.dlse)
    if "alibi_slopes" in case.differentiable:
        # The CUDA kernels, which know no such gradient, are not asked for it.
        options["want_dslopes"] = True
    gradients = backward(inputs.dout, *qkv, out, lse, dlse, **options, config=case.backward_tiles)
    names = ("dq", "dk", "dv", "dbias", "dsinks", "dalibi_slopes")
    return {name: grad for name, grad in zip(names, gradients) if grad is not None}


def run_kernels(
    case: Case,
    inputs: Inputs,
    forward: Callable[..., tuple[Tensor, Tensor]] = forward,
    backward: Callable[..., tuple[Tensor | None, ...]] = backward,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(out and lse, gradients) of the kernels."""
    outputs = run_forward(case, inputs, forward)
    return outputs, run_backward(case, inputs, outputs, backward)


def contract_of(
    case: Case,
    device: torch.device,
    forward: Callable[..., tuple[Tensor, Tensor]] = forward,
    backward: Callable[..., tuple[Tensor | None, ...]] = backward,
    seeds: int = SEEDS,
    least: int | None = None,
) -> Contract:
    """Errors of the kernels over ``seeds`` draws, beside those of plain PyTorch in the same dtype.

    ``least`` draws, and all only in doubt, are for tests that go over many cases.
    """
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        inputs = draw(case, seed, device)
        golden, golden_gradients = run_reference(inputs, torch.float64)
        plain, plain_gradients = run_reference(inputs)
        actual, gradients = run_kernels(case, inputs, forward, backward)
        contract.add_all(actual, plain, golden)
        contract.add_all(gradients, plain_gradients, golden_gradients, kind="gradient")

    return pool(contract, add, least, seeds)


def covering(factors: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Choices of one value per factor such that every pair of values of two factors occurs: greedily few."""
    names = list(factors)
    missing = {
        (first, i, second, j)
        for position, first in enumerate(names)
        for second in names[position + 1 :]
        for i in range(len(factors[first]))
        for j in range(len(factors[second]))
    }
    while missing:
        chosen: dict[str, int] = {}
        first, i, second, j = min(missing)
        chosen[first], chosen[second] = i, j
        for name in names:
            if name not in chosen:
                gains = [
                    sum(pair in missing for pair in _pairs({**chosen, name: value}, names))
                    for value in range(len(factors[name]))
                ]
                chosen[name] = gains.index(max(gains))
        missing -= set(_pairs(chosen, names))
        yield {name: factors[name][value] for name, value in chosen.items()}


def _pairs(chosen: dict[str, int], names: list[str]) -> Iterator[tuple[str, int, str, int]]:
    present = [name for name in names if name in chosen]
    for position, first in enumerate(present):
        for second in present[position + 1 :]:
            yield first, chosen[first], second, chosen[second]


# Windows of the grids, by name.
WINDOWS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "left": {"window": (5, -1)},
    "both": {"window": (0, 3)},
    "causal, left": {"causal": True, "window": (20, 7)},
}


def grid_cases(grid: dict[str, list[Any]]) -> list[Any]:
    """A named pytest parameter for each case of a covering array of lengths, dims, heads, dtype and the window's name."""
    cases = []
    for choice in covering(grid):
        window = choice.pop("window")
        lengths, dims, heads = choice["lengths"], choice["dims"], choice["heads"]
        dtype = str(choice["dtype"]).removeprefix("torch.")
        shape = "packed" if isinstance(lengths[0], tuple) else f"{lengths[0]}x{lengths[1]}"
        name = f"{dtype}-{shape}-d{dims[0]}-dv{dims[1]}-heads{heads[0]}/{heads[1]}-{window}"
        cases.append(pytest.param(Case(**choice, options=WINDOWS[window]), id=name))
    return cases
