"""What every launcher shares: the limits of the device it launches on, and small integer helpers.

Launch policy (tile sizes, warps, stages) is decided from :func:`device_limits`, never by asking the driver elsewhere, so that the same
decision can be taken, printed and compiled on a machine without a GPU: see :func:`assume_arch`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

# Triton's default for this changes between releases; the kernels are written, and their SASS is gated, with fused multiply-add on.
COMMON_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class DeviceLimits:
    """What launch policy may depend on.

    Attributes:
        arch: compute capability as major * 10 + minor, e.g. 90.
        num_sms: streaming multiprocessors.
        shared_memory: largest dynamic shared memory of one block, in bytes.
    """

    arch: int
    num_sms: int
    shared_memory: int


# Figures of the CUDA programming guide (opt-in shared memory per block) with the SM count of a common part of each family.
_NOMINAL = {
    80: DeviceLimits(80, 108, 166912),
    86: DeviceLimits(86, 84, 101376),
    89: DeviceLimits(89, 142, 101376),
    90: DeviceLimits(90, 132, 232448),
    100: DeviceLimits(100, 148, 232448),
    120: DeviceLimits(120, 170, 101376),
}
_assumed: DeviceLimits | None = None


@functools.cache
def _query(index: int) -> DeviceLimits:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.major * 10 + properties.minor
    shared_memory = getattr(properties, "shared_memory_per_block_optin", None) or _NOMINAL[80].shared_memory
    return DeviceLimits(arch, properties.multi_processor_count, shared_memory)


def device_limits(device: torch.device) -> DeviceLimits:
    """Limits of ``device``; a tensor on the CPU (interpreter, compile gate) is served as if it were on an sm_90 part."""
    if _assumed is not None:
        return _assumed
    if device.type != "cuda":
        return _NOMINAL[90]
    return _query(torch.cuda.current_device() if device.index is None else device.index)


@contextlib.contextmanager
def assume_arch(arch: int) -> Iterator[DeviceLimits]:
    """Inside, launch policy answers for a GPU of compute capability ``arch`` (80, 86, 89, 90, 100 or 120), whatever is there."""
    global _assumed
    if arch not in _NOMINAL:
        raise ValueError(f"arch must be one of {sorted(_NOMINAL)}, got {arch}")
    before, _assumed = _assumed, replace(_NOMINAL[arch])
    try:
        yield _assumed
    finally:
        _assumed = before


@contextlib.contextmanager
def assume_current_gpu() -> Iterator[DeviceLimits]:
    """Inside, launch policy answers for the current GPU whatever a tensor's device is."""
    global _assumed
    before, _assumed = _assumed, _query(torch.cuda.current_device())
    try:
        yield _assumed
    finally:
        _assumed = before


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` was set before they were imported)."""
    return bool(triton.knobs.runtime.interpret)


def _harden_interpreter() -> None:
    """Triton's own interpreter is wrong in bfloat16 and 8-bit floats: who sets ``TRITON_INTERPRET=1`` gets the hardened one.

    Raises:
        RuntimeError: the variable was set after triton had been imported.
        UnsupportedTritonError: of this Triton it is not known how.
    """
    from pytransformer import triton_interpreter

    if not triton_interpreter.installed():  # with whatever options
        triton_interpreter.install()


# Every kernel imports this module before it is launched.
if interpreting():
    _harden_interpreter()


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, as Triton launches on the current device; does nothing on a CPU."""
    if tensor.is_cuda and _several_devices():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


_several_devices = functools.cache(lambda: torch.cuda.device_count() > 1)


def cdiv(numerator: int, denominator: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-numerator // denominator)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a new tensor, as ``torch.empty`` makes them."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))[-len(shape) :] if len(shape) > 0 else ()


def strides_by_name(strides: Mapping[str, tuple[str, Sequence[int]]]) -> dict[str, int]:
    """``{"q": ("batch token", (64, 8))}`` as ``{"stride_q_batch": 64, "stride_q_token": 8}``; strides beyond the names are left out."""
    return {
        f"stride_{name}_{dim}": stride
        for name, (dims, of_dims) in strides.items()
        for dim, stride in zip(dims.split(), of_dims)
    }


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8: for kernels that take float8 apart by hand, as parts before sm_89 cannot convert it, and for masks."""
    return tensor.view(torch.uint8)


def viewed(
    given: Sequence[Any], views: Iterable[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]
) -> tuple[Any, ...]:
    """What is given, with the views made of what is at their places."""
    changed = list(given)
    for place, view in views:
        changed[place] = view(changed[place])
    return tuple(changed)


class NewTensor:
    """Makes contiguous, uninitialised tensors of one shape and dtype.

    Args:
        like: has this shape; the calls' tensors have its strides too.
        dtype: None = that of ``like``.
    """

    __slots__ = ("_as_like", "_device", "_dtype", "_shape", "_strides")

    def __init__(self, like: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self._shape, self._strides = like.shape, contiguous_strides(like.shape)
        self._dtype, self._device = dtype or like.dtype, like.device
        # empty_like takes the host half the time of any other way to a new tensor.
        self._as_like = like.stride() == self._strides and self._dtype == like.dtype

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """A new tensor; ``like`` is one with the properties of that given at first."""
        if self._as_like:
            return torch.empty_like(like)
        return torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=self._device)


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is not below ``value`` (1 for 0)."""
    return 1 << max(value - 1, 0).bit_length()


def scale_strides(scale: torch.Tensor | None) -> tuple[int, ...]:
    """Of per-head (heads) or per-token (pages, page_size, heads) scales."""
    return (0, 0, 0) if scale is None else (0,) * (3 - scale.dim()) + scale.stride()
