"""`pytransformer bench`: times the kernels against the limits of this machine and against peers, compares runs, draws them."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytransformer.benchmarks.harness.compare import Report

DEFAULT_FOLDER = Path("runs/bench")
COMMANDS = ("run", "compare", "plot")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand; `pytransformer bench [OP …]` is short for `pytransformer bench run [OP …]`."""
    parser = subparsers.add_parser(
        "bench",
        help="time the kernels against this machine's limits and against peers",
        description=(
            "Times rows of a grid: our kernels and the peers interleaved, on a GPU as CUDA graphs over inputs outside the L2 cache. "
            "Each row is checked against float64 and reported as a fraction of its floor, the larger of arithmetic and memory time at "
            "the rates measured in the same run. Without a GPU the rows are tiny: a smoke run. `bench compare A B` compares two "
            "result files, `bench plot FILE …` draws them; `bench run` is the default."
        ),
    )
    commands = parser.add_subparsers(dest="bench_command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_compare(commands)
    _add_plot(commands)


def expand(arguments: Sequence[str]) -> list[str]:
    """`bench …` becomes `bench run …` where neither a command nor help was asked for."""
    words = list(arguments)
    place = next((index for index, word in enumerate(words) if not word.startswith("-")), None)
    if place is None or words[place] != "bench":
        return words
    rest = words[place + 1 :]
    if rest[:1] and (rest[0] in COMMANDS or rest[0] in ("-h", "--help")):
        return words
    return [*words[: place + 1], "run", *rest]


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run", help="time rows (the default)", description="Times rows; see `pytransformer bench --help`."
    )
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help="only these suites or ops, such as attention or rope_forward (default: all)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--tiny", action="store_const", const="tiny", dest="grid", help="smoke sizes (the default without a GPU)"
    )
    size.add_argument(
        "--quick",
        action="store_const",
        const="quick",
        dest="grid",
        help="the most important rows (the default on a GPU)",
    )
    size.add_argument("--full", action="store_const", const="full", dest="grid", help="all rows")
    parser.add_argument(
        "--peers", action="store_true", help="also the kernels of other packages, where they are installed"
    )
    parser.add_argument("--plot", action="store_true", help="draw the result, as PNG files beside FILE")
    parser.add_argument(
        "--limit-seconds", type=float, metavar="S", help="start no further row after this long (default: no limit)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the result, JSON; an unfinished one is continued (default: a new one in {DEFAULT_FOLDER})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="samples of each variant, at least (default: 11, of tiny rows 3)"
    )
    parser.set_defaults(run=run)


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "compare",
        help="what became faster or slower from one result file to another",
        description=(
            "Ratio of medians of each row and variant, with a 95 %% bootstrap interval; faster or slower only where a Mann-Whitney "
            "test of the samples, corrected for the number of comparisons (Holm), says so, and where the change exceeds 1 %% and what "
            "the machine itself moved by, as its ceilings and the peers tell."
        ),
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--force", action="store_true", help="compare results of different devices or sizes all the same"
    )
    parser.add_argument(
        "--margin",
        type=float,
        metavar="PERCENT",
        help="smallest change that counts (default: 1, or what the machine moved by)",
    )
    parser.add_argument("--all", action="store_true", help="also list what does not differ")
    parser.add_argument(
        "--fail-on-regression",
        type=float,
        metavar="PERCENT",
        help="exit code 1 if a variant of ours became slower by more than this",
    )
    parser.set_defaults(run=run_compare)


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plot", help="draw result files: roofline, peers, sweeps", description="Draws result files as PNG."
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER", help="where the pictures go (default: beside each file)"
    )
    parser.set_defaults(run=run_plot)


def run(arguments: argparse.Namespace) -> int:
    """Times the rows, prints the tables; 1 if one of our own kernels failed.

    Raises:
        ValueError: an op that does not exist, a real grid without a GPU, a result file that cannot be continued.
    """
    from pytransformer.benchmarks.harness import record, schema, tables, worker
    from pytransformer.benchmarks.harness.supervise import Limits, supervise
    from pytransformer.benchmarks.harness.timing import device_here

    device = device_here()
    grid = arguments.grid or ("quick" if device.type == "cuda" else "tiny")
    if grid != "tiny" and device.type == "cpu":
        raise ValueError(f"--{grid} needs a GPU, and torch sees none here; --tiny runs every row at sizes for a CPU")
    out: Path = arguments.out or DEFAULT_FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{grid}.json"
    options = ["--grid", grid, "--seed", str(arguments.seed), *arguments.ops]
    options += ["--peers"] if arguments.peers else []
    options += ["--rounds", str(arguments.rounds)] if arguments.rounds is not None else []
    _check(worker, options, out, device)
    outcome = supervise(out, options, Limits(arguments.limit_seconds))
    if outcome.problem:
        raise RuntimeError(f"the benchmarks ended: {outcome.problem}")
    content = record.load(out)
    tables.show(content)
    try:
        schema.validate(content)
    except ModuleNotFoundError:
        print(f"{out} was not checked against its schema: jsonschema is not installed")
    if arguments.plot:
        _draw(content, out.parent, out.stem)
    print(out)
    return outcome.exit_code


