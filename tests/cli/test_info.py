"""``pytransformer info``."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

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
            assert backend in shown and answer.split(";")[0][:60] in shown


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


def test_answers_have_colours_of_their_own():
    table = info.backends_table({"op": {"a": "serves", "b": "serves, except [x]", "c": "no"}})
    styles = [str(cell.style) for cell in table.columns[2]._cells]
    assert styles == ["green", "yellow", "dim"]
    assert [cell.plain for cell in table.columns[2]._cells] == ["serves", "serves, except [x]", "no"]
