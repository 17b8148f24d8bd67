"""The CUDA attention ops with the arguments of the Triton launchers, for the measuring functions that both share."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension, reference
from tests.kernels.attention_contract import Case, Inputs, contract_of, draw, run_kernels
from tests.support.emulator import MOST_SHARED_MEMORY, SCHEDULES, configure, in_every_schedule

EMULATED = "PYTRANSFORMER_CUDA_LIBRARY" in os.environ


def op_options(
    *,
    softmax_scale: float,
    causal: bool,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    bias: None = None,
    sinks: None = None,
    config: Any = None,
) -> tuple[Any, ...]:
    """The arguments of the CUDA ops behind their tensors; ``config`` is Triton's, and here the launch policy's business."""
    return alibi_slopes, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, *window, softcap


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of the CUDA kernels."""
    gradients: tuple[Tensor, Tensor, Tensor] = extension.op("attention_backward")(
        dout, dlse, out, lse, q, k, v, *op_options(**options)
    )
    return gradients


def exact_forward(q: Tensor, k: Tensor, v: Tensor, *, config: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) by the reference in float32, out rounded once: what is measured then is the backward pass alone."""
    out, lse = reference.attention(q.float(), k.float(), v.float(), **options, return_lse=True)
    return out.to(q.dtype).contiguous(), lse.contiguous()


def check_case(
    case: Case, device: torch.device, *, every_schedule: bool, shared_memory: int = MOST_SHARED_MEMORY
) -> None:
    """The contract over seeds that take turns with the schedules; on request the same bits from all of these for the first seed.

    ``shared_memory`` is what a block may have of it in the emulator.
    """
    turns = itertools.count()

    def backward_in_turns(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        if EMULATED:
            configure(next(turns) % len(SCHEDULES), shared_memory=shared_memory)
        return backward(*args, **options)

    contract_of(case, device, exact_forward, backward_in_turns).check()
    if every_schedule:
        inputs = draw(case, 0, device)
        in_every_schedule(lambda: list(gradients_of(case, inputs).values()), shared_memory=shared_memory)
    elif EMULATED:
        configure()


def gradients_of(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    return run_kernels(case, inputs, exact_forward, backward)[1]
