"""When the events of a trace happen: by the interpreter's steps, or by a model of a multiprocessor.

The model takes the tasks' events, who waits for whom, and three rates, and lets everything happen as soon as it may.
The interpreter's order of tasks has no part in it. It is a model of order, not of time: between what it counts nothing
takes any.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

from .trace import Event, Trace

Key = tuple[str, int]  # a barrier and its phase


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one multiprocessor (compute capability 9.0) does in a cycle, each at its limit.

    Attributes:
        operations: floating-point ones of 16-bit products. A score of head_dim 64 takes 4 × 64, and those of a tile of 64 × 128 take the
            tensor cores 512 cycles.
        exponentials: 16: those of the same tile take 512 cycles as well.
        bytes: of copies. A multiprocessor's part of the memory's 4.3 TB/s is 18.6; twice that, as programs of one head read the same keys
            and values at about the same time, and then they come from memory for one of them.
    """

    operations: float = 4096.0
    exponentials: float = 16.0
    bytes: float = 37.2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be positive, got {getattr(self, field.name)}")


class Moments(NamedTuple):
    """Of one event.

    Attributes:
        issued: when its task came to it.
        begin: when it began: later than it was issued where a unit was still busy.
        end: when it was done: of copies and products the work itself, of a wait its return.
    """

    issued: float
    begin: float
    end: float


def is_barrier_event(event: Event) -> bool:
    """Whether the end of a phase waits for it."""
    return event.kind in ("arrive", "expect", "copied", "named arrive", "named sync") and bool(event.barrier)


def by_steps(trace: Trace) -> list[Moments]:
    """Each event at its step; waits from ``blocked``, copies and products until ``copied`` and until a wait found them through."""
    ends: dict[int, int] = {}
    for event in trace.events:
        if event.kind in ("copied", "produced", "store_wait"):
            for work in event.works:
                ends.setdefault(work, event.step)
    blocked: dict[str, int] = {}
    moments = []
    for event in trace.events:
        begin = end = event.step
        if event.kind in ("copy", "product"):
            end = ends.get(event.works[0], event.step)
        elif event.kind == "exponentials":
            end = event.step + 1
        elif event.kind == "blocked":
            blocked[event.task] = event.step
        elif event.kind in ("wait", "named sync"):
            begin = blocked.pop(event.task, event.step)
        moments.append(Moments(begin, begin, end))
    return moments


def by_model(trace: Trace, rates: Rates) -> list[Moments]:
    """Each event as early as those that it waits for, and the rates, allow.

    Three units take what is asked of them one after the other: the copy engine, the tensor cores and the exponential unit.

    Raises:
        ValueError: the trace is not that of a program that came to its end.
    """
    return _Model(trace, rates).run()


class _Model:
    """Takes the next event of the task whose next one can be first, until there is none."""

    def __init__(self, trace: Trace, rates: Rates) -> None:
        self._rates = rates
        self._events = trace.events
        self._moments: dict[int, Moments] = {}
        self._streams = _streams(trace)
        self._clocks = dict.fromkeys(self._streams, 0.0)
        self._missing = collections.Counter(
            (event.barrier, event.phase) for event in self._events if is_barrier_event(event)
        )
        self._ends: dict[Key, float] = {}  # of phases, as far as who arrived has
        self._works: dict[int, float] = {}
        self._free = {"copy": 0.0, "product": 0.0, "exponentials": 0.0}
        self._forks: list[float] = []
        self._joins: dict[str, list[float]] = {}  # of each task that was split off: the ends of its parts
        self._arrived: set[int] = set()  # steps of named sync that have arrived, and wait

    def run(self) -> list[Moments]:
        """When each event happens."""
        while True:
            times = [
                (time, number, task)
                for number, task in enumerate(self._streams)
                if self._streams[task] and (time := self._possible(task)) is not None
            ]
            if not times:
                break
            time, _, task = min(times)
            self._take(task, self._streams[task].popleft(), time)
        left = [stream[0] for stream in self._streams.values() if stream]
        if left:
            raise ValueError(
                f"no timeline for this trace: {left[0].kind} {left[0].what} at {left[0].where} waits for what is not in it"
            )
        for event in self._events:  # what is no step of a task's own
            if event.step not in self._moments:
                time = self._works[event.works[0]] if event.kind == "copied" else self._last(event)
                self._moments[event.step] = Moments(time, time, time)
        return [self._moments[event.step] for event in self._events]

    def _last(self, event: Event) -> float:
        """When the event's task was at the event before."""
        before = (e for e in reversed(self._events[: event.step]) if e.task == event.task and e.step in self._moments)
        return next((self._moments[e.step].end for e in before), 0.0)

    def _possible(self, task: str) -> float | None:
        """When its next event can be over, or begin if it takes time; None while that is open."""
        event = self._streams[task][0]
        clock = self._clocks[task]
        if task != next(iter(self._streams)):
            split = len(self._joins.get(task, ()))
            if split >= len(self._forks):
                return None
            clock = self._clocks[task] = max(clock, self._forks[split])
        if event.kind == "named sync" and event.step not in self._arrived:
            self._arrived.add(event.step)
            self._arrive((event.barrier, event.phase), clock)
        if event.kind in ("wait", "named sync") and event.phase >= 0:
            key = (event.barrier, event.phase)
            return max(clock, self._ends[key]) if key in self._ends and not self._missing[key] else None
        if event.kind in ("produced", "store_wait"):
            return max([clock, *(self._works[work] for work in event.works)])
        if event.kind == "joined":
            ends = [self._joins.get(other, []) for other in list(self._streams)[1:]]
            number = len(self._forks)
            return max([clock, *(end[number - 1] for end in ends)]) if all(len(e) >= number for e in ends) else None
        return clock

    def _take(self, task: str, event: Event, time: float) -> None:
        issued, begin = self._clocks[task], time
        if event.kind in self._free:
            begin = max(time, self._free[event.kind])
            rate = {"copy": self._rates.bytes, "product": self._rates.operations}.get(
                event.kind, self._rates.exponentials
            )
            end = self._free[event.kind] = begin + event.size / rate
            for work in event.works:
                self._works[work] = end
            if event.kind == "copy" and event.barrier:
                self._arrive((event.barrier, event.phase), end)
            self._clocks[task] = end if event.kind == "exponentials" else time
        else:
            begin, end = issued, time
            self._clocks[task] = end
            if event.kind != "named sync" and is_barrier_event(event):
                self._arrive((event.barrier, event.phase), end)
            if event.kind == "specialize":
                self._forks.append(end)
            if event.kind == "end":
                self._joins.setdefault(task, []).append(end)
        self._moments[event.step] = Moments(issued, begin, end)

    def _arrive(self, key: Key, time: float) -> None:
        self._missing[key] -= 1
        self._ends[key] = max(self._ends.get(key, 0.0), time)


def _streams(trace: Trace) -> dict[str, collections.deque[Event]]:
    """The events of each task in its own order, the program's first; it goes on as a partition."""
    program = program_name(trace)
    streams: dict[str, collections.deque[Event]] = {program: collections.deque()}
    for event in trace.events:
        if event.kind not in ("copied", "blocked"):
            name = program if event.task == "program" else event.task
            streams.setdefault(name, collections.deque()).append(event)
    return streams


def program_name(trace: Trace) -> str:
    """The partition as which the program goes on."""
    return next((event.task for event in trace.events if event.kind == "specialize"), "program")
