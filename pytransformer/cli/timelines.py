"""Timelines of a kernel's block as a picture and as text."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pytransformer.gluon_interpreter.timeline import TENSOR_CORES, Span, Timeline, Wait
from pytransformer.training.plots import new_figure

# Okabe and Ito's colours, which no common colour blindness confuses; waits are told by their hatches too.
LOAD, HELD, STORE, EXPONENTIALS = "#E69F00", "#FBE7BF", "#CC79A7", "#009E73"
CONSUMERS = ("#0072B2", "#56B4E9", "#F0E442")
WAIT_EDGE, ARROW = "#8A8A8A", "#D55E00"
_WIDTH, _HEIGHT, _DPI = 1600, 900, 130
_FONT, _SMALL_FONT = 7.0, 5.8
_HATCHES = {"wait": "////", "wait for work": "...."}
CAPTIONS = {
    "model": (
        "A model of order, not of time: the tensor cores do 4096 floating-point operations a cycle, the exponential unit 16 exponentials, "
        "the copy engine\n37.2 bytes, one after the other; all else takes no time. Who waits for whom, where, is the kernel's own trace."
    ),
    "steps": (
        "Steps of the interpreter, in the order in which it ran the tasks: not time. Work lasts from its issue until it is found to be "
        "through.\nWho waits for whom, where, is the kernel's own trace."
    ),
}
AXES = {"model": "cycles of the model", "steps": "steps of the interpreter"}


@dataclasses.dataclass(frozen=True)
class _Lane:
    """A row of the picture: its middle and height, in units of a task's lane."""

    name: str
    middle: float
    height: float


