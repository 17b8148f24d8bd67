"""`pytransformer warmup`: compiles the Triton kernels of a model's shapes before they are needed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytransformer.model.config import TransformerConfig
from pytransformer.model.config_checks import CHOICES

if TYPE_CHECKING:
    from rich.table import Table

    from pytransformer.precompile import Compiled, Shapes

DTYPES = ("float32", "float16", "bfloat16")
LOSS = "linear_cross_entropy"
# Fields of the configuration that decide what is compiled; it knows their types, choices and defaults.
_FIELDS = {
    "hidden_size": "width of the model (default: num-heads times head-dim)",
    "num_heads": "query heads",
    "num_kv_heads": "key/value heads (default: num-heads)",
    "head_dim": "width of a head",
    "intermediate_size": "width of the feed-forward (default: 8/3 times hidden-size, rounded up to a multiple of 64)",
    "vocab_size": f"of the head, for {LOSS} (default: without it)",
    "norm": "default rms_norm, or the model's",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "warmup",
        help="compile the Triton kernels of a model before they are needed",
        description=(
            "Compiles the Triton kernels that a model of these shapes launches into Triton's cache on disk (TRITON_CACHE_DIR), "
            "where later processes find them: for the GPU of this machine, or with --arch for another one, on a machine without a "
            "GPU too, such as one that builds a container image. Lengths and batch sizes need not be known."
        ),
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model or training run whose shapes to take")
    for name, text in _FIELDS.items():
        kind: dict[str, Any] = {"choices": CHOICES["norm"]} if name == "norm" else {"type": int}
        parser.add_argument(_option(name), help=text, **kind)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations (default bfloat16)"
    )
    parser.add_argument("--page-size", type=int, help="of a paged KV cache (default: a contiguous cache)")
    parser.add_argument("--ops", metavar="NAME,...", help="only these ops, by commas")
    parser.add_argument("--training", action="store_true", help="the backward passes too")
    parser.add_argument(
        "--arch", type=int, help="compute capability of the GPU, e.g. 90 (default: the GPU of this machine)"
    )
    parser.add_argument(
        "--load",
        action="store_true",
        help="load the kernels onto the GPU of this machine too: shows that they load, as each process loads them anew",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints what was compiled; 0.

    Raises:
        ValueError: an option that is missing, out of range or unknown.
        FileNotFoundError: there is no such model.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pytransformer.precompile import MODEL_OPS, OPS, environment, warmup

    shapes = shapes_of(arguments)
    ops = list(MODEL_OPS) if arguments.ops is None else [name.strip() for name in arguments.ops.split(",")]
    for name in ops:
        if name not in OPS:
            raise ValueError(f"--ops must be among {', '.join(OPS)}, got {name!r}")
    if arguments.model is None and arguments.vocab_size is None:
        ops = [name for name in ops if name != LOSS]
    console = Console(highlight=False)
    start = time.perf_counter()
    columns = (
        TextColumn("warmup"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting")

        def show(op: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=op)

        kernels = warmup(
            shapes, ops=ops, training=arguments.training, arch=arguments.arch, load=arguments.load, progress=show
        )
    console.print(kernel_table(kernels))
    console.print(summary(kernels, time.perf_counter() - start), soft_wrap=True)
    console.print(for_whom(environment()), soft_wrap=True)
    return 0


def shapes_of(arguments: argparse.Namespace) -> Shapes:
    """The shapes that the options ask for.

    Raises:
        ValueError: sizes that are missing, out of range, or given together with a model.
        FileNotFoundError: there is no such model.
    """
    import torch

    from pytransformer.precompile import Shapes

    given = {name: getattr(arguments, name) for name in _FIELDS if getattr(arguments, name) is not None}
    dtype = getattr(torch, arguments.dtype)
    if arguments.model is not None:
        if given:
            raise ValueError(f"--model says all shapes, so {', '.join(map(_option, given))} cannot be given with it")
        from pytransformer.cli.model_folder import find_model
        from pytransformer.model.checkpoint import CONFIG_FILE, read_config

        return Shapes.of(read_config(find_model(arguments.model) / CONFIG_FILE), dtype, arguments.page_size)
    for name in ("num_heads", "head_dim"):
        if name not in given:
            raise ValueError(f"{_option(name)} must be given, or --model")
    # No kernel depends on the number of layers, and without a vocabulary the one that would is left out.
    defaults = {"hidden_size": arguments.num_heads * arguments.head_dim, "num_layers": 1, "vocab_size": 1}
    return Shapes.of(TransformerConfig.llama(**{**defaults, **given}), dtype, arguments.page_size)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def kernel_table(kernels: Sequence[Compiled]) -> Table:
    """A row for each op and kernel: how many variants of it were compiled and how many were there."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("op", "kernel"):
        table.add_column(name, no_wrap=True)
    for name in ("compiled", "found", "seconds"):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.op, kernel.kernel), []).append(kernel)
    for (op, name), group in groups.items():
        found = sum(kernel.found for kernel in group)
        table.add_row(op, name, str(len(group) - found), str(found), f"{sum(kernel.seconds for kernel in group):.1f}")
    return table


def for_whom(environment: Mapping[str, str]) -> str:
    """In which environment a later process finds the kernels."""
    if not environment:
        return "for processes without environment variables that change what Triton compiles, as this one"
    return (
        f"warning: for processes with {', '.join(f'{name}={value}' for name, value in environment.items())}, as here, and with no other "
        "variable that changes what Triton compiles; any other process compiles again"
    )


def summary(kernels: Sequence[Compiled], seconds: float) -> str:
    """The closing line."""
    import triton

    found = sum(kernel.found for kernel in kernels)
    return f"{len(kernels) - found} kernels compiled, {found} found, in {seconds:.0f} s, in {triton.knobs.cache.dir}"
