"""How a call is timed: variants interleaved in one process, cold caches by rotating inputs, medians with their spread.

On a GPU the calls of a variant are captured into one CUDA graph (so that host overhead does not count) which runs over several input
sets, larger together than the L2 cache. Where a variant cannot be captured it is timed with events around eager calls, and says so.
On a CPU the wall clock is read around each call.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A stream of its own for everything that is benchmarked.

    A backward pass runs on the stream of its forward pass, and the default stream cannot be captured: so inputs, forward passes, capture
    and replay all happen on this one.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        median, low, high: over the rounds; low and high are the 10th and 90th percentile.
        method: "graph", "events" or "clock".
    """

    median: float
    low: float
    high: float
    rounds: int
    method: str

    @staticmethod
    def of(samples: Sequence[float], method: str) -> Timing:
        """Summary of one variant's rounds."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
        return Timing(statistics.median(ordered), low, high, len(ordered), method)


class _GraphRunner:
    """One replay runs every call of the variant ``repeats`` times."""

    method = "graph"

    def __init__(self, calls: Sequence[Call], target_seconds: float) -> None:
        seconds = _warm_up(calls)
        self.repeats = max(1, min(64, round(target_seconds / max(seconds, 1e-7))))
        self.count = self.repeats * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for _ in range(self.repeats):
                for call in calls:
                    call()
        self.graph.replay()
        torch.cuda.synchronize()

    def run(self) -> None:
        self.graph.replay()


class _EagerRunner:
    """The calls one after another from the host."""

    method = "events"

    def __init__(self, calls: Sequence[Call], target_seconds: float) -> None:
        seconds = _warm_up(calls)
        self.calls = calls
        self.repeats = max(1, min(64, round(target_seconds / max(seconds, 1e-7))))
        self.count = self.repeats * len(calls)

    def run(self) -> None:
        for _ in range(self.repeats):
            for call in self.calls:
                call()


def _warm_up(calls: Sequence[Call]) -> float:
    """Runs each call (compiling, loading), then times one pass; seconds of the pass."""
    for call in calls:
        call()
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _runner(calls: Sequence[Call], target_seconds: float) -> _GraphRunner | _EagerRunner:
    try:
        return _GraphRunner(calls, target_seconds)
    except RuntimeError:  # not capturable: a peer that synchronises or allocates on the host
        torch.cuda.synchronize()
        return _EagerRunner(calls, target_seconds)


def time_interleaved(
    variants: Mapping[str, Sequence[Call]], device: torch.device, *, rounds: int = 15, target_seconds: float = 2e-3
) -> dict[str, Timing]:
    """Times several variants of one computation A B C A B C …

    Args:
        variants: for each name the same call on each of several input sets.
        rounds: samples for each variant.
        target_seconds: about how long one sample lasts.
    """
    if device.type != "cuda":
        return _time_on_cpu(variants, rounds)
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        raise RuntimeError(
            "time_interleaved must be called inside side_stream(): the default stream cannot be captured"
        )
    runners = {name: _runner(calls, target_seconds) for name, calls in variants.items()}
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        events = {}
        for name, runner in runners.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            runner.run()
            end.record()
            events[name] = (begin, end)
        torch.cuda.synchronize()
        for name, (begin, end) in events.items():
            samples[name].append(begin.elapsed_time(end) * 1e-3 / runners[name].count)
    return {name: Timing.of(values, runners[name].method) for name, values in samples.items()}


def _time_on_cpu(variants: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for calls in variants.values():
        calls[0]()
    for index in range(rounds):
        for name, calls in variants.items():
            call = calls[index % len(calls)]
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: Timing.of(values, "clock") for name, values in samples.items()}
