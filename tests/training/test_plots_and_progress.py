"""The loss picture and the displays."""

from __future__ import annotations

import builtins
import io

import pytest

from pytransformer.training import plots, progress
from pytransformer.training.baselines import Baselines
from pytransformer.training.plots import plot_loss, smooth
from pytransformer.training.progress import Bar, PlainLines, Quiet, make_progress


def _records(steps: int, evaluations: bool = True):
    records = [{"step": step, "loss": 2.0 + 4.0 / step} for step in range(1, steps + 1)]
    return records + ([{"step": steps, "validation_loss": 2.5}] if evaluations else [])


def _texts(figure) -> list[str]:
    axes = figure.axes[0]
    return [
        figure._suptitle.get_text(),
        axes.get_xlabel(),
        axes.get_ylabel(),
        *(t.get_text() for t in axes.get_legend().get_texts()),
    ]


@pytest.fixture
def figures(monkeypatch):
    seen = []
    original = plots.save_figure
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: (seen.append(figure), original(figure, path)))
    return seen


def test_the_loss_picture_shows_both_curves_and_both_baselines(tmp_path, figures):
    path = tmp_path / "deep" / "loss.png"
    plot_loss(_records(100), Baselines(unigram=6.0, bigram=4.0), path, "a model")
    assert path.read_bytes().startswith(b"\x89PNG")
    title, xlabel, ylabel, *legend = _texts(figures[0])
    assert title == "a model\nvalidation loss 2.500, 1.50 nats below the bigram"
    assert xlabel == "optimizer step" and ylabel == "loss (nats per token)"
    assert legend == ["training, each step", "training, mean of 5 steps", "validation", "unigram 6.00", "bigram 4.00"]
    low, high = figures[0].axes[0].get_ylim()
    assert low < 2.0 and high >= 6.0
    lines = {line.get_label(): line for line in figures[0].axes[0].get_lines()}
    assert list(lines["bigram 4.00"].get_ydata()) == [4.0, 4.0]
    assert list(lines["validation"].get_xdata()) == [100] and list(lines["validation"].get_ydata()) == [2.5]


def test_a_short_run_without_evaluation_or_baselines(tmp_path, figures):
    plot_loss(_records(3, evaluations=False), None, tmp_path / "loss.png")
    assert _texts(figures[0]) == [
        "training loss 3.333",
        "optimizer step",
        "loss (nats per token)",
        "training, each step",
    ]
    plot_loss(_records(3), Baselines(6.0, 2.0), tmp_path / "loss.svg")
    assert _texts(figures[1])[0] == "validation loss 2.500, 0.50 nats above the bigram"


def test_nothing_to_draw_and_unknown_formats(tmp_path):
    with pytest.raises(ValueError, match="no training loss to draw yet"):
        plot_loss([], None, tmp_path / "loss.png")
    with pytest.raises(ValueError, match="not supported"):
        plot_loss(_records(3), None, tmp_path / "loss.xyz")


def test_smoothing_is_a_centred_mean():
    assert smooth([1.0, 2.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 11 / 3, 4.5])
    assert smooth([5.0], 9) == [5.0]


def _without(monkeypatch, package: str) -> None:
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)


def test_without_matplotlib_the_message_says_how_to_get_it(monkeypatch, tmp_path):
    _without(monkeypatch, "matplotlib")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pytransformer-kernels\[plot\]'"):
        plot_loss(_records(3), None, tmp_path / "loss.png")


def test_plain_lines_are_few_and_say_what_matters(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    display = PlainLines(stream)
    display.start(10, 50)
    display.update(11, loss=5.0, tokens_per_second=1000.0)  # too early for a line
    clock[0] += 20.0
    display.update(20, loss=4.5, tokens_per_second=12345.6)
    display.evaluated(20, 4.25)
    clock[0] += 1.0
    display.update(50, loss=4.0, tokens_per_second=1000.0)  # the last always gets one
    display.close()
    assert stream.getvalue().splitlines() == [
        "step 20/50  loss 4.500  12,346 tokens/s  1:00 left",
        "step 20/50  validation loss 4.250",
        "step 50/50  loss 4.000  1,000 tokens/s  0:00 left",
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = _Terminal()
    display = make_progress(terminal)
    assert isinstance(display, Bar)
    display.note("about [to] start")
    display.start(0, 20)
    display.update(10, loss=4.5, tokens_per_second=12345.6)
    display.evaluated(10, 4.25)
    display.close()
    shown = terminal.getvalue()
    for text in ("about [to] start", "10/20", "loss 4.500", "12,346 tokens/s", "validation 4.250", "ETA"):
        assert text in shown


def test_elsewhere_and_without_rich_there_are_plain_lines(monkeypatch):
    assert isinstance(make_progress(io.StringIO()), PlainLines)
    _without(monkeypatch, "rich")
    assert isinstance(make_progress(_Terminal()), PlainLines)


def test_quiet_is_quiet(capsys):
    display = Quiet()
    display.note("x")
    display.start(0, 1)
    display.update(1, loss=1.0, tokens_per_second=1.0)
    display.evaluated(1, 1.0)
    display.close()
    assert capsys.readouterr() == ("", "")
