"""What of the activations is compiled in the gate: forward and backward, each kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from tests.support.launchers import activation_backward, activation_forward


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launches, forward and backward, of the shipped configurations, for the compile gate."""

    def both(num_cols: int, dtype: torch.dtype, activation: str, gated: bool, packed: bool) -> object:
        dout = torch.empty(4, num_cols, dtype=dtype)
        gate = torch.empty(4, 2 * num_cols, dtype=dtype) if packed else dout
        up = dout if gated and not packed else None
        activation_forward(gate, up, activation=activation, gated=gated)
        return activation_backward(dout, gate, up, activation=activation, gated=gated)

    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    yield "activation-swiglu-14336-bfloat16-packed", functools.partial(both, 14336, bfloat16, "silu", True, True)
    yield "activation-swiglu-11008-float32", functools.partial(both, 11008, float32, "silu", True, False)
    # erf needs the most registers.
    yield "activation-geglu-5632-bfloat16-packed", functools.partial(both, 5632, bfloat16, "gelu", True, True)
    yield "activation-geglu_tanh-1000-float16", functools.partial(both, 1000, float16, "gelu_tanh", True, False)
    yield "activation-gelu-3072-float32", functools.partial(both, 3072, float32, "gelu", False, False)
    yield "activation-gelu_tanh-16384-bfloat16", functools.partial(both, 16384, bfloat16, "gelu_tanh", False, False)
