"""What the programs of one launch do to memory: bounds, alignment, and races between programs.

Bounds. User-space addresses fit in 48 bits, so the pointer of each argument carries the argument's number in the 15
bits above them. Pointer arithmetic leaves the number alone, and each access is checked against the elements of exactly
the tensor that its pointer was derived from: bytes between the rows of a view do not belong to it, nor does another
argument that happens to lie behind it. A pointer without a number (made inside the kernel from an integer) may touch
the elements of any argument.

Races. For each element the launch remembers which program stored to it, loaded from it and did an atomic on it. Two
programs may load one element, or do atomics on it; any other pair of accesses is a race, in whatever order the
interpreter happened to run them, unless atomics put them in order: what a program did before an atomic with release
semantics happened before what another does after an atomic on the same element that acquires and read the first one's
result or a later one. So a program may read what others have written once a counter says that they are through; one
that waits in a loop for another never ends here, and should be two launches.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .errors import MisalignedAccessError, OutOfBoundsError, RaceError

Addresses = npt.NDArray[np.uint64]
Offsets = npt.NDArray[np.int64]
Owners = npt.NDArray[np.int32]
Program = tuple[int, int, int]

ADDRESS_BITS = 48
_ADDRESS_MASK = np.uint64((1 << ADDRESS_BITS) - 1)
_MAX_ARGUMENTS = 1 << 15

_NOBODY, _SEVERAL = 0, -1


class Access(enum.Enum):
    """How an instruction touches memory."""

    LOAD = "load"
    STORE = "store"
    ATOMIC = "atomic"


def strip(addresses: Addresses) -> Addresses:
    """The addresses as the machine knows them."""
    return addresses & _ADDRESS_MASK


class Order:
    """Which accesses of a launch happened before those of the program that runs now.

    A program is cut into stretches at its releases. Stretches are numbered: that at the start of program n is n + 1, later ones
    follow all programs.
    """

    def __init__(self) -> None:
        self.stretch = _NOBODY
        self._program = -1
        self._programs: dict[int, int] = {}  # of the stretches that follow a release
        self._known: set[int] = set()
        self._released: dict[int, set[int]] = {}  # by address: what a program knows that acquires there

    def enter(self, program: int, num_programs: int) -> None:
        """The accesses that follow are of a program; each runs to its end before the next begins."""
        if program != self._program:
            self._program, self.stretch, self._known = program, program + 1, {program + 1}
            self._next = num_programs + 1 + len(self._programs)

    def program_of(self, stretch: int) -> int:
        """The number of the program of a stretch."""
        return self._programs.get(stretch, stretch - 1)

    def precedes(self, stretches: Owners) -> npt.NDArray[np.bool_]:
        """Which stretches happened before what is done now, those of this program among them."""
        if len(self._known) == 1:
            return np.equal(stretches, self.stretch)
        return np.isin(stretches, np.fromiter(self._known, np.int32))

    def acquire(self, addresses: Addresses) -> None:
        """What was released at these addresses is known from now on."""
        for address in addresses.ravel().tolist():
            self._known |= self._released.get(address, set())

    def release(self, addresses: Addresses) -> None:
        """Who acquires at these addresses from now on knows what this program knows now."""
        for address in addresses.ravel().tolist():
            self._released.setdefault(address, set()).update(self._known)
        self.stretch = self._next
        self._next += 1
        self._programs[self.stretch] = self._program
        self._known.add(self.stretch)


@dataclass
class Region:
    """A stretch of memory in which arguments of the launch overlap, with the programs that touched each of its units.

    Owners are numbers of stretches (see :class:`Order`), 0 for nobody and -1 for several programs.
    """

    begin: int
    end: int
    unit: int
    owners: dict[Access, Owners] = field(default_factory=dict)
    scratch: Owners | None = None

    def units(self, addresses: Addresses, size: int) -> Offsets:
        """Numbers of the units that elements of ``size`` bytes at ``addresses`` consist of."""
        if size < self.unit:
            self._refine(size)
        # Units are powers of two: a shift is cheaper than a division.
        first = ((addresses - np.uint64(self.begin)) >> np.uint64(self.unit.bit_length() - 1)).view(np.int64)
        if size == self.unit:
            return first
        return (first[:, None] + np.arange(size // self.unit)).ravel()

    def _refine(self, unit: int) -> None:
        self.owners = {access: np.repeat(owners, self.unit // unit) for access, owners in self.owners.items()}
        self.scratch = None
        self.unit = unit

    def _owners(self, access: Access) -> Owners:
        if access not in self.owners:
            # Zeros come from fresh pages, which cost nothing until they are touched.
            self.owners[access] = np.zeros((self.end - self.begin) // self.unit, np.int32)
        return self.owners[access]

    def repeated(self, units: Offsets) -> bool:
        """Whether a unit occurs twice: then writing each one's position there and reading it back does not give the
        positions.
        """
        if self.scratch is None:
            self.scratch = np.empty((self.end - self.begin) // self.unit, np.int32)
        positions = np.arange(units.size, dtype=np.int32)
        self.scratch[units] = positions
        return not np.array_equal(self.scratch[units], positions)

    def conflict(self, units: Offsets, access: Access, order: Order) -> tuple[Access, int] | None:
        """An earlier access of another program that this one races with, and the number of that one's stretch."""
        for earlier, owners in self.owners.items():
            if earlier is access and access is not Access.STORE:
                continue
            before = owners[units]
            if not before.any():
                continue
            foreign = (before != _NOBODY) & ~order.precedes(before)
            if foreign.any():
                return earlier, int(before[foreign][0])
        return None

    def record(self, units: Offsets, access: Access, order: Order) -> None:
        """Notes the access; the caller has made sure that it races with none before."""
        owners = self._owners(access)
        if access is Access.STORE:
            owners[units] = order.stretch
        else:
            before = owners[units]
            if before.any():
                owners[units] = np.where((before == _NOBODY) | order.precedes(before), order.stretch, _SEVERAL)
            else:
                owners[units] = order.stretch


