"""What the tests of this folder found, committed as docs/attention-options.json: the facts behind docs/attention-options.md.

A test hands each finding to :func:`expect`, which fails if the committed file says something else or nothing. ``tools/attention_table.py
--update`` runs the tests with PYTRANSFORMER_UPDATE_OPTIONS=1, in one process, which writes the findings instead.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from pytransformer import extension
from tests.combinations.pairwise import Factors, Impossible, Row, all_pairs, impossible_pairs, pairs_of

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs/attention-options.json"
UPDATING = os.environ.get("PYTRANSFORMER_UPDATE_OPTIONS") == "1"
# Those that are asked for each option alone. Triton is met with every option in the rows. The extension takes part where it is loaded, on a
# GPU or in the emulator.
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "torch") if extension.why_not(_DEVICE) else ("reference", "torch", "cuda")
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


def expect_share(op: str, factors: Factors, rules: Iterable[Impossible], rows: Sequence[Row]) -> None:
    """Every possible pair of an op's options is in some row, at least 95 in a hundred of all, and the rest has its reason."""
    everything = set(all_pairs(factors))
    executed = set().union(*(pairs_of(row, factors) for row in rows))
    left_out = impossible_pairs(factors, rules)
    assert everything - executed == left_out.keys()
    assert len(executed) >= 0.95 * len(everything)
    expect(op, "share", "triton", "options", {name: list(levels) for name, levels in factors.items()})
    reasons = {
        " + ".join(f"{name}: {level}" for name, level in pair): reason for pair, reason in sorted(left_out.items())
    }
    found = {"all": len(everything), "executed": len(executed), "calls": len(rows), "left out": reasons}
    expect(op, "share", "triton", "pairs", found)


def outcome(run: Callable[[], object]) -> str:
    """ "served", or "refused: " and the reason the op gives; anything else that is raised is a failure of the test."""
    try:
        run()
    except NotImplementedError as error:
        return f"refused: {str(error).rpartition(' cannot serve this call: ')[2]}"
    return "served"
