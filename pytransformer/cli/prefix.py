"""``pytransformer prefix``: computes the beginning of prompts once and keeps it on disk."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from pytransformer.cli.generate import add_model_options
from pytransformer.cli.train import DEFAULT_FOLDER


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "prefix",
        help="keep what a model made of a text, for prompts that begin with it",
        description=(
            "Runs a model over a text and writes its keys and values into a folder. `pytransformer generate --prefix FOLDER` then computes "
            "only what follows that text in its prompt. The folder serves this model, dtype and kind of cache alone; others refuse it."
        ),
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="FOLDER",
        help=f"a training run or a model's folder (default {DEFAULT_FOLDER})",
    )
    parser.add_argument(
        "--text",
        type=Path,
        required=True,
        metavar="FILE",
        help="what prompts begin with, UTF-8; - reads standard input",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where to keep it")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and says what it holds."""
    from pytransformer.cli.model_folder import check_device, encode, load_model, read_text
    from pytransformer.generation import Prefix
    from pytransformer.generation.caches.sizes import in_words
    from pytransformer.generation.prompts import check_generates

    check_device(arguments.device)
    text = sys.stdin.read() if str(arguments.text) == "-" else read_text(arguments.text, "--text")
    if not text:
        raise ValueError(f"--text {arguments.text} is empty: there is nothing to keep")
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    check_generates(model.config)
    ids = encode(model, tokenizer, text, "--text")
    if len(ids) >= model.config.max_seqlen:
        raise ValueError(
            f"--text {arguments.text} has {len(ids)} tokens, but the model's context is {model.config.max_seqlen}: "
            "there is no room for what follows"
        )
    started = time.perf_counter()
    prefix = Prefix.of(model, ids, cache=arguments.cache)
    seconds = time.perf_counter() - started
    prefix.save(arguments.output)
    print(f"{arguments.output}: {len(prefix)} tokens, {in_words(prefix.part.nbytes)}, computed in {seconds:.2f} s")
    return 0