@dataclass(frozen=True)
class Argument:
    """A tensor that was passed to the launch.

    Attributes:
        name: the kernel parameter, with an index into tuples.
        tag: what its pointers carry above the address bits.
        begin, end: addresses of its first byte and behind its last one.
        element_size: in bytes.
        elements: for a view with holes, which of the element-sized slots between begin and end are its elements.
        region: where its accesses are recorded.
    """

    name: str
    tag: int
    begin: int
    end: int
    element_size: int
    elements: npt.NDArray[np.bool_] | None
    region: Region

    def outside(self, addresses: Addresses, size: int) -> npt.NDArray[np.bool_]:
        """Which of the accesses of ``size`` bytes are not within elements of this tensor. Addresses are without tags."""
        wrong = (addresses < np.uint64(self.begin)) | (addresses + np.uint64(size) > np.uint64(self.end))
        if self.elements is not None:
            slots = (addresses - np.uint64(self.begin)).astype(np.int64) // self.element_size
            wrong |= ~self.elements[np.where(wrong, 0, slots)]
        return wrong

    def distance(self, address: int) -> int:
        """Bytes between the address and the tensor, 0 inside."""
        return max(self.begin - address, address - self.end + 1, 0)


class LaunchMemory:
    """The arguments of one launch and what its programs have touched so far.

    Args:
        tensors: parameter names and tensors, on the host.
        bounds: check that each access is within the tensor its pointer came from, and aligned.
        races: check programs against each other, and the lanes of each store.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]], *, bounds: bool, races: bool) -> None:
        self._bounds = bounds
        self._races = races
        named = [(name, tensor) for name, tensor in tensors if tensor.numel() > 0]
        if len(named) >= _MAX_ARGUMENTS:
            raise ValueError(f"a launch may have at most {_MAX_ARGUMENTS - 1} tensors, got {len(named)}")
        regions = list(_regions([tensor for _, tensor in named]))
        self.arguments = [_argument(name, tag, tensor, regions) for tag, (name, tensor) in enumerate(named, start=1)]
        self._tags = {id(tensor): tag for tag, (_, tensor) in enumerate(named, start=1)}
        self.order = Order()

    def tag(self, tensor: object) -> int:
        """What to add to the tensor's address to make it traceable; 0 for a tensor without elements."""
        return self._tags.get(id(tensor), 0) << ADDRESS_BITS

    def access(
        self, pointers: Addresses, mask: npt.NDArray[np.bool_], size: int, access: Access, program: Program
    ) -> None:
        """Checks and records an access to elements of ``size`` bytes at the (tagged) pointers where the mask is set.

        Raises:
            OutOfBoundsError, MisalignedAccessError, RaceError: as they say.
        """
        active = pointers.ravel() if mask.all() else np.broadcast_to(pointers, mask.shape)[mask]
        if active.size == 0:
            return
        lowest, highest = int(np.minimum.reduce(active)), int(np.maximum.reduce(active))
        tag = lowest >> ADDRESS_BITS
        if tag == highest >> ADDRESS_BITS:
            self._access_argument(tag, strip(active), size, access, program)
            return
        tags = active >> np.uint64(ADDRESS_BITS)
        for tag in np.unique(tags):
            self._access_argument(int(tag), strip(active[tags == tag]), size, access, program)

    def _access_argument(self, tag: int, addresses: Addresses, size: int, access: Access, program: Program) -> None:
        if tag == 0:
            self._access_unknown(addresses, size, access, program)
            return
        if tag > len(self.arguments):
            # So far away that the offset ran into the tag: nothing is known but that it is wrong.
            tag = 1
        argument = self.arguments[tag - 1]
        if self._bounds:
            _check_bounds(argument, addresses, size, access, program)
        else:
            addresses = addresses[~argument.outside(addresses, size)]
        if self._races and addresses.size:
            _check_races(argument, addresses, size, access, program, self.order)

    def _access_unknown(self, addresses: Addresses, size: int, access: Access, program: Program) -> None:
        left = addresses
        for argument in self.arguments:
            inside = ~argument.outside(left, size)
            if inside.any():
                self._access_argument(argument.tag, left[inside], size, access, program)
                left = left[~inside]
        if self._bounds and left.size:
            if not self.arguments:
                raise OutOfBoundsError(f"{access.value} in program {_name(program)}, though no argument has an element")
            nearest = min(self.arguments, key=lambda argument: argument.distance(int(left[0])))
            _check_bounds(nearest, left, size, access, program)


