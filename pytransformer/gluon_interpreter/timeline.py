"""A trace as lanes of spans and as waits with their causes, for a picture.

Lanes are stages of shared memory that copies fill, the tasks, and the tensor cores. What a task is called follows from
what it does: consumers issue products, producers copies alone.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Sequence, Set
from typing import Literal

from .clocks import Moments, is_barrier_event, program_name
from .trace import Event, Trace

Kind = Literal["load", "store", "held", "product", "exponentials", "wait", "wait for work"]
TENSOR_CORES = "tensor cores"


@dataclasses.dataclass(frozen=True)
class Span:
    """Something that takes from ``begin`` to ``end``.

    Attributes:
        lane: of the timeline's.
        kind: a copy in flight, a tile that lies in its stage until its last reader is through (``held``), a product, exponentials, a
            task that waits for a barrier, or one that waits for its own products or stores.
        label: the memory, operands or barrier.
        where: the line of the kernel.
        owner: the task, by its name in the timeline.
        tile: of what is copied, held or multiplied, which one: ``k2`` is the third that was copied to ``k``, ``k_ring.tiles`` or the like.
    """

    lane: str
    begin: float
    end: float
    kind: Kind
    label: str
    where: str
    owner: str
    tile: str = ""


@dataclasses.dataclass(frozen=True)
class Cause:
    """What ended a wait.

    Attributes:
        lane, time: where that is in the picture.
        what: in words.
        where: the line of the kernel.
    """

    lane: str
    time: float
    what: str
    where: str


@dataclasses.dataclass(frozen=True)
class Wait:
    """A task had to wait.

    Attributes:
        lane: of the task.
        begin, end: when.
        what: a barrier, or work of its own.
        phase: of the barrier, counted from 0; −1 for work.
        where: the line of the kernel.
        cause: the last of what it waited for.
    """

    lane: str
    begin: float
    end: float
    what: str
    phase: int
    where: str
    cause: Cause


@dataclasses.dataclass(frozen=True)
class Mark:
    """An arrival at a barrier: where a task tells others something."""

    lane: str
    time: float
    barrier: str
    where: str


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a picture shows.

    Attributes:
        program: whose it is.
        stages: lanes of shared memory.
        tasks: lanes of tasks, producers first.
        spans, waits, marks: what happened; waits that took no time are left out.
        end: of the last span.
    """

    program: tuple[int, int, int]
    stages: tuple[str, ...]
    tasks: tuple[str, ...]
    spans: tuple[Span, ...]
    waits: tuple[Wait, ...]
    marks: tuple[Mark, ...]
    end: float


def timeline(trace: Trace, moments: Sequence[Moments]) -> Timeline:
    """The timeline of a program.

    Args:
        trace: of the program.
        moments: of its events, from a clock (clocks.py).
    """
    return _Builder(trace, moments).build()


def task_names(trace: Trace) -> dict[str, str]:
    """What each task is called in a timeline: ``consumer 0``, ``producer``."""
    program = program_name(trace)
    busy = {
        kind: [program if event.task == "program" else event.task for event in trace.events if event.kind == kind]
        for kind in ("product", "copy", "end")
    }
    tasks = sorted(dict.fromkeys(busy["end"]))
    consumers = [task for task in tasks if task in busy["product"]]
    producers = [task for task in tasks if task not in consumers and task in busy["copy"]]
    names = {}
    for role, members in (("consumer", consumers), ("producer", producers)):
        for number, task in enumerate(members):
            names[task] = role if len(members) == 1 else f"{role} {number}"
    names = {task: names.get(task, task) for task in tasks}
    return names | {"program": names.get(program, program)}


