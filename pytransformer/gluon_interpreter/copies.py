"""The tensor memory accelerator: copies of boxes between a tensor in global memory and shared memory.

Loads report their bytes, those outside of the tensor included, to an mbarrier; stores and reductions form one bulk
group each (Triton commits after every one), and ``store_wait`` is ``cp.async.bulk.wait_group.read``: when it returns
shared memory has been read, though the tensor need not have been written.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import triton.experimental.gluon.language as gl

from pytransformer.triton_interpreter import formats
from pytransformer.triton_interpreter.memory import Access as GlobalAccess
from pytransformer.triton_interpreter.memory import strip

from .barriers import Barrier
from .faults import DescriptorError
from .machine import Machine
from .shared import Array, View
from .source import line

# PTX, cp.async.bulk.tensor: shared memory is aligned to 128 bytes, global addresses and strides to 16.
_SHARED_ALIGNMENT, _GLOBAL_ALIGNMENT, _MOST_STRIDE = 128, 16, 2**40


class Descriptor:
    """What a tensor descriptor says: a tensor in global memory and the box that is copied.

    Attributes:
        shape, strides: of the tensor, strides in elements.
        block_shape: of the box.
        element: Triton's type.
        layout: of the box in shared memory.
        nan_outside: what lies outside of the tensor is loaded as NaN, else as zero.
    """

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        block_shape: tuple[int, ...],
        element: Any,
        dtype: np.dtype[Any],
        layout: Any,
        nan_outside: bool,
    ) -> None:
        self.shape = shape
        self.strides = strides
        self.block_shape = block_shape
        self.element = element
        self.dtype = dtype
        self.layout = layout
        self.nan_outside = nan_outside
        self._address = address  # with the argument's tag
        self._check()
        self._plain = int(strip(np.array(address, np.uint64)))

    @property
    def nbytes(self) -> int:
        """Of the box."""
        return math.prod(self.block_shape) * self.dtype.itemsize

    def _check(self) -> None:
        if self._address % _GLOBAL_ALIGNMENT:
            raise DescriptorError(f"a descriptor's tensor must be aligned to {_GLOBAL_ALIGNMENT} bytes")
        if self.strides[-1] != 1:
            raise DescriptorError(f"the last stride of a descriptor must be 1, got {self.strides}")
        for stride in self.strides[:-1]:
            size = stride * self.dtype.itemsize
            if size % _GLOBAL_ALIGNMENT or not 0 <= size < _MOST_STRIDE:
                raise DescriptorError(
                    f"strides of a descriptor must be multiples of {_GLOBAL_ALIGNMENT} bytes below 2^40, got {size} bytes"
                )
        if self.block_shape[-1] * self.dtype.itemsize < _GLOBAL_ALIGNMENT:
            raise DescriptorError(
                f"a box has at least {_GLOBAL_ALIGNMENT} bytes in its last dimension, got {self.block_shape}"
            )

    def check_box(self, view: View, memory: Any, coordinates: list[int], where: str) -> None:
        """Whether the box goes to, or comes from, that shared memory.

        Raises:
            DescriptorError: it does not.
        """
        for what, own, other in (
            ("shape", list(self.block_shape), list(memory.shape)),
            ("element type", self.element, memory.dtype),
            ("layout", self.layout, memory.layout),
        ):
            if own != other:
                raise DescriptorError(f"the descriptor's {what} is {own}, that of {view} is {other}, at {where}")
        if len(coordinates) != len(self.shape):
            raise DescriptorError(
                f"{len(coordinates)} coordinates for a tensor of {len(self.shape)} dimensions, at {where}"
            )
        if view.offset % _SHARED_ALIGNMENT:
            raise DescriptorError(
                f"{view} starts {view.offset} bytes into its allocation, and a copy needs {_SHARED_ALIGNMENT}, at {where}"
            )
        if not view.array.flags.c_contiguous:
            raise DescriptorError(f"{view} is not one stretch of memory, which a copy needs, at {where}")

    def inside(self, coordinates: list[int]) -> tuple[slice, ...]:
        """The part of the box at these coordinates that is inside of the tensor; empty slices if there is none."""
        return tuple(
            slice(min(max(0, -start), length), max(0, min(length, extent - start)))
            for start, length, extent in zip(coordinates, self.block_shape, self.shape)
        )

    def access(self, machine: Machine, coordinates: list[int], access: GlobalAccess) -> Array | None:
        """The elements of the tensor in :meth:`inside`, as a view of global memory, after the launch's checks; None if there are none."""
        part = self.inside(coordinates)
        shape = tuple(max(0, piece.stop - piece.start) for piece in part)
        if 0 in shape:
            return None
        size = self.dtype.itemsize
        first = [start + piece.start for start, piece in zip(coordinates, part)]
        # The sum wraps around 64 bits, as the hardware's does: descriptors of ragged tensors count on it.
        offset = sum(place * stride for place, stride in zip(first, self.strides)) * size
        steps = [stride * size for stride in self.strides]
        addresses = np.full((1,) * len(shape), (self._address + offset) % 2**64, np.uint64)
        for dim, (length, step) in enumerate(zip(shape, steps)):
            places = np.arange(length, dtype=np.uint64) * np.uint64(step)
            addresses = addresses + places.reshape((-1, *(1,) * (len(shape) - 1 - dim)))
        machine.memory.access(addresses, np.ones(addresses.shape, np.bool_), size, access, machine.program)
        span = sum((length - 1) * step for length, step in zip(shape, steps)) + size
        memory = (ctypes.c_char * span).from_address((self._plain + offset) % 2**64)
        return np.ndarray(shape, self.dtype, memory, 0, steps)


