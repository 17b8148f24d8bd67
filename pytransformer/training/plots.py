"""The loss curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pytransformer.training import metrics
from pytransformer.training.baselines import Baselines

TRAIN_COLOR, SMOOTH_COLOR, VALIDATION_COLOR = "#9ecae1", "#2171b5", "#d94801"
UNIGRAM_COLOR, BIGRAM_COLOR = "#969696", "#525252"


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A matplotlib figure that needs no display. Raises ModuleNotFoundError saying how to get matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            f"pictures need matplotlib ({error}): pip install 'pytransformer-kernels[plot]'"
        ) from None
    figure = Figure(figsize=(width, height), dpi=130, **options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes the picture in the format of the name's ending. Raises ValueError if matplotlib knows no such format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", facecolor="white")


def smooth(values: Sequence[float], width: int) -> list[float]:
    """The mean over the ``width`` values around each, fewer at the ends; the length stays."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    places = np.arange(len(values))
    first, last = np.maximum(places - width // 2, 0), np.minimum(places + width // 2 + 1, len(values))
    return [float(mean) for mean in (sums[last] - sums[first]) / (last - first)]


def plot_loss(records: Sequence[metrics.Record], baselines: Baselines | None, path: Path, title: str = "") -> None:
    """Training and validation loss against the step, with what counting achieves as horizontal lines.

    Args:
        records: of ``metrics.jsonl``, at least one with a training loss.
        baselines: the lines; None = none.
        path: the picture to write.
        title: what was trained; the final numbers are added below it.

    Raises:
        ValueError: there is nothing to draw, or the ending of ``path`` is no picture format.
    """
    steps, losses = metrics.series(records, "loss")
    if not steps:
        raise ValueError("there is no training loss to draw yet")
    seen_steps, seen_losses = metrics.series(records, "validation_loss")
    figure = new_figure(8.6, 5.2)
    from matplotlib.ticker import MaxNLocator  # new_figure has said so if matplotlib isn't there

    axes = figure.add_subplot()
    axes.plot(steps, losses, color=TRAIN_COLOR, linewidth=0.8, label="training, each step")
    if len(losses) >= 50:
        width = max(5, len(losses) // 40)
        axes.plot(
            steps, smooth(losses, width), color=SMOOTH_COLOR, linewidth=1.8, label=f"training, mean of {width} steps"
        )
    if seen_steps:
        axes.plot(
            seen_steps, seen_losses, color=VALIDATION_COLOR, linewidth=1.8, marker="o", markersize=4, label="validation"
        )
    lowest = min([*losses, *seen_losses])
    if baselines is not None:
        lowest = min(lowest, baselines.bigram)
        _baseline(axes, baselines.unigram, "unigram", UNIGRAM_COLOR, ":")
        _baseline(axes, baselines.bigram, "bigram", BIGRAM_COLOR, "--")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(0, max(steps) * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=max(0.0, lowest - 0.35))
    axes.grid(alpha=0.25)
    axes.legend(loc="upper right", framealpha=0.95)
    figure.suptitle("\n".join(line for line in (title, _summary(losses, seen_losses, baselines)) if line), fontsize=11)
    save_figure(figure, path)


def _baseline(axes: Any, value: float, name: str, color: str, style: str) -> None:
    axes.axhline(value, color=color, linestyle=style, linewidth=1.5, label=f"{name} {value:.2f}", zorder=1)


def _summary(losses: Sequence[float], validation: Sequence[float], baselines: Baselines | None) -> str:
    if not validation:
        return f"training loss {losses[-1]:.3f}"
    text = f"validation loss {validation[-1]:.3f}"
    if baselines is not None:
        margin = baselines.bigram - validation[-1]
        text += f", {abs(margin):.2f} nats {'below' if margin >= 0 else 'above'} the bigram"
    return text
