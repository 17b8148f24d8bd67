"""What the functions share: the errors flash_attn raises for a mistake, and its looser arguments in the ops' terms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pytransformer.ops import checks

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def raises_as_flash_attn(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The ops' ValueError and TypeError become RuntimeError, which flash_attn's checks of shapes, dtypes and options raise."""

    @functools.wraps(function)
    def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise RuntimeError(str(error)) from error

    return checked


def check_dimensions(name: str, tensor: Any, layout: str) -> None:
    """A tensor with as many dimensions as ``layout`` names: TypeError otherwise, IndexError for too few and RuntimeError for too many."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {checks.describe(tensor)}")
    wanted = layout.count(",") + 1
    if tensor.ndim != wanted:
        message = f"{name} must have {wanted} dimensions, {layout}, got shape {tuple(tensor.shape)}"
        raise IndexError(message) if tensor.ndim < wanted else RuntimeError(message)


def check_packing(name: str, tensor: Tensor, dimension: int, count: int) -> None:
    """Exactly ``count`` tensors lie along ``dimension``: IndexError for fewer; more, which flash_attn overlooks, is a RuntimeError."""
    found = tensor.shape[dimension]
    if found != count:
        message = f"{name} must hold {count} tensors in dimension {dimension}, got shape {tuple(tensor.shape)}"
        raise IndexError(message) if found < count else RuntimeError(message)


def check_alibi_slopes(alibi_slopes: Any, batch: int | None = None, num_heads: int = 0) -> None:
    """RuntimeError unless float32 and, where ``batch`` is given, (num_heads) or (batch, num_heads)."""
    if alibi_slopes is None:
        return
    checks.check_tensor("alibi_slopes", alibi_slopes, ndim=(1, 2), dtypes=(torch.float32,))
    if batch is not None and tuple(alibi_slopes.shape) not in ((num_heads,), (batch, num_heads)):
        raise RuntimeError(
            f"alibi_slopes must have shape (num_heads) = ({num_heads},) or (batch, num_heads) = {(batch, num_heads)}, "
            f"got {tuple(alibi_slopes.shape)}"
        )


def window_of(window_size: Any) -> tuple[int, int]:
    """(left, right) with -1 for anything negative, all of which means unlimited in flash_attn.

    Any pair does, as there, where its two elements are only looked up: a tuple, a list, a tensor or array of two integers (read on the
    host), or a pair of tensors or of numpy's integers.
    """
    try:
        left, right = window_size.tolist() if _is_array(window_size) else window_size
    except (TypeError, ValueError):
        raise RuntimeError(
            f"window_size must be a pair (left, right) of ints, got {checks.describe(window_size)}"
        ) from None
    left, right = (
        checks.check_int(f"window_size[{place}] ({side})", number.item() if _is_array(number) else number)
        for place, (side, number) in enumerate((("left", left), ("right", right)))
    )
    return max(left, -1), max(right, -1)


def _is_array(value: Any) -> bool:
    """Whether it is a tensor, or an array or number of numpy's."""
    if isinstance(value, (int, torch.SymInt, tuple, list)):  # the tracer asks a symbolic number nothing else
        return False
    return isinstance(value, Tensor) or (hasattr(value, "dtype") and hasattr(value, "tolist"))


def softcap_of(softcap: Any) -> float:
    """0.0 (off) for anything that is not positive, as in flash_attn."""
    return max(checks.check_float("softcap", softcap), 0.0)


def with_contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where elements of the last dimension are not adjacent."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
