"""Which accesses have happened before what a task does next.

Every access to shared memory, by a task or by asynchronous work, has a number. What a task knows is a set of numbers,
held as the bits of an integer: its own accesses, those of asynchronous work that it has waited for, and what others
knew when they arrived at a barrier on which it has waited since. Two accesses of the same bytes are in order if, and
only if, the one who makes the later one knows the earlier one. That depends on the barriers alone, not on the order
in which the interpreter happened to run the tasks: so one schedule finds what would go wrong in another.
"""

from __future__ import annotations


class Knowledge:
    """A set of accesses that have happened before, and the part of it that a proxy fence has followed.

    PTX (memory consistency model, proxy-preserved causality order): an access through the generic proxy is in order with one through
    the async proxy only if a proxy fence lies between them on the path of synchronisation; whose thread executes it does not matter.
    """

    __slots__ = ("fenced", "seen")

    def __init__(self, seen: int = 0, fenced: int = 0) -> None:
        self.seen = seen
        self.fenced = fenced

    def copy(self) -> Knowledge:
        """What is known now; does not grow with this."""
        return Knowledge(self.seen, self.fenced)

    def join(self, other: Knowledge) -> None:
        """Learns what another knows."""
        self.seen |= other.seen
        self.fenced |= other.fenced

    def add(self, access: int) -> None:
        """An access has happened."""
        self.seen |= 1 << access

    def fence(self) -> None:
        """``fence.proxy.async``."""
        self.fenced |= self.seen

    def knows(self, access: int) -> bool:
        """Whether the access has happened before."""
        return bool(self.seen >> access & 1)

    def knows_fenced(self, access: int) -> bool:
        """Whether it has, and a fence has followed it."""
        return bool(self.fenced >> access & 1)
