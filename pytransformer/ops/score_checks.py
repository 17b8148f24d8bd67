"""Checks of what scores are made of, for every op that has scores: mask, bias, ALiBi slopes, sinks, softmax_scale."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASK_DTYPES = (torch.bool, *INTEGER_DTYPES)


class Extent(NamedTuple):
    """What one dimension of a mask or bias must have, unless it is 1.

    Attributes:
        size: ``None`` = not known here.
        is_least: whether more will do.
    """

    size: int | None
    is_least: bool = False


class Scores(NamedTuple):
    """The shape of a call's scores.

    Attributes:
        layout: of the dimensions, for messages.
        what: describes the tensors in messages: " of packed sequences" or "".
    """

    batch: int
    num_heads: int
    rows: Extent
    cols: Extent
    layout: str = "(batch, num_heads, seqlen_q, seqlen_k)"
    what: str = ""


def check_mask(
    name: str, value: Any, q: Tensor, additive: str, ndim: int | None = None, layout: str = "(batch, seqlen_k)"
) -> Tensor:
    """A boolean or integer mask, returned boolean; TypeError for a floating-point one, with how ``additive`` ones are passed."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        # Both kinds are about, and each passed as the other gives wrong numbers in silence.
        raise TypeError(
            f"{name} must be boolean or integer, got {checks.short(value.dtype)}; {additive} (0 = attend, -inf = hide), "
            f"and one of ones and zeros (1 = attend, 0 = hide) as {name}.bool()"
        )
    mask = checks.check_tensor(name, value, ndim=ndim, dtypes=MASK_DTYPES, device=q.device, layout=layout)
    return mask if mask.dtype == torch.bool else mask != 0


def check_score_terms(call: Any, scores: Scores) -> Any:
    """mask, bias, alibi_slopes and sinks of a call; returns it with its mask boolean."""
    if call.mask is not None:
        call = call._replace(mask=check_mask("mask", call.mask, call.q, "pass an additive mask as bias"))
        check_score_shape("mask", call.mask, scores)
    if call.bias is not None:
        if isinstance(call.bias, Tensor) and call.bias.dtype in MASK_DTYPES:
            dtype = checks.short(call.bias.dtype)
            raise TypeError(f"bias must be floating-point, got {dtype}; pass a boolean mask as mask")
        _check_floating("bias", call.bias, call.q)
        check_score_shape("bias", call.bias, scores)
    if call.alibi_slopes is not None:
        layout = "(num_heads) or (batch, num_heads)"
        slopes = _check_floating("alibi_slopes", call.alibi_slopes, call.q, (1, 2), layout)
        expected = (scores.num_heads,) if slopes.ndim == 1 else (scores.batch, scores.num_heads)
        checks.check_shape(
            "alibi_slopes", slopes, expected, "(num_heads)" if slopes.ndim == 1 else "(batch, num_heads)"
        )
    if call.sinks is not None:
        sinks = _check_floating("sinks", call.sinks, call.q, 1, "(num_heads)")
        checks.check_shape("sinks", sinks, (scores.num_heads,), "(num_heads)")
    return call


def _check_floating(
    name: str, value: Any, q: Tensor, ndim: int | tuple[int, ...] | None = None, layout: str = ""
) -> Tensor:
    # float64 belongs to golden results: beside float32 queries it would widen the scores on one backend and not on another.
    dtypes = checks.FLOAT_DTYPES_AND_DOUBLE if q.dtype == torch.float64 else checks.FLOAT_DTYPES
    return checks.check_tensor(name, value, ndim=ndim, dtypes=dtypes, device=q.device, layout=layout)


def check_score_shape(name: str, tensor: Tensor, scores: Scores) -> None:
    """ValueError unless it broadcasts to the scores."""
    sizes = four_sizes(tensor)
    fits = len(sizes) == 4 and sizes[0] in (1, scores.batch) and sizes[1] in (1, scores.num_heads)
    if not fits or not _fits(sizes[2], scores.rows) or not _fits(sizes[3], scores.cols):
        wanted = f"({scores.batch}, {scores.num_heads}, {shown(scores.rows)}, {shown(scores.cols)})"
        raise ValueError(
            f"{name}{scores.what} must broadcast to {scores.layout} = {wanted}, got shape {tuple(tensor.shape)}"
        )


def four_sizes(tensor: Tensor) -> tuple[int, ...]:
    """Sizes with ones in front, as they broadcast."""
    return (1,) * (4 - tensor.ndim) + tuple(tensor.shape)


def four_dims(tensor: Tensor) -> Tensor:
    """A mask or bias in the shape of ``four_sizes``."""
    return tensor.reshape(four_sizes(tensor))


def _fits(size: int, extent: Extent) -> bool:
    if size == 1 or extent.size is None:
        return True
    return size >= extent.size if extent.is_least else size == extent.size


def shown(extent: Extent) -> str:
    """For messages."""
    if extent.size is None:
        return "any"
    return f"at least {extent.size}" if extent.is_least else str(extent.size)


def check_softmax_scale(value: Any, head_dim: int) -> float:
    """The given number, or ``1 / sqrt(head_dim)`` for ``None``."""
    return 1.0 / math.sqrt(head_dim) if value is None else checks.check_float("softmax_scale", value)


def longest(cu_seqlens: Tensor | None) -> int | None:
    """Length of the longest packed sequence, where it may be read."""
    if cu_seqlens is None or not checks.readable(cu_seqlens):
        return None
    return max((end - start for start, end in itertools.pairwise(cu_seqlens.tolist())), default=0)


def check_length_hint(side: str, hint: Any, cu_seqlens: Tensor | None, kind: str) -> int | None:
    """``max_seqlen_<side>``: an int for packed tensors (of this kind) only, not below the longest sequence."""
    if hint is None:
        return None
    name = f"max_seqlen_{side}"
    length = checks.check_int(name, hint, minimum=0)
    if cu_seqlens is None:
        raise ValueError(f"{name} is for packed {kind}: pass cu_seqlens_{side} too, got {length} without it")
    known = longest(cu_seqlens)
    if known is not None and length < known:
        raise ValueError(f"{name} must be at least the longest sequence ({known}), got {length}")
    return length
