"""Optimizers from torch with weight decay on matrices only, and the learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pytransformer.training.config import TrainingConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norm weights, which have one dimension, do not. A shared parameter appears once."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, fused (one kernel for all parameters) where torch has that for the device."""
    groups = parameter_groups(model, config.weight_decay)
    fused = _can_fuse(model.parameters())
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    betas = (config.beta1, config.beta2)
    return kind(groups, lr=config.learning_rate, betas=betas, eps=config.epsilon, fused=fused)


def _can_fuse(parameters: Iterable[nn.Parameter]) -> bool:
    return all(parameter.device.type in ("cuda", "cpu") and parameter.is_floating_point() for parameter in parameters)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of optimizer step ``step``, counted from 0.

    Linear warm-up, then for progress t from 0 to 1 over the remaining steps, with peak p and floor f = p · min_learning_rate_ratio:
    cosine: f + (p − f) · (1 + cos πt) / 2 (Loshchilov and Hutter 2017); wsd: p, then linear to f (Hu et al. 2024); constant: p.
    """
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    floor = peak * config.min_learning_rate_ratio
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    decay_steps = max(1, round(config.steps * config.decay_fraction))
    remaining = max(0, config.steps - step)
    return floor + (peak - floor) * min(1.0, remaining / decay_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
