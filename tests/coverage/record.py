"""What the tests of this folder found, committed as docs/attention-options.json: the facts behind docs/attention-options.md.

A test hands each finding to :func:`expect`, which fails if the committed file says something else or nothing. ``tools/attention_table.py
--update`` runs the tests with PYTRANSFORMER_UPDATE_OPTIONS=1, in one process, which writes the findings instead.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs/attention-options.json"
UPDATING = os.environ.get("PYTRANSFORMER_UPDATE_OPTIONS") == "1"
ADVICE = "if it is meant, run `python tools/attention_table.py --update` and commit docs/attention-options.*"


@functools.cache
def committed() -> dict[str, Any]:
    """The file's content."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def expect(op: str, kind: str, backend: str, key: str, finding: Any) -> None:
    """Compares a finding with the committed one, or writes it.

    Args:
        op: "attention" or "decode_attention".
        kind: "pairs" (a row of the covering array) or "alone" (one option by itself).
        key: of the row or option.
        finding: what JSON can hold.
    """
    known = committed().setdefault(op, {}).setdefault(kind, {}).setdefault(backend, {})
    if UPDATING:
        known[key] = finding
        FILE.write_text(json.dumps(committed(), indent=1, ensure_ascii=False) + "\n")
        return
    assert key in known, f"{op}, {kind}, {backend}: nothing is recorded for {key}: {ADVICE}"
    assert known[key] == finding, f"{op}, {kind}, {backend}, {key}: recorded {known[key]}, found {finding}: {ADVICE}"


def outcome(run: Callable[[], object]) -> str:
    """ "served", or "refused: " and the reason the op gives; anything else that is raised is a failure of the test."""
    try:
        run()
    except NotImplementedError as error:
        return f"refused: {str(error).rpartition(' cannot serve this call: ')[2]}"
    return "served"
