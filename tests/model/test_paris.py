"""docs/paris.md, the walk from a sentence to its next word, shows what its code prints; the checkpoint is written by transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paris_walk", ROOT / "tools/paris_walk.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


TOOL = load_tool()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("paris")
    TOOL.make_checkpoint(made)
    return made


def test_the_page_shows_what_its_code_prints(folder):
    page = TOOL.PAGE.read_text(encoding="utf-8")
    assert TOOL.walk(page, folder) == page


def test_outputs_are_made_anew(folder):
    """Of a page without them or with wrong ones; code that prints nothing has none, and names live from block to block."""
    code = "```python\na = folder.name\n```\n\nText.\n\n```python\nprint(len(a) > 0)\n```\n{}\nThe end.\n"
    right = code.format("\n```text\nTrue\n```\n")
    assert TOOL.walk(code.format(""), folder) == TOOL.walk(code.format("\n```text\nFalse\n```\n"), folder) == right
