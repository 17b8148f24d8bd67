"""``pytransformer generate``: continue a prompt, character by character as the tokens come."""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytransformer.cli.train import DEFAULT_FOLDER

if TYPE_CHECKING:
    import torch

    from pytransformer.model.transformer import Transformer
    from pytransformer.text import Tokenizer


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Registers the subcommand."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continues a prompt, printing characters as they come. Facts about the run go to standard error.",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=DEFAULT_FOLDER,
        metavar="FOLDER",
        help=f"a training run or a model's folder (default {DEFAULT_FOLDER})",
    )
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="at most this many tokens (default 200)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="randomness; 0 = always the most probable token (default 0.8)",
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="choose among the N most probable tokens only")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="choose among the most probable tokens that together have probability X",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same seed gives the same text (default: another each time)"
    )
    parser.add_argument(
        "--top", type=int, metavar="N", help="print the N most probable next tokens instead of generating"
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="compute the whole sequence again for each token, for comparison"
    )
    parser.add_argument("--device", help='"cuda" or "cpu" (default: a GPU if there is one)')
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the prompt and its continuation, or the most probable next tokens."""
    if not arguments.prompt:
        raise ValueError("--prompt is empty: generation needs a token to start from")
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, but is {arguments.max_new_tokens}")
    if arguments.top is not None and arguments.top < 1:
        raise ValueError(f"--top must be at least 1, but is {arguments.top}")

    import torch

    from pytransformer.cli.model_folder import check_device, encode, load_model
    from pytransformer.generation import Sampler
    from pytransformer.generation.generate import check_generates

    # Whatever is wrong with an option is said before the model is loaded and the prompt printed.
    check_device(arguments.device)
    seed = random.SystemRandom().getrandbits(31) if arguments.seed is None else arguments.seed
    options = {"temperature": arguments.temperature, "top_k": arguments.top_k, "top_p": arguments.top_p, "seed": seed}
    Sampler(1, **options)
    model, tokenizer = load_model(arguments.model, arguments.device)
    check_generates(model.config)
    ids = encode(model, tokenizer, arguments.prompt)
    limit = model.config.max_seqlen
    full = arguments.top is None and not model.config.is_encoder_decoder
    if len(ids) > limit or (len(ids) == limit and full):
        raise ValueError(
            f"--prompt has {len(ids)} tokens, but the model's context is {limit}: there is no room for a new one"
        )
    prompt = torch.tensor([ids], device=model.lm_head.weight.device)
    if arguments.top is not None:
        print_most_probable(model, tokenizer, prompt, arguments.top)
    else:
        print_continuation(model, tokenizer, prompt, arguments, options)
    return 0


def print_most_probable(model: Transformer, tokenizer: Tokenizer, prompt: torch.Tensor, count: int) -> None:
    """A table of the most probable tokens after the prompt."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Most probable next tokens", title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("token")
    table.add_column("id", justify="right")
    table.add_column("probability", justify="right")
    for rank, (token_id, probability) in enumerate(most_probable(model, prompt, count), start=1):
        table.add_row(str(rank), Text(tokenizer.label(token_id)), str(token_id), f"{probability:.4f}")
    Console(highlight=False).print(table)


def most_probable(model: Transformer, prompt: torch.Tensor, count: int) -> list[tuple[int, float]]:
    """Ids and probabilities of the ``count`` most probable tokens after ``prompt`` (1, seqlen), the best first."""
    import torch

    from pytransformer.generation.prompts import start_tokens
    from pytransformer.generation.sampling import probabilities
    from pytransformer.model.transformer import EncoderDecoder

    with torch.no_grad():
        if isinstance(model, EncoderDecoder):
            start = start_tokens(None, model.config).to(prompt.device)
            hidden = model.decode(model.encode(prompt), None, start[None])
        else:
            hidden = model.model(prompt)
        values, ids = probabilities(model.lm_head(hidden[0, -1])).sort(descending=True, stable=True)
    if values[0].isnan():
        raise ValueError("the model's logits after the prompt hold NaN, or nothing but -inf: no token is probable")
    return list(zip(ids[:count].tolist(), values[:count].tolist()))


def print_continuation(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: torch.Tensor,
    arguments: argparse.Namespace,
    options: dict[str, Any],
) -> None:
    """Streams the prompt and what follows (of an encoder–decoder the target alone), then says on standard error why it ended.

    ``options`` are the sampler's.
    """
    from pytransformer.generation import Step, generate
    from pytransformer.text import CharacterStream

    # What an encoder–decoder writes is a text of its own, not the prompt's continuation.
    continues = not model.config.is_encoder_decoder
    characters = CharacterStream(tokenizer, context=prompt[0].tolist() if continues else [])

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def arrived(step: Step) -> None:
        token_id = step.tokens[0]
        assert token_id is not None  # the only sequence goes on until generate returns
        show(characters.push(token_id))

    show(arguments.prompt if continues else "")
    started = time.perf_counter()
    try:
        result = generate(
            model,
            prompt,
            arguments.max_new_tokens,
            **options,
            use_cache=not arguments.no_cache,
            callback=arrived,
        )
        seconds = time.perf_counter() - started
    finally:
        show(characters.finish() + "\n")
    reason = {
        "eos": "stopped at the end-of-text token",
        "length": f"stopped after --max-new-tokens {arguments.max_new_tokens}",
        "context": f"stopped at the model's context limit of {model.config.max_seqlen} tokens",
    }[result.stop_reasons[0]]
    count = result.new_tokens[0]
    chance = f"; seed {options['seed']}" if arguments.temperature else ""
    print(f"[{count} tokens, {count / seconds:,.1f} tokens/s; {reason}{chance}]", file=sys.stderr)
