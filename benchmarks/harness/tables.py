"""Results as text: a table for each op, with rich where it is installed, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytransformer.benchmarks.harness.record import Result, entries
from pytransformer.benchmarks.harness.rows import is_ours

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

COLUMNS = ("shape, variant", "time", "of floor", "rate", "error", "memory", "× best peer")
MEASUREMENT_COLUMNS = ("shape, variant", "median", "unit", "× best peer")
# Columns of text that goes to a file or a pipe.
PAGE_WIDTH = 132
SMOKE = "These are smoke sizes on a CPU: they show that every row runs and is right. The times mean nothing."


def describe_ceilings(ceilings: Mapping[str, float], device_type: str = "cuda") -> str:
    """The measured limits, in a line."""
    where = "" if device_type == "cuda" else " (small sizes, on a CPU)"
    return (
        f"ceilings{where}: copy {amount(ceilings['copy'], 'B/s')}, read {amount(ceilings['read'], 'B/s')}, "
        f"bf16 matmul {amount(ceilings['matmul'], 'FLOP/s')}"
    )


def amount(value: float, unit: str) -> str:
    """Three digits and a prefix: 4.31 TB/s."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            digits = ".3g" if value < 1e3 * factor else ".0f"
            return f"{value / factor:{digits}} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def duration(seconds: float) -> str:
    """Three digits and a unit: 12.3 µs."""
    factor, unit = next((pair for pair in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= pair[0]), (1e-9, "ns"))
    return f"{seconds / factor:#.3g}".rstrip(".") + f" {unit}"


def number(value: float, digits: int = 4) -> str:
    """So many digits, never an exponent: 23,020."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(0, places)}f}"


def spread(figures: Result) -> str:
    """Half the distance from the 10th to the 90th percentile, as a share of the median."""
    return f"{50 * (figures['seconds_p90'] - figures['seconds_p10']) / figures['seconds']:.1f} %"


def rate(row: Result, figures: Result) -> str:
    """FLOP per second where arithmetic is counted, else bytes per second."""
    if row["flop"] and row["memory_ceiling"] != "read":
        return amount(figures["tflops"] * 1e12, "FLOP/s")
    return amount(figures["gbytes_per_second"] * 1e9, "B/s")


def best_peer(row: Result) -> tuple[str, float] | None:
    """The fastest peer of a row and its time; of a measurement, its value."""
    return _best(row, [name for name in row["variants"] if not is_ours(name)])


def best_of_ours(row: Result) -> tuple[str, float] | None:
    """Likewise for our own variants."""
    return _best(row, [name for name in row["variants"] if is_ours(name)])


def _best(row: Result, names: list[str]) -> tuple[str, float] | None:
    if not names:
        return None
    values = {name: _figure(row["variants"][name]) for name in names}
    name = (max if row.get("higher_is_better") else min)(values, key=lambda key: values[key])
    return name, values[name]


def speedup(row: Result, name: str) -> float | None:
    """How many times faster a variant is than the best peer (of a rate: how many times as much)."""
    peer = best_peer(row)
    if peer is None or not peer[1]:
        return None
    value = _figure(row["variants"][name])
    return value / peer[1] if row.get("higher_is_better") else peer[1] / value


def _figure(figures: Result) -> float:
    return float(figures["seconds"] if "seconds" in figures else figures["value"])


def _against_peer(row: Result, name: str) -> str:
    peer = best_peer(row)
    ratio = speedup(row, name)
    return f"{ratio:.2f}× {peer[0]}" if is_ours(name) and peer and ratio else ""


def cells(row: Result) -> list[list[str]]:
    """The lines of a row's table, without its shape: one for each variant with figures."""
    lines = []
    for name, figures in row["variants"].items():
        note = row["notes"].get(name, "")
        label = f"{name} ({note})" if note else name
        if "value" in figures:
            half = (figures["p90"] - figures["p10"]) / 2
            lines.append(
                [label, f"{number(figures['value'])} ± {number(half, 2)}", row["unit"], _against_peer(row, name)]
            )
            continue
        # Neither a captured graph nor a CPU's clock.
        eager = " eager" if figures["method"] == "events" else ""
        memory = amount(figures["peak_memory_bytes"], "B") if "peak_memory_bytes" in figures else ""
        lines.append(
            [
                label,
                f"{duration(figures['seconds'])}{eager} ± {spread(figures)}",
                f"{100 * figures['fraction_of_floor']:.0f} %",
                rate(row, figures),
                f"{figures['relative_error']:.1e}",
                memory,
                _against_peer(row, name),
            ]
        )
    return lines


