"""Writes what docs/architecture.md says of rooms and ways: who may import whom, and how q gets from a module to a kernel, as recorded.

    python tools/walk.py             writes the tables of the page, and the drawing docs/walk.png
    python tools/walk.py --check     fails if the page does not say what is recorded now

Real calls of nn.Attention on a machine without a GPU: Triton's way is real down to the CUDA driver, which does nothing
(tests/support/triton_stub.py); of the CUDA extension's way the op is a stand-in, and what lies below it is read from the sources.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs/architecture.md", ROOT / "docs/walk.png"
WALKS = ("first call", "later calls", "later calls, recorded for a backward pass")
# What a call does in passing, before it goes on: by the name of the function.
SIDE_ROOMS = {
    "Launches.find": "seen before?",
    "check_attention": "check",
    "BackendChoice.select": "choose",
    "Op._keep": "keep",
}


@dataclass(frozen=True)
class Station:
    """Where a call stops on its way: in these files, or in those that only pass it on."""

    name: str
    files: tuple[str, ...]
    passing: tuple[str, ...] = ()


ROOM = "pytransformer/ops/attention"
BEGINNING = (
    Station("module", ("pytransformer/nn/attention.py",)),
    Station("public function", (f"{ROOM}/__init__.py",)),
    Station("hall", ("pytransformer/ops/op.py", "pytransformer/ops/registered.py")),
)
WAYS = {
    "triton": (
        *BEGINNING,
        Station(
            "launch",
            ("kernels/attention/forward.py",),
            (f"{ROOM}/by_triton.py", f"{ROOM}/call.py", f"{ROOM}/padding.py", "pytransformer/ops/launches.py"),
        ),
        Station("prepared launch", ("kernels/prepared.py",)),
        Station("kernel", ("kernels/attention/forward.py",)),
    ),
    "cuda": (
        *BEGINNING,
        Station("launch", (f"{ROOM}/by_cuda.py",), (f"{ROOM}/call.py", f"{ROOM}/padding.py")),
        Station("op of the extension", ("csrc/attention/ops.cpp",)),
        Station("kernel", ("csrc/attention/forward.cuh",)),
    ),
}


@dataclass
class Walk:
    """One call: for each station the functions on the way, and what was called in passing, each in the order of calls."""

    stops: list[list[str]]
    in_passing: list[str] = field(default_factory=list)


class Recorder:
    """Sees every call that Python makes, and remembers who was under way when the kernel was reached."""

    def __init__(self, kernel_of: Callable[[FrameType, str, Any], str | None]) -> None:
        self._kernel_of = kernel_of
        self.way: list[tuple[str, str]] = []  # (file, function), from the module to the kernel's caller
        self.kernel, self.in_passing = "", list[str]()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and (name := _name(frame)) in SIDE_ROOMS and _name(frame.f_back).startswith("Op."):
            self.in_passing.append(SIDE_ROOMS[name])
        if event in ("call", "c_call") and not self.kernel:
            kernel = self._kernel_of(frame, event, argument)
            if kernel is not None:
                self.kernel, self.way = kernel, _way(frame)


def _name(frame: FrameType | None) -> str:
    if frame is None:
        return ""
    first = frame.f_code.co_varnames[:1]
    of = f"{type(frame.f_locals['self']).__name__}." if first == ("self",) and "self" in frame.f_locals else ""
    return of + frame.f_code.co_name


def _file(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""


def _way(frame: FrameType | None) -> list[tuple[str, str]]:
    way = []
    while frame is not None:
        if _file(frame).startswith(("pytransformer/", "kernels/")):
            way.append((_file(frame), _name(frame)))
            if way[-1][1] == "Attention.forward":
                return way[::-1]
        frame = frame.f_back
    raise RuntimeError("the kernel was reached without Attention.forward")


def _walk(stations: tuple[Station, ...], recorder: Recorder) -> Walk:
    """Sorts the way into stations; RuntimeError where it leads elsewhere, or back."""
    if not recorder.kernel:
        raise RuntimeError("the call reached no kernel")
    stops: list[list[str]] = [[] for _ in stations]
    here = 0
    for file, name in recorder.way:
        while file not in (*stations[here].files, *stations[here].passing):
            here += 1
            if here == len(stations):
                raise RuntimeError(f"{name} in {file} is at no station, or the way leads back to it")
        # A lambda has no name, and only passes its argument on.
        if name != "<lambda>" and name not in stops[here]:
            stops[here].append(name)
    stops[-1].append(recorder.kernel)
    return Walk(stops, list(dict.fromkeys(recorder.in_passing)))


# --- the two ways -----------------------------------------------------------------------------------------------------------------------


def _triton_kernel(frame: FrameType, event: str, argument: Any) -> str | None:
    """Triton's own way to a launch begins, or the C function that a prepared launch ends with is called."""
    if event == "call" and _name(frame) == "JITFunction.run":
        return str(frame.f_locals["self"].__name__)
    if event == "c_call" and _name(frame) == "PreparedLaunch.__call__" and argument is frame.f_locals.get("call"):
        return str(frame.f_locals["self"]._kernel.__name__)
    return None


