"""What the comparisons with transformers on a CPU share: options, the result file, its rows and the verdict."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pytransformer.benchmarks.harness.record import environment, save
from pytransformer.benchmarks.harness.timing import Timing


def new_parser(program: str, description: str, rounds: int, round_is: str, result: Path) -> argparse.ArgumentParser:
    """With the options --rounds, --threads and --out."""
    parser = argparse.ArgumentParser(
        prog=f"python -m pytransformer.benchmarks.programs.{program}", description=description.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=rounds, help=f"{round_is} of each variant")
    parser.add_argument("--threads", type=int, default=0, help="threads for torch; 0 = its own choice")
    parser.add_argument("--out", type=Path, default=result)
    return parser


def new_result(shape: object, threads: int) -> dict[str, Any]:
    """A result without rows; torch has so many threads from now on (0: as many as it chooses)."""
    import transformers

    if threads:
        torch.set_num_threads(threads)
    return {
        "environment": environment(torch.device("cpu")),
        "rows": [],
        "shape": shape,
        "threads": torch.get_num_threads(),
        "transformers": transformers.__version__,
    }


def show_progress(what: str, done: int, of: int) -> None:
    """Over itself on one line, which ends with the last."""
    print(f"\r{what} {done} of {of}", end="\n" if done == of else "", file=sys.stderr, flush=True)


def add_row(
    result: dict[str, Any],
    variant: str,
    seconds: Sequence[float],
    *,
    unit: str,
    tokens: int,
    samples: str,
    **more: object,
) -> Timing:
    """Adds a variant to the result and prints it.

    Args:
        seconds: of each sample; they are stored under the name ``samples``.
        unit: what a sample is the time of, with so many ``tokens``.
        more: stored as it is.
    """
    timing = Timing.of(seconds, "clock")
    rate = tokens / timing.median
    row = {
        "variant": variant,
        "tokens_per_second": rate,
        f"seconds_per_{unit}": {"median": timing.median, "p10": timing.low, "p90": timing.high},
        samples: list(seconds),
        **more,
    }
    result["rows"].append(row)
    spread = f"{timing.low * 1e3:.1f} to {timing.high * 1e3:.1f}"
    print(f"{variant:36} {rate:8.1f} tokens/s   {timing.median * 1e3:6.1f} ms a {unit} ({spread})")
    return timing


def judge(result: dict[str, Any], timings: Mapping[str, Timing], least: float) -> int:
    """Stores and prints how many times as fast as transformers' fastest way ours is; 0 if it is ``least`` or more."""
    peer = min(timing.median for name, timing in timings.items() if name.startswith("transformers"))
    speedup = peer / timings["pytransformer"].median
    result["speedup_over_transformers"] = speedup
    print(f"\n{speedup:.2f} × transformers (target {least})")
    return 0 if speedup >= least else 1


def write(path: Path, result: dict[str, Any]) -> None:
    """The result file, in place of the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, result)
