"""Writes docs/surfaces.md: what each public surface can be put through, each cell as its check finds it now.

    python tools/surfaces.py             runs the checks and writes the page
    python tools/surfaces.py --check     fails if the page does not say what they find

The surfaces and the checks are in tests/surfaces/, whose tests compare each row with the page. A check that fails writes nothing.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/surfaces.md"
INTRODUCTION = """\
# What each surface can be put through

<!-- made by tools/surfaces.py; do not edit -->

Made from what the checks in `tests/surfaces` found on a CPU. **yes**: the check ran and held. A number in brackets refers to the reason
below the table.

"""


def columns() -> dict[str, str]:
    """By name, what each check shows: the first lines of their docstrings."""
    from tests.surfaces.properties import PROPERTIES

    return {name: (check.__doc__ or "").strip() for name, check in PROPERTIES.items()}


def row(name: str) -> dict[str, str]:
    """The cells of a surface, found now."""
    from tests.surfaces.properties import PROPERTIES, cell
    from tests.surfaces.surfaces import SURFACES

    return {column: cell(SURFACES[name], column) for column in PROPERTIES}


def page(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The page of such rows."""
    from tests.surfaces.surfaces import SURFACES

    names = list(columns())
    notes: list[str] = []
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    group = ""
    for name, cells in rows.items():
        if SURFACES[name].group != group:
            group = SURFACES[name].group
            lines.append(f"| **{group}** |{' |' * len(names)}")
        for reason in cells.values():
            if reason != "yes" and reason not in notes:
                notes.append(reason)
        shown = ("yes" if each == "yes" else f"[{notes.index(each) + 1}]" for each in cells.values())
        lines.append(f"| {name} | {' | '.join(shown)} |")
    legend = [f"* **{name}**: {' '.join(text.split())}" for name, text in columns().items()]
    reasons = [f"{index}. {reason}." for index, reason in enumerate(notes, 1)]
    return "\n".join([INTRODUCTION + "\n".join(lines), "", *reasons, "", "The checks:", "", *legend, ""])


def main() -> int:
    """Writes the page, or with --check compares it; returns 1 if it is stale."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="fail instead of writing")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    from tests.surfaces.surfaces import SURFACES

    text = page({name: row(name) for name in SURFACES})
    if not arguments.check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        print("docs/surfaces.md is stale: run python tools/surfaces.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
