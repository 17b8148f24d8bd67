"""``pytransformer plot``: the loss of a run, the attention and the experts of a prompt, the use of a cache, each as a picture."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pytransformer.cli.train import DEFAULT_FOLDER

if TYPE_CHECKING:
    import torch

    from pytransformer.model.transformer import Transformer
    from pytransformer.text import Tokenizer

DEFAULT_PROMPT = "def read(self, path):\n    return open(path).read()\n"
_MAX_LAYERS_SHOWN = 4


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand and its pictures."""
    parser = subparsers.add_parser(
        "plot", help="draw the loss of a run, attention maps, the load of experts, or speed with and without a cache"
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
    attention.add_argument(
        "--of",
        choices=("self", "cross", "encoder"),
        help="of an encoder-decoder: the decoder's self-attention, its attention to the source (the default), or the encoder's",
    )
    attention.add_argument("--target", help="of an encoder-decoder: the target (default: what it generates)")
    experts = pictures.add_parser("experts", help="how many tokens of a prompt each expert gets")
    experts.add_argument("--prompt", help="the text to route (default: words of the run's text, or a line of Python)")
    cache = pictures.add_parser("cache", help="tokens per second against length, with and without a KV cache")
    cache.add_argument("--prompt", help="where generation starts (default: words of the run's text, or 'def')")
    cache.add_argument("--max-new-tokens", type=int, metavar="N", help="how far to go (default: to the context limit)")
    cache.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="measurements; the fastest counts (default 3)"
    )
    named = ((loss, "loss"), (attention, "attention"), (experts, "experts"), (cache, "cache"))
    for picture, name in named:
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
    experts.set_defaults(run=run_experts)
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

    from pytransformer.cli.model_folder import load_model
    from pytransformer.cli.pictures import plot_attention
    from pytransformer.model.transformer import EncoderDecoder

    model, tokenizer = load_model(arguments.model, arguments.device)
    prompt = _prompt_ids(arguments, model, tokenizer)
    queries = keys = prompt
    if isinstance(model, EncoderDecoder):
        target = _target(arguments, model, tokenizer, prompt)
        with torch.no_grad():
            output = model(prompt, target, return_attention=True)
        weights = {"self": output.attentions, "encoder": output.encoder_attentions}.get(
            arguments.of, output.cross_attentions
        )
        queries = prompt if arguments.of == "encoder" else target
        keys = target if arguments.of == "self" else prompt
    elif arguments.of is not None or arguments.target is not None:
        raise ValueError("--of and --target are for an encoder-decoder, and this model is none")
    else:
        weights = model.attention_weights(prompt)
    layers = chosen_layers(arguments.layers, len(weights))
    maps = [weights[layer][0].float().cpu().numpy() for layer in layers]
    labels, key_labels = ([tokenizer.label(token) for token in side[0].tolist()] for side in (queries, keys))
    plot_attention(maps, layers, labels, arguments.output, key_labels)
    print(arguments.output)
    return 0


def run_experts(arguments: argparse.Namespace) -> int:
    """Draws how a prompt's tokens are spread over the experts of each layer."""
    import torch

    from pytransformer.cli.model_folder import load_model
    from pytransformer.cli.pictures import plot_experts

    model, tokenizer = load_model(arguments.model, arguments.device)
    config = model.config
    if not config.num_experts or config.is_encoder_decoder:
        raise ValueError(f"plot experts is for decoders and encoders with experts, and {arguments.model} is none")
    prompt = _prompt_ids(arguments, model, tokenizer)
    with torch.no_grad():
        routed = model(prompt, return_router_logits=True).router_logits
    chosen = torch.stack([logits.topk(config.experts_per_token).indices.flatten() for logits in routed]).cpu()
    loads = torch.stack([layer.bincount(minlength=config.num_experts) for layer in chosen])
    layers = [layer for layer in range(config.num_layers) if config.is_sparse(layer)]
    title = f"{prompt.shape[1]} tokens, {config.experts_per_token} of {config.num_experts} experts each"
    plot_experts(loads.double().numpy(), layers, arguments.output, title)
    print(arguments.output)
    return 0


def _prompt_ids(arguments: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> torch.Tensor:
    """The prompt's tokens (1, seqlen), on the model's device."""
    import torch

    from pytransformer.cli.model_folder import encode

    ids = encode(model, tokenizer, _prompt(arguments, DEFAULT_PROMPT))
    if not ids:
        raise ValueError("--prompt is empty: there is no token to look at")
    if len(ids) > model.config.max_seqlen:
        raise ValueError(f"--prompt has {len(ids)} tokens, but the model's context is {model.config.max_seqlen}")
    return torch.tensor([ids], device=model.model.embed_tokens.weight.device)


def _target(
    arguments: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, prompt: torch.Tensor
) -> torch.Tensor:
    """What the decoder reads (1, seqlen): the start token and the target that was given or is generated."""
    import torch

    if arguments.target is None:
        ids: torch.Tensor = model.generate(prompt, max_new_tokens=24)
        return ids
    start = model.config.decoder_start_token_id
    ids = torch.tensor([[*([] if start is None else [start]), *tokenizer.encode(arguments.target)]])
    return ids.to(prompt.device)


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
