"""Pictures of a record: a roofline, and for each op its sweeps over size.

A sweep is found in the shapes themselves: rows of one op whose shapes differ in a single number ("causal B2 L8192 …", "causal B4 L4096 …",
where batch × seqlen is held, count as one number too) are one panel, with that number along the bottom and a line for each variant.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytransformer.benchmarks.harness.record import Result
from pytransformer.benchmarks.harness.rows import is_ours
from pytransformer.benchmarks.harness.tables import amount, best_of_ours, best_peer, speedup
from pytransformer.training.plots import new_figure, save_figure

NUMBER = re.compile(r"(?<![\w.,/])([A-Za-z]{0,3})(\d+)(?![\d.,/])")
# What a number may mean: by the letters before it, else by the words around it. Others (heads, head_dim, dtypes) are not sizes.
LETTERS = {"L": "sequence length", "kv": "keys", "B": "batch"}
WORDS = (
    (r"pages of $", "", "page size"),
    (r"vocabulary $", "", "vocabulary"),
    (r"", r"^ tokens", "tokens"),
    (r"×$", "", "width"),
    (r"", r"^×", "rows"),
)
OUR_COLORS = {"cuda": "#d94801", "triton": "#2171b5", "torch": "#238b45", "pytransformer": "#6a51a3"}
PEER_COLORS = (
    "#525252",
    "#969696",
    "#8c6d31",
    "#7b4173",
    "#17a2b8",
    "#bcbd22",
    "#e377c2",
    "#9c9ede",
    "#637939",
    "#ad494a",
)
MARKERS = "osD^vP*Xh<>p"
POINT: dict[str, Any] = {"markersize": 7, "alpha": 0.85, "markeredgecolor": "white", "markeredgewidth": 0.4}
FEWEST_POINTS = 3
MOST_PANELS = 9
MOST_BARS = 48


@dataclass(frozen=True)
class Sweep:
    """Rows of one op along one number.

    Attributes:
        along: what the number is.
        title: what the rows share.
        points: (number, row), ascending.
    """

    op: str
    along: str
    title: str
    points: list[tuple[int, Result]]


def draw(content: Result, folder: Path, stem: str) -> list[Path]:
    """Writes all pictures of a record; their paths: the roofline, the comparison with peers, then each op's sweeps.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    rows = [row for row in content["rows"] if row["variants"]]
    written = []
    if rows and "ceilings" in content:
        written.append(draw_roofline(content, rows, folder / f"{stem}-roofline.png"))
    if any(best_of_ours(row) and best_peer(row) for row in rows):
        written.append(draw_peers(content, rows, folder / f"{stem}-peers.png"))
    groups: dict[str, list[Sweep]] = {}
    for sweep in sweeps(rows):
        groups.setdefault(sweep.op, []).append(sweep)
    for op, found in groups.items():
        written.append(draw_sweeps(content, op, found[:MOST_PANELS], folder / f"{stem}-{op}.png"))
    return written


def subtitle(content: Result) -> str:
    """Device, versions and revision, under the title of each picture."""
    where, grid = content["environment"], content["options"]["grid"]
    smoke = "\nsmoke sizes on a CPU: the times mean nothing" if grid == "tiny" else ""
    versions = f"torch {where['torch']} · triton {where['triton']} · revision {where['revision']}"
    return f"{where['device']} · {versions}{smoke}"


