"""`python -m pytransformer.benchmarks.harness.worker`: one process that times rows until all are done or its time is up, JSON after each.

Rows that the file already holds are not run again. The process notes what it is about to run, so that whoever started it
(`supervise`, behind `pytransformer bench` and `make gpu`) knows what it died of. Exit codes: 0, or FAULTS if something of ours failed;
USAGE for what was asked wrongly; CONTEXT_LOST when the GPU context is gone and a new process must go on.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pytransformer.benchmarks.harness.record import Record, entries, key_of
from pytransformer.benchmarks.harness.roofline import Ceilings, measure_ceilings
from pytransformer.benchmarks.harness.rows import Measurement, Options, Row, is_ours, run_measurement, run_row
from pytransformer.benchmarks.harness.tables import describe_ceilings, plain_lines
from pytransformer.benchmarks.harness.timing import (
    ContextLost,
    Sampling,
    context_is_lost,
    device_here,
    reason_of,
    side_stream,
)

FAULTS, USAGE, CONTEXT_LOST = 3, 2, 75
# Environment variable with the process id of the supervisor.
SUPERVISOR = "PYTRANSFORMER_BENCHMARK_SUPERVISOR"
PR_SET_PDEATHSIG = 1
GRIDS = ("tiny", "quick", "full")
GRID_MODULE = "pytransformer.benchmarks.suites.grid"
ROUNDS, MAX_ROUNDS, TINY_ROUNDS = 11, 41, 3
# Time kept back for the second measurement of the ceilings.
CLOSING_SECONDS = 5.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options that this process shares with those that start it."""
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these suites or ops (default: all)")
    parser.add_argument("--grid", choices=GRIDS, default="full", help="which rows (default full)")
    parser.add_argument(
        "--peers", action="store_true", help="also the kernels of other packages, where they are installed"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    parser.add_argument(
        "--rounds", type=int, help=f"samples of each variant at least (default {ROUNDS}, of tiny rows {TINY_ROUNDS})"
    )
    parser.add_argument(
        "--limit-seconds", type=float, metavar="S", help="start no further row after this long (default: no limit)"
    )
    parser.add_argument(
        "--grid-module",
        default=GRID_MODULE,
        metavar="NAME",
        help="the module with the rows, as suites/grid.py is (default: that one)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the rows."""
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.harness.worker", description=__doc__)
    add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write, or to go on with")
    arguments = parser.parse_args(argv)
    end_with_parent()
    device = device_here()
    if device.type == "cpu" and arguments.grid != "tiny":
        parser.error("the grid needs a GPU; --grid tiny runs it at sizes for a CPU")
    try:
        worker = Worker(arguments, device)
        with side_stream(device):
            return worker.run()
    except UsageError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return USAGE


def end_with_parent() -> None:
    """Asks Linux to end this process when the one that supervises it ends: nobody would read its result."""
    if sys.platform == "linux" and os.environ.get(SUPERVISOR) == str(os.getppid()):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class UsageError(ValueError):
    """An argument that cannot be served: trying again would not help."""


class Worker:
    """The rows of one process.

    Args:
        arguments: of `add_options`, and ``out``.
        device: where they run.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments = arguments
        self.device = device
        self.start = time.monotonic()
        try:
            self.record = Record(arguments.out, device, options_of(arguments))
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.before = float(self.record.content["seconds"])
        self.faults = 0

    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def out_of_time(self) -> bool:
        limit = self.arguments.limit_seconds
        return limit is not None and self.elapsed() > max(0.0, limit - CLOSING_SECONDS)

    def run(self) -> int:
        """All rows that are left; the exit code of the process."""
        small = self.device.type != "cuda"
        if self.arguments.peers and "peers" not in self.record.content:
            self.record.set("peers", _grid(self.arguments).peers(self.device))
        ceilings = self._ceilings(small)
        left_out = []
        done = self.record.done()
        try:
            for row in wanted_rows(self.arguments, self.device):
                if key_of(row.op, row.shape) in done:
                    continue
                if self.out_of_time():
                    left_out.append(f"{row.op} {row.shape}")
                    continue
                self._one(row, ceilings)
        except ContextLost as error:
            print(f"the GPU context is lost: {error}; a new process goes on", flush=True)
            # Whatever would be tidied up on the way out would fail, or hang.
            os._exit(CONTEXT_LOST)
        self._close(left_out, ceilings, small)
        return FAULTS if self.faults else 0

    def _ceilings(self, small: bool) -> Ceilings:
        """Those of the run: measured by its first process, and kept by the others."""
        if "ceilings" in self.record.content:
            return Ceilings(**self.record.content["ceilings"])
        ceilings = measure_ceilings(self.device, small=small)
        self.record.set("ceilings", ceilings.to_dict())
        print(describe_ceilings(ceilings.to_dict(), self.device.type), flush=True)
        return ceilings

    def _one(self, row: Row | Measurement, ceilings: Ceilings) -> None:
        key = key_of(row.op, row.shape)
        section = "rows" if isinstance(row, Row) else "measurements"
        options = Options(
            sampling_of(self.arguments),
            self.arguments.seed,
            self.record.skipped_variants(key),
            lambda variant: self.record.running(row.op, row.shape, section, variant),
        )
        try:
            if isinstance(row, Row):
                result = run_row(row, self.device, ceilings, options)
            else:
                result = run_measurement(row, self.device, options)
        except ContextLost as error:
            self.record.running(row.op, row.shape, section, error.variant, error.reason)
            raise
        except Exception as error:
            # One broken row must not end the run.
            if context_is_lost(self.device):
                self.record.running(row.op, row.shape, section, "", reason_of(error))
                raise ContextLost("", reason_of(error)) from error
            result = failed_row(row.op, row.shape, reason_of(error), row.priority)
        self.record.content["seconds"] = self.before + self.elapsed()
        self.record.add(result, section)
        self.record.idle()
        self.faults += len(faults(result))
        for line in plain_lines(result):
            print(line, flush=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _close(self, left_out: list[str], ceilings: Ceilings, small: bool) -> None:
        after = measure_ceilings(self.device, small=small)
        content = self.record.content
        content["ceilings_after"] = after.to_dict()
        content["ceilings_drift"] = max(
            abs(now / before - 1) for now, before in zip(after.to_dict().values(), ceilings.to_dict().values())
        )
        content["left_out"] = left_out
        content["complete"] = not left_out
        content["seconds"] = self.before + self.elapsed()
        self.record.write()
        if left_out:
            print(f"{len(left_out)} rows left out, the time limit was reached")
        count = len(entries(content))
        print(f"{count} rows in {content['seconds']:.0f} s, written to {self.record.path}", flush=True)


def failed_row(op: str, shape: str, reason: str, priority: int = 1) -> dict[str, Any]:
    """The record of a row that has no figures at all."""
    return {
        "op": op,
        "shape": shape,
        "priority": priority,
        "variants": {},
        "absent": {},
        "failed": {},
        "failure": reason,
        "notes": {},
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What failed in a row by our own doing: the row itself, or one of our variants. A peer that fails is reported, but is no fault."""
    found = [result["failure"]] if "failure" in result else []
    return found + [f"{name}: {reason}" for name, reason in result["failed"].items() if is_ours(name)]


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """How the rows are run, for the record."""
    sampling = sampling_of(arguments)
    return {
        "grid": arguments.grid,
        "ops": list(arguments.ops),
        "peers": arguments.peers,
        "seed": arguments.seed,
        "rounds": sampling.rounds,
        "max_rounds": sampling.max_rounds,
    }


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """More rounds for the grid than for a smoke run, whose times mean nothing."""
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {arguments.rounds}")
    if arguments.grid == "tiny":
        rounds = arguments.rounds or TINY_ROUNDS
        return Sampling(rounds, rounds, limit_seconds=2.0)
    return Sampling(arguments.rounds or ROUNDS, max(arguments.rounds or 0, MAX_ROUNDS))


def wanted_rows(arguments: argparse.Namespace, device: torch.device) -> Iterator[Row | Measurement]:
    """The rows asked for, the quick grid's first.

    Raises:
        UsageError: an op that is neither a suite nor the op of a row.
    """
    grid = _grid(arguments)
    suites = tuple(name for name in arguments.ops if name in grid.SUITES)
    ops = [name for name in arguments.ops if name not in grid.SUITES]
    found = list(
        grid.rows(
            device,
            tiny=arguments.grid == "tiny",
            suites=() if ops else suites,
            peers=arguments.peers,
            quick=arguments.grid == "quick",
        )
    )
    if ops:
        known = {name for row in found for name in (row.op, _function(row.op))}
        unknown = [name for name in ops if name not in known]
        if unknown:
            names = ", ".join(sorted({*grid.SUITES, *map(_function, known)}))
            raise UsageError(
                f"OP must be one of {names}; or of a function one pass, such as rms_norm_forward; got {unknown[0]!r}"
            )
        chosen = {row.op for name in suites for row in grid.rows(device, tiny=True, suites=(name,))}
        found = [row for row in found if row.op in ops or _function(row.op) in ops or row.op in chosen]
    return iter(sorted(found, key=lambda row: row.priority))


def _grid(arguments: argparse.Namespace) -> ModuleType:
    """The module with ``SUITES``, ``rows`` and ``peers``. It is imported by its name only: the harness knows none of the rows."""
    return importlib.import_module(arguments.grid_module)


def _function(op: str) -> str:
    """The public function that a row's op is a pass of: "rms_norm" of "rms_norm_backward"."""
    return re.sub("_(forward|backward|both)$", "", op)


if __name__ == "__main__":
    sys.exit(main())
