"""The watch over benchmark processes: what it does when they end, die or hang. The processes here are scripts of a few lines."""

import os
import sys
import textwrap

import pytest
import torch

from pytransformer.benchmarks.harness import record, supervise, worker
from pytransformer.benchmarks.harness.roofline import Ceilings
from pytransformer.benchmarks.harness.supervise import Limits
from tests.benchmarks.samples import ENVIRONMENT, OPTIONS, record_of, row

PRELUDE = """
import json, os, sys, time
out = sys.argv[1]
content = json.load(open(out))
def save():
    open(out, "w").write(json.dumps(content))
def note(variant, section="rows"):
    text = json.dumps({"op": "rope", "shape": "8", "section": section, "variant": variant, "since": time.time()})
    open(out + ".running.tmp", "w").write(text)
    os.replace(out + ".running.tmp", out + ".running")
"""


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """Supervises scripts, one after another; the outcome, the record and how many were started."""

    def supervised(*scripts, limits=None):
        out = tmp_path / "r.json"
        record.save(out, {**record.new_content(dict(ENVIRONMENT), dict(OPTIONS))})
        started = []

        def command(path, options, left):
            script = scripts[min(len(started), len(scripts) - 1)]
            started.append(left)
            return [sys.executable, "-S", "-c", PRELUDE + textwrap.dedent(script), str(path)]

        monkeypatch.setattr(supervise, "worker_command", command)
        outcome = supervise.supervise(out, [], limits or Limits(), echo=lambda line: None)
        return outcome, record.load(out), started

    return supervised


FINISHES = "content['complete'] = True; save()"


def test_a_process_that_finishes(watch):
    outcome, _, started = watch(FINISHES)
    assert (outcome.complete, outcome.status, outcome.exit_code, len(started)) == (True, "passed", 0, 1)


def test_a_process_that_leaves_rows_for_want_of_time(watch):
    outcome, content, _ = watch("content['left_out'] = ['rope 8']; save()", limits=Limits(30.0))
    assert (outcome.complete, outcome.exit_code) == (False, 0)
    assert outcome.status == "passed, cut at its limit"
    assert content["left_out"] == ["rope 8"]


def test_a_process_that_dies_of_a_signal_costs_the_variant(watch):
    outcome, content, started = watch("note('cuda'); os.kill(os.getpid(), 11)", FINISHES)
    reason = "the process died with signal 11"
    assert content["incidents"] == [{"op": "rope", "shape": "8", "variant": "cuda", "reason": reason}]
    assert content["rows"] == []
    assert (outcome.complete, len(started)) == (True, 2)


def test_a_measurement_that_dies_where_nobody_can_tell_costs_the_row(watch):
    outcome, content, _ = watch("note('', 'measurements'); os._exit(3)", FINISHES)
    (failed,) = content["measurements"]
    assert failed["failure"] == "the process ended with exit code 3"
    assert outcome.faults == ["rope 8: the process ended with exit code 3"]
    assert (outcome.status, outcome.exit_code) == ("1 of ours failed", 1)


def test_processes_that_die_outside_any_row_are_given_up(watch):
    outcome, _, started = watch("raise SystemExit('no torch here')")
    assert outcome.problem == "the process ended with exit code 1 outside any row, 2 times"
    assert (outcome.exit_code, len(started)) == (1, 2)


def test_options_that_cannot_be_served_are_not_tried_again(watch):
    outcome, _, started = watch(f"raise SystemExit({worker.USAGE})")
    assert (outcome.problem, len(started)) == ("the options cannot be served", 1)


def test_a_process_that_never_begins_is_ended(watch):
    outcome, _, started = watch("time.sleep(60)", limits=Limits(start=0.3))
    assert outcome.problem.startswith("the process did nothing for 0.3 s outside any row")
    assert len(started) == 2


def test_a_hanging_variant_is_ended_and_the_row_tried_again(watch):
    outcome, content, started = watch("note('flex'); time.sleep(60)", FINISHES, limits=Limits(stage=0.4))
    assert [(found["variant"], found["reason"]) for found in content["incidents"]] == [
        ("flex", "the process ran past 0.4 s")
    ]
    assert (outcome.complete, len(started)) == (True, 2)


