"""Which calls of attention Hopper's kernels serve: an ordered list of reasons why one falls to the portable kernel, and the switch.

Nothing here imports Triton, so that ``pytransformer info`` can ask wherever it runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pytransformer.ops.attention.call import AttentionCall

ARCH = 90
# (head_dim of q and k, of v)
HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
BACKWARD_HEAD_DIMS = ((64, 64), (128, 128))
# Whose Gluon the kernels are written for: it changes from release to release.
RELEASES = ("3.6", "3.9")
SWITCH = "PYTRANSFORMER_HOPPER"

# A descriptor's address and strides are multiples of 16 bytes; its strides are shorter than 2^40, and a ragged one has 2^30 rows.
_ALIGNMENT, _MOST_STRIDE, _MOST_ROWS = 16, 2**40, 2**30
# Coordinates of a box have 32 bits.
_MOST_SUMS = 2**31


# --- The switch. ------------------------------------------------------------------------------------------------------------------------

# Off until a run on a GPU is on record.
_is_on = os.environ.get(SWITCH, "0").lower() in ("1", "true", "on", "yes", "y")
_failure: str | None = None


def is_on() -> bool:
    """Whether calls may go to Hopper's kernels: PYTRANSFORMER_HOPPER=1, or :func:`switched`, and none has failed to compile."""
    return _is_on and _failure is None


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Inside, Hopper's kernels are on, or off. Launches that were kept before know nothing of it: see ``hopper`` of ops/attention."""
    global _is_on, _failure
    before, _is_on, _failure = (_is_on, _failure), on, None
    try:
        yield
    finally:
        _is_on, _failure = before


def switch_off(reason: str) -> None:
    """From now on no call goes to Hopper's kernels, as one of them has failed to compile or launch."""
    global _failure
    _failure = reason


def status(arch: int | None) -> str:
    """Whether calls go to Hopper's kernels, and if not why: a line for ``pytransformer info``.

    Args:
        arch: compute capability of the GPU that is asked about, ``None`` without one.
    """
    if _failure is not None:
        return f"off: {_failure}"
    reason = "no GPU" if arch is None else _refuse_arch(arch) or triton_missing()
    if reason is not None:
        return f"off: {reason}"
    return "on" if _is_on else f"off: not yet measured on a GPU; {SWITCH}=1 switches them on"


# --- The list. --------------------------------------------------------------------------------------------------------------------------


def _refuse_arch(arch: int) -> str | None:
    return None if arch == ARCH else f"the kernels are for sm_{ARCH}, and this is sm_{arch}"


