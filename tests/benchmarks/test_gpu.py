"""`make gpu` without a GPU: parts are independent, limits hold, the closing table says what happened."""

import json
import sys

import pytest
import torch

from pytransformer.benchmarks import gpu
from pytransformer.benchmarks.grid import SUITES, rows
from pytransformer.benchmarks.record import Record
from pytransformer.benchmarks.roofline import Ceilings
from pytransformer.benchmarks.rows import relative_error, run_row
from pytransformer.benchmarks.timing import Timing, time_interleaved

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy=1e11, read=1e11, matmul=1e12)


def test_a_part_that_fails_or_hangs_says_so(tmp_path, capsys):
    failed = gpu._run(
        "failing", [sys.executable, "-c", "print('out'); raise SystemExit(3)"], tmp_path / "failing.log", 60
    )
    assert failed.status == "failed (exit 3)"
    assert "out" in capsys.readouterr().out
    hung = gpu._run("hanging", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "hanging.log", 0.5)
    assert hung.status == "ran past its limit"
    assert hung.seconds < 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_in_one_sentence(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "torch sees no GPU on this machine; --rehearse" in capsys.readouterr().err


def test_a_failing_part_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def failing_tests(out, rehearse):
        (out / "tests.xml").write_text(
            '<testsuites><testsuite><testcase classname="tests.ops.test_rope" name="a"/>'
            '<testcase classname="tests.ops.test_rope" name="b"><failure/></testcase>'
            '<testcase classname="tests.ops.test_norm" name="c"><skipped/></testcase></testsuite></testsuites>'
        )
        return gpu.Part("tests", "failed (exit 1)", 1.0)

    monkeypatch.setattr(gpu, "run_tests", failing_tests)
    monkeypatch.setattr(gpu, "BENCHMARK_SECONDS", 300)
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "tests                  failed (exit 1)" in text
    assert "benchmarks             passed" in text
    assert [line.split() for line in text.splitlines() if line.startswith("ops.test_rope")] == [
        ["ops.test_rope", "1", "1", "0"]
    ]
    record = json.loads((tmp_path / "benchmarks.json").read_text())
    assert {row["op"] for row in record["rows"]} >= {
        "attention_forward",
        "rope_forward",
        "kv_append",
        "decode_attention",
    }
    assert record["environment"]["torch"] == torch.__version__
    assert all(figure > 0 for figure in record["ceilings"].values())


def test_the_table_of_a_run_that_wrote_nothing(tmp_path):
    text = gpu.report([gpu.Part("tests", "ran past its limit", 270.0)], tmp_path)
    assert "no test report was written" in text
    assert "no benchmark was written" in text


def row(suite: str = "rope"):
    return next(iter(rows(CPU, tiny=True, suites=(suite,))))


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_rows_are_right_and_complete(suite):
    result = run_row(row(suite), CPU, CEILINGS, rounds=2)
    assert result["absent"] == {}
    assert len(result["variants"]) >= 2
    for variant in result["variants"].values():
        # bfloat16 keeps 8 bits
        assert variant["relative_error"] < 4 * torch.finfo(torch.bfloat16).eps
        assert variant["seconds_p10"] <= variant["seconds"] <= variant["seconds_p90"]
        assert variant["fraction_of_floor"] == pytest.approx(result["floor_seconds"] / variant["seconds"])


def test_a_variant_that_raises_is_absent_and_the_others_go_on():
    def refuses(inputs):
        raise RuntimeError("not on this device\nsecond line")

    bench = row()
    bench.variants["peer"] = refuses
    result = run_row(bench, CPU, CEILINGS, rounds=2)
    assert result["absent"] == {"peer": "RuntimeError: not on this device"}
    assert "torch" in result["variants"]


def test_a_wrong_variant_shows_in_its_error():
    golden = torch.randn(100, dtype=torch.float64)
    assert relative_error(golden.clone(), golden) == 0
    assert relative_error(golden * 1.1, golden) == pytest.approx(0.1)
    assert relative_error(golden * float("nan"), golden) == float("inf")


def test_a_record_is_complete_after_each_row(tmp_path):
    path = tmp_path / "deep" / "results.json"
    record = Record(path, CPU)
    record.add({"op": "rope"})
    assert json.loads(path.read_text())["rows"] == [{"op": "rope"}]
    record.set("seconds", 2.0)
    assert json.loads(path.read_text())["seconds"] == 2.0
    assert list(path.parent.iterdir()) == [path]


def test_variants_are_interleaved():
    order = []
    timings = time_interleaved({name: [lambda name=name: order.append(name)] for name in "AB"}, CPU, rounds=3)
    assert order[2:] == ["A", "B"] * 3
    assert timings["A"].rounds == 3


def test_timing_summarises_with_the_median():
    timing = Timing.of([5.0, 1.0, 2.0, 3.0, 100.0], "clock")
    assert (timing.median, timing.low, timing.high) == (3.0, 1.0, 100.0)


def test_a_backend_that_says_it_does_not_serve_a_row_is_no_fault():
    from pytransformer.benchmarks.run import _is_fault

    assert not _is_fault("cuda", "NotImplementedError: attention: backend 'cuda' cannot serve this call")
    assert not _is_fault("liger", "ModuleNotFoundError: No module named 'liger_kernel'")
    assert _is_fault("cuda", "RuntimeError: launch failed")
    assert _is_fault("row", "RuntimeError: out of memory")
