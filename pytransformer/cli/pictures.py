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
    weights: Sequence[np.ndarray[Any, np.dtype[Any]]],
    layers: Sequence[int],
    labels: Sequence[str],
    path: Path,
    key_labels: Sequence[str] | None = None,
) -> None:
    """A grid of attention maps: a row for each layer, a column for each head; in a map, row = query, column = key.

    Args:
        weights: for each of ``layers`` the probabilities (num_heads, queries, keys).
        layers: their numbers.
        labels: the tokens that attend.
        path: the picture to write.
        key_labels: the tokens attended to, if they are others (cross-attention).
    """
    from matplotlib.colors import PowerNorm  # the square root of the probability: small ones are seen too

    columns = max(len(layer) for layer in weights)
    key_labels = labels if key_labels is None else key_labels
    labelled = max(len(labels), len(key_labels)) <= _MAX_LABELLED_TOKENS
    width, height = ((_side(side) if labelled else 2.6) for side in (key_labels, labels))
    figure = new_figure(width * columns + 2.0, (height + 0.25) * len(weights) + 0.9, layout="constrained")
    grid = figure.subplots(len(weights), columns, squeeze=False)
    image = None
    for row, (layer, heads) in enumerate(zip(layers, weights)):
        for column, axes in enumerate(grid[row]):
            image = axes.imshow(heads[column], cmap="viridis", norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
            axes.set_title(f"layer {layer}, head {column}", fontsize=9)
            sides = (labels, key_labels) if labelled else None
            _label(axes, sides, left=column == 0, bottom=row == len(weights) - 1)
    figure.colorbar(
        image, ax=grid, label="attention probability", shrink=min(1.0, 4.0 / figure.get_figheight()), aspect=25
    )
    figure.supxlabel("key: the token attended to", fontsize=10)
    figure.supylabel("query: the token that attends", fontsize=10)
    save_figure(figure, path)


def _side(labels: Sequence[str]) -> float:
    """Inches that so many labels want."""
    return min(5.0, max(1.9, 0.17 * len(labels)))


def _label(axes: Any, labels: tuple[Sequence[str], Sequence[str]] | None, *, left: bool, bottom: bool) -> None:
    """Tokens (queries, keys) along the outer edges of the grid; positions if there are too many to read."""
    if labels is None:
        axes.tick_params(labelsize=7, labelleft=left, labelbottom=bottom)
        return
    # A dollar sign would start a formula in matplotlib.
    queries, keys = ([_shorten(label).replace("$", r"\$") for label in side] for side in labels)
    axes.set_xticks(range(len(keys)), keys if bottom else [], rotation=90, fontsize=7, family="monospace")
    axes.set_yticks(range(len(queries)), queries if left else [], fontsize=7, family="monospace")


def plot_experts(loads: np.ndarray[Any, np.dtype[Any]], layers: Sequence[int], path: Path, title: str) -> None:
    """How many tokens each expert of each layer got, as a share of an even spread.

    Args:
        loads: (layers, num_experts), tokens; a token counts once for each expert that it goes to.
        layers: their numbers.
        path: the picture to write.
        title: what was routed.
    """
    shares = loads / loads.mean(axis=1, keepdims=True)
    rows, columns = shares.shape
    figure = new_figure(
        min(16.0, max(5.0, 0.28 * columns + 2.5)), min(12.0, max(3.2, 0.42 * rows + 2.0)), layout="constrained"
    )
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto", interpolation="nearest")
    if columns <= 32:
        for row, column in np.ndindex(rows, columns):
            shade = "white" if abs(shares[row, column] - 1.0) > 0.7 else "black"
            axes.text(column, row, f"{shares[row, column]:.1f}", ha="center", va="center", fontsize=7, color=shade)
        axes.set_xticks(range(columns), [str(expert) for expert in range(columns)], fontsize=7)
    axes.set_yticks(range(rows), [str(layer) for layer in layers], fontsize=7)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="share of an even spread", extend="max", aspect=25)
    save_figure(figure, path)


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
