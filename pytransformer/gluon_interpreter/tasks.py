"""Partitions of a kernel as tasks that take turns: generators of which one runs at a time, in an order that a schedule
decides.

A task yields where others may run: after each operation that they can notice (``None``), and where it has to wait (a
:class:`Waiting`). So a run is the same each time.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Generator
from typing import Any

from .faults import DeadlockError, ProtocolFault
from .knowledge import Knowledge
from .schedules import Schedule


@dataclasses.dataclass
class Waiting:
    """What a task waits for.

    Attributes:
        ready: whether it may go on.
        describe: what it waits for, in words, as things stand when it is asked.
        where: the line of the kernel.
        fault: looks, once nothing can go on, for a better reason than a deadlock.
    """

    ready: Callable[[], bool]
    describe: Callable[[], str]
    where: str
    fault: Callable[[], ProtocolFault | None] = lambda: None


# What runs as a task, or as a part of one.
Steps = Generator[Waiting | None, None, Any]


class Task:
    """One partition of a program: its warps run in step, as the compiler puts barriers between them where they share memory.

    Attributes:
        number: 0 for the default partition, which is also the program before and after ``warp_specialize``.
        name: number and function.
        num_warps: as many as the partition was given.
        knowledge: the accesses that happened before what it does next.
        products: asynchronous products that it has issued and not waited for, oldest first.
        stores: bulk copies out of shared memory, each a group, likewise.
        waiting: what it waits for, if it does.
        done: it has come to its end.
    """

    def __init__(self, number: int, name: str, num_warps: int, knowledge: Knowledge, steps: Steps) -> None:
        self.number = number
        self.name = name
        self.num_warps = num_warps
        self.knowledge = knowledge
        self.products: list[Any] = []
        self.stores: list[Any] = []
        self.waiting: Waiting | None = None
        self.done = False
        self.steps = steps

    def runnable(self) -> bool:
        """Whether it could go on now."""
        return not self.done and (self.waiting is None or self.waiting.ready())


class Scheduler:
    """Runs the tasks of one program.

    Args:
        schedule: decides who is next.
        generator: what it draws from where it is random.
        deliver: does one piece of asynchronous work that is under way, if there is any; called when no task can go on.
        finished: is called, as the last of its doings, for each task that has come to its end.
    """

    def __init__(
        self,
        schedule: Schedule,
        generator: random.Random,
        deliver: Callable[[], bool],
        finished: Callable[[Task], None],
    ) -> None:
        self._order = schedule.order
        self._random = generator
        self._deliver = deliver
        self._finished = finished
        self.tasks: list[Task] = []
        self.current: Task

    def add(self, name: str, num_warps: int, knowledge: Knowledge, steps: Steps) -> Task:
        """A new task, which does not run yet."""
        task = Task(len(self.tasks), name, num_warps, knowledge, steps)
        self.tasks.append(task)
        return task

    def run(self, program: Task) -> None:
        """Runs tasks until the program has come to its end.

        Raises:
            DeadlockError: nobody can go on.
            ProtocolFault: what a task raises.
        """
        task = self.current = program
        try:
            while not program.done:
                try:
                    task.waiting = next(task.steps)
                except StopIteration:
                    task.done = True
                    self._finished(task)
                if not program.done:
                    task = self.current = self._next(task)
        finally:
            for other in self.tasks:
                other.steps.close()

    def _next(self, task: Task) -> Task:
        while True:
            ready = [other for other in self.tasks if other.runnable()]
            if ready:
                return self._choose(task, ready)
            if not self._deliver():
                raise self._deadlock()

    def _choose(self, task: Task, ready: list[Task]) -> Task:
        if self._order == "same" and task in ready:
            return task
        if self._order == "first":
            return ready[0]
        if self._order == "last":
            return ready[-1]
        if self._order == "random":
            return self._random.choice(ready)
        return min(ready, key=lambda other: (other.number - task.number - 1) % len(self.tasks))

    def _deadlock(self) -> ProtocolFault:
        waiters = [(task, task.waiting) for task in self.tasks if not task.done and task.waiting is not None]
        for _, waiting in waiters:
            better = waiting.fault()
            if better is not None:
                return better
        lines = [f"  {task.name} waits at {waiting.where} for {waiting.describe()}" for task, waiting in waiters]
        return DeadlockError("\n".join(("deadlock: no task can go on and no copy is under way", *lines)))
