"""Pictures of a model at work: attention maps, and speed against length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pytransformer.training.plots import new_figure, save_figure

_MAX_LABELLED_TOKENS = 32
_MAX_LABEL_CHARACTERS = 12
CACHE_COLOR, NO_CACHE_COLOR = "#2171b5", "#d94801"


def plot_attention(
    weights: Sequence[np.ndarray[Any, np.dtype[Any]]], layers: Sequence[int], labels: Sequence[str], path: Path
) -> None:
    """A grid of attention maps: a row for each layer, a column for each head; in a map, row = query, column = key.

    Args:
        weights: for each of ``layers`` the probabilities (num_heads, seqlen, seqlen).
        layers: their numbers.
        labels: the tokens.
        path: the picture to write.
    """
    from matplotlib.colors import PowerNorm  # the square root of the probability: small ones are seen too

    columns = max(len(layer) for layer in weights)
    labelled = len(labels) <= _MAX_LABELLED_TOKENS
    side = min(5.0, max(1.9, 0.17 * len(labels))) if labelled else 2.6
    figure = new_figure(side * columns + 2.0, (side + 0.25) * len(weights) + 0.9, layout="constrained")
    grid = figure.subplots(len(weights), columns, squeeze=False)
    image = None
    for row, (layer, heads) in enumerate(zip(layers, weights)):
        for column, axes in enumerate(grid[row]):
            image = axes.imshow(heads[column], cmap="viridis", norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
            axes.set_title(f"layer {layer}, head {column}", fontsize=9)
            _label(axes, labels if labelled else None, left=column == 0, bottom=row == len(weights) - 1)
    figure.colorbar(
        image, ax=grid, label="attention probability", shrink=min(1.0, 4.0 / figure.get_figheight()), aspect=25
    )
    figure.supxlabel("key: the token attended to", fontsize=10)
    figure.supylabel("query: the token that attends", fontsize=10)
    save_figure(figure, path)


def _label(axes: Any, labels: Sequence[str] | None, *, left: bool, bottom: bool) -> None:
    """Tokens along the outer edges of the grid; positions if there are too many to read."""
    if labels is None:
        axes.tick_params(labelsize=7, labelleft=left, labelbottom=bottom)
        return
    # A dollar sign would start a formula in matplotlib.
    texts = [_shorten(label).replace("$", r"\$") for label in labels]
    axes.set_xticks(range(len(texts)), texts if bottom else [], rotation=90, fontsize=7, family="monospace")
    axes.set_yticks(range(len(texts)), texts if left else [], fontsize=7, family="monospace")


def _shorten(label: str) -> str:
    return label if len(label) <= _MAX_LABEL_CHARACTERS else label[: _MAX_LABEL_CHARACTERS - 1] + "…"


def running_median(values: Sequence[float], width: int) -> list[float]:
    """The median of the ``width`` values around each, fewer at the ends: a pause of the machine leaves no trace."""
    half = width // 2
    return [float(np.median(values[max(0, place - half) : place + half + 1])) for place in range(len(values))]


def plot_cache(
    lengths: Sequence[int], with_cache: Sequence[float], without_cache: Sequence[float], path: Path, title: str
) -> None:
    """Tokens per second against the length of the sequence so far.

    Args:
        lengths: tokens already there when each token was computed.
        with_cache, without_cache: seconds that each of them took.
        path: the picture to write.
        title: what was measured.
    """
    from matplotlib.ticker import MaxNLocator

    width = max(5, len(lengths) // 12)
    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot()
    for seconds, color, label in (
        (with_cache, CACHE_COLOR, "with KV cache"),
        (without_cache, NO_CACHE_COLOR, "without: the whole sequence again for each token"),
    ):
        speeds = [1.0 / median for median in running_median(seconds, width)]
        overall = f"{len(seconds) / sum(seconds):,.0f} tokens/s overall"
        axes.plot(lengths, speeds, color=color, linewidth=1.8, label=f"{label} ({overall})")
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("tokens per second")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlim(lengths[0], lengths[-1])
    axes.grid(alpha=0.25)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    axes.set_title(title, fontsize=11)
    save_figure(figure, path)
