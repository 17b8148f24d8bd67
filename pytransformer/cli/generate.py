"""``pytransformer generate``: continue a prompt, character by character as the tokens come."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytransformer.cli.train import DEFAULT_FOLDER

if TYPE_CHECKING:
    import torch

    from pytransformer.generation import Generation, Prefix, Step
    from pytransformer.model.transformer import Transformer
    from pytransformer.text import Tokenizer

# Where neither the command nor the checkpoint says one.
MAX_NEW_TOKENS = 200
TEMPERATURE = 0.8
# As in generation/caches/sizes.py, which would import torch for --help.
CACHES = ("contiguous", "paged", "int8", "fp8", "paged-int8", "paged-fp8")
DTYPES = ("float32", "bfloat16", "float16")
_BEAMS = ("num_beams", "length_penalty")
_LIMITS = ("temperature", "top_k", "top_p", "min_p")
_NOT_WITH_TOP = ("prefix", "no-cache", "prompt-lookup", "draft", "num-beams", "length-penalty")


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
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"at most this many tokens (default: the checkpoint's, else {MAX_NEW_TOKENS})",
    )
    add_sampling_options(parser)
    add_beam_options(parser)
    add_model_options(parser)
    parser.add_argument(
        "--prefix",
        type=Path,
        metavar="FOLDER",
        help="what `pytransformer prefix` kept of the prompt's beginning, which is then not computed again",
    )
    parser.add_argument(
        "--top", type=int, metavar="N", help="print the N most probable next tokens instead of generating"
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="compute the whole sequence again for each token, for comparison"
    )
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="propose up to N tokens at a time from where the text ended alike before, and check them in one pass",
    )
    drafts.add_argument(
        "--draft", type=Path, metavar="FOLDER", help="let a smaller model with the same tokenizer propose tokens"
    )
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where the model computes, in what dtype, and how it keeps keys and values."""
    parser.add_argument("--device", help='"cuda" or "cpu" (default: a GPU if there is one)')
    parser.add_argument(
        "--dtype", choices=DTYPES, help="compute with weights of this dtype (default: as the folder has them)"
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default=CACHES[0],
        help=f"kind of the KV cache, see docs/caches.md (default {CACHES[0]})",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How a token is chosen; what is not given is the checkpoint's."""
    group = parser.add_argument_group(
        "sampling", "What is not given is what the checkpoint's generation_config.json says."
    )
    group.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help=f"randomness; 0 = always the most probable token (default: the checkpoint's, else {TEMPERATURE})",
    )
    group.add_argument("--top-k", type=int, metavar="N", help="choose among the N most probable tokens only")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="choose among the most probable tokens that together have probability X",
    )
    group.add_argument(
        "--min-p", type=float, metavar="X", help="choose among tokens at least X times as probable as the most probable"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1: tokens of the text so far become less probable"
    )
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be given several times"
    )
    group.add_argument(
        "--seed", type=int, metavar="N", help="the same seed gives the same text (default: another each time)"
    )