def test_the_end_of_the_run_ends_a_row_that_is_late(watch, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 0.2)
    outcome, content, started = watch("note('cuda'); time.sleep(60)", limits=Limits(0.5))
    assert (outcome.out_of_time, outcome.exit_code, len(started)) == (True, 0, 1)
    assert content["incidents"] == [], "it has done nothing wrong: the next run tries it again"


def test_a_run_without_a_record_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "worker_command", lambda *_: [sys.executable, "-S", "-c", ""])
    outcome = supervise.supervise(tmp_path / "none.json", [])
    assert outcome.problem.startswith("no result was written")
    assert outcome.exit_code == 1


def test_the_time_that_is_left_is_handed_down(tmp_path):
    assert supervise.worker_command(tmp_path, ["--peers"], 12.34)[-2:] == ["--limit-seconds", "12.3"]
    assert "--limit-seconds" not in supervise.worker_command(tmp_path, [], None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tiny rows are for a CPU")
def test_a_worker_without_time_leaves_all_rows_out(tmp_path, monkeypatch, capsys):
    """In this process: the ceilings are still measured twice, and every row is named as left out."""
    measured = []

    def measure(device, *, small):
        measured.append(device.type)
        return Ceilings(copy=1e10, read=1e10, matmul=1e11)

    monkeypatch.setattr(worker, "measure_ceilings", measure)  # itself in test_timing
    monkeypatch.setenv("PYTRANSFORMER_REVISION", "here")
    out = tmp_path / "r.json"
    assert worker.main(["rope", "--grid", "tiny", "--limit-seconds", "0", "--out", str(out)]) == 0
    content = record.load(out)
    assert content["rows"] == [] and not content["complete"]
    assert measured == ["cpu", "cpu"]
    assert content["left_out"] and "left out, the time limit was reached" in capsys.readouterr().out
    assert worker.main(["rope", "--grid", "tiny", "--out", str(out)]) == 0
    content = record.load(out)
    assert content["complete"] and content["left_out"] == []
    assert worker.main(["rope", "--grid", "tiny", "--out", str(out)]) == worker.USAGE
    assert "holds a complete run" in capsys.readouterr().err


def test_what_is_asked_wrongly_is_one_line(tmp_path, capsys):
    out = str(tmp_path / "r.json")
    assert worker.main(["rope", "--grid", "tiny", "--rounds", "0", "--out", out]) == worker.USAGE
    assert worker.main(["fly", "--grid", "tiny", "--out", out]) == worker.USAGE
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "benchmarks: --rounds must be at least 1",
        "benchmarks: OP must be one of activation",
    ]


def test_ops_and_suites_can_be_mixed():
    parser = worker.argparse.ArgumentParser()
    worker.add_options(parser)

    def ops(*names):
        arguments = parser.parse_args(["--grid", "tiny", *names])
        return {found.op for found in worker.wanted_rows(arguments, torch.device("cpu"))}

    assert ops("rope") == {"rope_forward"}
    assert ops("rope_forward", "kv_append") == {"rope_forward", "kv_append"}
    assert ops("rms_norm_forward", "rope") == {"rms_norm_forward", "rope_forward"}
    assert ops("rms_norm", "rope") == {"rms_norm_forward", "rms_norm_backward", "rope_forward"}


def test_faults_are_ours_only():
    failed = row("rope", "8", 1.0, 1.0, {})
    failed["failed"] = {"flex": "no", "triton": "RuntimeError: no", "cuda deterministic": "no"}
    assert worker.faults(failed) == ["triton: RuntimeError: no", "cuda deterministic: no"]
    assert worker.faults(worker.failed_row("rope", "8", "out of memory")) == ["out of memory"]
    assert record_of([failed])["rows"][0]["failed"]


def test_a_worker_ends_with_its_supervisor(monkeypatch):
    calls = []

    class Library:
        def prctl(self, *arguments):
            calls.append(arguments)

    monkeypatch.setattr(worker.ctypes, "CDLL", lambda _: Library())
    monkeypatch.delenv(worker.SUPERVISOR, raising=False)
    worker.end_with_parent()
    monkeypatch.setenv(worker.SUPERVISOR, str(os.getppid()))
    worker.end_with_parent()
    assert calls == ([(1, 9)] if sys.platform == "linux" else [])
