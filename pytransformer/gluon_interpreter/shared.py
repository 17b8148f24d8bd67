"""Shared memory of one program: what it holds, what was ever written, and who accessed which part of it.

It starts as NaN. Each access is held against the earlier ones of the same bytes (see knowledge.py); where two are not
in order the later one faults, whatever data they would have seen.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pytransformer.triton_interpreter import OutOfBoundsError

from .faults import (
    MissingFenceError,
    MissingWaitError,
    OverwriteError,
    ProtocolFault,
    SharedMemoryLimitError,
    SharedRaceError,
    UninitialisedReadError,
)
from .knowledge import Knowledge

Array = npt.NDArray[Any]
Box = tuple[tuple[int, int], ...]

# CUDA C++ programming guide, compute capability 9.0: what one block may use.
SHARED_MEMORY_LIMIT = 227 * 1024


@dataclasses.dataclass(frozen=True)
class Access:
    """An access that has been made or is under way.

    Attributes:
        number: its bit in :class:`Knowledge`.
        box: the elements, as ranges in the dimensions of the allocation.
        write: whether it writes.
        asynchronous: made through the async proxy, by work that goes on after the instruction that started it.
        what: in words.
        task: who made or started it.
        where: the line.
    """

    number: int
    box: Box
    write: bool
    asynchronous: bool
    what: str
    task: str
    where: str


@dataclasses.dataclass
class Allocation:
    """One ``allocate_shared_memory``."""

    name: str
    array: Array
    written: npt.NDArray[np.bool_]
    accesses: list[Access] = dataclasses.field(default_factory=list)


class View:
    """A part of an allocation, seen with its dimensions in some order.

    Attributes:
        allocation: whose part it is.
        array: the elements; a NumPy view.
        written: which of them have ever been written; a NumPy view.
        box: the part, in the dimensions of the allocation.
        offset: of its first element, in bytes from the start of the allocation.
    """

    def __init__(
        self, allocation: Allocation, array: Array, written: Array, box: Box, axes: tuple[int, ...] | None
    ) -> None:
        self.allocation = allocation
        self.array = array
        self.written = written
        self.box = box
        self._axes = axes  # the allocation's dimension that each of the view's is; None once they are mixed

    def __str__(self) -> str:
        whole = tuple((0, length) for length in self.allocation.array.shape)
        if self.box == whole:
            return self.allocation.name
        ranges = (str(low) if high == low + 1 else f"{low}:{high}" for low, high in self.box)
        return f"{self.allocation.name}[{', '.join(ranges)}]"

    @property
    def offset(self) -> int:
        """Of its first element, in bytes from the start of the allocation."""
        return int(self.array.__array_interface__["data"][0] - self.allocation.array.__array_interface__["data"][0])

    def part(self, dim: int, start: int, length: int) -> View:
        """``length`` of the elements along one dimension."""
        if start < 0 or length < 1 or start + length > self.array.shape[dim]:
            raise OutOfBoundsError(
                f"{start}:{start + length} is outside of the {self.array.shape[dim]} elements of dimension {dim} of {self}"
            )
        if self._axes is None:
            raise NotImplementedError("a part of shared memory whose dimensions were reshaped is not followed")
        axis = self._axes[dim]
        low = self.box[axis][0] + start
        box = (*self.box[:axis], (low, low + length), *self.box[axis + 1 :])
        chosen = (*(slice(None),) * dim, slice(start, start + length))
        return View(self.allocation, self.array[chosen], self.written[chosen], box, self._axes)

    def index(self, place: int) -> View:
        """One element of the first dimension, which goes."""
        part = self.part(0, place, 1)
        assert part._axes is not None
        return View(self.allocation, part.array[0], part.written[0], part.box, part._axes[1:])

    def permute(self, order: tuple[int, ...]) -> View:
        """The dimensions in another order."""
        axes = None if self._axes is None else tuple(self._axes[place] for place in order)
        return View(self.allocation, self.array.transpose(order), self.written.transpose(order), self.box, axes)

    def reshape(self, shape: tuple[int, ...]) -> View:
        """The same elements in another shape; must be possible without a copy."""
        array, written = self.array.reshape(shape), self.written.reshape(shape)
        if not np.shares_memory(array, self.array):
            raise NotImplementedError(f"{self} cannot be seen in shape {list(shape)} without a copy")
        longer = [dim for dim, length in enumerate(self.array.shape) if length > 1]
        # Parts can still be taken where nothing but dimensions of length 1 went.
        kept = self._axes is not None and shape == tuple(self.array.shape[dim] for dim in longer)
        axes = tuple(self._axes[dim] for dim in longer) if self._axes is not None and kept else None
        return View(self.allocation, array, written, self.box, axes)


class SharedMemory:
    """The allocations of one program and the accesses to them."""

    def __init__(self) -> None:
        self.bytes = 0
        self._number = 0

    def allocate(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], alignment: int) -> View:
        """Memory that nothing has written: every bit is set, which is NaN in every floating format.

        Raises:
            SharedMemoryLimitError: more than a block may have.
        """
        size = math.prod(shape) * dtype.itemsize
        self.bytes = -(-self.bytes // alignment) * alignment + size
        if self.bytes > SHARED_MEMORY_LIMIT:
            raise SharedMemoryLimitError(
                f"{name} makes {self.bytes} bytes of shared memory, and a block has {SHARED_MEMORY_LIMIT}"
            )
        array = np.empty(shape, dtype)
        array.view(np.uint8).fill(0xFF)
        allocation = Allocation(name, array, np.zeros(shape, np.bool_))
        box = tuple((0, length) for length in shape)
        return View(allocation, array, allocation.written, box, tuple(range(len(shape))))

    def event(self) -> int:
        """A number for something that others can know of, as they know of accesses."""
        self._number += 1
        return self._number - 1

    def read(self, view: View, knowledge: Knowledge, what: str, *, asynchronous: bool, task: str, where: str) -> Access:
        """Notes a read, to be called before the data are taken.

        Raises:
            MissingWaitError, MissingFenceError, SharedRaceError, UninitialisedReadError: as they say.
        """
        access = self._access(view, knowledge, what, False, asynchronous, task, where)
        if not view.written.all():
            missing = int(view.written.size - np.count_nonzero(view.written))
            raise UninitialisedReadError(
                f"{what} reads {view}, of which {missing} of {view.written.size} elements were never written, at {where}"
            )
        return access

    def write(
        self, view: View, knowledge: Knowledge, what: str, *, asynchronous: bool, task: str, where: str
    ) -> Access:
        """Notes a write, to be called before the data change.

        Raises:
            OverwriteError, MissingFenceError, SharedRaceError: as they say.
        """
        access = self._access(view, knowledge, what, True, asynchronous, task, where)
        view.written[...] = True
        return access

    def _access(
        self, view: View, knowledge: Knowledge, what: str, write: bool, asynchronous: bool, task: str, where: str
    ) -> Access:
        access = Access(self.event(), view.box, write, asynchronous, what, task, where)
        kept = []
        for earlier in view.allocation.accesses:
            if _overlap(earlier.box, access.box):
                if earlier.write or write:
                    fault = _conflict(earlier, access, knowledge)
                    if fault is not None:
                        raise fault(f"{_sentence(fault, earlier, access)} ({view})")
                    if write and _within(earlier.box, access.box):
                        continue  # in order before this write: whoever knows this one knows it
                elif earlier.task == task and earlier.box == access.box and earlier.asynchronous == asynchronous:
                    continue  # reads of one kind by one task end in the order in which they begin
            kept.append(earlier)
        kept.append(access)
        view.allocation.accesses = kept
        return access


def _overlap(a: Box, b: Box) -> bool:
    return all(low < other_high and other_low < high for (low, high), (other_low, other_high) in zip(a, b))


def _within(a: Box, b: Box) -> bool:
    return all(other_low <= low and high <= other_high for (low, high), (other_low, other_high) in zip(a, b))


def _conflict(earlier: Access, access: Access, knowledge: Knowledge) -> type[ProtocolFault] | None:
    if not knowledge.knows(earlier.number):
        if earlier.asynchronous and earlier.write and not access.write:
            return MissingWaitError
        if access.write and (earlier.asynchronous or access.asynchronous):
            return OverwriteError
        return SharedRaceError
    # What threads only read needs no fence before a copy overwrites it: an arrival at a barrier follows the values read.
    if (
        earlier.write
        and access.asynchronous
        and not earlier.asynchronous
        and not knowledge.knows_fenced(earlier.number)
    ):
        return MissingFenceError
    return None


def _sentence(fault: type[ProtocolFault], earlier: Access, access: Access) -> str:
    first = f"{earlier.what} of {earlier.task} at {earlier.where}"
    then = f"{access.what} of {access.task} at {access.where}"
    if fault is MissingWaitError:
        return f"{then} reads what {first} may not have brought yet: a wait is missing, or is for another phase"
    if fault is MissingFenceError:
        return f"{then} uses what {first} wrote, without fence_async_shared in between"
    if fault is OverwriteError:
        return f"{then} writes over bytes that {first} may still {'write' if earlier.write else 'read'}"
    return f"{then} and {first} touch the same bytes in no order"
