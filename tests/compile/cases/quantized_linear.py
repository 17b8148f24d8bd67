"""What of the product with codes is compiled in the gate: each tile of the launch policy, both widths of codes, both passes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from tests.support.launchers import quantized_backward, quantized_forward


def codes_of(bits: int, num_out: int, num_in: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """weight, scale and zero_point, with groups of 64."""
    if bits == 8:
        return torch.zeros(num_out, num_in, dtype=torch.int8), torch.zeros(num_out, dtype=torch.bfloat16), None
    scale = torch.zeros(num_out, num_in // 64, dtype=torch.bfloat16)
    return torch.zeros(num_out, num_in // 2, dtype=torch.uint8), scale, torch.zeros_like(scale, dtype=torch.uint8)


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launches of the shipped configurations, for the compile gate."""

    def launch(rows: int, bits: int, dtype: torch.dtype, *, backward: bool = False, tf32: bool = False) -> None:
        num_out, num_in = 4096, 2048
        codes = codes_of(bits, num_out, num_in)
        quantized_forward(torch.empty(rows, num_in, dtype=dtype), *codes, allow_tf32=tf32)
        if backward:
            quantized_backward(torch.empty(rows, num_out, dtype=dtype), *codes, allow_tf32=tf32)

    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    for bits in (8, 4):
        yield f"quantized_linear-int{bits}-bfloat16-decoding", functools.partial(launch, 1, bits, bfloat16)
        yield f"quantized_linear-int{bits}-bfloat16-prompt", functools.partial(launch, 64, bits, bfloat16)
        yield (
            f"quantized_linear-int{bits}-bfloat16-training",
            functools.partial(launch, 4096, bits, bfloat16, backward=True),
        )
        yield (
            f"quantized_linear-int{bits}-float32-training",
            functools.partial(launch, 4096, bits, float32, backward=True),
        )
    yield "quantized_linear-int4-float16-decoding", functools.partial(launch, 1, 4, float16)


def wgmma_kernels(case_name: str) -> tuple[str, ...]:
    """Kernels of a case that must use the matrix instructions of sm_90 and sm_100 there; those take at least 64 rows."""
    if "float16" not in case_name or "decoding" in case_name:
        return ()
    forward = ("quantized_product_kernel",)
    return forward if "prompt" in case_name else (*forward, "quantized_gradient_kernel")
