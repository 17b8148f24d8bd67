"""``pytransformer info``."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from rich.text import Text

import pytransformer
from pytransformer.cli import info
from pytransformer.cli.main import main


@pytest.mark.parametrize("options", [[], ["--device", "cpu"], ["--device", "cuda"]])
def test_it_shows_versions_and_every_op(monkeypatch, capsys, options):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info", *options]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and pytransformer.__version__ in shown
    for op, answers in pytransformer.backends(*options[1:]).items():
        assert op in shown
        for backend, answer in answers.items():
            assert backend in shown
            assert answer == "serves" or answer.removeprefix("serves, ").split(";")[0][:60] in shown


def test_it_says_whether_hoppers_kernels_are_on(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["info", "--device", "cpu"]) == 0
    assert "attention's kernels for Hopper: off: no GPU" in capsys.readouterr().out


def test_what_is_not_installed_is_said(monkeypatch):
    def version(name: str) -> str:
        if name == "matplotlib":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr(importlib.metadata, "version", version)
    facts = info.versions()
    assert facts["matplotlib"] == "not installed" and facts["numpy"] == "1.2.3"


def test_gpus_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert info.versions()["gpu"].startswith("GPU 0, GPU 1 (CUDA ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert info.versions()["gpu"] == "none that torch can use"


def test_cells_refer_to_notes_that_stand_once():
    report = {"f": {"a": "serves", "b": "serves, except [x]", "c": "absent"}, "g": {"a": "absent", "c": "serves"}}
    table, notes = info.backends_table(report)
    assert notes == ["except [x]", "absent"]
    assert [column.header for column in table.columns] == ["op", "a", "b", "c"]
    cells = [[Text.from_markup(cell).plain for cell in column.cells] for column in table.columns]
    assert cells == [["f", "g"], ["yes", "no (2)"], ["yes (1)", ""], ["no (2)", "yes"]]
