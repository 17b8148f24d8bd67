"""What happened in one program, in the order in which the interpreter did it: material for a timeline (timeline.py)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple


class Event(NamedTuple):
    """One thing that a task did or that was done for it.

    Of asynchronous work there are two: ``copy`` or ``product`` when it is issued; ``copied`` when a copy's bytes are there, and
    ``produced`` or ``store_wait`` when a task has waited for products or stores. They name the work by the same numbers.

    Attributes:
        step: counts the events of a program.
        task: who did it; of asynchronous work, who started it.
        kind: ``arrive``, ``expect``, ``wait``, ``blocked``, ``copy``, ``copied``, ``product``, ``produced``, ``exponentials``, ``fence``
            and the like. ``blocked`` comes before a ``wait`` or a ``named sync`` that did not return at once.
        what: the barrier, the shared memory or what else it was done to, by the kernel's own names.
        where: the line of the kernel.
        size: bytes of a copy or of what is expected, floating-point operations of a product, elements of exponentials; else 0.
        barrier: the mbarrier or named barrier that it is about, or that a copy reports to; else empty.
        phase: of that barrier, counted from 0: the one in which it arrives, or whose end it waits for (−1: none, the wait returns at once).
        works: numbers of the asynchronous work: of what is issued, or of all that was waited for.
    """

    step: int
    task: str
    kind: str
    what: str
    where: str
    size: int = 0
    barrier: str = ""
    phase: int = -1
    works: tuple[int, ...] = ()


@dataclasses.dataclass
class Trace:
    """The events of one program."""

    program: tuple[int, int, int]
    events: list[Event] = dataclasses.field(default_factory=list)

    def add(
        self,
        task: str,
        kind: str,
        what: str,
        where: str,
        size: int = 0,
        barrier: str = "",
        phase: int = -1,
        works: tuple[int, ...] = (),
    ) -> None:
        """Appends an event."""
        self.events.append(Event(len(self.events), task, kind, what, where, size, barrier, phase, works))
