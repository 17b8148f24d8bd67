"""What the suites share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pytransformer import extension

BF16 = torch.bfloat16


def ours(device: torch.device) -> tuple[str, ...]:
    """Our backends worth timing on this device: the kernels on a GPU, CUDA's where they are built; plain torch on a CPU."""
    if device.type != "cuda":
        return ("torch",)
    return ("triton",) if extension.why_not("cuda") else ("cuda", "triton")


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator for one input set."""
    return torch.Generator(device=device).manual_seed(seed)


def normal(device: torch.device, seed: int, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Random data (zeros would run faster than real data does)."""
    return torch.randn(*shape, device=device, generator=generator(device, seed)).to(dtype)


def no_grad(function: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    """The variant without autograd's bookkeeping."""

    def call(inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return function(inputs)

    return call


def backward_of(
    name: str, forward: Callable[[dict[str, Any]], torch.Tensor], wanted: tuple[str, ...]
) -> Callable[[dict[str, Any]], Any]:
    """A variant that runs only the backward pass: the forward pass is computed once for each input set and kept."""

    def call(inputs: dict[str, Any]) -> Any:
        kept = inputs.setdefault("kept", {})
        if name not in kept:
            kept[name] = forward(inputs)
        leaves = [inputs[key] for key in wanted]
        return torch.autograd.grad(kept[name], leaves, inputs["dout"], retain_graph=True)

    return call
