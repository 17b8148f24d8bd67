"""``pytransformer convert``: a model's folder in another layout, dtype or number of files."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path

DTYPES = ("float32", "float16", "bfloat16")
# What belongs to a tokenizer or says how to generate, in the layouts of transformers' families.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_WORTH_A_BAR = 10**8
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="write a model in another layout: a public family's or ours",
        description=(
            "Reads a model, ours or of Hugging Face's layout, and writes it as a public family (a folder that transformers loads) or in "
            "our own layout, with the files of its tokenizer. Weights stay in the mapped files until they are written."
        ),
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="a model's folder, or a training run's")
    parser.add_argument("target", type=Path, metavar="DST", help="the folder to write, which must not hold a model yet")
    parser.add_argument(
        "--to",
        metavar="FAMILY",
        help='a public family ("llama", …) or "pytransformer" for our own layout (default: as it is)',
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    parser.add_argument(
        "--max-shard-size", default="50GB", metavar="SIZE", help="of one file, as 500MB or 5GB (default 50GB)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Converts and prints the folder.

    Raises:
        ValueError: an option that is wrong, a model that the family cannot express, a damaged file.
        FileExistsError: the target holds a model.
        FileNotFoundError: the source holds none.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from pytransformer.cli.model_folder import find_model
    from pytransformer.model.checkpoint import CONFIG_FILE, load, save
    from pytransformer.model.description import describe

    max_shard_bytes = parse_size(arguments.max_shard_size)
    source = find_model(arguments.source)
    if (arguments.target / CONFIG_FILE).exists():
        raise FileExistsError(f"{arguments.target} holds a model already; give another folder")
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    model = load(source, device="cpu")
    size = describe(source).weight_bytes
    if dtype is not None:
        size = model.num_parameters() * dtype.itemsize
    columns = (TextColumn("convert"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    quiet = size < _WORTH_A_BAR or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task("writing", total=size)
        save(
            model,
            arguments.target,
            family=arguments.to,
            max_shard_bytes=max_shard_bytes,
            dtype=dtype,
            progress=lambda count: progress.advance(task, count),
        )
    copy_tokenizer(source, arguments.target)
    print(arguments.target)
    return 0


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies what belongs to a tokenizer from one model's folder to another."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def parse_size(text: str) -> int:
    """Bytes of "500MB", "5GB", "2GiB" or "1000"; ValueError for anything else."""
    match = re.fullmatch(r"(\d+)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) == 0:
        raise ValueError(f"--max-shard-size must be a size as 500MB, 5GB or 2GiB, got {text!r}")
    return int(match[1]) * _UNITS[match[2]]
