"""What a person sees of a running training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

_PLAIN_INTERVAL_SECONDS = 10.0


class Progress(Protocol):
    """A display of training."""

    def note(self, message: str) -> None: ...
    def start(self, first_step: int, steps: int) -> None: ...
    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None: ...
    def evaluated(self, step: int, validation_loss: float) -> None: ...
    def close(self) -> None: ...


class Quiet:
    """Shows nothing."""

    def note(self, message: str) -> None:
        pass

    def start(self, first_step: int, steps: int) -> None:
        pass

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        pass

    def evaluated(self, step: int, validation_loss: float) -> None:
        pass

    def close(self) -> None:
        pass


class PlainLines(Quiet):
    """A line every few seconds and one for each evaluation, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._steps = 0
        self._first_step = 0
        self._started = self._last_line = time.monotonic()

    def note(self, message: str) -> None:
        print(message, file=self._stream, flush=True)

    def start(self, first_step: int, steps: int) -> None:
        self._first_step, self._steps = first_step, steps
        self._started = self._last_line = time.monotonic()

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        now = time.monotonic()
        if now - self._last_line < _PLAIN_INTERVAL_SECONDS and step < self._steps:
            return
        self._last_line = now
        remaining = (now - self._started) / (step - self._first_step) * (self._steps - step)
        self.note(
            f"step {step}/{self._steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s  {_minutes(remaining)} left"
        )

    def evaluated(self, step: int, validation_loss: float) -> None:
        self.note(f"step {step}/{self._steps}  validation loss {validation_loss:.3f}")


class Bar:
    """A rich progress bar: step, loss, validation loss, tokens/s, time left."""

    def __init__(self, console: Any) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: Any = None
        self._training = ""
        self._validation = ""

    def note(self, message: str) -> None:
        self._bar.console.print(message, markup=False, highlight=False)

    def start(self, first_step: int, steps: int) -> None:
        self._task = self._bar.add_task("", total=steps, completed=first_step, facts="")
        self._bar.start()

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        self._training = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, facts=f"{self._training}{self._validation}")

    def evaluated(self, step: int, validation_loss: float) -> None:
        self._validation = f"  validation {validation_loss:.3f}"
        self._bar.update(self._task, facts=f"{self._training}{self._validation}")

    def close(self) -> None:
        self._bar.stop()


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def make_progress(stream: TextIO | None = None) -> Progress:
    """A bar if ``stream`` (standard error by default) is a terminal and rich is installed, else plain lines."""
    stream = sys.stderr if stream is None else stream
    try:
        from rich.console import Console
    except ImportError:
        return PlainLines(stream)
    console = Console(file=stream)
    return Bar(console) if console.is_terminal else PlainLines(stream)