def _cuda_kernel(frame: FrameType, event: str, argument: Any) -> str | None:
    return "attention_forward" if event == "call" and frame.f_code is _stand_in.__code__ else None


def _stand_in(q: Any, k: Any, v: Any, *_: Any) -> Any:
    """What the extension's op returns, without values."""
    from pytransformer.ops.attention.by_cuda import _fake_forward

    return _fake_forward(q, k, v)


@contextlib.contextmanager
def _without_the_extension() -> Iterator[None]:
    from pytransformer.ops import backend
    from pytransformer.ops.attention import by_cuda
    from pytransformer.ops.op import forget_launches

    unavailable = backend.unavailable
    forget_launches()
    with (
        mock.patch.object(
            backend, "unavailable", lambda name, device: None if name == "cuda" else unavailable(name, device)
        ),
        mock.patch.object(by_cuda, "_op", lambda name: _stand_in),
    ):
        yield
    forget_launches()


def _below_the_op(way: Walk) -> Walk:
    """The extension's part of the way, by the sources."""
    op = way.stops[-1].pop()
    ops, forward = ((ROOT / "csrc/attention" / name).read_text() for name in ("ops.cpp", "forward.cuh"))
    registered = re.search(rf'impl\("{op}", TORCH_BOX\(&(\w+)\)\)', ops)
    launched = re.search(r'launch\("(\w+)"', forward)
    if registered is None or launched is None:
        raise RuntimeError("csrc/attention no longer registers and launches as this tool knows it")
    way.stops[-2] += [f"torch.ops.pytransformer_cuda.{op}", registered[1]]
    way.stops[-1].append(launched[1])
    return way


def record(backend: str) -> dict[str, Walk]:
    """The walks of a first call, a later one, and a later one that autograd records."""
    import torch

    from pytransformer import use_backend
    from pytransformer.nn import Attention

    if backend == "triton":
        from tests.support.triton_stub import stubbed_driver

        around, kernel_of = stubbed_driver(90), _triton_kernel
    else:
        around, kernel_of = _without_the_extension(), _cuda_kernel
    module, x = Attention(64, 2, dtype=torch.bfloat16), torch.zeros(1, 16, 64, dtype=torch.bfloat16)
    walks = {}
    with around, use_backend(backend):
        # A prepared launch goes through Triton twice before it is made directly.
        for title, warm_up, recorded in zip(WALKS, (0, 4, 4), (False, False, True)):
            with torch.set_grad_enabled(recorded):
                for _ in range(warm_up):
                    module(x)
                recorder = Recorder(kernel_of)
                sys.setprofile(recorder)
                try:
                    module(x)
                finally:
                    sys.setprofile(None)
            walk = _walk(WAYS[backend], recorder)
            walks[title] = _below_the_op(walk) if backend == "cuda" else walk
    return walks


# --- the page ---------------------------------------------------------------------------------------------------------------------------


def _cells(stops: list[list[str]], in_passing: list[list[str]]) -> list[str]:
    """What each walk does at a station; "the same" as the walk before it."""
    cells = []
    for names, passed in zip(stops, in_passing):
        cells.append(" → ".join((*passed, *(f"`{name}`" for name in names))))
    return [cell if cell not in cells[:index][-1:] else "the same" for index, cell in enumerate(cells)]


