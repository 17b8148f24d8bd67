"""Calls of linear attention's kernels beside the reference, for the tests of the kernels and of broken copies of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.kernels.linear_attention.policy import LinearConfig
from pytransformer.verification import SEEDS, Contract
from tests.support.draws import pool
from tests.support.launchers import linear_backward, linear_forward

FLOAT32 = torch.float32
# Small tiles: two of rows in a chunk, and features and values padded to 32.
CONFIG = LinearConfig(32, 16, 32, 32, 4, 1, 4)
CHUNK = CONFIG.chunk


@dataclass(frozen=True)
class Case:
    """One call, forward and backward, with all inputs that have a gradient and through all results."""

    seqlen: int
    seqlen_k: int | None = None
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (20, 18)
    dtype: torch.dtype = FLOAT32
    decay: tuple[float, ...] | None = None
    has_state: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    config: LinearConfig | None = CONFIG

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        (heads, kv_heads), (head_dim, value_dim) = self.heads, self.dims
        seqlen_k = self.seqlen if self.seqlen_k is None else self.seqlen_k
        found = {
            "q": torch.randn(1, self.seqlen, heads, head_dim).to(self.dtype),
            "k": torch.randn(1, seqlen_k, kv_heads, head_dim).to(self.dtype),
            "v": torch.randn(1, seqlen_k, kv_heads, value_dim).to(self.dtype),
        }
        if self.decay is not None:
            found["decay"] = torch.tensor(self.decay)
        if self.has_state:
            found |= {"S": torch.randn(1, kv_heads, head_dim, value_dim), "z": 0.5 + torch.rand(1, kv_heads, head_dim)}
        return {name: tensor.to(device) for name, tensor in found.items()}

    def gradients(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """Of out, S and z, the same in every dtype."""
        (heads, kv_heads), (head_dim, value_dim), device = self.heads, self.dims, inputs["q"].device
        shapes = ((1, self.seqlen, heads, value_dim), (1, kv_heads, head_dim, value_dim), (1, kv_heads, head_dim))
        return [torch.randn(shape).to(self.dtype).to(device, torch.float32) for shape in shapes]


def by_kernel(
    case: Case,
    inputs: dict[str, Tensor],
    gradients: list[Tensor],
    forward: Any = linear_forward,
    backward: Any = linear_backward,
) -> dict[str, Tensor]:
    dout, *rest = gradients
    call, results = forward(**inputs, **case.options, config=case.config)
    found = backward(call, results, dout.to(case.dtype), *rest, config=case.config)
    grads = {f"grad {name}": value for name, value in zip(("q", "k", "v", "decay", "S", "z"), found) if name in inputs}
    return {**dict(zip(("out", "S", "z"), results)), **grads}


def by_reference(
    case: Case, inputs: dict[str, Tensor], gradients: list[Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, FLOAT32)
    leaves = {
        name: tensor.to(dtype if name in "qkv" else wide).detach().requires_grad_() for name, tensor in inputs.items()
    }
    state = (leaves["S"], leaves["z"]) if case.has_state else None
    qkv = [leaves[name] for name in "qkv"]
    out, last = reference.linear_attention(
        *qkv, decay=leaves.get("decay"), initial_state=state, return_state=True, **case.options
    )
    results = (out, *last)
    given = [gradient.to(result.dtype) for gradient, result in zip(gradients, results)]
    found = torch.autograd.grad(results, list(leaves.values()), given, materialize_grads=True)
    grads = {f"grad {name}": gradient for name, gradient in zip(leaves, found)}
    return {**dict(zip(("out", "S", "z"), (result.detach() for result in results))), **grads}


def measure(
    case: Case, device: torch.device, seeds: int = SEEDS, least: int | None = None, **launchers: Any
) -> Contract:
    """Errors over ``seeds`` draws; ``least``, and all only in doubt, are for tests that go over many cases."""
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        inputs = case.inputs(device, seed)
        gradients = case.gradients(inputs)
        plain, golden = (by_reference(case, inputs, gradients, dtype) for dtype in (case.dtype, torch.float64))
        for name, value in by_kernel(case, inputs, gradients, **launchers).items():
            assert value.is_contiguous() and value.dtype == plain[name].dtype
            kind = "gradient" if name.startswith("grad") else "output"
            contract.add(name, actual=value, plain=plain[name], golden=golden[name], kind=kind)

    return pool(contract, add, least, seeds)
