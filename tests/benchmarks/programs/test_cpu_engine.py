"""The engine against static batches: both do the same work, and a run leaves its result."""

import dataclasses
import json

import pytest

from pytransformer.benchmarks.programs import cpu_engine
from tests.generation.engine.support import SIZES, TINY, tiny_model


@pytest.fixture
def model():
    return tiny_model(dataclasses.replace(TINY, max_seqlen=cpu_engine.CONTEXT))


def test_requests_are_skewed_and_fit():
    requests = cpu_engine.skewed_requests(200, SIZES["vocab_size"])
    wanted = sorted(request.max_new_tokens for request in requests)
    assert 15 <= wanted[100] <= 25 and wanted[190] > 5 * wanted[100] and wanted[-1] <= cpu_engine.MOST_NEW
    assert max(len(request.prompt) + request.max_new_tokens for request in requests) <= cpu_engine.CONTEXT
    again = cpu_engine.skewed_requests(200, SIZES["vocab_size"])
    assert [request.prompt for request in again] == [request.prompt for request in requests]


def test_both_sides_do_the_same_work(model, monkeypatch):
    requests = [
        dataclasses.replace(request, max_new_tokens=min(request.max_new_tokens, 9))
        for request in cpu_engine.skewed_requests(5, model.config.vocab_size)
    ]
    tokens = sum(request.max_new_tokens for request in requests)
    assert cpu_engine.check_same_tokens(model, requests, 2) == tokens
    monkeypatch.setattr(cpu_engine, "by_engine", lambda *_: ([[0]] * 5, None))
    with pytest.raises(SystemExit, match="do not give the same tokens"):
        cpu_engine.check_same_tokens(model, requests, 2)


@pytest.mark.parametrize(("seconds", "code"), [(2.5, 0), (1.5, 1)])
def test_a_run_leaves_its_result(model, monkeypatch, tmp_path, capsys, seconds, code):
    pytest.importorskip("transformers", reason="the programs for a CPU name its version")
    statistics = cpu_engine.by_engine(model, cpu_engine.skewed_requests(1, 17), 1)[1]
    monkeypatch.setattr(cpu_engine, "make_model", lambda: model)
    monkeypatch.setattr(cpu_engine, "check_same_tokens", lambda model, requests, batch: 7)
    measured = {"engine": [1.0] * 3, "static batches": [seconds] * 3}, statistics
    monkeypatch.setattr(cpu_engine, "measure", lambda model, requests, batch, rounds: measured)
    path = tmp_path / "engine.json"
    monkeypatch.setattr("sys.argv", ["cpu_engine", "--requests", "3", "--out", str(path)])
    assert cpu_engine.main() == code
    result = json.loads(path.read_text())
    assert result["speedup_over_static_batches"] == pytest.approx(seconds) and result["requests"]["count"] == 3
    assert f"{seconds:.2f} × static batches" in capsys.readouterr().out
