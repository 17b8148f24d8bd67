"""What of the grouped product is compiled in the gate: each tile of the launch policy, dtypes, widths that no tile divides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from tests.support.launchers import grouped_backward, grouped_forward


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launches of the shipped configurations, for the compile gate."""

    def launch(
        rows: int,
        sizes: tuple[int, int],
        dtype: torch.dtype,
        *,
        backward: bool = True,
        bias: bool = False,
        tf32: bool = False,
    ) -> None:
        num_groups, (num_in, num_out) = 8, sizes
        x, weight = torch.empty(rows, num_in, dtype=dtype), torch.empty(num_groups, num_out, num_in, dtype=dtype)
        offsets = torch.zeros(num_groups + 1, dtype=torch.int32)
        grouped_forward(
            x, weight, offsets, torch.empty(num_groups, num_out, dtype=dtype) if bias else None, allow_tf32=tf32
        )
        if backward:
            grouped_backward(
                torch.empty(rows, num_out, dtype=dtype), x, weight, offsets, want_dbias=bias, allow_tf32=tf32
            )

    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    yield "grouped_linear-bfloat16-training", functools.partial(launch, 4096, (2048, 1536), bfloat16, bias=True)
    yield "grouped_linear-bfloat16-prompt", functools.partial(launch, 512, (2048, 1536), bfloat16, backward=False)
    yield "grouped_linear-bfloat16-decoding", functools.partial(launch, 16, (2048, 1536), bfloat16, backward=False)
    yield "grouped_linear-float16-training-odd", functools.partial(launch, 4096, (2880, 1000), float16)
    yield "grouped_linear-float32-training", functools.partial(launch, 4096, (1024, 704), float32, bias=True)
    yield "grouped_linear-float32-training-tf32", functools.partial(launch, 4096, (1024, 704), float32, tf32=True)
    yield "grouped_linear-float32-decoding", functools.partial(launch, 16, (1024, 704), float32, backward=False)


def wgmma_kernels(case_name: str) -> tuple[str, ...]:
    """Kernels of a case that must use the matrix instructions of sm_90 and sm_100 there; those take at least 64 rows."""
    if "float16" not in case_name or "decoding" in case_name:
        return ()
    forward = ("grouped_product_kernel",)
    return forward if "prompt" in case_name else (*forward, "grouped_weight_gradient_kernel")
