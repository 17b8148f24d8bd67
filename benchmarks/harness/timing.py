"""How a call is timed: variants interleaved in one process, cold caches by rotating inputs, every sample kept.

On a GPU the calls of a variant are captured into one CUDA graph (so that host overhead does not count) which runs over several input
sets, larger together than the L2 cache. Where a variant cannot be captured it is timed with events around eager calls, and says so.
On a CPU the wall clock is read around each call.

Rounds go on until the median of every variant is known well enough, or a cap is reached. The order of the variants rotates from round to
round, so that none always runs after the same neighbour.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]
# Calls in one graph: enough for a kernel of a few µs to fill the sample, few enough to capture in a fraction of a second.
MAX_CAPTURED_CALLS = 1536
# The standard error of a median is √(π/2) σ/√n, and of a normal distribution σ = IQR / 1.349.
MEDIAN_ERROR_PER_IQR = math.sqrt(math.pi / 2) / 1.349


class ContextLost(RuntimeError):
    """The CUDA context of this process is unusable; ``variant`` was running. Only a new process can go on."""

    def __init__(self, variant: str, reason: str) -> None:
        super().__init__(f"{variant}: {reason}")
        self.variant = variant
        self.reason = reason


def side_stream(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A stream of its own for everything that is benchmarked.

    A backward pass runs on the stream of its forward pass, and the default stream cannot be captured: so inputs, forward passes, capture
    and replay all happen on this one.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def device_here() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    """Until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def context_is_lost(device: torch.device) -> bool:
    """Whether the CUDA context fails now at anything (an illegal access or a failed assertion cannot be recovered from)."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        return float(torch.ones((), device=device)) != 1.0
    except RuntimeError:
        return True


def reason_of(error: BaseException) -> str:
    """Type and first line of an error; running out of memory is called that."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in text:
        return f"out of memory: {text}"[:300]
    return f"{type(error).__name__}: {text}"[:300]


@dataclass(frozen=True)
class Sampling:
    """How many samples are taken of each variant.

    Attributes:
        rounds, max_rounds: at least and at most this many samples of each variant.
        precision: the rounds end when the standard error of every variant's median is below this fraction of it.
        sample_seconds: about how long one sample lasts on a GPU.
        limit_seconds: no further round is begun after this long, whatever the precision.
    """

    rounds: int = 11
    max_rounds: int = 41
    precision: float = 0.002
    sample_seconds: float = 2e-3
    limit_seconds: float = 8.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Attributes:
        median, low, high: over the rounds; low and high are the 10th and 90th percentile.
        method: "graph", "events" or "clock".
        samples: one for each round.
        note: why a variant was not captured, or "".
    """

    median: float
    low: float
    high: float
    rounds: int
    method: str
    samples: tuple[float, ...] = ()
    note: str = ""

    @staticmethod
    def of(samples: Sequence[float], method: str, note: str = "") -> Timing:
        """Summary of one variant's rounds."""
        low, high = percentile(samples, 0.1), percentile(samples, 0.9)
        return Timing(statistics.median(samples), low, high, len(samples), method, tuple(samples), note)


@dataclass
class Timings:
    """What came of timing some variants: a timing, or the reason why there is none."""

    found: dict[str, Timing] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The sample at this fraction of the sorted samples (nearest rank)."""
    ordered = sorted(samples)
    return ordered[round(fraction * (len(ordered) - 1))]


def settled(samples: Sequence[float], precision: float) -> bool:
    """Whether the standard error of the median is below this fraction of it (judged by the quartiles, which outliers do not move)."""
    if len(samples) < 4:
        return False
    first, median, third = statistics.quantiles(samples, n=4)
    return MEDIAN_ERROR_PER_IQR * (third - first) / math.sqrt(len(samples)) <= precision * median


class _GraphRunner:
    """One replay runs every call of the variant ``repeats`` times."""

    method = "graph"
    note = ""

    def __init__(self, calls: Sequence[Call], sample_seconds: float) -> None:
        _warm_up(calls)
        self._capture(calls, 1)
        # Of the graph, without the host time that eager calls would add.
        seconds = min(_elapsed(self.run) for _ in range(3))
        most = max(1, MAX_CAPTURED_CALLS // len(calls))
        repeats = max(1, min(most, round(sample_seconds / max(seconds, 1e-7))))
        if repeats > 1:
            self._capture(calls, repeats)
            self.run()
        torch.cuda.synchronize()

    def _capture(self, calls: Sequence[Call], repeats: int) -> None:
        self.count = repeats * len(calls)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            for _ in range(repeats):
                for call in calls:
                    call()

    def run(self) -> None:
        self.graph.replay()


class _EagerRunner:
    """The calls one after another from the host."""

    method = "events"

    def __init__(self, calls: Sequence[Call], sample_seconds: float, note: str) -> None:
        seconds = _warm_up(calls)
        self.note = note
        self.calls = calls
        self.repeats = max(1, min(64, round(sample_seconds / max(seconds, 1e-7))))
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


def _elapsed(run: Call) -> float:
    """Seconds of a run on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def _runner(
    name: str, calls: Sequence[Call], device: torch.device, sample_seconds: float
) -> _GraphRunner | _EagerRunner:
    """A captured graph where that works, else eager calls. Raises ContextLost, or what the calls themselves raise."""
    try:
        return _GraphRunner(calls, sample_seconds)
    except Exception as error:
        # Not capturable: a peer that synchronises, or that asks what cannot be asked during capture.
        reason = reason_of(error)
        if context_is_lost(device):
            raise ContextLost(name, reason) from error
    return _EagerRunner(calls, sample_seconds, f"not captured: {reason}")


