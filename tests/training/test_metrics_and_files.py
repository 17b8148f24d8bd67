"""What is recorded can be read back to the bit, also after a kill in the middle of a line."""

from __future__ import annotations

import json

import pytest

from pytransformer.training import metrics
from pytransformer.training.files import read_json, write_json

RECORDS = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-300}, {"step": 2, "validation_loss": 1 / 3}]


def test_records_come_back_to_the_bit(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, RECORDS[:1])
    metrics.append(path, RECORDS[1:])
    assert metrics.read(path) == RECORDS
    assert metrics.series(metrics.read(path), "loss") == ([1, 2], [0.1 + 0.2, 1e-300])
    assert metrics.series(metrics.read(path), "validation_loss") == ([2], [1 / 3])


def test_a_cut_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, RECORDS)
    whole = path.read_text()
    path.write_text(whole[:-5])
    assert metrics.read(path) == RECORDS[:2]
    for damaged in ("{\n", "[1]\n", '{"loss": 1}\n', '{"step": "1"}\n'):
        path.write_text(whole + damaged + whole)
        with pytest.raises(ValueError, match=r"metrics.jsonl: line 4 is not a metrics record"):
            metrics.read(path)


def test_truncation_drops_what_came_after_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics.truncate(path, 0)
    assert path.read_text() == ""
    metrics.append(path, [*RECORDS, {"step": 3, "loss": 1.0}])
    path.write_text(path.read_text() + '{"step": 4, "lo')
    metrics.truncate(path, 2)
    assert metrics.read(path) == RECORDS and path.read_text().endswith("\n")
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_reading_metrics_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="has this run started"):
        metrics.read(tmp_path / "metrics.jsonl")


def test_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        metrics.append(tmp_path / "metrics.jsonl", [{"step": 1, "loss": float("nan")}])


def test_json_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "a.json"
    for value in (1, 2):
        write_json(path, {"value": value})
        assert read_json(path) == {"value": value} == json.loads(path.read_text())
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(path)
