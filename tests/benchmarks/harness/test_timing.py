"""Samples: interleaved, as many as it takes, and what fails beside what does not."""

import statistics

import pytest
import torch

from pytransformer.benchmarks.harness.roofline import Ceilings, measure_ceilings
from pytransformer.benchmarks.harness.timing import Sampling, Timing, reason_of, settled, side_stream, time_interleaved

FEW = Sampling(rounds=4, max_rounds=4)


def timed(variants, device, sampling=FEW, **options):
    with side_stream(device):
        return time_interleaved(variants, device, sampling, **options)


def test_variants_take_turns_and_none_is_always_first():
    order = []
    variants = {name: [lambda name=name: order.append(name)] for name in "ABC"}
    timings = timed(variants, torch.device("cpu"))
    assert order[3:] == list("ABCBCACABABC")
    assert all(len(timing.samples) == timing.rounds == 4 for timing in timings.found.values())


def test_every_input_set_has_its_turn():
    order = []
    timed({"A": [lambda index=index: order.append(index) for index in range(3)]}, torch.device("cpu"))
    assert order[1:] == [0, 1, 2, 0]


def test_a_variant_that_fails_when_timed_is_told_apart(device):
    def raises():
        raise RuntimeError("an injected failure\nsecond line")

    x = torch.ones(8, device=device)
    timings = timed({"raises": [raises], "right": [lambda: x * 2]}, device)
    assert timings.failed == {"raises": "RuntimeError: an injected failure"}
    assert set(timings.found) == {"right"}
    assert timings.found["right"].method == ("graph" if device.type == "cuda" else "clock")


def test_a_call_that_cannot_be_captured_is_timed_with_events(device):
    x = torch.ones(8, device=device)
    timing = timed({"reads back": [lambda: x.sum().item()]}, device).found["reads back"]
    assert timing.method == ("events" if device.type == "cuda" else "clock")
    assert bool(timing.note) == (device.type == "cuda")
    assert timing.median > 0


def test_the_progress_names_the_variant_at_work():
    seen = []
    variants = {"A": [lambda: seen.append("call A")], "B": [lambda: seen.append("call B")]}
    timed(variants, torch.device("cpu"), Sampling(1, 1), progress=seen.append)
    assert seen == ["A", "call A", "B", "call B", "", "call A", "call B"]


def test_rounds_end_when_the_median_is_known():
    steady, noisy = [1.0, 1.001, 0.999, 1.0] * 3, [1.0, 3.0, 2.0, 5.0] * 3
    assert settled(steady, 0.002)
    assert not settled(noisy, 0.002)
    assert not settled([1.0, 1.0, 1.0], 0.002), "three samples say nothing about the spread"


def test_the_rounds_have_a_floor_and_a_cap(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("pytransformer.benchmarks.harness.timing.time.perf_counter", lambda: float(next(clock)))
    steady = timed({"A": [lambda: None]}, torch.device("cpu"), Sampling(5, 40)).found["A"]
    assert steady.rounds == 5
    jumps = iter([1.0, 5.0, 2.0, 9.0] * 100)
    monkeypatch.setattr("pytransformer.benchmarks.harness.timing.time.perf_counter", lambda: next(clock) * next(jumps))
    assert timed({"A": [lambda: None]}, torch.device("cpu"), Sampling(5, 12)).found["A"].rounds == 12


def test_a_slow_row_ends_at_its_time_limit():
    timing = timed({"A": [lambda: None]}, torch.device("cpu"), Sampling(5, 40, limit_seconds=-1.0)).found["A"]
    assert timing.rounds == 1


def test_timing_summarises_with_the_median():
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 100.0], "clock")
    assert (timing.median, timing.low, timing.high) == (3.0, 1.0, 100.0)
    assert timing.samples == (5.0, 1.0, 2.0, 3.0, 100.0)


def test_the_error_of_a_median_is_estimated_rightly():
    """The rule behind `settled`, against what medians of many samples really do."""
    from pytransformer.benchmarks.harness.timing import MEDIAN_ERROR_PER_IQR

    draw = torch.Generator().manual_seed(0)
    groups = torch.randn(2000, 25, generator=draw, dtype=torch.float64)
    actual = groups.median(1).values.std()
    quartiles = [statistics.quantiles(group.tolist(), n=4) for group in groups[:400]]
    estimates = [MEDIAN_ERROR_PER_IQR * (third - first) / 5 for first, _, third in quartiles]
    assert statistics.fmean(estimates) == pytest.approx(float(actual), rel=0.15)


def test_running_out_of_memory_is_called_that():
    assert reason_of(torch.OutOfMemoryError("Tried to allocate\nmore")) == "out of memory: Tried to allocate"
    assert reason_of(RuntimeError("CUDA error: out of memory")).startswith("out of memory")
    assert reason_of(KeyError("")) == "KeyError: ''"


def test_ceilings_are_measured_on_this_device(device):
    with side_stream(device):
        ceilings = measure_ceilings(device, small=True)
    assert all(value > 0 for value in ceilings.to_dict().values())


def test_the_floor_is_the_larger_of_arithmetic_and_memory():
    ceilings = Ceilings(copy=100.0, read=200.0, matmul=1000.0)
    assert ceilings.floor(5000.0, 100.0) == 5.0
    assert ceilings.floor(500.0, 100.0) == 1.0
    assert ceilings.floor(500.0, 100.0, "read") == 0.5
    assert Ceilings(copy=100.0, read=50.0, matmul=1.0).memory_rate("read") == 100.0, (
        "reading is not slower than copying"
    )
