"""Result files: complete after each row, continued where they were cut off, valid against the schema."""

import json

import pytest
import torch

from pytransformer.benchmarks.harness import record, schema
from pytransformer.benchmarks.harness.record import Record
from tests.benchmarks.samples import OPTIONS, attention_row, measurement, record_of, row

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_revision(monkeypatch):
    monkeypatch.setenv("PYTRANSFORMER_REVISION", "here")


def test_a_file_is_complete_after_each_row(tmp_path):
    path = tmp_path / "deep" / "results.json"
    found = Record(path, CPU, OPTIONS)
    found.add(row("rope", "8", 1.0, 1.0, {"torch": [1.0, 2.0]}))
    assert [line["op"] for line in json.loads(path.read_text())["rows"]] == ["rope"]
    schema.validate(record.load(path))
    found.set("seconds", 2.0)
    assert record.load(path)["seconds"] == 2.0
    assert list(path.parent.iterdir()) == [path]


def test_samples_stand_on_one_line_with_six_digits(tmp_path):
    record.save(tmp_path / "r.json", {"samples": [1.23456789e-5, 2.0], "names": ["a, b"], "infinite": float("inf")})
    text = (tmp_path / "r.json").read_text()
    assert '"samples": [1.23457e-05, 2.0]' in text
    assert json.loads(text) == {"samples": [1.23457e-5, 2.0], "names": ["a, b"], "infinite": None}


def test_an_unfinished_file_is_continued(tmp_path):
    path = tmp_path / "r.json"
    Record(path, CPU, OPTIONS).add(row("rope", "8", 1.0, 1.0, {"torch": [1.0]}))
    again = Record(path, CPU, {**OPTIONS, "grid": "full"})
    assert again.done() == {record.key_of("rope", "8")}
    assert again.content["options"]["grid"] == "full"


def test_what_took_a_process_down_is_remembered(tmp_path):
    found = Record(tmp_path / "r.json", CPU, OPTIONS)
    found.content["incidents"] = [
        {"op": "rope", "shape": "8", "variant": "peer", "reason": "died"},
        {"op": "rope", "shape": "8", "variant": "", "reason": "died in the rounds"},
        {"op": "norm", "shape": "8", "variant": "cuda", "reason": "died"},
    ]
    assert found.skipped_variants(record.key_of("rope", "8")) == {"peer": "died"}


def test_another_revision_or_a_complete_file_is_not_continued(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    found = Record(path, CPU, OPTIONS)
    found.write()
    monkeypatch.setenv("PYTRANSFORMER_REVISION", "elsewhere")
    with pytest.raises(ValueError, match=r"r.json holds results of revision here, here it is elsewhere"):
        Record(path, CPU, OPTIONS)
    monkeypatch.setenv("PYTRANSFORMER_REVISION", "here")
    found.set("complete", True)
    with pytest.raises(ValueError, match="holds a complete run"):
        Record(path, CPU, OPTIONS)
    record.reopen(path)
    Record(path, CPU, OPTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no benchmark results"),
        ('{"rows": [], "environment": {}, "schema": 1}', "has schema 1"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        record.load(tmp_path / "r.json")


def test_a_full_record_is_valid():
    assert (
        schema.problems(
            record_of([attention_row(1024, {"cuda": 500.0})], [measurement("t", "s", "µs", {"torch": [1.0]}, False)])
        )
        == []
    )


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda content: content.pop("ceilings_drift") and content.update(schema=1), "schema"),
        (lambda content: content["rows"][0].pop("floor_seconds"), "rows/0"),
        (lambda content: content["rows"][0]["variants"]["cuda"].update(samples=[]), "rows/0/variants/cuda/samples"),
        (lambda content: content["rows"][0]["variants"]["cuda"].update(relative_error=None), "relative_error"),
        (lambda content: content["rows"][0].update(surprise=1), "rows/0"),
        (lambda content: content["environment"].pop("driver"), "environment"),
        (lambda content: content["options"].update(grid="huge"), "options/grid"),
    ],
)
def test_an_invalid_record_is_found_out(change, where):
    content = record_of([attention_row(1024, {"cuda": 500.0})])
    change(content)
    found = schema.problems(content)
    assert found
    assert any(where in problem for problem in found)
    with pytest.raises(ValueError, match="not a valid result"):
        schema.validate(content)


def test_the_revision_without_git_is_a_hash_of_the_sources(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTRANSFORMER_REVISION")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "norm.py").write_text("a")
    before = record.revision()
    assert ", sources " in before
    (tmp_path / "kernels" / "norm.py").write_text("b")
    assert record.revision() != before
