"""Writes docs/attention-options.md from docs/attention-options.json, which tests/combinations writes and compares itself with.

    python tools/attention_table.py                 the page from the committed findings
    python tools/attention_table.py --check         fails if the page is stale
    python tools/attention_table.py --update        runs the tests, which write what they find, then the page
    python tools/attention_table.py --update-cuda   likewise, for the column of the CUDA extension, in the host emulator

Nothing on the page is typed in by hand: "yes" is a call that a test made and judged by the accuracy contract.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FINDINGS = ROOT / "docs/attention-options.json"
PAGE = ROOT / "docs/attention-options.md"
# Triton is judged by the covering array, the others by one option at a time.
ALONE = ("cuda", "torch", "reference")
INTRODUCTION = """\
# Which option which backend serves

<!-- made by tools/attention_table.py from docs/attention-options.json; do not edit -->

Made from what the tests in `tests/combinations` found. **yes**: a test made such calls and their results, forward and backward, were
within the [accuracy contract](verification.md). Under *triton* stands the number of calls of the covering array with this option, each
with many other options; every other column is the option by itself, with bfloat16, head_dim 64 and nothing else. A number in brackets
refers to the backend's own reason for refusing, below the table; what it refuses, the next backend serves.
"""


class Notes:
    """Numbered footnotes; the same text has one number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def cell(found: str | None, notes: Notes) -> str:
    """A finding as the table shows it."""
    if found is None:
        return "not run"
    return "yes" if found == "served" else f"no [{notes.number(found.removeprefix('refused: '))}]"


def table(findings: dict[str, Any], directions: tuple[str, ...], notes: Notes) -> list[str]:
    """The table of one op: a row for each option."""
    calls = findings["pairs"]["triton"].values()
    columns = [("triton", ", ".join(directions))] + [(name, way) for name in ALONE for way in directions]
    lines = [
        "| option | " + " | ".join(f"{name}<br>{way}" for name, way in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for factor, levels in findings["share"]["triton"]["options"].items():
        for level in levels:
            count = sum(call["options"][factor] == level and call[", ".join(directions)] == "passed" for call in calls)
            cells = [f"yes ({count} calls)" if count else "not run"]
            key = f"{factor}: {level}"
            for name in ALONE:
                alone = findings["alone"].get(name, {})
                # A level that the plain call has too is the plain call.
                found = alone.get(key, alone.get("nothing else", {}))
                cells += [cell(found.get(way), notes) for way in directions]
            lines.append(f"| {factor}: {level} | " + " | ".join(cells) + " |")
    return lines


def section(op: str, findings: dict[str, Any]) -> list[str]:
    """Heading, share of pairs, table and reasons of one op."""
    directions = ("forward", "backward") if op == "attention" else ("forward",)
    pairs = findings["share"]["triton"]["pairs"]
    share = 100 * pairs["executed"] / pairs["all"]
    lines = [
        f"## {op}",
        "",
        f"Triton: {pairs['executed']} of {pairs['all']} pairs of options ({share:.1f} %) are executed by the {pairs['calls']} calls of the "
        "covering array.",
    ]
    if pairs["left out"]:
        lines += ["", "Left out:", ""]
        by_reason: dict[str, list[str]] = {}
        for pair, reason in pairs["left out"].items():
            by_reason.setdefault(reason, []).append(pair)
        lines += [f"* {'; '.join(excluded)}: {reason}." for reason, excluded in by_reason.items()]
    notes = Notes()
    lines += ["", *table(findings, directions, notes), ""]
    lines += [f"[{number}] {text}  " for number, text in enumerate(notes.texts, 1)]
    return [*lines, ""]


def page() -> str:
    """The whole page."""
    findings = json.loads(FINDINGS.read_text())
    lines = [INTRODUCTION]
    for op in ("attention", "decode_attention"):
        lines += section(op, findings[op])
    return "\n".join(lines).rstrip() + "\n"


def forget(backends: tuple[str, ...]) -> None:
    """Removes the findings of these backends, so that none outlives the option it is about."""
    findings = json.loads(FINDINGS.read_text()) if FINDINGS.exists() else {}
    for kinds in findings.values():
        for found in kinds.values():
            for backend in backends:
                found.pop(backend, None)
    FINDINGS.write_text(json.dumps(findings, indent=1, ensure_ascii=False) + "\n")


def update(cuda: bool) -> int:
    """Runs the tests that make findings."""
    forget(("cuda",) if cuda else ("triton", "torch", "reference"))
    runner = ["tests.support.emulator", "--flavor", "emulated"] if cuda else ["pytest"]
    selection = "alone and cuda" if cuda else "pairs_of_options or alone or share"
    files = ("tests/combinations/test_attention_pairs.py", "tests/combinations/test_decode_pairs.py")
    command = [sys.executable, "-m", *runner, *files, "-k", selection]
    environment = {**os.environ, "PYTRANSFORMER_UPDATE_OPTIONS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true")
    choice.add_argument("--update", action="store_true")
    choice.add_argument("--update-cuda", action="store_true")
    arguments = parser.parse_args()
    if arguments.update or arguments.update_cuda:
        code = update(arguments.update_cuda)
        if code:
            return code
    if arguments.check:
        if PAGE.read_text() != page():
            print(f"{PAGE.relative_to(ROOT)} is stale: run `python tools/attention_table.py`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