class Load:
    """A copy from global to shared memory that reports to a barrier."""

    def __init__(self, machine: Machine, descriptor: Descriptor, coordinates: list[int], barrier: Barrier, memory: Any):
        self.where = line()
        self.view: View = memory.handle
        self._descriptor = descriptor
        self._machine = machine
        self._barrier = barrier
        descriptor.check_box(self.view, memory, coordinates, self.where)
        task = machine.task
        self.access = machine.shared.write(
            self.view, task.knowledge, "the load", asynchronous=True, task=task.name, where=self.where
        )
        self._task = task.name
        self._part = descriptor.inside(coordinates)
        self._source = descriptor.access(machine, coordinates, GlobalAccess.LOAD)
        barrier.issue(descriptor.nbytes, self.where)
        machine.writes(self.access.number, self.where)

    def deliverable(self) -> bool:
        """Always: nobody but the barrier knows when."""
        return True

    def perform(self) -> None:
        """The bytes arrive."""
        array = self.view.array
        if self._source is None or self._source.shape != array.shape:
            if self._descriptor.nan_outside:
                array.view(np.uint8).fill(0xFF)
            else:
                array[...] = 0
        if self._source is not None:
            array[self._part] = self._source
        self._machine.trace.add(self._task, "copied", str(self.view), self.where)
        self._barrier.complete(self._descriptor.nbytes, self.access.number, self.where)


class Store:
    """A copy from shared to global memory, or with ``reduction`` an addition to it (minimum, maximum); a bulk group of its own."""

    def __init__(
        self, machine: Machine, descriptor: Descriptor, coordinates: list[int], memory: Any, reduction: str | None
    ) -> None:
        self.where = line()
        self.view: View = memory.handle
        self._descriptor = descriptor
        self._machine = machine
        self._reduction = reduction
        if reduction == "add" and descriptor.element not in (gl.float32, gl.float16, gl.bfloat16, gl.int32, gl.uint32):
            raise DescriptorError(f"there is no reduction {reduction} of {descriptor.element}, at {self.where}")
        descriptor.check_box(self.view, memory, coordinates, self.where)
        task = machine.task
        self._access = machine.shared.read(
            self.view, task.knowledge, "the store", asynchronous=True, task=task.name, where=self.where
        )
        self._task = task.name
        self._part = descriptor.inside(coordinates)
        self._target = descriptor.access(machine, coordinates, GlobalAccess.ATOMIC if reduction else GlobalAccess.STORE)

    def deliverable(self) -> bool:
        """Nobody can tell when before its wait: done at random moments, or in the end by the wait."""
        return self._machine.schedule.copies == "random"

    def perform(self) -> None:
        """Shared memory is read and the tensor written."""
        if self._target is not None:
            values = self.view.array[self._part]
            if self._reduction is None:
                self._target[...] = values
            else:
                self._target[...] = self._combined(self._target, values)
        self._machine.trace.add(self._task, "copied", str(self.view), self.where)

    def _combined(self, before: Array, values: Array) -> Array:
        function = {"add": np.add, "min": np.minimum, "max": np.maximum}[str(self._reduction)]
        if self._descriptor.element == gl.bfloat16:
            wide = function(formats.bfloat16_to_float32(before), formats.bfloat16_to_float32(values))
            return formats.float32_to_bfloat16(wide)
        result: Array = function(before, values)
        return result

    def finish(self) -> None:
        """The task that runs has waited for it: shared memory has been read."""
        self._machine.deliver(self)
        self._machine.task.knowledge.add(self._access.number)
