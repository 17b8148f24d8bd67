"""What attention allocates for itself grows like the length, not like its square, also with a mask, a bias and a window.

On a CPU the kernels do nothing here (interpreting 4k tokens would take hours): what counts is what the op and its launchers ask memory
for. On a GPU the kernels run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytransformer.ops.attention import attention
from tests.support.memory import bytes_of, peak_allocated

HEADS, HEAD_DIM = 2, 64
# What each case gives beside q, k, v, as shapes that broadcast to (batch, heads, seqlen, seqlen) or, for key padding, (batch, seqlen).
CASES: dict[str, Callable[[int], dict[str, tuple[int, ...]]]] = {
    "bias of every score, mask over heads": lambda n: {"bias": (1, HEADS, n, n), "mask": (1, 1, n, n)},
    "bias and mask over queries": lambda n: {
        "bias": (1, HEADS, 1, n),
        "mask": (1, 1, 1, n),
        "key_padding_mask": (1, n),
    },
    "bias over heads, mask over keys": lambda n: {"bias": (n, n), "mask": (1, HEADS, n, 1)},
    "bias over keys": lambda n: {"bias": (1, HEADS, n, 1)},
    "one bias for all": lambda n: {"bias": (1,)},
}


def arguments(shapes: dict[str, tuple[int, ...]], seqlen: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs whose memory is asked for and, where the kernels do nothing, never touched."""
    tensors: dict[str, Tensor] = {
        name: torch.zeros(1, seqlen, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device) for name in ("q", "k", "v")
    }
    for name, shape in shapes.items():
        dtype = torch.bfloat16 if name == "bias" else torch.bool
        tensors[name] = torch.zeros(shape, dtype=dtype, device=device)
    for name in ("q", "k", "v", "bias"):
        tensors[name].requires_grad_()
    return tensors


def bytes_beyond(case: str, seqlen: int, device: torch.device, folder: Path) -> int:
    """Peak of forward and backward, less the output and the gradients."""
    tensors = arguments(CASES[case](seqlen), seqlen, device)
    dout = torch.zeros_like(tensors["q"])

    def forward_and_backward() -> list[Tensor]:
        out = attention(**tensors, window=(128, 128), backend="triton")
        wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
        return [out, *torch.autograd.grad(out, wanted, dout)]

    peak, results = peak_allocated(forward_and_backward, device, folder)
    return peak - sum(bytes_of(result) for result in results)


@pytest.mark.parametrize("case", CASES)
def test_memory_is_linear_in_the_length(
    case: str, device: torch.device, tmp_path: Path, kernels_do_nothing: None
) -> None:
    at_2k, at_4k = (bytes_beyond(case, seqlen, device, tmp_path) for seqlen in (2048, 4096))
    # One float32 for each row, of which forward and backward keep three, and four with large scores. The scores are 512 times as much.
    statistics = HEADS * 4096 * 4
    assert 0 < at_4k <= 8 * statistics
    assert at_4k <= 2.1 * at_2k


def test_the_counter_counts(device: torch.device, tmp_path: Path) -> None:
    """What is freed again is seen at its peak."""

    def squares() -> Tensor:
        scores = torch.ones(1024, 1024, device=device)
        total = scores.sum(1)
        del scores
        return total + 1

    peak, total = peak_allocated(squares, device, tmp_path)
    assert 4 * 1024 * 1024 + bytes_of(total) <= peak < 4 * 1024 * 1024 + 16 * bytes_of(total)