@functools.cache
def triton_missing() -> str | None:
    """What this Triton lacks that the kernels need, or ``None``."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    version = triton.__version__
    if ".".join(version.split(".")[:2]) not in RELEASES:
        return f"the kernels are written for Gluon of Triton {' and '.join(RELEASES)}, and this is {version}"
    try:
        from .forward import attention_forward_kernel as _  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Triton {version} lacks what the kernels need: {error}"
    return None


def _refuse_triton(call: AttentionCall) -> str | None:
    return triton_missing()


def _refuse_dtype(call: AttentionCall) -> str | None:
    dtype = call.q.dtype
    return None if dtype in (torch.float16, torch.bfloat16) else f"float16 and bfloat16 alone, not {dtype}"


def _refuse_head_dim(call: AttentionCall) -> str | None:
    dims = call.q.shape[-1], call.v.shape[-1]
    return None if dims in HEAD_DIMS else f"head_dim {dims[0]} with {dims[1]} of v is none of {HEAD_DIMS}"


def _refuse_option(call: AttentionCall) -> str | None:
    for name in ("mask", "bias", "key_padding_mask", "block_mask", "alibi_slopes"):
        if getattr(call, name) is not None:
            return name
    return "dropout" if call.dropout_p > 0.0 else None


def _refuse_scale(call: AttentionCall) -> str | None:
    # The largest product gives the largest score only if it is positive.
    return None if call.softmax_scale > 0.0 else f"softmax_scale {call.softmax_scale} is not positive"


def _refuse_empty(call: AttentionCall) -> str | None:
    return "no queries or no keys" if call.q.numel() == 0 or call.k.numel() == 0 else None


def unwalkable(name: str, tensor: torch.Tensor) -> str | None:
    """Why the copy engine cannot walk a tensor of such strides, wherever it begins, or ``None``."""
    if tensor.stride(-1) != 1:
        return f"the features of {name} do not lie side by side"
    steps = [size for length, size in zip(tensor.shape[:-1], tensor.stride()) if length > 1]
    if any(not 0 < step * tensor.element_size() < _MOST_STRIDE for step in steps):
        return f"strides {tensor.stride()} of {name} are none that a descriptor has"
    if any(step * tensor.element_size() % _ALIGNMENT for step in steps):
        return f"strides {tensor.stride()} of {name} are no multiples of {_ALIGNMENT} bytes"
    return None


def _refuse_layout(call: AttentionCall) -> str | None:
    for name in ("q", "k", "v"):
        tensor = getattr(call, name)
        if tensor.dim() == 3 and tensor.shape[0] > _MOST_ROWS:
            return f"{name} has {tensor.shape[0]} rows, and a descriptor of packed sequences {_MOST_ROWS}"
        if (complaint := unwalkable(name, tensor)) is not None:
            return complaint
    return None


_REASONS: tuple[Callable[[AttentionCall], str | None], ...] = (
    _refuse_triton,
    _refuse_dtype,
    _refuse_head_dim,
    _refuse_option,
    _refuse_scale,
    _refuse_empty,
    _refuse_layout,
)


def refusal(call: AttentionCall, arch: int) -> str | None:
    """Why Hopper's forward kernel does not serve calls like this one, or ``None``. Looks at no value and no address.

    Args:
        call: checked.
        arch: compute capability of the GPU, major * 10 + minor.
    """
    reason = _refuse_arch(arch)
    for refuse in _REASONS:
        reason = reason or refuse(call)
    return reason


def _refuse_reductions(call: AttentionCall) -> str | None:
    from .names import HAS_REDUCTIONS

    return None if HAS_REDUCTIONS else "this Triton's copy engine adds nothing up, as dq is"


def _refuse_determinism(call: AttentionCall) -> str | None:
    return (
        "parts of dq are added up in no fixed order, and the call asks for determinism" if call.deterministic else None
    )


def _refuse_backward_head_dim(call: AttentionCall) -> str | None:
    dims = call.q.shape[-1], call.v.shape[-1]
    return (
        None
        if dims in BACKWARD_HEAD_DIMS
        else f"head_dim {dims[0]} with {dims[1]} of v is none of {BACKWARD_HEAD_DIMS}"
    )


def _refuse_rows(call: AttentionCall) -> str | None:
    """Sums of dq are addressed by their row: of each head and sequence whole tiles."""
    from ..attention.options import geometry
    from .backward import BLOCK_M

    shape, block = geometry(call), BLOCK_M.value
    rows = shape.tiles(shape.seqlen_q, block) * shape.slots(shape.num_heads) * block
    return None if rows < _MOST_SUMS else f"{rows} rows of dq, of all heads, are more than {_MOST_SUMS - 1}"


_BACKWARD_REASONS: tuple[Callable[[AttentionCall], str | None], ...] = (
    _refuse_reductions,
    _refuse_determinism,
    _refuse_backward_head_dim,
    _refuse_rows,
)


def refusal_backward(call: AttentionCall, arch: int) -> str | None:
    """Why Hopper's backward kernel does not serve the gradients of calls like this one, or ``None``; see :func:`refusal`."""
    reason = refusal(call, arch)
    for refuse in _BACKWARD_REASONS:
        reason = reason or refuse(call)
    return reason


def is_aligned(call: AttentionCall) -> bool:
    """Whether the tensors lie where a descriptor can begin, which differs between calls that are otherwise alike."""
    return (call.q.data_ptr() | call.k.data_ptr() | call.v.data_ptr()) % _ALIGNMENT == 0
