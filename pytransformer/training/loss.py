"""The causal language-model loss, normalised over all real target tokens of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from pytransformer.model.heads import QuantizedLMHead
from pytransformer.model.transformer import Transformer
from pytransformer.ops.linear_cross_entropy import linear_cross_entropy
from pytransformer.training.data import IGNORE_INDEX


def summed_loss(model: Transformer, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of −log p(target) over the real targets, float32, in nats; training and evaluation both take it from here.

    The logits never exist as a whole, on any device: they would be the largest tensor of a step. On a CPU that costs no time either: a step
    of the demo takes 48 ms of one core, and took 52 ms with all logits and ``F.cross_entropy`` in the same run.

    Args:
        model: its decoder is run, and its head's weight goes into the loss.
        inputs: int64 (batch, seqlen).
        targets: int64 (batch, seqlen): the inputs shifted by one; −100 = no target here.
    """
    head = model.lm_head
    if isinstance(head, QuantizedLMHead):  # of codes there is no fused loss: the logits are made
        logits = head(model.model(inputs)).flatten(0, -2).float()
        return torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return linear_cross_entropy(
        head.features(model.model(inputs)),
        head.weight,
        targets,
        bias=head.bias,
        softcap=head.softcap,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def count_targets(targets: torch.Tensor) -> int:
    """Real targets; ask on the host, where it costs no synchronisation."""
    return int((targets != IGNORE_INDEX).sum())


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bfloat16 arithmetic for "bf16", nothing for "fp32"."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def accumulate_gradients(
    model: Transformer,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    parts: int,
    *,
    device: torch.device,
    precision: str = "fp32",
) -> torch.Tensor:
    """Adds the gradient of the mean loss over the whole batch, computed in ``parts`` parts, to the parameters' ``grad``.

    Every part is divided by the number of real targets of the *whole* batch, so the gradient doesn't depend on how they are spread.

    Returns:
        The mean loss, float32, on the device.

    Raises:
        ValueError: the batch has no real target.
    """
    count = count_targets(targets)
    if count == 0:
        raise ValueError("the batch has no target token: there is nothing to learn from it")
    total = torch.zeros((), device=device)
    for part_inputs, part_targets in zip(inputs.chunk(parts), targets.chunk(parts)):
        with autocast(device, precision):
            loss = summed_loss(model, _move(part_inputs, device), _move(part_targets, device)) / count
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(
    model: Transformer,
    windows: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    device: torch.device,
    precision: str = "fp32",
) -> float:
    """Mean loss in nats per real target over ``windows``, without dropout; the model's mode is as before afterwards."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for inputs, targets in windows:
        with autocast(device, precision):
            total += summed_loss(model, _move(inputs, device), _move(targets, device))
    model.train(was_training)
    return float(total) / sum(count_targets(targets) for _, targets in windows)


def _move(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    return ids.to(device, non_blocking=True)
