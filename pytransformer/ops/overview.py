"""What serves what on this machine: the table behind ``pytransformer info``."""

from __future__ import annotations

import torch

from pytransformer.kernels.hopper import serves
from pytransformer.ops import (
    activation,
    attention,
    decode_attention,
    grouped_linear,
    kv_append,
    linear_attention,
    linear_cross_entropy,
    norm,
    quantized_linear,
    rope,
)
from pytransformer.ops.backend import BackendChoice

CHOICES: tuple[BackendChoice, ...] = (
    attention.CHOICE,
    decode_attention.CHOICE,
    linear_attention.CHOICE,
    rope.CHOICE,
    norm.LAYER_NORM_CHOICE,
    norm.RMS_NORM_CHOICE,
    kv_append.CHOICE,
    linear_cross_entropy.CHOICE,
    grouped_linear.CHOICE,
    quantized_linear.CHOICE,
    activation.SWIGLU_CHOICE,
    activation.GEGLU_CHOICE,
    activation.GELU_CHOICE,
)


def backends(device: str | torch.device | None = None) -> dict[str, dict[str, str]]:
    """For each op and backend: "serves", "serves, except …", or the reason why it serves nothing here.

    Args:
        device: the kind of device asked about; by default "cuda" where a GPU is usable, else "cpu".

    Returns:
        ``{op: {backend: text}}``, ops in the order of the documentation, backends best first.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device_type = torch.device(device).type
    return {choice.op: choice.report(device_type) for choice in CHOICES}


def hopper_kernels() -> str:
    """Whether attention runs Hopper's own kernels (kernels/hopper) on the current GPU: "on", or "off: " and why."""
    if not torch.cuda.is_available():
        return serves.status(None)
    major, minor = torch.cuda.get_device_capability()
    return serves.status(10 * major + minor)