def _check_bounds(argument: Argument, addresses: Addresses, size: int, access: Access, program: Program) -> None:
    lowest, highest = int(np.minimum.reduce(addresses)), int(np.maximum.reduce(addresses))
    if argument.elements is not None or lowest < argument.begin or highest + size > argument.end:
        wrong = argument.outside(addresses, size)
        if wrong.any():
            first = int(addresses[wrong][0])
            between = argument.begin <= first < argument.end and first + size <= argument.end
            raise OutOfBoundsError(
                f"{access.value} out of bounds in program {_name(program)}: {_lanes(int(wrong.sum()))}, the first is "
                f"{first - argument.begin} bytes from the start of '{argument.name}' "
                f"({argument.end - argument.begin} bytes{', in a hole of the view' if between else ''})"
            )
    # One bit of one address is enough.
    if int(np.bitwise_or.reduce(addresses)) & (size - 1):
        misaligned = (addresses & np.uint64(size - 1)) != 0
        first = int(addresses[misaligned][0])
        raise MisalignedAccessError(
            f"misaligned {access.value} in program {_name(program)}: {_lanes(int(misaligned.sum()))}, the first is "
            f"{first - argument.begin} bytes from the start of '{argument.name}', and its elements are of {size} bytes"
        )


def _check_races(
    argument: Argument, addresses: Addresses, size: int, access: Access, program: Program, order: Order
) -> None:
    region = argument.region
    units = region.units(addresses, size)
    if access is Access.STORE and region.repeated(units):
        raise RaceError(f"one store in program {_name(program)} writes an element of '{argument.name}' more than once")
    found = region.conflict(units, access, order)
    if found is not None:
        earlier, other = found
        who = "several programs" if other == _SEVERAL else f"program number {order.program_of(other)}"
        verb = {Access.LOAD: "loaded", Access.STORE: "stored to", Access.ATOMIC: "updated atomically"}[earlier]
        raise RaceError(
            f"race on '{argument.name}': {access.value} in program {_name(program)} (number {order.program_of(order.stretch)}) "
            f"of an element that {who} of the same launch {verb}"
        )
    region.record(units, access, order)


def _name(program: Program) -> str:
    return "({},{},{})".format(*program)


def _lanes(count: int) -> str:
    return "1 lane" if count == 1 else f"{count} lanes"


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor with elements, and behind its last one (torch has no negative strides)."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _regions(tensors: list[torch.Tensor]) -> Iterator[Region]:
    spans = sorted((*_span(tensor), tensor.element_size()) for tensor in tensors)
    merged: list[list[int]] = []
    for begin, end, size in spans:
        if merged and begin < merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
            merged[-1][2] = min(merged[-1][2], size)
        else:
            merged.append([begin, end, size])
    for begin, end, unit in merged:
        yield Region(begin, end, unit if begin % unit == 0 else 1)


def _argument(name: str, tag: int, tensor: torch.Tensor, regions: list[Region]) -> Argument:
    begin, end = _span(tensor)
    size = tensor.element_size()
    region = next(region for region in regions if region.begin <= begin < region.end)
    elements: npt.NDArray[np.bool_] | None = None
    if not tensor.is_contiguous():
        elements = np.zeros((end - begin) // size, np.bool_)
        # One pass over a broadcast dimension is enough, however long it is.
        shape = [length if stride else 1 for length, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        np.lib.stride_tricks.as_strided(elements, shape, tensor.stride())[...] = True
        if elements.all():
            elements = None
    return Argument(name, tag, begin, end, size, elements, region)


def named_tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an argument of a launch: a tensor, a wrapped one, a tuple of any of these, or a tensor
    descriptor.
    """
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from named_tensors(f"{name}[{index}]", item)
    elif hasattr(value, "base"):
        # A TensorDescriptor, or a tensor reinterpreted as another type (TensorWrapper).
        yield from named_tensors(name, value.base)