class _Builder:
    def __init__(self, trace: Trace, moments: Sequence[Moments]) -> None:
        self._trace = trace
        self._moments = moments
        self._names = task_names(trace)
        self._issues = {work: event for event in trace.events if event.kind in _ISSUES for work in event.works}
        self._memory = {event.works[0]: event.what for event in trace.events if event.kind == "copied"}
        self._tiles = self._numbered()

    def build(self) -> Timeline:
        """See :func:`timeline`."""
        waits = list(self._waits())
        spans = [*self._work(), *self._held(), *_merged(self._exponentials())]
        spans += [
            Span(wait.lane, wait.begin, wait.end, "wait" if wait.phase >= 0 else "wait for work", wait.what, wait.where, wait.lane)
            for wait in waits
        ]  # fmt: skip
        marks = [
            Mark(self._names[event.task], self._moments[event.step].end, event.barrier, event.where)
            for event in self._trace.events
            if event.kind in ("arrive", "named arrive")
        ]
        order = sorted(set(self._names.values()), key=lambda name: (not name.startswith("producer"), name))
        end = max((span.end for span in spans), default=0.0)
        # Sorted, so that the picture of a model is the same whatever the interpreter's order of tasks was.
        spans.sort(key=lambda span: (span.begin, span.lane, span.kind, span.end))
        waits.sort(key=lambda wait: (wait.begin, wait.lane, wait.end))
        marks.sort(key=lambda mark: (mark.time, mark.lane, mark.barrier))
        return Timeline(
            self._trace.program, self._stages(), tuple(order), tuple(spans), tuple(waits), tuple(marks), end
        )

    def _numbered(self) -> dict[int, str]:
        """The tile of each copy and product: of a product, what its last operand holds that was copied there."""
        counts: collections.Counter[str] = collections.Counter()
        short = _short({_variable(memory) for memory in self._memory.values()})
        holds: dict[str, str] = {}
        tiles = {}
        for event in self._trace.events:
            if event.kind == "copy":
                memory = self._memory[event.works[0]]
                if event.barrier:
                    variable = _variable(memory)
                    holds[memory] = f"{short[variable]}{counts[variable]}"
                    counts[variable] += 1
                tiles[event.works[0]] = holds.get(memory, "")
            elif event.kind == "product":
                operands = [memory for memory in _read(event, holds.keys()) if memory in holds]
                tiles[event.works[0]] = holds[operands[-1]] if operands else ""
        return tiles

    def _stages(self) -> tuple[str, ...]:
        """In the order of their variables' first use, each variable's stages side by side."""
        copies = (event for event in self._trace.events if event.kind == "copy")
        labels = list(dict.fromkeys(self._memory[event.works[0]] for event in copies))
        variables = list(dict.fromkeys(_variable(label) for label in labels))
        return tuple(sorted(labels, key=lambda label: (variables.index(_variable(label)), label)))

    def _work(self) -> Iterator[Span]:
        for event in self._trace.events:
            _, begin, end = self._moments[event.step]
            owner = self._names[event.task]
            if event.kind == "copy":
                memory = self._memory[event.works[0]]
                yield Span(
                    memory,
                    begin,
                    end,
                    "load" if event.barrier else "store",
                    event.what,
                    event.where,
                    owner,
                    self._tiles[event.works[0]],
                )
            elif event.kind == "product":
                yield Span(
                    TENSOR_CORES, begin, end, "product", event.what, event.where, owner, self._tiles[event.works[0]]
                )

    def _exponentials(self) -> Iterator[Span]:
        for event in self._trace.events:
            if event.kind == "exponentials":
                issued, _, end = self._moments[event.step]
                owner = self._names[event.task]
                yield Span(owner, issued, end, "exponentials", str(event.size), event.where, owner)

    def _held(self) -> Iterator[Span]:
        """From a load's arrival until the last that read it, before the next load into the same stage, is through."""
        returns = {}
        for event in self._trace.events:
            if event.kind == "produced":
                for work in event.works:
                    returns[work] = self._moments[event.step].end
        open_: dict[str, tuple[Event, float]] = {}
        for event in self._trace.events:
            if event.kind == "copy" and event.barrier:
                memory = self._memory[event.works[0]]
                yield from self._closed(memory, open_)
                open_[memory] = event, self._moments[event.step].end
                continue
            read = _read(event, open_.keys()) if event.kind in ("product", "load") else ()
            for memory in open_.keys() & set(read):
                load, end = open_[memory]
                last = returns.get(event.works[0], 0.0) if event.works else self._moments[event.step].end
                open_[memory] = load, max(end, last)
        for memory in list(open_):
            yield from self._closed(memory, open_)

    def _closed(self, memory: str, open_: dict[str, tuple[Event, float]]) -> Iterator[Span]:
        if memory in open_:
            load, end = open_.pop(memory)
            arrived = self._moments[load.step].end
            if end > arrived:
                tile = self._tiles[load.works[0]]
                yield Span(memory, arrived, end, "held", load.what, load.where, self._names[load.task], tile)

    def _waits(self) -> Iterator[Wait]:
        causes = self._causes()
        for event in self._trace.events:
            begin, end = self._moments[event.step].begin, self._moments[event.step].end
            if end <= begin:
                continue
            name = self._names[event.task]
            if event.kind in ("wait", "named sync"):
                cause = causes[(event.barrier, event.phase)]
                yield Wait(name, begin, end, event.barrier, event.phase, event.where, cause)
            elif event.kind in ("produced", "store_wait") and event.works:
                last = max(event.works, key=lambda work: self._moments[self._issues[work].step].end)
                cause = self._cause(self._issues[last])
                yield Wait(name, begin, end, self._issues[last].what, -1, event.where, cause)

    def _causes(self) -> dict[tuple[str, int], Cause]:
        """For each phase, the last of those who arrived."""
        found: dict[tuple[str, int], Cause] = {}
        for event in self._trace.events:
            if is_barrier_event(event):
                key = event.barrier, event.phase
                cause = self._cause(self._issues[event.works[0]] if event.kind == "copied" else event)
                if key not in found or (cause.time, cause.lane) > (found[key].time, found[key].lane):
                    found[key] = cause
        return found

    def _cause(self, event: Event) -> Cause:
        name, (issued, _, end) = self._names[event.task], self._moments[event.step]
        if event.kind == "copy":
            return Cause(self._memory[event.works[0]], end, f"the copy of {event.what}", event.where)
        if event.kind == "product":
            return Cause(TENSOR_CORES, end, f"the product {event.what} of {name}", event.where)
        return Cause(name, issued if event.kind == "named sync" else end, f"{name}, which arrives", event.where)


