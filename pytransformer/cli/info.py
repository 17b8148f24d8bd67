"""``pytransformer info``: what is installed, and which backend serves which op here."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

# Distribution names; what is absent is shown as absent.
PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "rich", "matplotlib", "transformers")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="versions, devices, and which backend serves which op",
        description="Shows versions, devices, and for each op which backends serve it here, best first, and why others don't.",
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="the kind of device asked about (default: a GPU if there is one)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the versions, the table of backends and its notes, and whether Hopper's kernels are on."""
    from rich.console import Console

    from pytransformer.ops.overview import backends, hopper_kernels

    console = Console(highlight=False)
    console.print(versions_table())
    table, notes = backends_table(backends(arguments.device))
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}", markup=False, style="dim")
    console.print(f"attention's kernels for Hopper: {hopper_kernels()}", markup=False)
    return 0


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of what it uses, and the devices that torch sees."""
    import torch

    from pytransformer import __version__

    facts = {
        "pytransformer": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu"] = f"{torch.get_num_threads()} threads"
    facts["gpu"] = "none that torch can use"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        facts["gpu"] = f"{', '.join(names)} (CUDA {torch.version.cuda})"
    return facts


def versions_table() -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in versions().items():
        table.add_row(name, value)
    return table


def backends_table(report: dict[str, dict[str, str]]) -> tuple[Table, list[str]]:
    """A row for each op, a column for each backend, best first; and the numbered notes that its cells refer to."""
    from rich import box
    from rich.table import Table

    notes: list[str] = []
    backends = list(dict.fromkeys(backend for answers in report.values() for backend in answers))
    title = "Which backend serves which op here, best first"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("op", no_wrap=True)
    for backend in backends:
        table.add_column(backend)
    for op, answers in report.items():
        table.add_row(op, *(_cell(answers.get(backend, ""), notes) for backend in backends))
    return table, notes


def _cell(answer: str, notes: list[str]) -> str:
    """ "yes" or "no", with the number of a note where there is more to say; a note that is new is appended."""
    if answer in ("", "serves"):
        return "[green]yes[/green]" if answer else ""
    serves = answer.startswith("serves, ")
    note = answer.removeprefix("serves, ")
    if note not in notes:
        notes.append(note)
    mark = notes.index(note) + 1
    return f"[green]yes[/green] ({mark})" if serves else f"[dim]no ({mark})[/dim]"
