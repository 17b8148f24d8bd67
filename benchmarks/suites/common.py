"""What the suites share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from pytransformer import extension
from pytransformer.benchmarks import peers
from pytransformer.benchmarks.harness.rows import Inputs, Variant

BF16 = torch.bfloat16
# Rows of a result that are compared with float64; a whole one would take longer to check than to time.
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Wanted:
    """What a run asks of a suite.

    Attributes:
        tiny: sizes for a CPU, one row for each code path.
        peers: every peer that is installed, not only what torch brings.
        quick: leave out peers that compile for long.
    """

    device: torch.device
    tiny: bool = False
    peers: bool = False
    quick: bool = False


def ours(device: torch.device) -> tuple[str, ...]:
    """Our backends worth timing on this device: the kernels on a GPU, CUDA's where they are built; plain torch on a CPU."""
    if device.type != "cuda":
        return ("torch",)
    return ("triton",) if extension.why_not("cuda") else ("cuda", "triton")


def our_backends(device: torch.device) -> dict[str, str | None]:
    """Name of the variant → argument ``backend``; on a CPU the automatic choice, which serves every option, under the name "torch"."""
    return {name: name if device.type == "cuda" else None for name in ours(device)}


def our_variants(device: torch.device, make: Callable[[str | None], Variant]) -> dict[str, Variant]:
    """Name → call for each backend of ours."""
    return {name: make(backend) for name, backend in our_backends(device).items()}


def all_variants(
    wanted: Wanted, op: str, case: Any, make: Callable[[str | None], Variant]
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Ours, then the peers that serve this case; and what is to be said about them."""
    others = peers.variants(op, case, wanted.device, peers=wanted.peers, quick=wanted.quick)
    return {**our_variants(wanted.device, make), **others}, peers.notes(op, others)


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator for one input set."""
    return torch.Generator(device=device).manual_seed(seed)


def normal(device: torch.device, seed: int, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Random data (zeros would run faster than real data does), drawn in 16 bits so that a large tensor needs no larger one beside it."""
    return torch.randn(*shape, device=device, generator=generator(device, seed), dtype=BF16).to(dtype)


def checked_rows(length: int, device: torch.device) -> torch.Tensor:
    """Indices spread over the whole length, first and last included."""
    return torch.linspace(0, length - 1, min(length, CHECKED_ROWS), device=device).long()


def no_grad(function: Variant) -> Variant:
    """The variant without autograd's bookkeeping."""

    def call(inputs: Inputs) -> Any:
        with torch.no_grad():
            return function(inputs)

    return call


def backward_of(name: str, forward: Variant, leaves: Iterable[str], gradients: Iterable[str] = ("dout",)) -> Variant:
    """A variant that runs only the backward pass: the forward pass is computed once for each input set and kept.

    Args:
        leaves: inputs whose gradients are returned, in this order.
        gradients: inputs that hold the gradients of the forward pass's results.
    """
    leaves, gradients = tuple(leaves), tuple(gradients)

    def call(inputs: Inputs) -> Any:
        outputs = peers.kept(inputs, f"output of {name}", lambda: forward(inputs))
        wanted = [inputs[key] for key in leaves]
        return torch.autograd.grad(outputs, wanted, [inputs[key] for key in gradients], retain_graph=True)

    return call


def forward_and_backward(forward: Variant, leaves: Iterable[str], gradients: Iterable[str] = ("dout",)) -> Variant:
    """A variant that runs both passes; it returns (result of the forward pass, gradients)."""
    leaves, gradients = tuple(leaves), tuple(gradients)

    def call(inputs: Inputs) -> Any:
        outputs = forward(inputs)
        wanted = [inputs[key] for key in leaves]
        return outputs, torch.autograd.grad(outputs, wanted, [inputs[key] for key in gradients])

    return call
