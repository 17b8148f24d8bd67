"""What of the norms is compiled in the gate: narrow and wide rows, dtypes, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from tests.support.launchers import norm_backward, norm_forward


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch, forward and backward."""
    yield from _forward_cases()
    yield from _backward_cases()


def _forward_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def forward(
        num_cols: int, dtype: torch.dtype, is_rms: bool, with_residual: bool, weight_dtype: torch.dtype
    ) -> object:
        x, weight = torch.empty(4, num_cols, dtype=dtype), torch.empty(num_cols, dtype=weight_dtype)
        bias, residual = None if is_rms else weight, x if with_residual else None
        return norm_forward(x, weight, bias, residual, eps=1e-5, is_rms=is_rms)

    def inference(num_cols: int) -> object:
        x = torch.empty(4, num_cols, dtype=torch.bfloat16)
        return norm_forward(x, x[0], x[0], x, eps=1e-5, is_rms=False, statistics=False)

    for num_cols in (4096, 65536):
        yield f"norm-forward-layer-{num_cols}-bfloat16-inference", functools.partial(inference, num_cols)
    for case in _norm_cases():
        yield f"norm-forward-{case[0]}", functools.partial(forward, *case[1:])
    # The widest rows that are read once.
    widest = functools.partial(forward, 32768, torch.bfloat16, False, True, torch.bfloat16)
    yield "norm-forward-layer-32768-bfloat16-residual", widest


def _backward_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    def backward(num_cols: int, dtype: torch.dtype, is_rms: bool, with_ds: bool, weight_dtype: torch.dtype) -> object:
        x, weight = torch.empty(4, num_cols, dtype=dtype), torch.empty(num_cols, dtype=weight_dtype)
        rstd = torch.empty(4)
        mean, dbias_dtype = (None, None) if is_rms else (rstd, weight_dtype)
        return norm_backward(x, x if with_ds else None, x, weight, mean, rstd, dbias_dtype=dbias_dtype)

    for case in _norm_cases():
        yield f"norm_backward-backward-{case[0]}", functools.partial(backward, *case[1:])


def _norm_cases() -> Iterator[tuple[str, int, torch.dtype, bool, bool, torch.dtype]]:
    """(name, num_cols, dtype, is_rms, with_residual, weight_dtype) of the forward and the backward kernels' compile cases."""
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    for num_cols in (128, 4096, 65536):
        yield f"rms-{num_cols}-bfloat16-residual", num_cols, bfloat16, True, True, bfloat16
    # The widest rows of each kind of tile need the most registers, LayerNorm more of them than RMSNorm.
    for num_cols in (128, 2048, 8192, 16384, 65536):
        yield f"layer-{num_cols}-bfloat16-residual", num_cols, bfloat16, False, True, bfloat16
    for num_cols in (4096, 65536):
        yield f"layer-{num_cols}-float32", num_cols, float32, False, False, float32
    yield "rms-4096-float16-float32_weight", 4096, float16, True, False, float32
    # 1000 columns are a multiple of 8 but not of 16, which is all that Triton looks for by itself.
    yield "layer-1000-bfloat16", 1000, bfloat16, False, False, bfloat16
