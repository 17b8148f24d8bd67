"""`pytransformer verify`: the correctness matrix of this machine, as a table and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from pytransformer.verification import Outcome

DTYPES = ("float32", "float16", "bfloat16")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="check every kernel against the naive reference on this machine",
        description=(
            "Computes every op with every backend and dtype on this machine and compares it with the naive reference in "
            "float64. A figure is the error as a fraction of what the contract allows (a small multiple of the error of "
            "plain PyTorch in the same dtype): up to 1.00 passes. Without a GPU the Triton kernels run in an interpreter "
            "that also checks bounds and races. Exit code 1 if anything fails."
        ),
    )
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype (may be repeated)")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this backend (may be repeated)")
    parser.add_argument(
        "--seeds", type=int, default=8, help="inputs to pool errors over (default 8, as the contract asks)"
    )
    parser.add_argument("--device", help='"cuda" or "cpu" (default: a GPU if there is one)')
    parser.add_argument(
        "--jobs", type=int, help="processes that share the work (default: the number of cores, at most 8; 1 on a GPU)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the outcomes to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the matrix; 0 if every served cell passes, 1 otherwise.

    Raises:
        ValueError: an option names something that does not exist.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pytransformer import verification
    from pytransformer.ops.backend import BACKENDS, check_backend_name
    from pytransformer.verification.cases import CASES

    ops = arguments.op
    known = list(dict.fromkeys(case.op for case in CASES))
    for op in ops or ():
        if op not in known:
            raise ValueError(f"--op must be one of {', '.join(known)}, got {op!r}")
    backends = [check_backend_name(name, "--backend") for name in arguments.backend or BACKENDS]
    for name in ("seeds", "jobs"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda was asked for, but torch sees no GPU on this machine")
    dtypes = [getattr(torch, name) for name in arguments.dtype or DTYPES]
    verification.prepare_triton(device)

    cells = verification.plan(device, ops=ops, dtypes=dtypes, backends=backends, seeds=arguments.seeds)
    jobs = arguments.jobs or (1 if device.type == "cuda" else min(8, os.cpu_count() or 1))

    console = Console(highlight=False)
    outcomes: list[Outcome] = []
    start = time.perf_counter()
    columns = (
        TextColumn("verify"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=len(cells))
        for outcome in verification.run_matrix(cells, jobs):
            outcomes.append(outcome)
            progress.update(task, advance=1, description=f"{outcome.op} ({outcome.case})")
    console.print(matrix_table(outcomes, backends))
    for line in failure_lines(outcomes):
        console.print(line, markup=False, soft_wrap=True)
    console.print(summary(outcomes, device, arguments.seeds, time.perf_counter() - start), soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([outcome.to_dict() for outcome in outcomes], indent=1) + "\n")
    return exit_code(outcomes)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 if a cell failed, or if nothing was compared at all; else 0."""
    if any(outcome.failed for outcome in outcomes):
        return 1
    return 0 if any(outcome.status == "pass" for outcome in outcomes) else 1


def matrix_table(outcomes: Sequence[Outcome], backends: Sequence[str]) -> Table:
    """A heading for each op, a row for each case and dtype, a column for each backend that was run."""
    from rich import box
    from rich.table import Table

    shown = [backend for backend in backends if any(outcome.backend == backend for outcome in outcomes)]
    table = Table(
        title="Error as a fraction of what the contract allows (≤ 1 passes)", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("op, case", no_wrap=True)
    table.add_column("dtype")
    for backend in shown:
        table.add_column(backend, justify="right")
    rows: dict[tuple[str, str, str], dict[str, Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.op, outcome.case, outcome.dtype), {})[outcome.backend] = outcome
    before = ("", "")
    for (op, case, dtype), cells in rows.items():
        if op != before[0]:
            table.add_row(f"[bold]{op}[/bold]")
        label = f"  {case}" if (op, case) != before else ""
        table.add_row(label, dtype, *(_cell(cells.get(backend)) for backend in shown))
        before = (op, case)
    return table


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    if outcome.status == "unserved":
        return "[dim]—[/dim]"
    if outcome.status == "error":
        return "[bold red]error[/bold red]"
    figure = f"{outcome.ratio:.2f}"
    return f"[green]{figure}[/green]" if outcome.status == "pass" else f"[bold red]{figure} FAIL[/bold red]"


def failure_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each failing cell, with its figures."""
    return [
        f"{outcome.status.upper()} {outcome.op} ({outcome.case}), {outcome.dtype}, {outcome.backend}: {outcome.detail}"
        for outcome in outcomes
        if outcome.failed
    ]


def summary(outcomes: Sequence[Outcome], device: torch.device, seeds: int, seconds: float) -> str:
    """The closing line."""
    import torch

    counts = {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in ("pass", "fail", "error", "unserved")
    }
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "this CPU (Triton interpreted, with bounds and race checks)"
    )
    text = f"{counts['pass']} passed, {counts['fail'] + counts['error']} failed"
    if counts["unserved"]:
        text += f", {counts['unserved']} not served (—)"
    return f"{text}; {seeds} seeds each, on {where}, in {seconds:.0f} s"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pytransformer.cli.verify`: the subcommand alone, which needs no other part of the command line."""
    parser = argparse.ArgumentParser(prog="pytransformer")
    add_parser(parser.add_subparsers(required=True))
    arguments = parser.parse_args(argv)
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
