"""Calls of the norms that several test files draw."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pytransformer import extension, layer_norm, reference, rms_norm

# In the emulator's process (`make sanitize` runs this file there) these tests are about the extension alone.
EMULATED = "PYTRANSFORMER_CUDA_LIBRARY" in os.environ
HAS_CUDA = extension.why_not("cuda") is None
BACKENDS = ("cuda",) if EMULATED else (*(("cuda",) if HAS_CUDA else ()), "triton", "torch", "reference")
KERNEL_BACKENDS = tuple(backend for backend in BACKENDS if backend in ("cuda", "triton"))
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
OPS: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
    "layer_norm": (layer_norm, reference.layer_norm),
    "rms_norm": (rms_norm, reference.rms_norm),
}
ALL_KERNELS = pytest.mark.parametrize("backend", KERNEL_BACKENDS)
ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
ALL_OPS = pytest.mark.parametrize("op", OPS)


def draw(
    op: str, device: torch.device, shape: tuple[int, ...] = (3, 5, 24), dtype: torch.dtype = FLOAT32, **dtypes
) -> dict[str, Tensor]:
    """The differentiable tensors of a call by their names: all that the op has, or those in ``dtypes`` beside x."""
    names = {"weight": dtype, "residual": dtype} | ({"bias": dtype} if op == "layer_norm" else {})
    names.update({name: wanted for name, wanted in dtypes.items() if name in names})
    tensors = {"x": torch.randn(shape).to(device, dtype)}
    for name, wanted in names.items():
        if wanted is not None:
            tensors[name] = torch.randn(shape if name == "residual" else shape[-1:]).to(device, wanted)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def run(function: Callable[..., object], tensors: dict[str, Tensor], **options: object) -> tuple[Tensor, ...]:
    out = function(**tensors, **options)
    return out if isinstance(out, tuple) else (out,)


def results(function, tensors: dict[str, Tensor], dtype: torch.dtype | None = None, **options) -> tuple[dict, dict]:
    """Outputs by name, and gradients for output gradients that are the same in every dtype."""
    leaves = {name: value.detach().to(dtype or value.dtype).requires_grad_() for name, value in tensors.items()}
    outputs = run(function, leaves, **options)
    generator = torch.Generator().manual_seed(7)
    # Rounded to 8 bits, so that no dtype rounds them again.
    drawn = [torch.randn(out.shape, generator=generator).to(BFLOAT16).to(out.device, out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), drawn)
    return dict(zip(("y", "s"), outputs)), {f"grad {name}": grad for name, grad in zip(leaves, gradients)}
