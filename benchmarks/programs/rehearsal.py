"""Rows that go wrong on purpose, and a walk through what `make gpu` does then: what can be known of its control flow without a GPU.

Each row doubles a few numbers; what goes wrong is in its name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.harness import record
from pytransformer.benchmarks.harness.rows import Absent, Inputs, Measurement, Row
from pytransformer.benchmarks.harness.supervise import REVISION, Limits, Outcome, supervise
from pytransformer.benchmarks.harness.timing import ContextLost

SUITES = {"rehearsal": None}
MODULE = "pytransformer.benchmarks.programs.rehearsal"
OPTIONS = ("--grid", "tiny", "--grid-module", MODULE)
# Rows wait this long where a cut-off is to find them running; seconds.
PAUSE = "PYTRANSFORMER_REHEARSAL_PAUSE"
STAGE_SECONDS = 3.0


def _double(inputs: Inputs) -> Tensor:
    time.sleep(float(os.environ.get(PAUSE, "0")))
    return 2 * inputs["x"]


def _raises(inputs: Inputs) -> Tensor:
    raise RuntimeError("an injected failure\nwith a second line")


def _exits(inputs: Inputs) -> Tensor:
    os._exit(9)


def _hangs(inputs: Inputs) -> Tensor:
    time.sleep(3600)
    return inputs["x"]


def _loses_context(inputs: Inputs) -> Tensor:
    raise ContextLost("triton", "RuntimeError: an illegal memory access was encountered")


def _out_of_memory(inputs: Inputs) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def _absent(inputs: Inputs) -> Tensor:
    raise Absent("not installed")


def _wrong(inputs: Inputs) -> Tensor:
    return inputs["x"] * 3


def _exits_at_the_third_call(inputs: Inputs) -> Tensor:
    """After the check and the warm-up: in the rounds, where all variants run in turns."""
    inputs["calls"] = inputs.get("calls", 0) + 1
    if inputs["calls"] == 3:
        os._exit(9)
    return 2 * inputs["x"]


def _no_inputs(device: torch.device, seed: int) -> Inputs:
    raise RuntimeError("injected: no inputs")


def _inputs(device: torch.device, seed: int) -> Inputs:
    return {"x": torch.arange(1.0, 9.0, device=device) + seed}


def _row(shape: str, **variants: Callable[[Inputs], Tensor]) -> Row:
    inputs = _no_inputs if shape == "no inputs" else _inputs
    return Row(
        "rehearsal",
        shape,
        8.0,
        64.0,
        inputs,
        {"torch": _double, **variants},
        lambda drawn: 2 * drawn["x"].double(),
        lambda out: out,
    )


def rows(
    device: torch.device, *, tiny: bool = False, suites: Sequence[str] = (), peers: bool = False, quick: bool = False
) -> Iterator[Row | Measurement]:
    """As a grid does."""
    yield _row("right", peer=_double)
    yield _row("raises", triton=_raises)
    yield _row("peer raises", peer=_raises)
    yield _row("exits", cuda=_exits, peer=_double)
    yield _row("loses the context", triton=_loses_context, peer=_double)
    yield _row("out of memory", triton=_out_of_memory)
    yield _row("hangs", peer=_hangs)
    yield _row("wrong", triton=_wrong)
    yield _row("no inputs")
    yield _row("exits in the rounds", peer=_exits_at_the_third_call)
    yield _row("absent", peer=_absent)
    yield Measurement(
        "rehearsal_rate",
        "three samples",
        "tokens/s",
        {"torch": lambda device: {"samples": [3.0, 2.0, 4.0], "mfu": 0.5}, "peer": _measurement_raises},
        higher_is_better=True,
    )
    yield _row("right again", peer=_double)


def peers(device: torch.device) -> list[dict[str, Any]]:
    """As a grid does; nobody else takes part."""
    return []


def _measurement_raises(device: torch.device) -> dict[str, Any]:
    raise RuntimeError("an injected failure")


# What the record must say of each row: variants with figures, failed, absent; None for a row that failed as a whole.
EXPECTED: dict[str, tuple[set[str], set[str], set[str]] | None] = {
    "right": ({"torch", "peer"}, set(), set()),
    "raises": ({"torch"}, {"triton"}, set()),
    "peer raises": ({"torch"}, {"peer"}, set()),
    "exits": ({"torch", "peer"}, {"cuda"}, set()),
    "loses the context": ({"torch", "peer"}, {"triton"}, set()),
    "out of memory": ({"torch"}, {"triton"}, set()),
    "hangs": ({"torch"}, {"peer"}, set()),
    "wrong": ({"torch"}, {"triton"}, set()),
    "no inputs": None,
    "exits in the rounds": None,
    "absent": ({"torch"}, set(), {"peer"}),
    "three samples": ({"torch"}, {"peer"}, set()),
    "right again": ({"torch", "peer"}, set(), set()),
}
# Ours: the variants triton and cuda of five rows, and the two rows that failed as a whole.
EXPECTED_FAULTS = 7


def differences(content: dict[str, Any]) -> list[str]:
    """What a record of these rows says otherwise than it must."""
    found: list[str] = []
    rows_there = record.entries(content)
    counts = Counter(row["shape"] for row in rows_there)
    found += [f"{shape}: {counts[shape]} times" for shape in EXPECTED if counts[shape] != 1]
    for row in rows_there:
        expected = EXPECTED[row["shape"]]
        actual = set(row["variants"]), set(row["failed"]), set(row["absent"])
        if expected is None and "failure" not in row:
            found.append(f"{row['shape']}: has not failed")
        if expected is not None and actual != expected:
            found.append(f"{row['shape']}: {actual}")
    if not content["complete"]:
        found.append("the run is not complete")
    return found


def rehearse_faults(
    out: Path, log: Path | None = None, environment: dict[str, str] | None = None
) -> tuple[Outcome, list[str]]:
    """All rows above, in as many processes as it takes: the outcome, and what differs from what must come out."""
    outcome = supervise(out, OPTIONS, Limits(120.0, STAGE_SECONDS), environment=environment, log=log)
    found = differences(record.load(out))
    if len(outcome.faults) != EXPECTED_FAULTS or outcome.exit_code != 1:
        found.append(f"{len(outcome.faults)} faults, exit code {outcome.exit_code}: {outcome.faults}")
    return outcome, found


def rehearse_cut(out: Path, rows_before: int = 2, log: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Everything killed after a few rows, then continued: the record at the cut, and what differs from what must come out."""
    # One for both halves, even if the checkout changes between them.
    revision = record.revision()
    command = [sys.executable, "-m", "pytransformer.benchmarks.harness.supervise", "--out", str(out), *OPTIONS]
    command += ["--stage-seconds", str(STAGE_SECONDS)]
    stream = subprocess.DEVNULL if log is None else log.open("a")
    process = subprocess.Popen(
        command, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, PAUSE: "0.2", REVISION: revision}
    )
    try:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.poll() is None:
            if out.exists() and len(json.loads(out.read_text())["rows"]) >= rows_before:
                break
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
        if not isinstance(stream, int):
            stream.close()
    # Its worker ends with it.
    time.sleep(0.3)
    cut = record.load(out)
    found = [] if not cut["complete"] and cut["rows"] else ["the run was not cut in its middle"]
    _, more = rehearse_faults(out, log, {REVISION: revision})
    return cut, found + more
