"""Barriers in shared memory (mbarrier) and the sixteen named ones of a block.

The rules are those of PTX's ``mbarrier``: a phase is complete once no arrivals and no bytes are outstanding; its
parity is what a wait names. Triton (3.9, for compute capability 9.0) makes of ``expect`` one
``mbarrier.arrive.expect_tx``, so it counts as an arrival; of ``arrive(count=n)`` one thread's arrival with that
count; and of ``wait`` a loop of ``try_wait.parity``. Arrivals release and waits acquire.
"""

from __future__ import annotations

from .faults import BarrierStateError, ByteCountError, NamedBarrierError, OverArrivalError, PhaseError, ProtocolFault
from .knowledge import Knowledge
from .shared import View
from .tasks import Task, Waiting

# PTX: the ranges of an mbarrier's counts.
MAX_COUNT = 2**20 - 1


class Barrier:
    """One mbarrier. Its state is that of its current phase, which is not complete.

    Attributes:
        name: in words, with its line.
    """

    def __init__(self, view: View) -> None:
        self.name = str(view)
        self._view = view
        self._label = ""
        self._earlier = 0  # phases before it was initialised again
        self._reset()

    def _reset(self) -> None:
        self.count = 0  # 0: not initialised
        self.where = ""
        self.phases = 0  # completed so far
        self._pending = 0
        self._expected = 0  # bytes announced in this phase
        self._issued = 0  # bytes of copies that were started in this phase
        self._arrived = 0  # bytes of those that are done
        self._known = Knowledge()  # of everyone who arrived in a phase that is complete
        self._arriving = Knowledge()
        self._passed: list[tuple[int, str, str]] = []  # waits that came through in this phase: event, task, line
        self._waiters: dict[Task, int] = {}  # how many phases were complete when their wait was satisfied; -1: not yet

    def __str__(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        """A short name, for traces."""
        if not self._label:
            self._label = self._view.label
        return self._label

    @property
    def phase(self) -> int:
        """The number of the current phase, counted from the first time that it was initialised."""
        return self._earlier + self.phases

    def describe(self) -> str:
        """Its state in words."""
        bytes_left = self._expected - self._arrived
        return (
            f"{self.name} (initialised at {self.where}): in phase {self.phases & 1}, the {_ordinal(self.phases + 1)} since then; "
            f"{self._pending} of {self.count} arrivals and {bytes_left} of {self._expected} bytes are missing"
        )

    def init(self, count: int, where: str) -> None:
        """``mbarrier.init``: phase 0, with ``count`` arrivals to come."""
        if not 1 <= count <= MAX_COUNT:
            raise BarrierStateError(
                f"{self} is initialised with count {count}, allowed are 1 to {MAX_COUNT}, at {where}"
            )
        if self.count:
            raise BarrierStateError(
                f"{self} is initialised at {where}, and was already at {self.where}, with no invalidate in between"
            )
        self._earlier += self.phases + 1 if self.where else 0
        self._reset()
        self.count = self._pending = count
        self.where = where

    def invalidate(self, where: str) -> None:
        """``mbarrier.inval``."""
        self._check(where)
        if self._issued != self._arrived or self._waiters:
            raise BarrierStateError(f"{self} is invalidated at {where} while a copy or a waiter uses it")
        self.count = 0

    def arrive(self, count: int, knowledge: Knowledge, where: str) -> None:
        """``mbarrier.arrive``: what the one who arrives knows, those know who wait for this phase."""
        self._check(where)
        if count < 1:
            raise OverArrivalError(f"an arrival counts at least 1, got {count} at {where}")
        if count > self._pending:
            raise OverArrivalError(
                f"{count} arrival{'s' * (count > 1)} at {where}, and {self.name} (initialised at {self.where}) awaits "
                f"{self._pending} more of {self.count} in this phase, the {_ordinal(self.phases + 1)}"
            )
        self._pending -= count
        self._arriving.join(knowledge)
        self._settle(where)

    def expect(self, size: int, knowledge: Knowledge, where: str) -> None:
        """``mbarrier.arrive.expect_tx``: that many bytes more are to come in this phase, and one arrival."""
        self._check(where)
        if not 0 < size <= MAX_COUNT or self._expected + size > MAX_COUNT:
            raise ByteCountError(
                f"{self} is to expect {size} bytes, allowed are 1 to {MAX_COUNT} in a phase, at {where}"
            )
        self._expected += size
        self.arrive(1, knowledge, where)

    def issue(self, size: int, where: str) -> int:
        """A copy of so many bytes that will report here is started; returns the number of the phase in which."""
        self._check(where)
        self._issued += size
        self._check_bytes(where)
        return self.phases

    def complete(self, size: int, access: int, where: str) -> None:
        """``complete_tx``: a copy has brought its bytes; who waits for the phase knows of its writes."""
        self._arrived += size
        self._arriving.add(access)
        self._settle(where)

    def wait(self, phase: int, task: Task, where: str) -> Waiting:
        """What a task waits for until the phase of this parity is complete; :meth:`passed` follows."""
        self._check(where)
        if phase not in (0, 1):
            raise PhaseError(f"a wait for {self} names phase {phase}, allowed are 0 and 1, at {where}")
        self._waiters[task] = self.phases if self._complete(phase) else -1
        return Waiting(
            lambda: self._complete(phase),
            lambda: f"phase {phase} of {self.describe()}",
            where,
            lambda: self._too_few_bytes(where),
        )

    def passed(self, task: Task, event: int, where: str) -> None:
        """The task has come through its wait, which is an event with a number: it learns what those knew who arrived."""
        del self._waiters[task]
        task.knowledge.join(self._known)
        task.knowledge.add(event)
        self._passed.append((event, task.name, where))

    def _complete(self, phase: int) -> bool:
        # A phase before the first one counts as complete, so that a wait for parity 1 of a new barrier returns at once.
        return self.phases & 1 != phase

    def _check(self, where: str) -> None:
        if not self.count:
            raise BarrierStateError(f"{self} is used at {where}, and is not initialised")

    def _check_bytes(self, where: str) -> None:
        if self._pending == 0 and self._issued > self._expected:
            raise ByteCountError(
                f"copies of {self._issued} bytes report to {self.name} in its {_ordinal(self.phases + 1)} phase, which expects "
                f"{self._expected}: it would end before they are there, at {where}"
            )

    def _settle(self, where: str) -> None:
        self._check_bytes(where)
        if self._pending or self._arrived != self._expected:
            return
        self._check_waiters(where)
        self.phases += 1
        self._pending = self.count
        self._expected = self._issued = self._arrived = 0
        self._known.join(self._arriving)
        self._arriving = Knowledge()
        for task, phases in self._waiters.items():
            if phases == -1:
                self._waiters[task] = self.phases

    def _check_waiters(self, where: str) -> None:
        """A phase must not end before those who waited for the one before have seen that: its parity would tell them to wait again."""
        late = [task.name for task, phases in self._waiters.items() if phases != -1]
        late += [f"{task} at {at}" for event, task, at in self._passed if not self._arriving.knows(event)]
        if late:
            raise PhaseError(
                f"the {_ordinal(self.phases + 1)} phase of {self.name} ends with what is done at {where}, and nothing makes sure that "
                f"{late[0]} has seen the end of the one before: it could wait for ever"
            )
        self._passed = []

    def _too_few_bytes(self, where: str) -> ProtocolFault | None:
        if self._pending == 0 and self._issued < self._expected:
            return ByteCountError(
                f"{self.name} expects {self._expected} bytes in its {_ordinal(self.phases + 1)} phase, and copies of {self._issued} "
                f"were started: the wait at {where} never ends"
            )
        return None


class NamedBarrier:
    """One of the barriers 0 to 15 (``barrier.sync`` and ``barrier.arrive``): full once as many threads have come as each of them says."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rounds = 0
        self._threads = 0
        self._came = 0
        self._known = Knowledge()
        self._arriving = Knowledge()
        self._tasks: list[str] = []
        self._ends: list[int] = []  # events: the end of each round
        self._last: dict[Task, tuple[int, str]] = {}  # each task's latest arrival: round and line

    def arrive(self, threads: int, task: Task, event: int, where: str) -> int:
        """The warps of a task arrive, which may end a round, an event with that number; returns the round."""
        own = 32 * task.num_warps
        if threads % 32 or threads < own:
            raise NamedBarrierError(
                f"named barrier {self.number} is used with {threads} threads at {where}: a multiple of 32, at least the {own} of "
                f"{task.name}"
            )
        if self._came and threads != self._threads:
            raise NamedBarrierError(
                f"named barrier {self.number} is used with {threads} threads at {where}, and {self._tasks[-1]} used it with "
                f"{self._threads} in the same round"
            )
        if self._came + own > threads:
            raise NamedBarrierError(
                f"named barrier {self.number} gets {self._came + own} threads with {task.name} at {where}, and is for {threads}"
            )
        last, at = self._last.get(task, (-1, ""))
        if last >= 0 and not (last < self.rounds and task.knowledge.knows(self._ends[last])):
            raise NamedBarrierError(
                f"{task.name} arrives at named barrier {self.number} at {where}, and nothing makes sure that the round is over in which it "
                f"arrived at {at}: both could count in one"
            )
        self._last[task] = self.rounds, where
        self._threads = threads
        self._came += own
        self._tasks.append(task.name)
        self._arriving.join(task.knowledge)
        arrived = self.rounds
        if self._came == threads:
            self.rounds += 1
            self._came = 0
            self._tasks = []
            self._known.join(self._arriving)
            self._known.add(event)
            self._ends.append(event)
            self._arriving = Knowledge()
        return arrived

    def wait(self, arrived: int, where: str) -> Waiting:
        """What a task waits for that came in round ``arrived``; :meth:`passed` follows."""
        return Waiting(
            lambda: self.rounds > arrived,
            lambda: f"named barrier {self.number}: {self._came} of {self._threads} threads have come",
            where,
        )

    def passed(self, task: Task) -> None:
        """The task has come through: it learns what those knew who arrived."""
        task.knowledge.join(self._known)


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"
