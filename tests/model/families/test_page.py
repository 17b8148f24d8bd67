"""docs/families.md says what the families' tables say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pytransformer.model.families import FAMILIES

TOOL = Path(__file__).resolve().parents[3] / "tools/families.py"


def test_the_page_is_that_of_the_tables():
    spec = importlib.util.spec_from_file_location("families_tool", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert set(tool.TITLES) == set(FAMILIES)
    assert tool.PAGE.read_text(encoding="utf-8") == tool.page(), "run tools/families.py"
