"""docs/surfaces.md says what the checks find now, of every public name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

import pytransformer
import pytransformer.nn
from pytransformer.interop import flash_attn
from pytransformer.interop import torch as interop_torch
from tests.surfaces.properties import PROPERTIES
from tests.surfaces.surfaces import NO_ROWS, SURFACES

ROOT = Path(__file__).resolve().parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("surfaces_tool", ROOT / "tools/surfaces.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


TOOL = load()


def rows_of_the_page() -> dict[str, dict[str, str]]:
    """The cells by row and column, reasons in the place of their numbers."""
    text = TOOL.PAGE.read_text()
    reasons = dict(re.findall(r"^(\d+)\. (.*)\.$", text, re.MULTILINE))
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line] for line in lines if "**" not in line[0]]
    header = table[0][1:]
    return {
        name: {column: cell if cell == "yes" else reasons[cell.strip("[]")] for column, cell in zip(header, cells)}
        for name, *cells in table[1:]
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SURFACES)
def test_a_row_says_what_is_found(name: str) -> None:
    assert rows_of_the_page()[name] == TOOL.row(name)


def test_the_page_is_made_of_its_rows() -> None:
    assert TOOL.page({name: rows_of_the_page()[name] for name in SURFACES}) == TOOL.PAGE.read_text()


def test_every_public_name_has_a_row() -> None:
    rows = {name.partition(",")[0] for name in SURFACES}
    public = {
        *(name for name in pytransformer.__all__ if not name.startswith("_")),
        *(f"nn.{name}" for name in pytransformer.nn.__all__),
        *flash_attn.__all__,
        *interop_torch.__all__,
    }
    assert public - rows == set(NO_ROWS)


def test_a_hole_has_a_reason() -> None:
    for name, surface in SURFACES.items():
        assert set(surface.refusals) <= set(surface.reasons) <= set(PROPERTIES), name
        assert all(len(reason) > 10 for reason in surface.without.values()), name


def test_a_property_that_does_not_hold_is_found() -> None:
    """An op that loses its batch, and one whose reason is gone."""
    from tests.surfaces import properties

    broken = SURFACES["gelu"]
    batchless = properties.Surface("Ops", broken.inputs, broken.build, lambda target, tensors: tensors["x"][0])
    with pytest.raises(IndexError):
        properties.cell(batchless, "empty")
    reading = properties.Surface(
        "Ops", broken.inputs, broken.build, lambda target, tensors: tensors["x"] * float(tensors["x"].sum())
    )
    for name in ("meta", "vmap"):
        with pytest.raises(RuntimeError):
            properties.cell(reading, name)
    healed = properties.Surface(
        "Ops",
        broken.inputs,
        broken.build,
        broken.apply,
        reasons={"meta": "it reads values"},
        refusals={"meta": (RuntimeError, "")},
    )
    with pytest.raises(AssertionError, match="meta holds after all"):
        properties.cell(healed, "meta")
