"""Runs the rows in processes of their own, watches them, and starts the next where one dies.

A kernel that hangs, or that brings its CUDA context or its process down, costs the variant that was running, and nothing else: the row is
tried again without it. Where nobody can tell which variant it was (all of them run in turns), it costs the row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytransformer.benchmarks.harness import record
from pytransformer.benchmarks.harness.worker import CONTEXT_LOST, FAULTS, SUPERVISOR, USAGE, failed_row, faults

# Seconds. A stage is one variant's check or capture, compilation included, or all rounds of a row.
STAGE_SECONDS = 120.0
# A measurement's stage is a whole training or installation: it gets the time of this many.
MEASUREMENT_STAGES = 3
# From the start of a process to its first row: imports, ceilings.
START_SECONDS = 180.0
# A process that is past its time limit gets this long to end its row.
GRACE_SECONDS = 20.0
# Processes in a row that die before they run anything: then something else is wrong.
MAX_IDLE_DEATHS = 2
POLL_SECONDS = 0.1

REVISION = "PYTRANSFORMER_REVISION"


@dataclass
class Outcome:
    """How a supervised run ended.

    Attributes:
        complete: every row was run.
        out_of_time: the time limit ended it.
        faults: what failed by our own doing, a line each.
        problem: why it could not go on, or "".
    """

    complete: bool = False
    out_of_time: bool = False
    faults: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def status(self) -> str:
        """In a few words, for a table."""
        if self.problem:
            return f"failed: {self.problem}"
        if self.faults:
            return f"{len(self.faults)} of ours failed"
        return "passed" if self.complete else "passed, cut at its limit"

    @property
    def exit_code(self) -> int:
        """1 if anything of ours failed or the run could not go on; being out of time is no failure."""
        return 1 if self.faults or self.problem else 0


@dataclass(frozen=True)
class Limits:
    """Seconds: of all, of a stage, of a start."""

    total: float | None = None
    stage: float = STAGE_SECONDS
    start: float = START_SECONDS


def supervise(
    out: Path,
    options: Sequence[str],
    limits: Limits | None = None,
    *,
    environment: dict[str, str] | None = None,
    log: Path | None = None,
    echo: Callable[[str], None] = print,
) -> Outcome:
    """Runs rows until all are done or the time is up.

    Args:
        out: the record; an unfinished one is continued.
        options: of `pytransformer.benchmarks.harness.worker`, without --out and --limit-seconds.
        limits: of time.
        environment: variables for the processes, beside those here.
        log: where their output goes (default: to this process's own output).
        echo: told of deaths.
    """
    limits = limits or Limits()
    end = None if limits.total is None else time.monotonic() + limits.total
    outcome = Outcome()
    idle_deaths = 0
    while True:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            outcome.out_of_time = True
            break
        code, death = _one_process(out, options, left, limits, environment, log)
        if death is None:
            outcome.problem = "the options cannot be served" if code == USAGE else ""
            break
        note = _note(out)
        if note is None:
            idle_deaths += 1
            echo(f"benchmarks: the process {death} outside any row")
            if idle_deaths >= MAX_IDLE_DEATHS:
                outcome.problem = f"the process {death} outside any row, {idle_deaths} times"
                break
            continue
        idle_deaths = 0
        if death == _PAST_THE_END:
            outcome.out_of_time = True
            record.running_path(out).unlink(missing_ok=True)
            break
        echo(f"benchmarks: the process {death} in {note['op']} {note['shape']} {note['variant']}".rstrip())
        _book(out, note, f"the process {death}")
    return _judge(out, outcome)


_PAST_THE_END = "ran past the end of the run"


def worker_command(out: Path, options: Sequence[str], left: float | None) -> list[str]:
    """The process that runs rows, with so many seconds left."""
    command = [sys.executable, "-m", "pytransformer.benchmarks.harness.worker", *options, "--out", str(out)]
    return command if left is None else [*command, "--limit-seconds", f"{left:.1f}"]


def _one_process(
    out: Path,
    options: Sequence[str],
    left: float | None,
    limits: Limits,
    environment: dict[str, str] | None,
    log: Path | None,
) -> tuple[int, str | None]:
    """Exit code, and how it died (None if it ended by itself and had nothing more to do)."""
    record.running_path(out).unlink(missing_ok=True)
    # The revision is that of the whole run, whatever happens to the checkout meanwhile.
    variables = {**os.environ, REVISION: record.revision(), **(environment or {}), SUPERVISOR: str(os.getpid())}
    stream = None if log is None else log.open("a")
    sys.stdout.flush()
    started = time.time()
    try:
        process = subprocess.Popen(
            worker_command(out, options, left),
            stdout=stream,
            stderr=None if stream is None else subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        try:
            death = _watch(process, out, limits, started, left)
        finally:
            # Also on Ctrl-C.
            if process.poll() is None:
                os.killpg(process.pid, 9)
            code = process.wait()
    finally:
        if stream is not None:
            stream.close()
    return code, death


def _watch(
    process: subprocess.Popen[bytes], out: Path, limits: Limits, started: float, left: float | None
) -> str | None:
    """Waits for the end of a process, and says how it died; one that must be killed is left running."""
    while True:
        try:
            code = process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            now = time.time()
            note = _note(out)
            if left is not None and now - started > left + GRACE_SECONDS:
                return _PAST_THE_END
            if note is None and now - max(started, _last_written(out)) > limits.start:
                return f"did nothing for {limits.start:g} s"
            if note is not None:
                limit = limits.stage * (MEASUREMENT_STAGES if note["section"] == "measurements" else 1)
                if now - note["since"] > limit:
                    return f"ran past {limit:g} s"
            continue
        if code == CONTEXT_LOST:
            note = _note(out) or {}
            return f"lost its GPU context ({note.get('reason') or 'no reason given'})"
        if code in (0, FAULTS, USAGE) and _note(out) is None:
            return None
        return f"died with signal {-code}" if code < 0 else f"ended with exit code {code}"


def _last_written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _note(out: Path) -> dict[str, Any] | None:
    """What the process says that it runs."""
    try:
        note: dict[str, Any] = json.loads(record.running_path(out).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return note


def _book(out: Path, note: dict[str, Any], reason: str) -> None:
    """Puts a death into the record: the variant is not tried again, or the row is over."""
    content = record.load(out)
    place = {"op": note["op"], "shape": note["shape"]}
    content["incidents"].append({**place, "variant": note["variant"], "reason": reason})
    if not note["variant"]:
        content[note["section"]].append(failed_row(**place, reason=reason))
    record.save(out, content)


def _judge(out: Path, outcome: Outcome) -> Outcome:
    """What the record says in the end."""
    try:
        content = record.load(out)
    except (OSError, ValueError) as error:
        outcome.problem = outcome.problem or f"no result was written: {error}"
        return outcome
    outcome.complete = bool(content["complete"])
    for row in record.entries(content):
        outcome.faults += [f"{row['op']} {row['shape']}: {fault}" for fault in faults(row)]
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pytransformer.benchmarks.harness.supervise --out FILE [--stage-seconds S] [options of run]`."""
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.harness.supervise", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    parser.add_argument("--limit-seconds", type=float, metavar="S", help="of all rows (default: no limit)")
    parser.add_argument(
        "--stage-seconds", type=float, default=STAGE_SECONDS, help="of one variant or all rounds of a row"
    )
    arguments, options = parser.parse_known_args(argv)
    outcome = supervise(arguments.out, options, Limits(arguments.limit_seconds, arguments.stage_seconds))
    print(f"benchmarks: {outcome.status}")
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main())