def reasons(row: Result) -> list[str]:
    """A line for each variant without figures, and for a row without any."""
    lines = [f"FAILED: {row['failure']}"] if "failure" in row else []
    lines += [f"{name}: FAILED: {reason}" for name, reason in row["failed"].items()]
    return lines + [f"{name}: absent: {reason}" for name, reason in row["absent"].items()]


def plain_lines(row: Result) -> list[str]:
    """A row while the run goes on, and wherever there is no rich."""
    head = f"{row['op']:<20} {row['shape']:<44}"
    lines = [f"{head} {line[0]:<20} {' | '.join(cell for cell in line[1:] if cell)}" for line in cells(row)]
    return lines + [f"{head} {line}" for line in reasons(row)]


def grouped(content: Result) -> dict[str, list[Result]]:
    """The rows and measurements of each op, in the order of their first row."""
    groups: dict[str, list[Result]] = {}
    for row in entries(content):
        groups.setdefault(row["op"], []).append(row)
    return groups


def op_table(op: str, rows: list[Result]) -> Table:
    """The table of one op: under each shape its variants, the fastest of ours in bold."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    measured = any("value" in figures for row in rows for figures in row["variants"].values())
    table = Table(title=op, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in MEASUREMENT_COLUMNS if measured else COLUMNS:
        left = name in ("shape, variant", "unit", "× best peer")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "shape, variant")
    for row in rows:
        lines = cells(row)
        winner = best_of_ours(row)
        table.add_row(escape(row["shape"]), *([] if lines else ["[red]no figures[/red]"]))
        for line in lines:
            style = "bold" if winner and line[0].split(" (")[0] == winner[0] else None
            table.add_row(f"  {escape(line[0])}", *line[1:], style=style)
    return table


def summary(content: Result) -> list[str]:
    """What stands above the tables and below them: where, with what, in which limits, and what is missing."""
    where, options = content["environment"], content["options"]
    lines = [
        f"{where['device']}; torch {where['torch']}, triton {where['triton']}, revision {where['revision']}; "
        f"{options['grid']} grid, {options['rounds']} to {options['max_rounds']} samples of each variant"
    ]
    if "ceilings" in content:
        drift = content.get("ceilings_drift")
        after = "" if drift is None else f"; at the end of the run they differ by {100 * drift:.1f} %"
        lines.append(describe_ceilings(content["ceilings"], where["device_type"]) + after)
    if where["device_type"] == "cpu" and options["grid"] == "tiny":
        lines.append(SMOKE)
    return lines


def missing(content: Result) -> list[str]:
    """Variants without figures, the same reason once: first what failed, then what is absent."""
    failed: dict[str, list[str]] = {}
    absent: dict[str, list[str]] = {}
    for op, rows in grouped(content).items():
        for row in rows:
            place = f"{op} {row['shape']}"
            if "failure" in row:
                failed.setdefault(row["failure"], []).append(place)
            for name, reason in row["failed"].items():
                failed.setdefault(f"{name}: {reason}", []).append(place)
            for name, reason in row["absent"].items():
                absent.setdefault(f"{name}: {reason}", []).append(op)
    lines = [f"FAILED {reason} [{_places(places)}]" for reason, places in failed.items()]
    lines += [f"absent {reason} [{_places(places)}]" for reason, places in absent.items()]
    for peer in content.get("peers", ()):
        if "absent" in peer:
            lines.append(f"absent {peer['name']}: {peer['absent']} [{_places(peer['ops'])}]")
    if content["left_out"]:
        lines.append(f"left out for want of time: {len(content['left_out'])} rows")
    return lines


def _places(places: list[str]) -> str:
    distinct = list(dict.fromkeys(places))
    return ", ".join(distinct[:3]) + (f" and {len(distinct) - 3} more" if len(distinct) > 3 else "")


def console() -> Console:
    """Where tables go: as wide as the terminal, or as a page where there is none.

    Raises:
        ImportError: rich is not installed.
    """
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PAGE_WIDTH)


def show(content: Result) -> None:
    """Prints everything."""
    try:
        out = console()
    except ImportError:
        for line in summary(content):
            print(line)
        for rows in grouped(content).values():
            for row in rows:
                print("\n".join(plain_lines(row)))
        print("\n".join(missing(content)))
        return
    for line in summary(content):
        out.print(line, markup=False, soft_wrap=True)
    for op, rows in grouped(content).items():
        out.print(op_table(op, rows))
    for line in missing(content):
        out.print(line, markup=False, soft_wrap=True)
