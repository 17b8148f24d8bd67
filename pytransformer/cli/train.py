"""``pytransformer train``: from text files to a model that has learned them."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from pytransformer.training import config as choices
from pytransformer.training.config import CorpusConfig, ModelShape, RunConfig, TrainingConfig

DEFAULT_FOLDER = Path("runs/demo")
# (option, section, field, type or choices, help). Defaults are the dataclasses'; without options this is the demo.
_OPTIONS: tuple[tuple[str, str, str, Any, str], ...] = (
    ("--data", "corpus", "source", str, "folder, file or glob of UTF-8 text; by default the Python standard library's own source"),
    ("--vocab-size", "corpus", "vocab_size", int, "most tokens that the byte-level BPE learns"),
    ("--validation-fraction", "corpus", "validation_fraction", float, "share of the text held out: whole files, or the ends of a few"),
    ("--bad-bytes", "corpus", "bad_bytes", choices.BAD_BYTES_CHOICES, "what to do with a file that is not UTF-8"),
    ("--family", "model", "family", choices.FAMILIES, "style of the model"),
    ("--hidden-size", "model", "hidden_size", int, "width of the residual stream"),
    ("--layers", "model", "num_layers", int, "number of blocks"),
    ("--heads", "model", "num_heads", int, "query heads"),
    ("--kv-heads", "model", "num_kv_heads", int, "key/value heads; as many as query heads if not given"),
    ("--intermediate-size", "model", "intermediate_size", int, "width of the feed-forward; by the family's rule if not given"),
    ("--max-seqlen", "model", "max_seqlen", int, "context limit; the context length trained with if not given"),
    ("--dropout", "model", "dropout", float, "dropout rate"),
    ("--tie-embeddings", "model", "tie_embeddings", bool, "share the embedding's weight with the head"),
    ("--initializer-range", "model", "initializer_range", float, "standard deviation of the initial weights"),
    ("--steps", "training", "steps", int, "optimizer steps"),
    ("--batch-size", "training", "batch_size", int, "sequences per optimizer step"),
    ("--context-length", "training", "context_length", int, "tokens per sequence"),
    ("--accumulation-steps", "training", "accumulation_steps", int, "send a batch through the model in this many parts"),
    ("--optimizer", "training", "optimizer", choices.OPTIMIZERS, "the optimizer"),
    ("--lr", "training", "learning_rate", float, "highest learning rate"),
    ("--schedule", "training", "schedule", choices.SCHEDULES, "learning rate after the warm-up"),
    ("--min-lr-ratio", "training", "min_learning_rate_ratio", float, "last learning rate as a share of the highest"),
    ("--warmup-steps", "training", "warmup_steps", int, "steps of linear warm-up"),
    ("--decay-fraction", "training", "decay_fraction", float, "share of the steps in which wsd decays"),
    ("--weight-decay", "training", "weight_decay", float, "weight decay, of matrices only"),
    ("--beta1", "training", "beta1", float, "of AdamW and Adam"),
    ("--beta2", "training", "beta2", float, "of AdamW and Adam"),
    ("--epsilon", "training", "epsilon", float, "of AdamW and Adam"),
    ("--momentum", "training", "momentum", float, "of SGD"),
    ("--max-grad-norm", "training", "max_grad_norm", float, "gradients are scaled down to this norm; 0 = never"),
    ("--precision", "training", "precision", choices.PRECISIONS, "arithmetic; the weights stay float32"),
    ("--seed", "training", "seed", int, "of weights, batches and dropout"),
    ("--eval-every", "training", "eval_every", int, "steps between evaluations"),
    ("--eval-tokens", "training", "eval_tokens", int, "validation tokens per evaluation, at most"),
    ("--save-every", "training", "save_every", int, "steps between checkpoints"),
    ("--keep-checkpoints", "training", "keep_checkpoints", int, "newest checkpoints to keep"),
    ("--log-every", "training", "log_every", int, "steps between updates of the display"),
)  # fmt: skip
_SECTIONS = {"corpus": CorpusConfig, "model": ModelShape, "training": TrainingConfig}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "train",
        help="train a language model on text files",
        description=(
            "Trains a small transformer on text: a byte-level BPE tokenizer, next-token prediction, checkpoints, metrics and a "
            "picture of the loss with what counting words and pairs would achieve. Without options: a demo on the Python standard "
            "library's source that takes minutes on a CPU."
        ),
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="FOLDER",
        help=f"the run's folder (default {DEFAULT_FOLDER})",
    )
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint with exactly the losses of an unbroken run (options not given are the run's)",
    )
    begin.add_argument("--overwrite", action="store_true", help="delete an earlier run in the folder first")
    parser.add_argument("--device", help='"cuda" or "cpu" (default: a GPU if there is one)')
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="where prepared text is kept (default ~/.cache/pytransformer)"
    )
    groups = {section: parser.add_argument_group(section) for section in _SECTIONS}
    for option, section, name, kind, text in _OPTIONS:
        _add_option(groups[section], option, section, name, kind, text)
    parser.set_defaults(run=run)


def _add_option(group: Any, option: str, section: str, name: str, kind: Any, text: str) -> None:
    default = {field.name: field.default for field in dataclasses.fields(_SECTIONS[section])}[name]
    options: dict[str, Any] = {"dest": f"{section}.{name}", "default": argparse.SUPPRESS}
    options["help"] = text if default is None else f"{text} (default {default})"
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif isinstance(kind, tuple):
        options["choices"] = kind
    else:
        options.update(type=kind, metavar={int: "N", float: "X", str: "PATH"}[kind])
    group.add_argument(option, **options)


def config_from(arguments: argparse.Namespace, base: RunConfig) -> RunConfig:
    """``base`` with the options that were given."""
    sections = {}
    for section in _SECTIONS:
        given = {
            name.partition(".")[2]: value for name, value in vars(arguments).items() if name.startswith(f"{section}.")
        }
        sections[section] = dataclasses.replace(getattr(base, section), **given)
    return RunConfig(**sections)


def run(arguments: argparse.Namespace) -> int:
    """Trains and prints where everything is."""
    # Bad numbers are refused before the seconds that importing torch takes.
    config = config_from(arguments, RunConfig())

    from pytransformer.cli.model_folder import check_device
    from pytransformer.training.progress import make_progress
    from pytransformer.training.run import RunResult, has_run, saved_config, train

    if arguments.resume and has_run(arguments.out):
        config = config_from(arguments, saved_config(arguments.out))
    check_device(arguments.device)
    result: RunResult = train(
        config,
        arguments.out,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        device=arguments.device,
        cache=arguments.cache,
        progress=make_progress(),
    )
    margin = result.baselines.bigram - result.validation_loss
    print(
        f"validation loss {result.validation_loss:.4f} nats per token, {abs(margin):.4f} {'below' if margin >= 0 else 'above'} "
        f"the bigram's {result.baselines.bigram:.4f} on the same tokens (unigram {result.baselines.unigram:.4f})"
    )
    print(f"model       {result.checkpoint}")
    if result.picture is not None:
        print(f"loss curve  {result.picture}")
    prompt = "TEXT" if result.example_prompt is None else shlex.quote(result.example_prompt)
    print(f"try         pytransformer generate --model {shlex.quote(str(arguments.out))} --prompt {prompt}")
    return 0