def _check(worker: Any, options: list[str], out: Path, device: Any) -> None:
    """Finds out in this process, in one line, what cannot be served."""
    from pytransformer.benchmarks.harness.record import Record

    parser = argparse.ArgumentParser()
    worker.add_options(parser)
    parsed = parser.parse_args(options)
    worker.sampling_of(parsed)
    worker.wanted_rows(parsed, device)
    if out.exists():
        Record(out, device)


def run_compare(arguments: argparse.Namespace) -> int:
    """Prints what changed; 1 if a regression beyond --fail-on-regression was found.

    Raises:
        ValueError: a file is no result, or the two cannot be compared.
    """
    from pytransformer.benchmarks.harness import record
    from pytransformer.benchmarks.harness.compare import compare

    before, after = record.load(arguments.before), record.load(arguments.after)
    margin = None if arguments.margin is None else arguments.margin / 100
    report = compare(before, after, force=arguments.force, margin=margin)
    for name, content in (("A", before), ("B", after)):
        where = content["environment"]
        versions = f"torch {where['torch']}, triton {where['triton']}"
        print(f"{name}: {where['device']}, revision {where['revision']}, {versions}, {where['time']}")
    _print_report(report, arguments.all)
    if arguments.fail_on_regression is None:
        return 0
    slower = report.regressions(arguments.fail_on_regression)
    for found in slower:
        print(f"REGRESSION {found.op} {found.shape} {found.variant}: {100 * found.change:.1f} % slower")
    return 1 if slower else 0


def _print_report(report: Report, everything: bool) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from pytransformer.benchmarks.harness.compare import FASTER, SAME, SLOWER
    from pytransformer.benchmarks.harness.tables import console, duration

    out = console()
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("op, shape", "variant", "A", "B", "B / A", "95 %", "p", "B is"):
        left = name in ("op, shape", "variant", "B is")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "op, shape")
    styles = {FASTER: "green", SLOWER: "red", SAME: "dim"}
    for found in report.comparisons:
        if found.verdict == SAME and not everything:
            continue
        values = [
            duration(value) if found.unit == "s" else f"{value:,.4g} {found.unit}"
            for value in (found.before, found.after)
        ]
        table.add_row(
            escape(f"{found.op} {found.shape}"),
            escape(found.variant),
            *values,
            f"{found.ratio:.3f}",
            f"{found.low:.3f}–{found.high:.3f}",
            f"{found.p:.1g}",
            f"[{styles[found.verdict]}]{found.verdict}[/]",
        )
    if table.row_count:
        out.print(table)
    for name, only in (("A", report.only_before), ("B", report.only_after)):
        for place in only:
            out.print(f"only in {name}: {place}", markup=False, soft_wrap=True)
    counts = Counter(found.verdict for found in report.comparisons)
    print(
        f"{len(report.comparisons)} compared: {counts[FASTER]} faster, {counts[SLOWER]} slower, {counts[SAME]} no difference "
        f"(beyond {100 * report.margin:.1f} % and chance)"
    )
    if report.drift > report.margin / 2:
        print(f"The machine itself moved by {100 * report.drift:.1f} %, as its ceilings and the peers tell.")
    if report.too_few_samples:
        print("With so few samples for so many comparisons nothing can be told from chance: run with more --rounds.")


def run_plot(arguments: argparse.Namespace) -> int:
    """Draws result files."""
    from pytransformer.benchmarks.harness import record

    for path in arguments.files:
        _draw(record.load(path), arguments.output or path.parent, path.stem)
    return 0


def _draw(content: dict[str, Any], folder: Path, stem: str) -> None:
    from pytransformer.benchmarks.harness.plots import draw

    for path in draw(content, folder, stem):
        print(path)
