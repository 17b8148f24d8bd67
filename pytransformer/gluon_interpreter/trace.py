"""What happened in one program, in the order in which the interpreter did it: material for a timeline."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Event:
    """One thing that a task did or that was done for it.

    Attributes:
        step: counts the events of a program.
        task: who did it; of asynchronous work, who started it.
        kind: ``arrive``, ``expect``, ``wait``, ``blocked``, ``copy``, ``copied``, ``product``, ``produced``, ``fence`` and the like.
        what: the barrier, the shared memory or the number of bytes.
        where: the line of the kernel.
    """

    step: int
    task: str
    kind: str
    what: str
    where: str


@dataclasses.dataclass
class Trace:
    """The events of one program."""

    program: tuple[int, int, int]
    events: list[Event] = dataclasses.field(default_factory=list)

    def add(self, task: str, kind: str, what: str, where: str) -> None:
        """Appends an event."""
        self.events.append(Event(len(self.events), task, kind, what, where))
