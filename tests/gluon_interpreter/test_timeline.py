"""Traces as timelines: what they say of each event, and when a model lets it happen."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch

from pytransformer.gluon_interpreter import EARLY, SCHEDULES, Rates, Trace, by_model, by_steps, timeline, traced
from pytransformer.gluon_interpreter.timeline import TENSOR_CORES, Timeline, task_names
from tests.gluon_interpreter import attention_backward, attention_forward, test_ping_pong
from tests.gluon_interpreter.names import needs_inline_asm, needs_reductions

TILES = 4


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    """A block of 128 queries and four tiles of 128 keys, in every schedule."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, length, 64, generator=generator).to(torch.bfloat16) for length in (128, 128 * TILES, 128 * TILES)
    )
    return [attention_forward.run(q, k, v, False, 128, schedule)[2][0] for schedule in SCHEDULES]


def of_model(trace: Trace) -> Timeline:
    return timeline(trace, by_model(trace, Rates()))


def test_a_load_is_issued_arrives_is_waited_for_and_then_multiplied(traces: list[Trace]) -> None:
    for trace in traces:
        events = trace.events
        products = 0
        for copied in (event for event in events if event.kind == "copied" and event.barrier):
            (issued,) = (event for event in events if event.kind == "copy" and event.works == copied.works)
            assert issued.step < copied.step and issued.what.endswith(f"to {copied.what}")
            assert (issued.barrier, issued.phase) == (copied.barrier, copied.phase)
            for task in ("partition 0 (consume)", "partition 1 (consume)"):
                (wait,) = (
                    event
                    for event in events
                    if (event.kind, event.task, event.barrier, event.phase)
                    == ("wait", task, copied.barrier, copied.phase)
                )
                reads = [e for e in events if e.kind == "product" and e.task == task and copied.what in e.what]
                if reads:  # each consumer has its own queries
                    product = next(event for event in reads if event.step > wait.step)
                    produced = next(e for e in events if e.kind == "produced" and product.works[0] in e.works)
                    assert copied.step < wait.step < product.step < produced.step
                    assert product.size == 2 * 64 * 128 * 64
                    products += 1
        assert products == 2 * (1 + 2 * TILES)


def test_memory_and_barriers_have_the_names_of_the_kernel(traces: list[Trace]) -> None:
    for trace in traces:
        waited = {event.barrier for event in trace.events if event.kind == "wait"}
        stages = {f"{name}[{stage}]" for name in ("k_full", "k_empty", "v_full", "v_empty") for stage in (0, 1)}
        assert waited == {"q_full", *stages}
        assert of_model(trace).stages == ("q[0]", "q[1]", "k[0]", "k[1]", "v[0]", "v[1]")
        assert task_names(trace)["partition 2 (produce)"] == "producer"


def test_a_model_gives_every_schedule_the_same_timeline(traces: list[Trace]) -> None:
    first = of_model(traces[0])
    assert first.tasks == ("producer", "consumer 0", "consumer 1")
    for trace in traces[1:]:
        assert of_model(trace) == first


def test_nothing_in_a_model_happens_before_what_it_waits_for(traces: list[Trace]) -> None:
    picture = of_model(traces[0])
    for wait in picture.waits:
        assert wait.begin < wait.end == wait.cause.time
        assert wait.cause.lane != wait.lane
    # 4 × 64 operations for each of 128 × 512 scores, one product after the other.
    products = [span for span in picture.spans if span.lane == TENSOR_CORES]
    assert sum(span.end - span.begin for span in products) == 4 * 64 * 128 * 128 * TILES / 4096
    assert all(before.end <= after.begin for before, after in itertools.pairwise(products))
    for stage in picture.stages:
        held = [span for span in picture.spans if span.lane == stage]
        assert all(before.end <= after.begin for before, after in itertools.pairwise(held))
    labels = {(wait.lane, wait.what) for wait in picture.waits if wait.phase >= 0}
    assert ("producer", "v_empty[0]") in labels and ("consumer 1", "k_full[0]") in labels
    assert {span.tile for span in picture.spans if span.lane == "k[1]"} == {"k1", "k3"}
    assert sum(1 for mark in picture.marks if mark.barrier.endswith("]")) == 2 * (2 * TILES - 1)


def test_a_slower_unit_is_waited_for_longer(traces: list[Trace]) -> None:
    rates = Rates()
    end = of_model(traces[0]).end
    for name in ("operations", "exponentials", "bytes"):
        slower = dataclasses.replace(rates, **{name: getattr(rates, name) / 8})
        assert timeline(traces[0], by_model(traces[0], slower)).end > 2 * end, name
    with pytest.raises(ValueError, match="bytes must be positive, got 0"):
        Rates(bytes=0)


def test_a_trace_that_stops_has_no_timeline(traces: list[Trace]) -> None:
    trace = traces[0]
    stopped = Trace(
        trace.program, [event for event in trace.events if event.barrier != "v_full[0]" or event.kind == "wait"]
    )
    with pytest.raises(ValueError, match=r"no timeline for this trace: wait v_full\[0\] at attention_forward\.py:\d+"):
        by_model(stopped, Rates())


def test_steps_show_who_was_blocked_in_this_schedule(traces: list[Trace]) -> None:
    for trace in traces:
        picture = timeline(trace, by_steps(trace))
        blocked = [(event.step, event.barrier) for event in trace.events if event.kind == "blocked"]
        assert sorted((wait.begin, wait.what) for wait in picture.waits) == blocked
        assert all(wait.cause.time <= wait.end for wait in picture.waits)
        assert picture.end < len(trace.events)


@needs_inline_asm
def test_a_named_barrier_is_ended_by_the_other_consumer(tmp_path: Path) -> None:
    _, (trace,) = test_ping_pong._run(test_ping_pong._taking_turns(), tmp_path, EARLY)
    picture = of_model(trace)
    turns = [wait for wait in picture.waits if wait.what.startswith("named barrier")]
    assert turns
    for wait in turns:
        assert {wait.lane, wait.cause.lane} == {"consumer 0", "consumer 1"} and wait.end == wait.cause.time


@needs_reductions
def test_a_backward_pass_waits_for_its_stores() -> None:
    q, k, v, grad = (torch.randn(1, 128, 64).to(torch.bfloat16) for _ in range(4))
    with traced() as traces:
        attention_backward.run(q, k, v, grad, torch.zeros(1, 128), torch.zeros(1, 128), EARLY)
    (trace,) = traces
    picture = of_model(trace)
    assert any(span.kind == "store" and span.lane.startswith("dq") for span in picture.spans)
    assert any(wait.cause.what.startswith("the copy of v[0] to") for wait in picture.waits)
    products = [span for span in picture.spans if span.kind == "product"]
    assert len(products) == 2 * 2 * 5
    with traced() as others:
        pass
    assert not others and len(traces) == 1