def table(backend: str, walks: dict[str, Walk]) -> str:
    """A row for each hop, from the public function on."""
    lines = [f"| hop | to the | in | {' | '.join(WALKS)} |", "|---:|---|---|" + "---|" * len(WALKS)]
    for number, station in enumerate(WAYS[backend]):
        hop = str(number - 1) if number > 1 else ""
        files = ", ".join(f"`{file}`" for file in station.files)
        passed = [walks[title].in_passing if station.name == "hall" else [] for title in WALKS]
        cells = _cells([walks[title].stops[number] for title in WALKS], passed)
        lines.append(f"| {hop} | {station.name} | {files} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def contracts() -> str:
    """The contracts of pyproject.toml; of layers the upper ones may import the lower ones."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        found = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    lines = ["| contract | layers, each of which may import those to its right |", "|---|---|"]
    for contract in found:
        layers = [layer.replace(" | ", " \\| ") for layer in contract.get("layers", ())]
        within = f" ({contract['containers'][0]})" if layers else ""
        lines.append(f"| {contract['name']}{within} | {' → '.join(f'`{layer}`' for layer in layers)} |")
    return "\n".join(lines) + "\n"


def page(text: str, walks: dict[str, dict[str, Walk]]) -> str:
    """The page with these walks, and with the contracts."""
    tables = [f"To the {title} kernel:\n\n{table(name, walks[name])}" for name, title in TITLES.items()]
    for name, block in (("contracts", contracts()), ("walks", "\n".join(tables))):
        begin, end = f"<!-- {name}: made by tools/walk.py; do not edit -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    return text


# --- the drawing ------------------------------------------------------------------------------------------------------------------------

COLOURS = dict(zip(WALKS, ("#c2410c", "#1d4ed8", "#15803d")))
MARGIN, GAP, LINE, HEADING = 1.75, 0.38, 0.19, 0.95
WIDTHS = (1.6, 1.95, 3.0, 2.15, 2.9, 2.2)
MARK = {"ha": "center", "va": "center", "weight": "bold"}


def draw(walks: dict[str, dict[str, Walk]], path: Path) -> None:
    """For each kernel a line of stations for each kind of call, from the module on the left to the kernel on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = {name: [_height(walk) for walk in found.values()] for name, found in walks.items()}
    width = MARGIN + sum(WIDTHS) + GAP * len(WIDTHS)
    top = sum(sum(rows) + HEADING + 0.6 for rows in heights.values())
    figure, axes = pyplot.subplots(figsize=(width, top))
    axes.set(xlim=(0, width), ylim=(0, top))
    axes.axis("off")
    for backend, found in walks.items():
        axes.text(0, top - 0.15, f"To the {TITLES[backend]} kernel", size=15, weight="bold", va="center")
        top -= 0.45
        _draw_headings(axes, top, WAYS[backend])
        top -= HEADING
        for (title, walk), height in zip(found.items(), heights[backend]):
            _draw_walk(axes, top, height - 0.15, title, walk)
            top -= height
        top -= 0.15
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.15)
    pyplot.close(figure)


def _lines(walk: Walk, number: int) -> list[str]:
    """What stands in a box; what the hall does in passing comes first."""
    lines = [line for name in walk.stops[number] for line in name.replace("_cuda.", "_cuda\n.").split("\n")]
    return ([", ".join(walk.in_passing).replace("?,", "?")] if number == len(BEGINNING) - 1 else []) + lines


def _height(walk: Walk) -> float:
    return 0.4 + LINE * max(len(_lines(walk, number)) for number in range(len(walk.stops)))


def _left(number: int) -> float:
    return MARGIN + sum(WIDTHS[:number]) + GAP * number


def _draw_headings(axes: Any, top: float, stations: tuple[Station, ...]) -> None:
    for number, station in enumerate(stations):
        axes.text(_left(number), top - 0.2, station.name, size=12, weight="bold", va="center")
        for index, file in enumerate(station.files):
            short = file.removeprefix("pytransformer/")
            axes.text(_left(number), top - 0.45 - LINE * index, short, size=8, color="#475569", va="center")
        if number > 1:
            circle = {"boxstyle": "circle,pad=0.25", "fc": "#334155", "ec": "none"}
            axes.text(_left(number) - GAP / 2, top - 0.2, str(number - 1), size=9, color="white", bbox=circle, **MARK)


def _draw_walk(axes: Any, top: float, height: float, title: str, walk: Walk) -> None:
    from matplotlib.patches import FancyBboxPatch

    colour, middle = COLOURS[title], top - height / 2
    label = title.replace(", ", ",\n").replace("for a ", "\nfor a ").replace("backward", "\nbackward")
    axes.text(0, middle, label, size=11, weight="bold", color=colour, va="center")
    for number, width in enumerate(WIDTHS):
        left, lines = _left(number), _lines(walk, number)
        shape = {"boxstyle": "round,pad=0,rounding_size=0.08", "fc": colour + "12", "ec": colour}
        axes.add_patch(FancyBboxPatch((left, top - height), width, height, **shape))
        for index, text in enumerate(lines):
            in_passing = number == len(BEGINNING) - 1 and index == 0
            font = {"style": "italic", "size": 9} if in_passing else {"family": "DejaVu Sans Mono", "size": 8}
            y = middle + (len(lines) / 2 - index - 0.5) * LINE
            axes.text(left + 0.08, y, text, color=colour if in_passing else "black", va="center", **font)
        if number > 0:
            arrow = {"arrowstyle": "-|>", "lw": 2, "color": colour, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", xy=(left, middle), xytext=(left - GAP, middle), arrowprops=arrow)


TITLES = {"triton": "Triton", "cuda": "CUDA"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the page instead of writing it")
    arguments = parser.parse_args(argv)
    # Interpreted kernels go another way.
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path.insert(0, str(ROOT))
    walks = {backend: record(backend) for backend in WAYS}
    text = PAGE.read_text()
    found = page(text, walks)
    if arguments.check:
        if found != text:
            print("docs/architecture.md is stale: run python tools/walk.py", file=sys.stderr)
        return int(found != text)
    PAGE.write_text(found)
    draw(walks, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