def draw(timeline: Timeline, title: str, path: Path, clock: str) -> None:
    """Writes a picture of 1600 × 900 points.

    Args:
        timeline: what is drawn.
        title: what was launched.
        path: the picture to write; its ending says the format.
        clock: ``model`` or ``steps``: what the timeline is measured in.

    Raises:
        ModuleNotFoundError: there is no matplotlib.
        ValueError: the ending of ``path`` is no picture format.
    """
    figure = new_figure(_WIDTH / _DPI, _HEIGHT / _DPI)
    axes = figure.add_axes((0.095, 0.175, 0.895, 0.765))
    lanes = {lane.name: lane for lane in _lanes(timeline)}
    axes.set_xlim(-0.005 * timeline.end, 1.01 * timeline.end)
    bottom = max(lane.middle + lane.height / 2 for lane in lanes.values())
    axes.set_ylim(bottom + 0.24, -0.06)
    for lane in lanes.values():
        axes.axhspan(lane.middle - lane.height / 2, lane.middle + lane.height / 2, color="#F4F4F4", zorder=0)
    inches = 0.895 * _WIDTH / _DPI / (1.015 * timeline.end)  # of one unit of time
    for span, lane in _rows(timeline.spans, lanes):
        _draw_span(axes, span, lane, timeline, inches)
    _draw_marks(axes, timeline, lanes, inches)
    for wait in timeline.waits:
        _draw_arrow(axes, wait, lanes)
    axes.set_yticks([lane.middle for lane in lanes.values()], list(lanes), fontsize=8.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel(AXES[clock], fontsize=8.5, labelpad=2)
    axes.set_title(title, fontsize=11, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _legend(figure, timeline)
    figure.text(0.012, 0.012, CAPTIONS[clock], fontsize=7.2, color="#444444", va="bottom", linespacing=1.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _order(timeline: Timeline) -> list[str]:
    """Producers above the stages that they fill, consumers around the tensor cores."""
    producers = [task for task in timeline.tasks if not task.startswith("consumer")]
    consumers = [task for task in timeline.tasks if task.startswith("consumer")]
    products = [TENSOR_CORES] if any(span.lane == TENSOR_CORES for span in timeline.spans) else []
    return [*producers, *timeline.stages, *consumers[:1], *products, *consumers[1:]]


def _lanes(timeline: Timeline) -> Iterator[_Lane]:
    top = 0.0
    for name in _order(timeline):
        height = 0.62 if name in timeline.stages else 1.0
        yield _Lane(name, top + height / 2, height)
        top += height + (0.1 if name in timeline.stages else 0.3)


def _rows(spans: Sequence[Span], lanes: dict[str, _Lane]) -> Iterator[tuple[Span, _Lane]]:
    """Each span with its part of the lane: spans of one lane that overlap lie below each other."""
    for lane in lanes.values():
        ends: list[float] = []
        placed = []
        for span in (span for span in spans if span.lane == lane.name and span.end > span.begin):
            row = next((row for row, end in enumerate(ends) if end <= span.begin), len(ends))
            ends[row : row + 1] = [span.end]
            placed.append((span, row))
        height = 0.86 * lane.height / max(1, len(ends))
        first = lane.middle - 0.43 * lane.height + height / 2
        for span, row in placed:
            yield span, _Lane(lane.name, first + row * height, height * (0.94 if len(ends) > 1 else 1.0))


def _draw_span(axes: Any, span: Span, lane: _Lane, timeline: Timeline, inches: float) -> None:
    color, dark = _color(span, timeline)
    waits = span.kind in _HATCHES
    axes.barh(
        lane.middle,
        span.end - span.begin,
        left=span.begin,
        height=lane.height,
        color="white" if waits else color,
        edgecolor=WAIT_EDGE if waits else "white",
        hatch=_HATCHES.get(span.kind),
        linewidth=0.5,
        zorder=2,
    )
    label = _fitting(_labels(span, timeline), (span.end - span.begin) * inches)
    if label:
        box = {"facecolor": "white" if waits else color, "edgecolor": "none", "pad": 0.8}
        axes.text(
            (span.begin + span.end) / 2,
            lane.middle,
            label,
            ha="center",
            va="center",
            fontsize=_FONT,
            linespacing=1.1,
            color="white" if dark else "black",
            bbox=box,
            zorder=6,
        )


def _draw_marks(axes: Any, timeline: Timeline, lanes: dict[str, _Lane], inches: float) -> None:
    """Arrivals, with the barrier where there is room."""
    for lane in lanes.values():
        marks = [mark for mark in timeline.marks if mark.lane == lane.name]
        for mark, following in itertools.zip_longest(marks, marks[1:]):
            bottom = lane.middle + lane.height / 2
            axes.plot([mark.time], [bottom + 0.06], marker="v", color="black", markersize=3.5, zorder=5)
            room = ((following.time if following else timeline.end) - mark.time) * inches
            name = re.sub(r"_\w+\.", ".", mark.barrier)
            if _width(name, _SMALL_FONT) + 0.08 < room:
                axes.text(mark.time + 0.04 / inches, bottom + 0.07, name, fontsize=_SMALL_FONT, va="center", zorder=6)


def _color(span: Span, timeline: Timeline) -> tuple[str, bool]:
    """(colour, whether text on it is white)."""
    if span.kind == "product":
        consumers = [task for task in timeline.tasks if task.startswith("consumer")]
        number = consumers.index(span.owner) % len(CONSUMERS) if span.owner in consumers else 0
        return CONSUMERS[number], number == 0
    color = {"load": LOAD, "held": HELD, "store": STORE, "exponentials": EXPONENTIALS}.get(span.kind, "white")
    return color, span.kind == "exponentials"


def _labels(span: Span, timeline: Timeline) -> list[str]:
    """From the longest to the shortest."""
    if span.kind == "store":
        return ["result", "out"]
    if span.kind in ("load", "held"):
        return [f"{span.kind} {span.tile}", span.tile]
    if span.kind == "product":
        return [_product(span), span.tile]
    if span.kind == "exponentials":
        return [f"softmax\n{_line(span.where)}", "softmax"]
    if span.kind == "wait":
        phase = next(wait.phase for wait in timeline.waits if wait.lane == span.lane and wait.begin == span.begin)
        return [
            f"{span.label}, phase {phase}\n{_line(span.where)}",
            f"{span.label}\n{_line(span.where)}",
            span.label,
            span.label.replace(".", "\n."),
        ]
    return [f"its product\n{_line(span.where)}", _line(span.where)] if " × " in span.label else ["its store"]


def _product(span: Span) -> str:
    """What is multiplied: ``q·k2``; of a first operand in registers nothing is known but that the threads made it."""
    left, _ = span.label.split(" × ")
    variable = left.partition("[")[0]
    name = variable.rpartition(".")[2].partition("_")[0]
    return f"p·{span.tile}" if left == "registers" and span.tile[:1] == "v" else f"{name}·{span.tile}"


def _line(where: str) -> str:
    return where.split(" in ")[0]


def _fitting(labels: Sequence[str], inches: float) -> str:
    """The first that is not wider than that; empty if none is."""
    for label in labels:
        if max(_width(line, _FONT) for line in label.split("\n")) < inches:
            return label
    return ""


def _width(text: str, font: float) -> float:
    """Inches that it takes, nearly."""
    return len(text) * 0.58 * font / 72


def _draw_arrow(axes: Any, wait: Wait, lanes: dict[str, _Lane]) -> None:
    """From what ended a wait to its end; own products and stores are nearby and need none."""
    if wait.phase < 0:
        return
    start, end = lanes[wait.cause.lane], lanes[wait.lane]
    down = 1 if end.middle > start.middle else -1
    axes.annotate(
        "",
        xy=(wait.end, end.middle - down * end.height * 0.45),
        xytext=(wait.cause.time, start.middle + down * start.height * 0.45),
        arrowprops={"arrowstyle": "-|>", "color": ARROW, "linewidth": 1.0, "shrinkA": 0, "shrinkB": 0},
        zorder=4,
    )


def _legend(figure: Any, timeline: Timeline) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = {span.kind for span in timeline.spans}
    consumers = [task for task in timeline.tasks if task.startswith("consumer")]
    entries = [
        ("load", Patch(facecolor=LOAD), "copy into a stage"),
        ("held", Patch(facecolor=HELD), "tile in use until its last reader is through"),
        ("store", Patch(facecolor=STORE), "copy of the result"),
        *(
            ("product", Patch(facecolor=CONSUMERS[number % len(CONSUMERS)]), f"product of {task}")
            for number, task in enumerate(consumers)
        ),
        ("exponentials", Patch(facecolor=EXPONENTIALS), "softmax (exponentials)"),
        ("wait", Patch(facecolor="white", edgecolor=WAIT_EDGE, hatch="////"), "waits for a barrier"),
        ("wait for work", Patch(facecolor="white", edgecolor=WAIT_EDGE, hatch="...."), "waits for its own product or store"),
    ]  # fmt: skip
    handles: list[tuple[Any, str]] = [(handle, label) for kind, handle, label in entries if kind in kinds]
    handles.append((Line2D([], [], color=ARROW, marker=">", markersize=4, linewidth=1.2), "ends the wait"))
    handles.append((Line2D([], [], color="black", marker="v", markersize=4, linestyle=""), "arrives at a barrier"))
    figure.legend(
        [handle for handle, _ in handles],
        [label for _, label in handles],
        loc="lower left",
        bbox_to_anchor=(0.006, 0.052),
        ncols=-(-len(handles) // 2),
        fontsize=7.5,
        frameon=False,
        handlelength=2.2,
        columnspacing=1.6,
    )


_FILL = {"load": "=", "held": "-", "store": ">", "exponentials": "s", "wait": ".", "wait for work": ","}
_KEY = "= copy into a stage, - tile in use, > copy of the result, s softmax, . waits for a barrier, , waits for its own product or store"


def text_lines(timeline: Timeline, title: str, columns: int, clock: str) -> list[str]:
    """The timeline in so many columns, and a line for each wait."""
    width = max(len(name) for name in _order(timeline)) + 1
    scale = (columns - width) / max(timeline.end, 1.0)
    consumers = [task for task in timeline.tasks if task.startswith("consumer")]
    lines = [title, ""]
    for name in _order(timeline):
        cells = [" "] * (columns - width)
        for span in (span for span in timeline.spans if span.lane == name):
            _fill(cells, span, scale, str(consumers.index(span.owner)) if span.owner in consumers else "#")
        lines.append(f"{name:{width}}{''.join(cells)}".rstrip())
    numbered = ", ".join(f"{number} product of {task}" for number, task in enumerate(consumers))
    lines += [f"{'':{width}}0 to {timeline.end:,.0f} {AXES[clock]}", "", f"{_KEY}, {numbered}", ""]
    lines += CAPTIONS[clock].split("\n")
    lines += ["", f"{'from':>8} {'to':>8}  who waits, for what, and what ends it"]
    for wait in timeline.waits:
        phase = f" (phase {wait.phase})" if wait.phase >= 0 else ""
        lines.append(
            f"{wait.begin:8,.0f} {wait.end:8,.0f}  {wait.lane} at {_line(wait.where)} for {wait.what}{phase}: "
            f"{wait.cause.what} ({_line(wait.cause.where)})"
        )
    return lines


def _fill(cells: list[str], span: Span, scale: float, number: str) -> None:
    begin, end = round(span.begin * scale), round(span.end * scale)
    character = _FILL.get(span.kind, number)
    label = {"wait": span.label}.get(span.kind, "" if span.kind == "held" else span.tile)
    content = character * (end - begin)
    if label and len(label) < end - begin:
        content = label + content[len(label) :]
    cells[begin:end] = list(content[: len(cells) - begin])
