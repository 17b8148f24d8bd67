"""``pytransformer plot``: the loss of a run, the attention of a prompt, the use of a cache, each as a picture."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytransformer.cli.train import DEFAULT_FOLDER

if TYPE_CHECKING:
    from pytransformer.model.transformer import Transformer

DEFAULT_PROMPT = "def read(self, path):\n    return open(path).read()\n"
_MAX_LAYERS_SHOWN = 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand and its three pictures."""
    parser = subparsers.add_parser(
        "plot", help="draw the loss of a run, attention maps, or speed with and without a cache"
    )
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    loss = pictures.add_parser("loss", help="training and validation loss with the baselines")
    attention = pictures.add_parser("attention", help="attention maps of a prompt, for all heads")
    attention.add_argument(
        "--prompt", help="the text to look at (default: words of the run's text, or a line of Python)"
    )
    attention.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help=f"layers to draw, from 0 (default: up to {_MAX_LAYERS_SHOWN}, first to last)",
    )
    cache = pictures.add_parser("cache", help="tokens per second against length, with and without a KV cache")
    cache.add_argument("--prompt", help="where generation starts (default: words of the run's text, or 'def')")
    cache.add_argument("--max-new-tokens", type=int, metavar="N", help="how far to go (default: to the context limit)")
    cache.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="measurements; the fastest counts (default 3)"
    )
    for picture, name in ((loss, "loss"), (attention, "attention"), (cache, "cache")):
        picture.add_argument(
            "model",
            type=Path,
            nargs="?",
            default=DEFAULT_FOLDER,
            metavar="RUN",
            help=f"the run's folder (default {DEFAULT_FOLDER})",
        )
        picture.add_argument(
            "-o",
            "--output",
            type=Path,
            default=Path(f"{name}.png"),
            metavar="FILE",
            help=f"the picture (default {name}.png)",
        )
        if picture is not loss:
            picture.add_argument("--device", help='"cuda" or "cpu" (default: a GPU if there is one)')
    loss.set_defaults(run=run_loss)
    attention.set_defaults(run=run_attention)
    cache.set_defaults(run=run_cache)


def run_loss(arguments: argparse.Namespace) -> int:
    """Draws ``metrics.jsonl``, also of a run that is still going."""
    from pytransformer.training import metrics
    from pytransformer.training.plots import plot_loss
    from pytransformer.training.run import saved_baselines, saved_config

    config = saved_config(arguments.model)
    source = config.corpus.source or "the Python standard library"
    records = metrics.read(arguments.model / metrics.FILE_NAME)
    plot_loss(records, saved_baselines(arguments.model), arguments.output, f"{config.model.family} on {source}")
    print(arguments.output)
    return 0


def run_attention(arguments: argparse.Namespace) -> int:
    """Draws the attention probabilities of a prompt."""
    import torch

    from pytransformer.cli.model_folder import encode, load_model
    from pytransformer.cli.pictures import plot_attention

    model, tokenizer = load_model(arguments.model, arguments.device)
    ids = encode(model, tokenizer, _prompt(arguments, DEFAULT_PROMPT))
    if not ids:
        raise ValueError("--prompt is empty: there is no token to look at")
    if len(ids) > model.config.max_seqlen:
        raise ValueError(f"--prompt has {len(ids)} tokens, but the model's context is {model.config.max_seqlen}")
    layers = chosen_layers(arguments.layers, model.config.num_layers)
    weights = model.attention_weights(torch.tensor([ids], device=model.lm_head.weight.device))
    maps = [weights[layer][0].float().cpu().numpy() for layer in layers]
    plot_attention(maps, layers, [tokenizer.label(token) for token in ids], arguments.output)
    print(arguments.output)
    return 0


def _prompt(arguments: argparse.Namespace, of_python: str) -> str:
    """What was given, or something in the language that the model has learned."""
    from pytransformer.training.run import has_run, saved_config, saved_example

    if arguments.prompt is not None:
        given: str = arguments.prompt
        return given
    is_python = not has_run(arguments.model) or saved_config(arguments.model).corpus.source is None
    return of_python if is_python else saved_example(arguments.model) or of_python


def chosen_layers(asked: list[int] | None, num_layers: int) -> list[int]:
    """The layers to draw; without a wish at most four, evenly from the first to the last. Raises ValueError for one that isn't there."""
    if asked is None:
        count = min(num_layers, _MAX_LAYERS_SHOWN)
        return [round(index * (num_layers - 1) / max(1, count - 1)) for index in range(count)]
    for layer in asked:
        if not 0 <= layer < num_layers:
            raise ValueError(f"--layers must be from 0 to {num_layers - 1}, but {layer} was asked for")
    return asked


def run_cache(arguments: argparse.Namespace) -> int:
    """Generates twice, with and without a cache, and draws how fast each token came."""
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, but is {arguments.repeats}")

    from pytransformer.cli.model_folder import encode, load_model
    from pytransformer.cli.pictures import plot_cache
    from pytransformer.training.run import parameters

    model, tokenizer = load_model(arguments.model, arguments.device)
    ids = encode(model, tokenizer, _prompt(arguments, "def"))
    if not ids:
        raise ValueError("--prompt is empty: generation needs a token to start from")
    room = model.config.max_seqlen - len(ids)
    count = room if arguments.max_new_tokens is None else min(arguments.max_new_tokens, room)
    if count < 2:
        raise ValueError(
            f"there must be room for at least 2 new tokens, but the prompt has {len(ids)} of at most {model.config.max_seqlen} tokens "
            f"and --max-new-tokens is {arguments.max_new_tokens}"
        )
    seconds = {
        use_cache: seconds_per_token(model, ids, count, use_cache=use_cache, repeats=arguments.repeats)
        for use_cache in (True, False)
    }
    lengths = list(range(len(ids) + 1, len(ids) + count))
    title = f"{parameters(model.num_parameters())}, batch 1, on {model.lm_head.weight.device}"
    plot_cache(lengths, seconds[True], seconds[False], arguments.output, title)
    for use_cache, times in seconds.items():
        print(f"{'with' if use_cache else 'without':8}cache  {len(times) / sum(times):,.1f} tokens/s")
    print(arguments.output)
    return 0


def seconds_per_token(
    model: Transformer, ids: list[int], count: int, *, use_cache: bool, repeats: int = 1
) -> list[float]:
    """How long each token after the first took (the first is the prompt's): the fastest of some measurements.

    Generation is greedy and doesn't stop at end tokens.
    """
    import torch

    from pytransformer.generation import generate

    device = model.lm_head.weight.device
    prompt = torch.tensor([ids], device=device)
    moments: list[float] = []

    def arrived(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        moments.append(time.perf_counter())

    generate(model, prompt, min(count, 4), eos_token_id=(), use_cache=use_cache)  # warm-up
    fastest = [float("inf")] * (count - 1)
    for _ in range(repeats):
        moments.clear()
        generate(model, prompt, count, eos_token_id=(), use_cache=use_cache, callback=arrived)
        taken = [later - earlier for earlier, later in itertools.pairwise(moments)]
        fastest = [min(pair) for pair in zip(fastest, taken)]
    return fastest
