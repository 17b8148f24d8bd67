"""`python -m pytransformer.benchmarks.run`: times the rows of the grid on this machine, writes JSON after each, prints a table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pytransformer.benchmarks.grid import SUITES, rows
from pytransformer.benchmarks.record import Record
from pytransformer.benchmarks.roofline import Ceilings, measure_ceilings
from pytransformer.benchmarks.rows import run_row
from pytransformer.benchmarks.timing import side_stream

OURS = ("cuda", "triton", "torch")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs as much of the grid as the time limit allows; 0 unless a row of ours raised."""
    parser = argparse.ArgumentParser(prog="python -m pytransformer.benchmarks.run", description=__doc__)
    parser.add_argument("--suite", action="append", choices=sorted(SUITES), help="only this suite (may be repeated)")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: smoke run, not a measurement")
    parser.add_argument(
        "--limit-seconds", type=float, default=240.0, help="start no further row after this long (default 240)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        parser.error("the grid needs a GPU; --tiny runs it at sizes for a CPU")
    record = Record(arguments.out, device)
    start = time.monotonic()
    with side_stream(device):
        ceilings = measure_ceilings(device, small=arguments.tiny)
        record.set("ceilings", ceilings.to_dict())
        print(describe(ceilings), flush=True)
        faults = _run_rows(arguments, device, ceilings, record, start)
    record.set("seconds", time.monotonic() - start)
    print(f"{len(record.content['rows'])} rows in {time.monotonic() - start:.0f} s, written to {arguments.out}")
    return 1 if faults else 0


def _run_rows(
    arguments: argparse.Namespace, device: torch.device, ceilings: Ceilings, record: Record, start: float
) -> int:
    """Number of rows in which one of our own variants raised."""
    faults = 0
    left_out = []
    for row in rows(device, tiny=arguments.tiny, suites=tuple(arguments.suite or ())):
        if time.monotonic() - start > arguments.limit_seconds:
            left_out.append(f"{row.op} {row.shape}")
            continue
        try:
            result = run_row(row, device, ceilings, rounds=3 if arguments.tiny else 15)
        except Exception as error:  # one broken row must not end the run
            result = {
                "op": row.op,
                "shape": row.shape,
                "variants": {},
                "absent": {"row": f"{type(error).__name__}: {error}"[:500]},
            }
        record.add(result)
        faults += any(_is_fault(name, reason) for name, reason in result["absent"].items())
        for line in table_lines(result):
            print(line, flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if left_out:
        record.set("left_out", left_out)
        print(f"left out, the time limit was reached: {'; '.join(left_out)}")
    return faults


def _is_fault(name: str, reason: str) -> bool:
    """Whether a variant that gave no figure is our fault: not a peer, and not a backend that says it does not serve the call."""
    return name == "row" or (name in OURS and not reason.startswith("NotImplementedError"))


def describe(ceilings: Ceilings) -> str:
    """The measured limits, in a line."""
    return (
        f"ceilings: copy {ceilings.copy * 1e-12:.2f} TB/s, read {ceilings.read * 1e-12:.2f} TB/s, "
        f"bf16 matmul {ceilings.matmul * 1e-12:.0f} TFLOP/s"
    )


def table_lines(result: dict[str, Any]) -> list[str]:
    """One line for each variant of a row."""
    lines = []
    for name, variant in result["variants"].items():
        lines.append(
            f"{result['op']:<20} {result['shape']:<42} {name:<15} {variant['seconds'] * 1e6:>10.1f} µs "
            f"{100 * variant['fraction_of_floor']:>5.0f} % of floor {variant['tflops']:>7.1f} TFLOP/s "
            f"{variant['gbytes_per_second']:>7.0f} GB/s  error {variant['relative_error']:.1e} {variant['method']}"
        )
    lines.extend(
        f"{result['op']:<20} {result['shape']:<42} {name:<15} absent: {why}" for name, why in result["absent"].items()
    )
    return lines


if __name__ == "__main__":
    sys.exit(main())
