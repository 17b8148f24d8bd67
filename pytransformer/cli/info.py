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
    """Prints both tables."""
    from rich.console import Console

    from pytransformer.ops.overview import backends

    console = Console(highlight=False)
    console.print(versions_table())
    console.print(backends_table(backends(arguments.device)))
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


def backends_table(report: dict[str, dict[str, str]]) -> Table:
    """A row for each op and backend."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Which backend serves which op here (best first)", title_justify="left")
    for column in ("op", "backend", "here"):
        table.add_column(column, overflow="fold")
    for op, answers in report.items():
        for index, (backend, answer) in enumerate(answers.items()):
            style = "green" if answer == "serves" else "yellow" if answer.startswith("serves") else "dim"
            table.add_row(op if index == 0 else "", backend, Text(answer, style=style))
        table.add_section()
    return table