def add_beam_options(parser: argparse.ArgumentParser) -> None:
    """Beam search in the place of sampling."""
    parser.add_argument(
        "--num-beams",
        type=int,
        metavar="N",
        help="above 1: search for the most probable text with N candidates side by side; it is shown when it is found",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="with beams: divide a text's log-probability by its length to the power X; above 0 favours long texts (default 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the prompt and its continuation, or the most probable next tokens."""
    if not arguments.prompt:
        raise ValueError("--prompt is empty: generation needs a token to start from")
    _check_options(arguments)

    import torch

    from pytransformer.cli.model_folder import check_device, encode, load_model
    from pytransformer.generation.prompts import check_generates

    # Whatever is wrong with an option is said before the model is loaded and the prompt printed.
    check_device(arguments.device)
    given = {**given_sampling(arguments), **given_beams(arguments)}
    model, tokenizer = load_model(arguments.model, arguments.device, arguments.dtype)
    options, taken = sampling_options(given, arguments, model)
    arguments.max_new_tokens = arguments.max_new_tokens or MAX_NEW_TOKENS
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
        draft = find_draft(model, tokenizer, arguments, options.get("num_beams", 1))
        tell_defaults(taken, model.generation_config)
        prefix = find_prefix(model, arguments)
        print_continuation(model, tokenizer, prompt, arguments, {**options, "prefix": prefix, "draft": draft})
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    """ValueError for what is wrong with the options by themselves."""
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, but is {arguments.max_new_tokens}")
    if arguments.top is not None and arguments.top < 1:
        raise ValueError(f"--top must be at least 1, but is {arguments.top}")
    if arguments.no_cache and (arguments.prefix is not None or arguments.cache != CACHES[0]):
        raise ValueError(
            "--no-cache computes without a cache, so --cache and --prefix have no use: leave one of them out"
        )
    if arguments.prompt_lookup is not None and arguments.prompt_lookup < 1:
        raise ValueError(f"--prompt-lookup must be at least 1, but is {arguments.prompt_lookup}")
    if arguments.no_cache and (arguments.prompt_lookup or arguments.draft):
        raise ValueError("--no-cache is for plain decoding: leave --prompt-lookup and --draft out")
    unused = [name for name in _NOT_WITH_TOP if vars(arguments)[name.replace("-", "_")]]
    if arguments.top is not None and unused:
        raise ValueError(f"--top generates nothing, so --{unused[0]} has no use: leave one of them out")


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of these options that were given."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_sampling_options` that were given, and a seed; ValueError if one is out of range."""
    from pytransformer.generation import Sampler

    given = _given(arguments, *_LIMITS, "repetition_penalty")
    given["seed"] = random.SystemRandom().getrandbits(31) if arguments.seed is None else arguments.seed
    Sampler(1, **{"temperature": TEMPERATURE, **given})
    if arguments.stop and "" in arguments.stop:
        raise ValueError("--stop is empty: it would stop everything")
    return given


def given_beams(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_beam_options` that were given; ValueError if one is out of range or the sampler's contradict it."""
    from pytransformer.generation import BeamOptions, Sampler
    from pytransformer.generation.beams import check_greedy

    beams = _given(arguments, *_BEAMS)
    searched = BeamOptions(**{"num_beams": 2, **beams})  # a length penalty alone is for the checkpoint's beams
    if beams.get("num_beams", 1) > 1:
        check_greedy(Sampler(1, **{"temperature": 0.0, **_given(arguments, *_LIMITS)}), searched)
    return beams


def sampling_options(
    given: Mapping[str, Any], arguments: argparse.Namespace, model: Transformer
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sampler's options, and those of the checkpoint among them; its limit of new tokens is put where none was given."""
    from pytransformer.generation.defaults import with_defaults

    options, taken = with_defaults(given, model.generation_config)
    if arguments.max_new_tokens is None and (stated := (model.generation_config or {}).get("max_new_tokens")):
        arguments.max_new_tokens = taken["max_new_tokens"] = int(stated)
    return {"temperature": TEMPERATURE if options.get("num_beams", 1) == 1 else 0.0, **options}, taken


def find_draft(model: Transformer, tokenizer: Tokenizer, arguments: argparse.Namespace, num_beams: int) -> Any:
    """What ``--prompt-lookup`` or ``--draft`` says, or ``None``; ValueError for beams, or if the draft's tokens are not the model's."""
    from pytransformer.cli.model_folder import load_model
    from pytransformer.generation import DraftModel, PromptLookup
    from pytransformer.generation.drafts import check_draft

    if num_beams > 1 and (arguments.prompt_lookup or arguments.draft):
        raise ValueError(
            f"--prompt-lookup and --draft are for plain decoding, but {num_beams} beams are asked for, by --num-beams or the checkpoint: "
            "give --num-beams 1, or leave the draft out"
        )
    if arguments.prompt_lookup is not None:
        return PromptLookup(num_tokens=arguments.prompt_lookup)
    if arguments.draft is None:
        return None
    small, own = load_model(arguments.draft, arguments.device)
    if own.vocab_size != tokenizer.vocab_size or any(
        own.token(token) != tokenizer.token(token) for token in range(own.vocab_size)
    ):
        raise ValueError(f"--draft {arguments.draft} has another tokenizer than --model {arguments.model}")
    return check_draft(DraftModel(small), model)


def find_prefix(model: Transformer, arguments: argparse.Namespace) -> Prefix | None:
    """What ``--prefix`` says, or ``None``; ValueError if it is another model's, or for another kind of cache."""
    from pytransformer.generation import Prefix
    from pytransformer.generation.caches.sizes import split_kind

    if arguments.prefix is None:
        return None
    prefix = Prefix.load(arguments.prefix, model)
    if prefix.part.quantised != split_kind(arguments.cache)[1]:
        raise ValueError(
            f"--prefix {arguments.prefix} holds keys and values of {prefix.part.quantised or 'full precision'}, which --cache "
            f"{arguments.cache} does not take: make one with `pytransformer prefix --cache {arguments.cache}`"
        )
    return prefix


def tell_defaults(taken: Mapping[str, Any], generation_config: Mapping[str, Any] | None) -> None:
    """Says on standard error what comes from the checkpoint's generation_config.json, and what of it is not followed."""
    from pytransformer.generation.defaults import not_followed
    from pytransformer.model.generation_defaults import FILE_NAME

    for what, values in (("from", taken), ("not followed of", not_followed(generation_config))):
        if values:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            print(f"[{what} the checkpoint's {FILE_NAME}: {listed}]", file=sys.stderr)


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

    ``options`` are the sampler's, the prefix and the draft.
    """
    from pytransformer.generation import generate, generate_stream

    # What an encoder–decoder writes is a text of its own, not the prompt's continuation.
    before = "" if model.config.is_encoder_decoder else arguments.prompt
    options |= {
        "stop": arguments.stop, "tokenizer": tokenizer, "use_cache": not arguments.no_cache, "cache": arguments.cache
    }  # fmt: skip
    started = time.perf_counter()
    if options.get("num_beams", 1) > 1:
        result = generate(model, prompt, arguments.max_new_tokens, **options)
        assert result.texts is not None  # there is a tokenizer
        _show(f"{before}{result.texts[0]}\n")  # chosen at the end
    else:
        # Refuses options that contradict each other before anything is shown.
        steps = generate_stream(model, prompt, arguments.max_new_tokens, **options)
        _show(before)
        try:
            result = _shown(steps)
        finally:
            _show("\n")
    seconds = time.perf_counter() - started
    reason = {
        "eos": "stopped at the end-of-text token",
        "stop": "stopped before a --stop text",
        "length": f"stopped after --max-new-tokens {arguments.max_new_tokens}",
        "context": f"stopped at the model's context limit of {model.config.max_seqlen} tokens",
    }[result.stop_reasons[0]]
    count = result.new_tokens[0]
    chance = f"; seed {options['seed']}" if options["temperature"] else ""
    kept = ""
    if result.drafted is not None and result.accepted is not None:
        kept = f"; {result.accepted[0]} of {result.drafted[0]} proposed tokens kept"
    if (prefix := options["prefix"]) is not None:
        reason += f"; {prefix.common(list(prompt))} of {prompt.shape[1]} tokens of the prompt from the prefix"
    print(f"[{count} tokens, {count / seconds:,.1f} tokens/s{kept}; {reason}{chance}]", file=sys.stderr)


def _shown(steps: Generator[Step, None, Generation]) -> Generation:
    """Shows the text of each step as it comes; what the steps end with."""
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            result: Generation = end.value
            return result
        assert step.texts is not None  # there is a tokenizer
        _show(step.texts[0])


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
