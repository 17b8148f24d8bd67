"""What a training step's loss asks memory for at 8k tokens × 4k features × 128k words: inputs, gradients, one float32 copy of the
weight's gradient, and less than half a gigabyte, where the logits alone would be two.

On a CPU neither the kernel nor the matrix products run (they would take an hour): what counts is what is allocated. On a GPU they do.
With fewer features, which the logits do not know of, the weight and its gradients take less time to fill.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pytransformer.ops.linear_cross_entropy import by_triton, linear_cross_entropy
from tests.support.memory import bytes_of, peak_allocated

TOKENS, VOCAB = 8192, 131072
FEATURES = pytest.mark.parametrize("hidden", [256, pytest.param(4096, marks=pytest.mark.slow)])


@pytest.fixture
def products_do_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch, kernels_do_nothing: None) -> None:
    if device.type != "cuda":
        monkeypatch.setattr(by_triton, "product_into", lambda out, left, right, accumulate=False: None)


@FEATURES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak(reduction: str, hidden: int, device: torch.device, tmp_path: Path, products_do_nothing: None) -> None:
    x = torch.zeros(TOKENS, hidden, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.zeros(VOCAB, hidden, dtype=torch.bfloat16, device=device, requires_grad=True)
    targets = torch.zeros(TOKENS, dtype=torch.int64, device=device)

    def step() -> list[torch.Tensor]:
        loss = linear_cross_entropy(x, weight, targets, reduction=reduction, backend="triton")
        return [*torch.autograd.grad(loss.sum(), (x, weight))]

    peak, gradients = peak_allocated(step, device, tmp_path)
    float32_copy = 4 * weight.numel()
    assert bytes_of(*gradients) == bytes_of(x, weight)
    # The inputs were there before. What is counted must at least be what the step cannot do without.
    assert bytes_of(*gradients) + float32_copy <= peak <= bytes_of(*gradients) + float32_copy + 500_000_000


@FEATURES
def test_loss_alone(hidden: int, device: torch.device, tmp_path: Path, products_do_nothing: None) -> None:
    x = torch.zeros(TOKENS, hidden, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(VOCAB, hidden, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(TOKENS, dtype=torch.int64, device=device)
    peak, _ = peak_allocated(lambda: linear_cross_entropy(x, weight, targets, backend="triton"), device, tmp_path)
    assert TOKENS * 4 < peak <= 500_000_000
