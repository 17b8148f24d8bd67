"""A call of the loss and of its gradient, and the checks of every argument on the host, each error naming what is allowed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.precision import autocast_to_lower


class LossesCall(NamedTuple):
    """A call that returns the loss of each token."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float


class TotalCall(NamedTuple):
    """A call that returns their sum; ``want_...``: which gradients to compute along with it."""

    x: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    want_dx: bool
    want_dweight: bool
    want_dbias: bool
    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float


class GradientCall(NamedTuple):
    """A call of the backward pass of :class:`LossesCall`; ``dlosses``: the gradient of each token's loss."""

    dlosses: Tensor
    x: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    want_dx: bool
    want_dweight: bool
    want_dbias: bool
    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float


class Options(NamedTuple):
    """What the loss of one token depends on beside its logits."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float


class Wanted(NamedTuple):
    """Which gradients to compute."""

    dx: bool
    dweight: bool
    dbias: bool


def check_loss(call: Any) -> Any:
    """Checks a :class:`LossesCall` or :class:`TotalCall` as the user gave it; see ``linear_cross_entropy`` for the errors."""
    x, weight, bias = _check_tensors(call.x, call.weight, call.targets, call.bias)
    return call._replace(x=x, weight=weight, bias=bias, **_checked_options(call, weight.shape[0])._asdict())


def _check_tensors(x: Any, weight: Any, targets: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    dtypes = checks.FLOAT_DTYPES_AND_DOUBLE
    x = checks.check_tensor("x", x, dtypes=dtypes)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., hidden_size) with hidden_size of at least 1, got {tuple(x.shape)}")
    weight = checks.check_tensor(
        "weight", weight, ndim=2, dtypes=dtypes, device=x.device, layout="(vocab_size, hidden_size)"
    )
    checks.check_shape("weight", weight, (None, x.shape[-1]), "(vocab_size, hidden_size of x)")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row (vocab_size), got shape {tuple(weight.shape)}")
    targets = checks.check_tensor("targets", targets, dtypes=(torch.int64, torch.int32), device=x.device)
    checks.check_shape("targets", targets, x.shape[:-1], "x.shape[:-1]")
    x, weight = autocast_to_lower(x), autocast_to_lower(weight)
    checks.check_same_dtype("weight", weight, "x", x)
    checks.check_last_dim_contiguous("x", x)
    checks.check_last_dim_contiguous("weight", weight)
    if bias is not None:
        bias = checks.check_tensor("bias", bias, ndim=1, dtypes=dtypes, device=x.device, layout="(vocab_size)")
        checks.check_shape("bias", bias, (weight.shape[0],), "(vocab_size)")
        bias = autocast_to_lower(bias)
        checks.check_same_dtype("bias", bias, "x", x)
    return x, weight, bias


def _checked_options(call: Any, vocab_size: int) -> Options:
    targets, ignore_index = call.targets, checks.check_int("ignore_index", call.ignore_index)
    options = Options(
        ignore_index,
        checks.check_float("label_smoothing", call.label_smoothing, minimum=0.0, maximum=1.0),
        checks.check_float("softcap", call.softcap, minimum=0.0),
        checks.check_float("z_loss", call.z_loss, minimum=0.0),
    )
    if checks.readable(targets):
        inside = targets.masked_fill(targets == ignore_index, 0)
        meaning = f"token ids, or ignore_index ({ignore_index}),"
        checks.check_values("targets", inside, 0, vocab_size - 1, meaning)
    return options
