"""TMA descriptors of launches that are made again: a tensor's map is encoded once for each address, and kept.

A kernel that copies by TMA is given, for each tensor, a map of 128 bytes: address, shape, strides, box, dtype, swizzle. Triton writes each
descriptor's type as a text, to find the kernel, and encodes its map anew in every launch, 10 to 30 µs for each. Here the launch knows all
but the address beforehand, and looks the map up by it; for a new address that takes 4 µs, for one that it knows a tenth of one.

A map holds no tensor alive and needs none: it is these numbers and nothing else. So memory that was freed and given to another tensor of
the same shape is rightly served by the map that was made for the first; one of another shape has another :class:`HostDescriptor`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..prepared import Derived

# TMA reads and writes 16 bytes at a time: the first address and all strides but the last are multiples.
ALIGNMENT = 16
_MOST_DIMENSIONS = 5
# More than the layers of a model times the buffers that their tensors take turns with; a quarter of a megabyte.
MOST_MAPS = 1024
# Tensors of so many shapes share their maps between launches; a launch keeps those that it has.
_MOST_SHAPES = 64


@dataclass(frozen=True)
class HostDescriptor(Derived):
    """What a TMA descriptor says of its tensor, less the address: an argument of a :class:`..prepared.PreparedLaunch`.

    Attributes:
        shape: of what the kernel sees, which may be another view of the memory than the tensor's own; one to five positive sizes.
        strides: in elements, as many; the last is 1, the others are multiples of 16 bytes.
        dtype: of the tensors.
        block: the box that one copy moves.
        layout: of the box in shared memory.
        padding: what is read outside of the shape: "zero" or "nan".

    Raises:
        ValueError: the tensor cannot be copied by TMA; the message says why.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    block: tuple[int, ...]
    layout: NVMMASharedLayout
    padding: str = "zero"

    def __post_init__(self) -> None:
        rank, size = len(self.shape), self.dtype.itemsize
        if not 1 <= rank <= _MOST_DIMENSIONS or len(self.strides) != rank or len(self.block) != rank:
            raise ValueError(
                f"shape, strides and block must be of one to five dimensions, and all of the same number, got {self.shape}, "
                f"{self.strides} and {self.block}"
            )
        if min(self.shape) < 1:
            raise ValueError(f"shape must be positive, got {self.shape}")
        if self.strides[-1] != 1 or any(stride * size % ALIGNMENT for stride in self.strides[:-1]):
            raise ValueError(
                f"strides must end with 1 and be multiples of 16 bytes before, got {self.strides} of {self.dtype}"
            )
        if self.padding not in ("zero", "nan"):
            raise ValueError(f"padding must be zero or nan, got {self.padding!r}")

    @classmethod
    def of(
        cls, tensor: torch.Tensor, block: Sequence[int], layout: NVMMASharedLayout, padding: str = "zero"
    ) -> HostDescriptor:
        """Of tensors like this one, which is not kept."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tuple(block), layout, padding)

    def on(self, tensor: torch.Tensor) -> TensorDescriptor:
        """Triton's descriptor of memory that begins where the tensor does."""
        _check_address(tensor.data_ptr())
        return self._descriptor(tensor)

    def expanded(self, metadata: Mapping[str, Any]) -> tuple[TensorMaps, list[tuple[str, int]]]:
        """(tensor maps by address, the sizes and strides that the machine code is given behind a map)."""
        compiled = tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in metadata.items())
        sizes = [("i32", size) for size in self.shape]
        return _maps(self, compiled), sizes + [("i64", stride) for stride in self.strides]

    def _descriptor(self, base: Any) -> TensorDescriptor:
        return TensorDescriptor(
            base, list(self.shape), list(self.strides), list(self.block), self.layout, padding=self.padding
        )


class TensorMaps(dict[int, Any]):
    """CUtensorMap of each address that was asked for, as Triton's launcher in C takes it; at most :data:`MOST_MAPS`."""

    def __init__(self, descriptor: HostDescriptor, metadata: Mapping[str, Any]) -> None:
        super().__init__()
        # Checked by Triton once, at the address 0.
        self._fields = vars(descriptor._descriptor(_Address(descriptor.dtype, 0)))
        self._metadata = metadata

    def __missing__(self, address: int) -> Any:
        _check_address(address)
        descriptor = SimpleNamespace(**self._fields)
        descriptor.base = _Address(descriptor.base.dtype, address)
        tensor_map = _encoder()(descriptor, self._metadata)[0]
        if len(self) >= MOST_MAPS:
            self.clear()
        self[address] = tensor_map
        return tensor_map


class _Address:
    """As much of a tensor as Triton asks of a descriptor's base."""

    __slots__ = ("_address", "dtype")

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self._address = dtype, address

    def data_ptr(self) -> int:
        return self._address


def _check_address(address: int) -> None:
    if address % ALIGNMENT:
        raise ValueError(
            f"TMA reads tensors whose address is a multiple of 16 bytes, got one with remainder {address % ALIGNMENT}"
        )


@functools.lru_cache(maxsize=_MOST_SHAPES)
def _maps(descriptor: HostDescriptor, metadata: tuple[tuple[str, Any], ...]) -> TensorMaps:
    return TensorMaps(
        descriptor, {name: list(value) if isinstance(value, tuple) else value for name, value in metadata}
    )


@functools.cache
def _encoder() -> Callable[[object, Mapping[str, Any]], list[Any]]:
    """Triton's own function, (map, sizes, strides) of a descriptor: it knows its release's maps, and what older drivers get wrong."""
    from triton.backends.nvidia import driver

    make: Callable[..., list[Any]] = driver.make_tensordesc_arg
    if make.__code__.co_argcount == 2:  # so in Triton 3.6
        return make
    return lambda descriptor, metadata: make(descriptor, metadata, None)
