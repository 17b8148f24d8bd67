"""What the ways of linear_cross_entropy share: the tokens go through in chunks, and each chunk's logits become its gradient in place.

For T tokens, H features and V words: 6·T·H·V FLOP for loss and gradients in one pass (as the unfused head), and one chunk's logits instead
of T·V logits, their softmax and their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops.backend import Backend, Limit, Outputs
from pytransformer.ops.linear_cross_entropy.call import GradientCall, LossesCall, Options, TotalCall, Wanted

Result = tuple[Tensor, Tensor, Tensor, Tensor]
Work = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Wanted, Options], Result]
"""Losses of the tokens and the gradients of ``Σ dlosses · losses``, of their plain sum where ``dlosses`` is None.

Args:
    x: (tokens, hidden_size); weight: (vocab_size, hidden_size); targets: (tokens); bias: (vocab_size); dlosses: (tokens).

Returns:
    losses, dx, dweight, dbias. dweight and dbias are at least float32; a gradient that is not wanted is an empty tensor.
"""


class Ways(NamedTuple):
    """One backend's part in each of the ops."""

    losses: Backend
    total: Backend
    gradients: Backend


def ways(name: str, work: Work, limits: tuple[Limit, ...] = ()) -> Ways:
    """The backends that do their work in chunks."""

    def run(
        call: Any, dlosses: Tensor | None, wanted: Wanted, options: Options
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        x, targets = call.x.reshape(-1, call.x.shape[-1]), call.targets.reshape(-1)
        losses, dx, *others = work(x, call.weight, targets, call.bias, dlosses, wanted, options)
        gradients = (dx.view(call.x.shape) if wanted.dx else dx, *others)
        return losses, [gradient if want else None for gradient, want in zip(gradients, wanted)]

    def losses(call: LossesCall) -> Outputs:
        return (run(call, None, Wanted(False, False, False), Options(*call[4:]))[0].view(call.targets.shape),)

    def total(call: TotalCall) -> Outputs:
        found, gradients = run(call, None, Wanted(*call[4:7]), Options(*call[7:]))
        return (found.sum(), *gradients)

    def gradients(call: GradientCall) -> Outputs:
        found = run(call, call.dlosses.reshape(-1), Wanted(*call[5:8]), Options(*call[8:]))[1]
        return tuple(None if gradient is None else gradient.to(call.x.dtype) for gradient in found)

    return Ways(*(Backend(name, part, limits) for part in (losses, total, gradients)))


def gradient_buffers(x: Tensor, weight: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dweight and dbias in at least float32, uninitialised; without elements where they are not wanted."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty(x.shape if wanted.dx else 0, dtype=x.dtype, device=x.device),
        torch.empty(weight.shape if wanted.dweight else 0, dtype=wide, device=x.device),
        torch.empty(weight.shape[0] if wanted.dbias else 0, dtype=wide, device=x.device),
    )


def product_into(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool = False) -> None:
    """``out = left @ right``, or with ``accumulate`` ``out += left @ right``, without a temporary.

    Added up in float32 and, where ``out`` is float32, not rounded before.
    """
    if not out.is_cuda:
        # A CPU has no product of two dtypes; interpreted kernels do not mind.
        left, right = left.to(out.dtype), right.to(out.dtype)
        if out.dtype.itemsize == 2:
            # oneDNN's product with AMX (torch 2.13) reads behind the last column of rows with a stride: a NaN there makes the result NaN.
            left, right = left.contiguous(), right.contiguous()
    if not accumulate and out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif not accumulate:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