def _nothing(_: str) -> None:
    """Progress that nobody watches."""


def time_interleaved(
    variants: Mapping[str, Sequence[Call]],
    device: torch.device,
    sampling: Sampling | None = None,
    progress: Callable[[str], None] = _nothing,
) -> Timings:
    """Times several variants of one computation in turns.

    Args:
        variants: for each name the same call on each of several input sets.
        sampling: how many samples.
        progress: called with a variant's name before it is captured, and with "" before the rounds.

    Raises:
        ContextLost: the process can do nothing more on its GPU.
    """
    sampling = sampling or Sampling()
    if device.type != "cuda":
        return _time_on_cpu(variants, sampling, progress)
    if torch.cuda.current_stream() == torch.cuda.default_stream():
        raise RuntimeError(
            "time_interleaved must be called inside side_stream(): the default stream cannot be captured"
        )
    timings = Timings()
    runners: dict[str, _GraphRunner | _EagerRunner] = {}
    for name, calls in variants.items():
        progress(name)
        try:
            runners[name] = _runner(name, calls, device, sampling.sample_seconds)
        except ContextLost:
            raise
        except Exception as error:
            timings.failed[name] = reason_of(error)
            if context_is_lost(device):
                raise ContextLost(name, timings.failed[name]) from error

    def one_round(order: Sequence[str]) -> dict[str, float]:
        events = {}
        for name in order:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            runners[name].run()
            end.record()
            events[name] = (begin, end)
        torch.cuda.synchronize()
        return {name: begin.elapsed_time(end) * 1e-3 / runners[name].count for name, (begin, end) in events.items()}

    progress("")
    for name, samples in _rounds(list(runners), one_round, sampling).items():
        timings.found[name] = Timing.of(samples, runners[name].method, runners[name].note)
    return timings


def _rounds(
    names: Sequence[str], one_round: Callable[[Sequence[str]], Mapping[str, float]], sampling: Sampling
) -> dict[str, list[float]]:
    """The samples of all variants, taken until they settle."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.monotonic()
    for index in range(sampling.max_rounds if names else 0):
        turn = index % len(names)
        for name, seconds in one_round([*names[turn:], *names[:turn]]).items():
            samples[name].append(seconds)
        enough = index + 1 >= sampling.rounds and all(
            settled(values, sampling.precision) for values in samples.values()
        )
        if enough or time.monotonic() - start > sampling.limit_seconds:
            break
    return samples


def _time_on_cpu(
    variants: Mapping[str, Sequence[Call]], sampling: Sampling, progress: Callable[[str], None]
) -> Timings:
    timings = Timings()
    for name, calls in variants.items():
        progress(name)
        try:
            calls[0]()
        except Exception as error:
            timings.failed[name] = reason_of(error)
    usable = [name for name in variants if name not in timings.failed]
    taken = dict.fromkeys(usable, 0)

    def one_round(order: Sequence[str]) -> dict[str, float]:
        seconds = {}
        for name in order:
            calls = variants[name]
            call = calls[taken[name] % len(calls)]
            taken[name] += 1
            start = time.perf_counter()
            call()
            seconds[name] = time.perf_counter() - start
        return seconds

    progress("")
    for name, samples in _rounds(usable, one_round, sampling).items():
        timings.found[name] = Timing.of(samples, "clock")
    return timings