_ISSUES = ("copy", "product")


def _read(event: Event, stages: Set[str]) -> list[str]:
    """What a product or a thread reads: a stage, also where it is only a part of one (``k[0, 0:64]`` of ``k[0]``), or other memory."""
    read = []
    for label in event.what.split(" × "):
        whole = label
        while whole not in stages and "[" in whole:
            beginning, comma, _ = whole.rpartition(", ")
            whole = f"{beginning}]" if comma else whole.partition("[")[0]
        read.append(whole if whole in stages else label)
    return read


def _variable(label: str) -> str:
    return re.sub(r"\[.*", "", label)


def _short(variables: Set[str]) -> dict[str, str]:
    """``k`` for ``k_ring.tiles``, ``q`` for ``memory.q_tiles``: the shortest word that begins a part and no other variable's."""
    words = {variable: {part.partition("_")[0] for part in variable.split(".")} for variable in variables}
    uses = collections.Counter(word for found in words.values() for word in found)
    return {
        variable: min((word for word in found if uses[word] == 1), key=len, default=variable.rpartition(".")[2])
        for variable, found in words.items()
    }


def _merged(spans: Iterator[Span]) -> Iterator[Span]:
    """Exponentials of a task that follow each other as one span, with their sum."""
    last: dict[str, Span] = {}
    for span in spans:
        before = last.get(span.lane)
        if before is not None and before.end == span.begin:
            larger = max(before, span, key=lambda part: int(part.label))
            label = str(int(before.label) + int(span.label))
            last[span.lane] = dataclasses.replace(before, end=span.end, label=label, where=larger.where)
            continue
        if before is not None:
            yield before
        last[span.lane] = span
    yield from last.values()
