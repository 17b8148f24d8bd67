"""Argument checks shared by the ops: each error names the argument, what was given and what is allowed.

Checks of shapes, dtypes and devices cost no synchronisation. Values that live on a GPU are read back only under ``PYTRANSFORMER_DEBUG=1``;
on a CPU in eager mode reading is free, so they are always checked there (:func:`readable`).
"""

from __future__ import annotations

import itertools
import math
import numbers
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer.ops.overlap import overlaps_itself

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# float64 is for the golden results: the reference and torch serve it, kernels do not.
FLOAT_DTYPES_AND_DOUBLE = (*FLOAT_DTYPES, torch.float64)
DEBUG = os.environ.get("PYTRANSFORMER_DEBUG", "0") == "1"


def describe(value: object) -> str:
    """Short form of a value for an error message: tensors by shape, dtype and device."""
    if isinstance(value, Tensor):
        return f"a {short(value.dtype)} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def short(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def readable(tensor: Tensor) -> bool:
    """Whether values may be read on the host for checking: eager CPU tensors, or any eager tensor under PYTRANSFORMER_DEBUG=1."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack() > 0:
        return False
    if tensor.is_cuda:
        return DEBUG and not torch.cuda.is_current_stream_capturing()
    return tensor.device.type == "cpu"


def check_tensor(
    name: str,
    value: object,
    *,
    ndim: int | Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
    layout: str = "",
) -> Tensor:
    """A dense tensor with an allowed rank, dtype and device.

    Args:
        layout: the meaning of the dimensions, for the message, e.g. "(batch, seqlen, num_heads, head_dim)".

    Raises:
        TypeError: not a tensor, sparse or nested, or a dtype that is not allowed.
        ValueError: wrong rank or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must be of dtype {' or '.join(map(short, dtypes))}, got {short(value.dtype)}")
    if ndim is not None:
        allowed = (ndim,) if isinstance(ndim, int) else tuple(ndim)
        if value.ndim not in allowed:
            wanted = " or ".join(map(str, allowed))
            suffix = f": {layout}" if layout else ""
            raise ValueError(f"{name} must have {wanted} dimensions{suffix}, got shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")
    return value


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None], layout: str) -> None:
    """Each dimension equal to ``expected`` (``None`` = any); ValueError naming the layout and both shapes otherwise."""
    matches = tensor.ndim == len(expected)
    if matches:
        for size, want in zip(tensor.shape, expected):
            if want is not None and size != want:
                matches = False
    if not matches:
        wanted = ", ".join("any" if want is None else str(want) for want in expected)
        raise ValueError(f"{name} must have shape {layout} = ({wanted}), got {tuple(tensor.shape)}")


def check_broadcastable(name: str, tensor: Tensor, target: Sequence[int], layout: str) -> None:
    """Broadcasts to ``target`` without adding to it; ValueError otherwise."""
    fits = tensor.ndim <= len(target)
    if fits:
        for size, want in zip(reversed(tensor.shape), reversed(tuple(target))):
            if size != 1 and size != want:
                fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to {layout} = {tuple(target)}, got shape {tuple(tensor.shape)}")


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """TypeError unless both have one dtype."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name} ({short(other.dtype)}), got {short(tensor.dtype)}")


def check_last_dim_contiguous(name: str, tensor: Tensor) -> None:
    """ValueError unless elements of the last dimension are adjacent (stride 1)."""
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be contiguous in its last dimension (stride 1), got strides {tuple(tensor.stride())}; "
            f"call {name}.contiguous()"
        )


# What torch's own functions take as numbers, these checks do: Python's, numpy's, and tensors without dimensions that need no gradient. All
# return Python's, so what was checked has to be used.


def check_bool(name: str, value: object) -> bool:
    """True or False, numpy's too; TypeError otherwise."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {describe(value)}")


def check_int(name: str, value: Any, *, minimum: int | None = None, maximum: int | None = None) -> int:
    """An integer (or SymInt under tracing) within bounds; TypeError / ValueError otherwise."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        value = _python_number(name, value, numbers.Integral, "an int")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise ValueError(f"{name} must be {_bounds(minimum, maximum)}, got {value}")
    return value  # type: ignore[no-any-return]


def check_float(
    name: str,
    value: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> float:
    """A finite number with ``minimum <= value <= maximum`` and ``value < below``; TypeError / ValueError otherwise."""
    if type(value) not in (float, int) and not isinstance(value, (torch.SymInt, torch.SymFloat)):
        value = _python_number(name, value, numbers.Real, "a number")
    # NaN too; comparisons, unlike math.isfinite, can be traced with symbolic numbers.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    low = minimum is not None and value < minimum
    high = (maximum is not None and value > maximum) or (below is not None and value >= below)
    if low or high:
        bounds = _bounds(minimum, maximum) if below is None else f"at least {minimum} and below {below}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return value  # type: ignore[no-any-return]


def _python_number(name: str, value: Any, kind: type, wanted: str) -> Any:
    """A number of this kind as one of Python's; TypeError with what is wanted for anything else."""
    if isinstance(value, Tensor):
        integral = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if (
            value.ndim == 0
            and not value.requires_grad
            and (integral or (value.is_floating_point() and kind is numbers.Real))
        ):
            return value.item()
    elif isinstance(value, kind) and not isinstance(value, bool):
        return int(value) if isinstance(value, numbers.Integral) else float(value)  # type: ignore[arg-type]
    raise TypeError(f"{name} must be {wanted}, got {describe(value)}")


