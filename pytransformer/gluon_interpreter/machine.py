"""The state of one program while it runs: its tasks, shared memory, barriers and the asynchronous work under way."""

from __future__ import annotations

from typing import Any, Protocol

from pytransformer.triton_interpreter.memory import LaunchMemory

from .barriers import Barrier, NamedBarrier
from .faults import BarrierStateError, UnfinishedError
from .knowledge import Knowledge
from .schedules import Schedule
from .shared import Allocation, SharedMemory, View
from .source import line
from .tasks import Scheduler, Steps, Task, Waiting
from .trace import Trace

Program = tuple[int, int, int]


class Work(Protocol):
    """Asynchronous work: a copy."""

    where: str

    def deliverable(self) -> bool:
        """Whether it may be done at any moment; if not, only who waits for it makes it happen."""

    def perform(self) -> None:
        """Does it."""


class Machine:
    """One program. Everything in it is of that program alone, but for the launch's memory.

    Attributes:
        program: its place in the grid.
        memory: the launch's tensors, with what its programs did to them.
        shared: its shared memory.
        trace: what happened.
        scheduler: its tasks.
    """

    def __init__(self, program: Program, schedule: Schedule, memory: LaunchMemory, num_warps: int) -> None:
        self.program = program
        self.schedule = schedule
        self.memory = memory
        self.shared = SharedMemory()
        self.trace = Trace(program)
        self.random = schedule.generator(program)
        self.scheduler = Scheduler(schedule, self.random, self._deliver_one, self._finished)
        self._num_warps = num_warps
        self._barriers: dict[tuple[int, int], Barrier] = {}
        self._allocations: list[Allocation] = []  # keeps them alive: barriers are found by identity
        self._named: dict[int, NamedBarrier] = {}
        self._under_way: list[Work] = []
        self._writes: list[tuple[int, str]] = []  # of loads: their number as accesses, and the line

    @property
    def task(self) -> Task:
        """The task that runs."""
        return self.scheduler.current

    def step(self, kind: str, what: object = "", where: str | None = None, **details: Any) -> Waiting | None:
        """The task that runs did something that others can notice: noted, and to be yielded, as others may be next."""
        self.note(kind, what, where, **details)
        return self.turn()

    def turn(self) -> Waiting | None:
        """Asynchronous work may be done now; to be yielded, as others may be next."""
        if self.schedule.copies == "random":
            for work in [work for work in self._under_way if work.deliverable()]:
                if self.random.random() < 0.3:
                    self.deliver(work)
        return None

    def note(self, kind: str, what: object = "", where: str | None = None, **details: Any) -> None:
        """An event of the task that runs; ``details`` are fields of :class:`Event`."""
        self.trace.add(self.task.name, kind, str(what), line() if where is None else where, **details)

    def allocated(self, view: View) -> None:
        """Keeps an allocation for as long as the program runs."""
        self._allocations.append(view.allocation)

    def barrier(self, view: View) -> Barrier:
        """The mbarrier in an element of shared memory.

        Raises:
            BarrierStateError: the view is of several.
        """
        if view.array.size != 1:
            raise BarrierStateError(f"{view} is {view.array.size} barriers, and one is meant, at {line()}")
        key = (id(view.allocation), view.offset)
        if key not in self._barriers:
            self._barriers[key] = Barrier(view)
        return self._barriers[key]

    def named_barrier(self, number: int) -> NamedBarrier:
        """The named barrier of that number."""
        return self._named.setdefault(number, NamedBarrier(number))

    def start(self, work: Work) -> None:
        """Asynchronous work has been issued."""
        self._under_way.append(work)
        if self.schedule.copies == "early":
            self.deliver(work)

    def writes(self, access: int, where: str) -> None:
        """A load will write; somebody must have waited for it when the program ends."""
        self._writes.append((access, where))

    def deliver(self, work: Work) -> None:
        """Does a piece of asynchronous work, if it is not done."""
        if work in self._under_way:
            self._under_way.remove(work)
            work.perform()

    def _deliver_one(self) -> bool:
        ready = [work for work in self._under_way if work.deliverable()]
        if not ready:
            return False
        self.deliver(ready[-1 if self.schedule.copies == "latest" else 0])
        return True

    def run(self, steps: Steps) -> None:
        """Runs the program from its begin to its end.

        Raises:
            ProtocolFault: any of its rules was broken.
        """
        program = self.scheduler.add("program", self._num_warps, Knowledge(), steps)
        self.scheduler.run(program)
        for number, where in self._writes:
            if not program.knowledge.knows(number):
                raise UnfinishedError(f"the program ends, and nothing has waited for its load at {where}")

    def _finished(self, task: Task) -> None:
        self.note("end", where="")
        for product in task.products:
            raise UnfinishedError(f"{task.name} ends, and nothing waited for its product at {product.where}")
        for store in task.stores:
            raise UnfinishedError(
                f"{task.name} ends, and its copy at {store.where} may still read {store.view}: store_wait is missing"
            )


_machines: list[Machine] = []


def machine() -> Machine:
    """The program that runs now."""
    if not _machines:
        raise RuntimeError("this runs only inside of a launch of the Gluon interpreter")
    return _machines[-1]


def enter(entered: Machine) -> None:
    """Its program runs from now on."""
    _machines.append(entered)


def leave() -> None:
    """Back to the one before."""
    _machines.pop()