def draw_roofline(content: Result, rows: Sequence[Result], path: Path) -> Path:
    """Arithmetic intensity against FLOP/s for rows that count FLOP, and beside it the share of the ceiling for all ops.

    Left the fastest of ours of each row under both ceilings. Rows that count no arithmetic have no place there: right, every row of each op
    as a point at its fraction of the floor.
    """
    ceilings = content["ceilings"]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    style = {op: (_op_color(index), MARKERS[index % len(MARKERS)]) for index, op in enumerate(ops)}
    counted = [row for row in rows if row["flop"] and best_of_ours(row)]
    figure = new_figure(13.5, max(5.2, 1.6 + 0.34 * len(ops)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _roof(left, ceilings, counted)
    seen: set[str] = set()
    for row in counted:
        color, marker = style[row["op"]]
        figures = row["variants"][_winner(row)]
        label = row["op"] if row["op"] not in seen else None
        seen.add(row["op"])
        intensity = row["flop"] / row["bytes"]
        left.plot(intensity, figures["tflops"], marker, color=color, label=label, **POINT)
    left.set_xlabel("arithmetic intensity (FLOP per byte of the least traffic)")
    left.set_ylabel("TFLOP/s, the fastest of ours")
    if seen:
        left.legend(fontsize=8, framealpha=0.9)
    _fractions(right, rows, ops, style)
    figure.suptitle(f"Roofline\n{subtitle(content)}", fontsize=10)
    save_figure(figure, path)
    return path


def _roof(axes: Any, ceilings: Mapping[str, float], counted: Sequence[Result]) -> None:
    """Both ceilings: the slope of the copy rate, and the flat matrix rate."""
    intensities = [row["flop"] / row["bytes"] for row in counted]
    ridge = ceilings["matmul"] / ceilings["copy"]
    low = min([*intensities, ridge]) / 4
    high = max([*intensities, ridge]) * 4
    top = ceilings["matmul"] * 1e-12
    axes.plot([low, ridge, high], [low * ceilings["copy"] * 1e-12, top, top], color="black", linewidth=1.4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.annotate(
        f"bf16 matmul {amount(ceilings['matmul'], 'FLOP/s')}",
        (high, top),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
    )
    axes.text(
        0.03,
        0.97,
        f"slope: copy {amount(ceilings['copy'], 'B/s')}\nread {amount(ceilings['read'], 'B/s')}",
        transform=axes.transAxes,
        va="top",
        fontsize=8,
    )
    slowest = min([row["variants"][_winner(row)]["tflops"] for row in counted], default=top / 100)
    axes.set_ylim(slowest / 3, top * 3)
    axes.grid(True, which="major", alpha=0.25)


def _fractions(axes: Any, rows: Sequence[Result], ops: Sequence[str], style: Mapping[str, tuple[str, str]]) -> None:
    """A line of points for each op: ours filled, the best peer a grey bar."""
    for row in rows:
        place = len(ops) - 1 - ops.index(row["op"])
        color, marker = style[row["op"]]
        peer = best_peer(row)
        if peer is not None:
            share = row["variants"][peer[0]]["fraction_of_floor"] * 100
            axes.plot(share, place - 0.18, "|", color="#737373", markersize=8)
        if best_of_ours(row):
            share = row["variants"][_winner(row)]["fraction_of_floor"] * 100
            axes.plot(share, place + 0.1, marker, color=color, **POINT)
    axes.axvline(100, color="black", linewidth=1.0)
    axes.set_yticks(range(len(ops)), [op.replace("_", " ") for op in reversed(ops)], fontsize=8)
    axes.set_ylim(-0.6, len(ops) - 0.4)
    axes.set_xlim(0, max(106.0, axes.get_xlim()[1]))
    axes.set_xlabel("% of the floor (points: the fastest of ours, a row each; bars: its best peer)")
    axes.grid(True, axis="x", alpha=0.25)


def _winner(row: Result) -> str:
    found = best_of_ours(row)
    assert found is not None
    return found[0]


def _op_color(index: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["tab10"](index) if index < 10 else matplotlib.colormaps["Dark2"](index % 8)


def draw_peers(content: Result, rows: Sequence[Result], path: Path) -> Path:
    """How many times faster than the best peer the fastest of ours is: a bar for each row, those of the quick grid where there are many."""
    pairs = [row for row in rows if best_of_ours(row) and best_peer(row)]
    if len(pairs) > MOST_BARS:
        pairs = [row for row in pairs if row["priority"] == 0] or pairs[:MOST_BARS]
    ops = list(dict.fromkeys(row["op"] for row in pairs))
    pairs.sort(key=lambda row: ops.index(row["op"]))
    factors = [speedup(row, _winner(row)) or 0.0 for row in pairs]
    figure = new_figure(11.0, 1.8 + 0.3 * len(pairs), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(pairs) - 1, -1, -1))
    colors = [OUR_COLORS[_winner(row).split(" ", 1)[0]] for row in pairs]
    bars = axes.barh(places, [factor - 1 for factor in factors], left=1.0, height=0.7, color=colors)
    for bar, factor in zip(bars, factors):
        # Where the peer is faster, that is to be seen at a glance.
        bar.set_alpha(1.0 if factor >= 1 else 0.45)
    for place, row, factor in zip(places, pairs, factors):
        peer = best_peer(row)
        assert peer is not None
        side = 1 if factor >= 1 else -1
        axes.annotate(
            f"{factor:.2f}× {peer[0]}",
            (factor, place),
            xytext=(4 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=8,
        )
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_yticks(places, [f"{row['op'].replace('_', ' ')}  {row['shape']}" for row in pairs], fontsize=8)
    axes.set_ylim(-0.6, len(pairs) - 0.4)
    low, high = min([1.0, *factors]), max([1.0, *factors])
    if high > 4 * low:
        axes.set_xscale("log", base=2)
        # For the labels.
        margin = (high / low) ** 0.4
        axes.set_xlim(low / (1.0 if low == 1 else margin), high * margin)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.set_xlim(low - (0.35 * (high - low) + 0.1 if low < 1 else 0.02), high + 0.3 * (high - low) + 0.1)
    names = list(dict.fromkeys(_winner(row).split(" ", 1)[0] for row in pairs))
    if len(names) > 1:
        from matplotlib.patches import Patch

        patches = [Patch(color=OUR_COLORS[name], label=name) for name in names]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(names), fontsize=8)
    axes.set_xlabel("times as fast as the best peer of the same run (1 = as fast; pale: the peer is faster)")
    axes.grid(True, axis="x", alpha=0.25)
    figure.suptitle(f"Fastest of ours against the best peer\n{subtitle(content)}", fontsize=10)
    save_figure(figure, path)
    return path


def sweeps(rows: Sequence[Result]) -> list[Sweep]:
    """The sweeps in some rows, the longest of each op first. Of two rows at one number the one that moves more bytes stands."""
    found: list[Sweep] = []
    for op in dict.fromkeys(row["op"] for row in rows):
        groups: dict[tuple[str, str], dict[int, Result]] = {}
        for row in (row for row in rows if row["op"] == op):
            for along, number, rest in _places(row["shape"]):
                points = groups.setdefault((along, rest), {})
                if number not in points or points[number]["bytes"] < row["bytes"]:
                    points[number] = row
        long = [
            Sweep(op, along, rest, sorted(points.items(), key=lambda point: point[0]))
            for (along, rest), points in groups.items()
            if len(points) >= FEWEST_POINTS
        ]
        found += sorted(long, key=lambda sweep: -len(sweep.points))
    return found


def _places(shape: str) -> list[tuple[str, int, str]]:
    """Each number that a sweep may go along: its meaning, its value, and the shape with it left open.

    Two numbers move together where one makes up for the other: batch and sequence length with their product held, rows and width.
    """
    places = []
    values: dict[str, int] = {}
    for match in NUMBER.finditer(shape):
        meaning = _meaning(shape, match)
        if meaning:
            values[meaning] = int(match.group(2))
            rest = f"{shape[: match.start()]}{match.group(1)}…{shape[match.end() :]}"
            places.append((meaning, values[meaning], rest))
    if {"batch", "sequence length"} <= values.keys():
        rest = re.sub(r"(?<!\w)[BL]\d+ ?", "", shape)
        tokens = values["batch"] * values["sequence length"]
        return [("sequence length", values["sequence length"], f"{rest}, {tokens} tokens")]
    if {"rows", "width"} <= values.keys():
        return [("width", values["width"], re.sub(r"\d+×\d+", "rows × width", shape))]
    return [place for place in places if place[0] != "batch" or "keys" not in values]


def _meaning(shape: str, match: re.Match[str]) -> str | None:
    if match.group(1):
        return LETTERS.get(match.group(1))
    before, after = shape[: match.start()], shape[match.end() :]
    found = (meaning for left, right, meaning in WORDS if re.search(left, before) and re.search(right, after))
    return next(found, None)


def draw_sweeps(content: Result, op: str, found: Sequence[Sweep], path: Path) -> Path:
    """One panel for each sweep: TFLOP/s where arithmetic is counted, else % of the floor."""
    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure = new_figure(5.2 * columns + (1.6 if columns == 1 else 0.4), 3.9 * lines + 1.4, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    names = list(dict.fromkeys(name for sweep in found for _, row in sweep.points for name in row["variants"]))
    colors = variant_colors(names)
    handles: dict[str, Any] = {}
    ceilings = content["ceilings"]
    points = [row for sweep in found for _, row in sweep.points]
    bound = [row["flop"] / ceilings["matmul"] >= row["bytes"] / ceilings["copy"] for row in points]
    # One unit for all panels of an op.
    arithmetic = 2 * sum(bound) > len(bound)
    for axes, sweep in zip(panels.flat, found):
        _panel(axes, sweep, ceilings, colors, handles, arithmetic)
    for axes in panels.flat[len(found) :]:
        axes.set_axis_off()
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(len(handles), 4 * columns),
        fontsize=8,
    )
    figure.suptitle(f"{op.replace('_', ' ')}\n{subtitle(content)}", fontsize=10)
    save_figure(figure, path)
    return path


def _panel(
    axes: Any,
    sweep: Sweep,
    ceilings: Mapping[str, float],
    colors: Mapping[str, str],
    handles: dict[str, Any],
    arithmetic: bool,
) -> None:
    """A line for each variant with its 10th and 90th percentile, and the ceiling; ``arithmetic`` chooses the unit."""

    def height(row: Result, seconds: float) -> float:
        return float(row["flop"] / seconds * 1e-12 if arithmetic else 100 * row["floor_seconds"] / seconds)

    for index, (name, color) in enumerate(colors.items()):
        points = [(number, row, row["variants"][name]) for number, row in sweep.points if name in row["variants"]]
        if not points:
            continue
        xs = [number for number, _, _ in points]
        ys = [height(row, figures["seconds"]) for _, row, figures in points]
        bars = [
            [y - height(row, figures["seconds_p90"]) for y, (_, row, figures) in zip(ys, points)],
            [height(row, figures["seconds_p10"]) - y for y, (_, row, figures) in zip(ys, points)],
        ]
        ours = is_ours(name)
        (line, *_) = axes.errorbar(
            xs,
            ys,
            yerr=bars,
            color=color,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=2.0 if ours else 1.2,
            linestyle="-" if ours else "--",
            capsize=2,
            zorder=3 if ours else 2,
        )
        handles.setdefault(name, line)
    limit = ceilings["matmul"] * 1e-12 if arithmetic else 100.0
    axes.axhline(limit, color="black", linewidth=1.0)
    axes.set_xscale("log", base=2)
    numbers = [number for number, _ in sweep.points]
    axes.set_xticks(numbers, [_short(number) for number in numbers], fontsize=8, rotation=45 if len(numbers) > 7 else 0)
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(sweep.along, fontsize=9)
    axes.set_ylabel("TFLOP/s (line: matmul ceiling)" if arithmetic else "% of the floor", fontsize=9)
    axes.set_title(sweep.title, fontsize=8.5)
    axes.grid(True, alpha=0.25)


def variant_colors(names: Sequence[str]) -> dict[str, str]:
    """Ours in colour, peers in muted ones; ours are listed first."""
    ours = [name for name in names if is_ours(name)]
    peers = [name for name in names if not is_ours(name)]
    colors = {name: OUR_COLORS[name.split(" ", 1)[0]] for name in ours}
    colors.update({name: PEER_COLORS[index % len(PEER_COLORS)] for index, name in enumerate(peers)})
    return colors


def _short(number: int) -> str:
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)
