"""`make gpu` without a GPU: parts are independent, limits hold, a cut-off loses nothing, the closing table says what happened."""

import json
import sys

import pytest
import torch

from pytransformer.benchmarks.harness import record, schema
from pytransformer.benchmarks.harness.paths import ROOT
from pytransformer.benchmarks.programs import gpu, rehearsal
from tests.benchmarks.samples import attention_row, record_of


@pytest.fixture
def cut(tmp_path):
    """The record at the cut and after it went on, with all that differs from what must come out."""
    path = tmp_path / "benchmarks.json"
    half, found = rehearsal.rehearse_cut(path, log=tmp_path / "log")
    return half, record.load(path), found, (tmp_path / "log").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")
def test_a_cut_off_and_rows_that_go_wrong(cut):
    """Killed in the middle and continued; variants that raise, hang, exit, are wrong; a row that fails as a whole."""
    half, whole, found, log = cut
    assert found == [], log
    schema.validate(half)
    schema.validate(whole)
    assert 0 < len(half["rows"]) < len(whole["rows"])
    assert half["rows"] == whole["rows"][: len(half["rows"])], "rows before the cut are kept as they were"
    assert [(incident["shape"], incident["variant"]) for incident in whole["incidents"]] == [
        ("exits", "cuda"),
        ("loses the context", "triton"),
        ("hangs", "peer"),
        ("exits in the rounds", ""),
    ]
    failures = {row["shape"]: row["failed"] for row in whole["rows"] if row["failed"]}
    assert failures["exits"] == {"cuda": "the process ended with exit code 9"}
    lost = "the process lost its GPU context (RuntimeError: an illegal memory access was encountered)"
    assert failures["loses the context"] == {"triton": lost}
    assert failures["hangs"] == {"peer": f"the process ran past {rehearsal.STAGE_SECONDS:g} s"}
    assert failures["out of memory"]["triton"].startswith("out of memory")


def test_a_part_that_fails_or_hangs_says_so(tmp_path, capsys):
    failing = [sys.executable, "-c", "print('out'); raise SystemExit(3)"]
    failed = gpu._run("failing", failing, tmp_path / "failing.log", 60)
    assert (failed.status, failed.passed) == ("failed (exit 3)", False)
    assert "out" in capsys.readouterr().out
    hung = gpu._run("hanging", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "hanging.log", 0.5)
    assert (hung.status, hung.passed) == ("ran past its limit", False)
    assert hung.seconds < 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_in_one_sentence(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU on this machine; --rehearse" in capsys.readouterr().err


def stand_ins(monkeypatch, **parts):
    """Parts that only say how they ended, in the order in which they ran."""
    order = []

    def stand_in(name):
        def part(*arguments):
            order.append(name)
            if name in parts:
                raise parts[name]
            return gpu.Part(name, "passed", 1.0)

        return part

    for name in ("build_extension", "run_tests", "run_grid", "run_sanitizer", "rehearse_faults", "rehearse_cut"):
        monkeypatch.setattr(gpu, name, stand_in(name))
    return order


def test_a_failing_part_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="tests.ops.test_rope" name="a"/>'
        '<testcase classname="tests.ops.test_rope" name="b"><failure/></testcase>'
        '<testcase classname="tests.ops.test_norm" name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    order = stand_ins(monkeypatch, run_tests=OSError("no such file"))
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
    faults = ["rehearse_faults", "rehearse_cut"]
    assert order == ["build_extension", "run_tests", *faults, "run_grid", *["run_sanitizer"] * 4, "run_grid"]
    text = capsys.readouterr().out
    assert "tests                  failed (OSError: no such file)" in text
    assert [line.split() for line in text.splitlines() if line.startswith("ops.test_rope")] == [
        ["ops.test_rope", "1", "1", "0"]
    ]
    assert "no benchmark was written" in text


def test_the_tests_of_the_device_are_there():
    """A path that moved would fail the part on the GPU only."""
    assert [path for path in (*gpu.TESTS, *gpu.REHEARSED_TESTS) if not (ROOT / path).exists()] == []


def test_parts_can_be_chosen(tmp_path, monkeypatch):
    order = stand_ins(monkeypatch)
    assert gpu.main(["--rehearse", "--out", str(tmp_path), "--parts", "full,build"]) == 0
    assert order == ["build_extension", "run_grid"]
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--out", str(tmp_path), "--parts", "everything"])


def test_an_interrupted_run_still_prints_its_table(tmp_path, monkeypatch, capsys):
    stand_ins(monkeypatch, run_sanitizer=KeyboardInterrupt())
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "run_grid               passed" in text
    assert "memcheck triton        failed (interrupted)" in text


def test_the_time_is_shared_out():
    short, long = gpu.Budget.of(gpu.MINUTES * 60), gpu.Budget.of(25 * 60)
    assert (
        short.build + short.tests + len(gpu.SANITIZERS) * short.sanitizer + gpu.SHORTEST_GRID < gpu.MINUTES * 60 < 480
    )
    assert long.build + long.tests + len(gpu.SANITIZERS) * long.sanitizer + long.quick < 25 * 60
    assert long.quick == 240


def test_a_grid_without_time_is_not_started(tmp_path):
    part = gpu.run_grid(tmp_path, "full", 3.0, True)
    assert (part.status, part.passed) == ("not reached", True)
    assert not (tmp_path / gpu.RECORD).exists()


def test_records_that_cannot_be_continued_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTRANSFORMER_REVISION", "here")
    path = tmp_path / gpu.RECORD
    gpu.make_room(path)
    record.save(path, record_of([attention_row(1024, {"cuda": 500.0})]))
    gpu.make_room(path)
    kept = list(tmp_path.glob("benchmarks-before-*.json"))
    assert len(kept) == 1 and not path.exists()
    record.Record(path, torch.device("cpu"), {"grid": "quick"}).set("complete", True)
    gpu.make_room(path)
    assert record.load(path)["complete"] is False, "a complete quick grid goes on as the full one"


def test_the_table_of_a_run_that_wrote_nothing(tmp_path):
    text = gpu.report([gpu.Part("tests", "ran past its limit", 270.0)], tmp_path)
    assert "no test report was written" in text
    assert "no benchmark was written" in text
    (tmp_path / "tests.xml").write_text("<testsuites><testsu")
    assert "the test report was cut off" in gpu.report([], tmp_path)


def test_the_table_of_benchmarks(tmp_path):
    row = attention_row(1024, {"cuda": 624.0, "sdpa_cudnn": 546.0})
    row["absent"] = {"flash_attn_4": "not installed"}
    (tmp_path / gpu.RECORD).write_text(json.dumps(record_of([row])))
    text = gpu.report([], tmp_path)
    assert "cuda 80 %  sdpa_cudnn 70 %  flash_attn_4 absent" in text
    assert "absent flash_attn_4: not installed [attention_forward]" in text
