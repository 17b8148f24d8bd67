"""What the benchmarks do on a GPU, with a stand-in that keeps time by the calls it is given: capture, fallback, memory, a lost context.

The stand-in has a clock that only its kernels move, so times are known exactly; host time does not count in it.
"""

import os
import stat
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from pytransformer.benchmarks.harness import record, rows
from pytransformer.benchmarks.harness.timing import (
    MAX_CAPTURED_CALLS,
    ContextLost,
    Sampling,
    context_is_lost,
    time_interleaved,
)
from tests.benchmarks.samples import doubling

CUDA = torch.device("cuda")
SAMPLING = Sampling(3, 5, sample_seconds=1e-3)
LAUNCH_SECONDS = 1e-5  # of a replay


class Gpu:
    """A clock, and the graph that is being captured."""

    def __init__(self):
        self.now = 0.0
        self.capturing = None
        self.replays = 0
        self.lost = False
        self.captured = []

    def kernel(self, seconds):
        """A call that takes so long on the GPU."""

        def call():
            if self.capturing is not None:
                self.capturing.seconds += seconds
                self.capturing.calls += 1
            else:
                self.now += seconds

        return call

    def synchronize(self, device=None):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def gpu(monkeypatch):
    stand_in = Gpu()

    class Graph:
        def __init__(self):
            self.seconds, self.calls = 0.0, 0

        def replay(self):
            stand_in.now += self.seconds + LAUNCH_SECONDS
            stand_in.replays += 1

    @contextmanager
    def capture(graph, stream):
        stand_in.capturing = graph
        try:
            yield
        finally:
            stand_in.capturing = None
        stand_in.captured.append(graph.calls)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = stand_in.now

        def synchronize(self):
            stand_in.synchronize()

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    for name, value in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Event,
        "synchronize": stand_in.synchronize,
        "current_stream": lambda: "side",
        "default_stream": lambda: "default",
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.full(shape[0], 1.0))
    return stand_in


def test_a_graph_is_long_enough_for_its_launch_not_to_count(gpu):
    calls = [gpu.kernel(3e-6) for _ in range(4)]
    timing = time_interleaved({"A": calls}, CUDA, SAMPLING).found["A"]
    assert timing.method == "graph" and timing.note == ""
    first, final = gpu.captured
    assert first == 4, "one pass, to learn how long it takes"
    assert final % 4 == 0 and 100 < final <= MAX_CAPTURED_CALLS
    assert timing.median == pytest.approx(3e-6, rel=0.05)
    assert gpu.replays == 3 + 1 + timing.rounds


def test_a_slow_call_is_captured_once(gpu):
    timing = time_interleaved({"A": [gpu.kernel(0.5)]}, CUDA, SAMPLING).found["A"]
    assert gpu.captured == [1]
    assert timing.median == pytest.approx(0.5, rel=1e-3)


def test_very_short_calls_stay_below_the_cap(gpu):
    time_interleaved({"A": [gpu.kernel(1e-9)] * 7}, CUDA, SAMPLING)
    assert max(gpu.captured) <= MAX_CAPTURED_CALLS


def test_what_cannot_be_captured_is_timed_from_the_host(gpu):
    kernel = gpu.kernel(2e-6)

    def reads_back():
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        kernel()

    timings = time_interleaved({"A": [reads_back], "B": [gpu.kernel(1e-6)]}, CUDA, SAMPLING).found
    assert (timings["A"].method, timings["B"].method) == ("events", "graph")
    assert timings["A"].note == "not captured: RuntimeError: operation not permitted when stream is capturing"
    assert timings["A"].median == pytest.approx(2e-6)


def test_a_variant_that_runs_out_of_memory_costs_itself(gpu):
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    timings = time_interleaved({"A": [greedy], "B": [gpu.kernel(1e-6)]}, CUDA, SAMPLING)
    assert timings.failed == {"A": "out of memory: CUDA out of memory. Tried to allocate 20.00 GiB"}
    assert set(timings.found) == {"B"}


def test_a_lost_context_ends_everything(gpu):
    def breaks():
        gpu.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not context_is_lost(CUDA)
    with pytest.raises(ContextLost, match="A: RuntimeError: CUDA error: an illegal memory access") as lost:
        time_interleaved({"A": [breaks], "B": [gpu.kernel(1e-6)]}, CUDA, SAMPLING)
    assert lost.value.variant == "A"
    assert context_is_lost(CUDA)


def test_the_default_stream_is_refused(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "default")
    with pytest.raises(RuntimeError, match="inside side_stream"):
        time_interleaved({"A": [gpu.kernel(1e-6)]}, CUDA, SAMPLING)


@pytest.fixture
def memory(monkeypatch):
    """A GPU with a 50 MB cache and 1000 MB free."""

    def set_free(megabytes):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (megabytes * 10**6, 10**9))

    set_free(1000)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    properties = SimpleNamespace(L2_cache_size=50 * 10**6)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return set_free


def sized(megabytes, requires_grad=False):
    """A row whose input set has this size, and is read once; and the seeds it was drawn with."""
    seeds = []

    def inputs(device, seed):
        seeds.append(seed)
        return {"x": torch.empty(int(megabytes * 10**6) // 4).requires_grad_(requires_grad)}

    row = doubling()
    return rows.Row(row.op, row.shape, 0.0, megabytes * 1e6, inputs, row.variants, row.golden, row.pick), seeds


@pytest.mark.parametrize(
    ("megabytes", "sets", "state"),
    [(50, 3, "cold"), (10, 15, "cold"), (200, 2, "cold"), (1, 64, "warm"), (300, 1, "warm")],
)
def test_input_sets_are_as_many_as_the_cache_asks_for_and_memory_allows(memory, megabytes, sets, state):
    row, seeds = sized(megabytes)
    assert len(rows._input_sets(row, CUDA, 7)) == sets
    assert seeds == list(range(7, 7 + sets))
    assert rows._l2_state(row, sets, CUDA) == state


def test_what_forward_passes_keep_counts_as_memory(memory):
    row, _ = sized(50, requires_grad=True)
    memory(500)
    assert len(rows._input_sets(row, CUDA, 0)) == 2, "200 MB for inputs; a set and what one variant keeps take 100"


def test_clocks_come_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '1980, 3201, 652.10, 54'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    expected = {"clocks.sm": "1980", "clocks.mem": "3201", "power.draw": "652.10", "temperature.gpu": "54"}
    assert record.clocks(CUDA) == expected
    assert record.clocks(torch.device("cpu")) == {}
    program.write_text("#!/bin/sh\nexit 9\n")
    assert record.clocks(CUDA) == {}