def _bounds(minimum: float | None, maximum: float | None) -> str:
    if maximum is None:
        return f"at least {minimum}"
    if minimum is None:
        return f"at most {maximum}"
    return f"between {minimum} and {maximum}"


def check_window(name: str, value: Any) -> tuple[int, int]:
    """(left, right), two integers of at least -1; -1 = unlimited."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be a pair (left, right) of ints, got {describe(value)}")
    left = check_int(f"{name}[0] (left)", value[0], minimum=-1)
    right = check_int(f"{name}[1] (right)", value[1], minimum=-1)
    return left, right


def check_gqa(num_heads: int, num_kv_heads: int, q_name: str = "q", k_name: str = "k") -> None:
    """ValueError unless the query heads divide evenly among the key/value heads."""
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"the number of heads of {q_name} must be a multiple of that of {k_name}, got {num_heads} and {num_kv_heads}"
        )


def check_head_dim(name: str, head_dim: int) -> None:
    """ValueError unless at least 1; what kernels do not serve is a limit of their backends."""
    if head_dim < 1:
        raise ValueError(f"{name} must have a head_dim of at least 1, got {head_dim}")


def check_cu_seqlens(
    name: str, value: object, total: int, device: torch.device, batch: int | None = None, unit: str = "batch"
) -> Tensor:
    """int32, (batch + 1), starting at 0, never decreasing, ending at ``total``; values checked where :func:`readable`.

    ``unit``: what there are ``batch`` of, for the messages.
    """
    tensor = check_tensor(name, value, ndim=1, dtypes=(torch.int32,), device=device, layout=f"({unit} + 1)")
    if tensor.shape[0] < 1 or (batch is not None and tensor.shape[0] != batch + 1):
        wanted = "at least 1 entry" if batch is None else f"{batch + 1} entries ({unit} + 1)"
        raise ValueError(f"{name} must have {wanted}, got shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
    if readable(tensor):
        values = tensor.tolist()
        if values[0] != 0 or values[-1] != total or any(after < before for before, after in itertools.pairwise(values)):
            shown = values if len(values) <= 8 else [*values[:4], "…", *values[-3:]]
            raise ValueError(
                f"{name} must start at 0, never decrease and end at the number of tokens ({total}), got {shown}"
            )
    return tensor


def check_values(name: str, tensor: Tensor, minimum: int, maximum: int, meaning: str) -> None:
    """Integer values within ``minimum..maximum`` inclusive, where :func:`readable`; the message shows the first offender."""
    if tensor.numel() == 0 or not readable(tensor):
        return
    low, high = (int(value) for value in torch.aminmax(tensor))
    if low < minimum or high > maximum:
        bad = low if low < minimum else high
        where = (tensor == bad).nonzero()[0].tolist()
        raise ValueError(f"{name} must hold {meaning} from {minimum} to {maximum}, got {bad} at index {where}")


def check_no_nan(name: str, tensor: Tensor) -> None:
    """ValueError if a value is NaN, where :func:`readable`."""
    if readable(tensor) and bool(torch.isnan(tensor.float()).any()):
        raise ValueError(f"{name} must not contain NaN")


def shares_own_memory(tensor: Tensor) -> bool:
    """Whether two elements of a tensor share memory; of sizes that are symbols, whether it is expanded."""
    if torch.compiler.is_compiling() or not all(type(n) is int for n in (*tensor.shape, *tensor.stride())):
        return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride()))
    return overlaps_itself(tuple(tensor.shape), tensor.stride())


def check_written(name: str, tensor: Tensor) -> None:
    """ValueError if elements of a tensor that is written share memory, as those of an expanded one."""
    shape, strides = tuple(tensor.shape), tuple(tensor.stride())
    if shares_own_memory(tensor):
        raise ValueError(
            f"{name} is written to, so it must not be expanded, nor its elements share memory in another way, got strides {strides} "
            f"for shape {shape}"
        )


def refuse_grad(op: str, **tensors: Tensor | None) -> None:
    """RuntimeError if autograd would need a derivative of an op that has none."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(f"{op} is not differentiable, but {name} requires grad; call it under torch.no_grad()")
