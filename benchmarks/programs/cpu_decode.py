"""Decoding on a CPU: tokens per second at batch 1 against transformers and against the weights' own reading time.

A GPT-2-124M-shaped model with random float32 weights, the same in both. Everything is interleaved in one process: one short burst of each
variant, again and again. Ours is measured through the public ``generate``, its sampling and bookkeeping included; transformers through a
bare loop around ``forward``, without the overhead of its ``generate``. The weight-only chains are every matrix-vector product of one token
and nothing else, in each layout torch offers: what no decoder on top of them can beat.

    python -m pytransformer.benchmarks.programs.cpu_decode            # writes benchmarks/results/cpu/decode.json
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks.end_to_end import models
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu
from pytransformer.generation import Step, generate
from pytransformer.nn import Linear
from pytransformer.nn.packed_weight import product_of_pieces, reorder

RESULT = RESULTS / "cpu/decode.json"
PROMPT = 32
LEAST_SPEEDUP = 1.2
CHAIN_FRACTION = 0.9
# Decodes so many tokens; seconds of each.
Run = Callable[[int], list[float]]


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the target is met."""
    parser = cpu.new_parser("cpu_decode", __doc__, 24, "bursts", RESULT)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a burst")
    arguments = parser.parse_args()
    result = cpu.new_result("GPT-2 124M, float32, random weights, batch 1", arguments.threads)
    torch.manual_seed(0)
    config = TransformerConfig.gpt2()
    theirs = models.transformers_model(config).eval()
    ours = models.from_transformers(theirs, config)
    prompt = torch.randint(config.vocab_size, (1, PROMPT))
    result["same_tokens"] = check_same_tokens(ours, theirs, prompt)
    decoders: dict[str, Run] = {
        "pytransformer": lambda count: our_times(ours, prompt, count, pack=True),
        "pytransformer, plain weights": lambda count: our_times(ours, prompt, count, pack=False),
        "transformers, dynamic cache": lambda count: their_times(theirs, prompt, count, static=False),
        "transformers, static cache": lambda count: their_times(theirs, prompt, count, static=True),
    }
    code = report(result, measure({**decoders, **chains(ours)}, arguments.rounds, arguments.tokens))
    cpu.write(arguments.out, result)
    return code


@torch.no_grad()
def check_same_tokens(ours: Transformer, theirs: Any, prompt: Tensor, count: int = 24) -> int:
    """Greedy tokens on which both agree; a fast wrong model is not a result."""
    expected = prompt
    for _ in range(count):
        expected = torch.cat([expected, theirs(expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    actual = ours.generate(prompt, count)
    if not torch.equal(actual, expected):
        raise SystemExit(f"the models disagree: {actual[0, PROMPT:].tolist()} and {expected[0, PROMPT:].tolist()}")
    return count


def differences(times: list[float]) -> list[float]:
    """From each time to the next."""
    return [after - before for before, after in itertools.pairwise(times)]


def our_times(model: Transformer, prompt: Tensor, count: int, *, pack: bool) -> list[float]:
    """Seconds of each decoded token of one call of ``generate``, from callback to callback."""
    times: list[float] = []

    def clock(step: Step) -> None:
        times.append(time.perf_counter())

    with contextlib.nullcontext() if pack else packed_weights_kept(model):
        generate(model, prompt, count + 1, pack_weights=pack, callback=clock)
    return differences(times)


@contextlib.contextmanager
def packed_weights_kept(model: Transformer) -> Iterator[None]:
    """Afterwards the packed weights are back that decoding from plain ones frees: packing them anew would disturb what is timed next."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    packed = [layer._packed for layer in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, packed):
            layer._packed = weight


@torch.no_grad()
def their_times(model: Any, prompt: Tensor, count: int, *, static: bool) -> list[float]:
    """The same for transformers: prefill, then one token after another through its cache."""
    from transformers import DynamicCache, StaticCache

    if static:
        cache = StaticCache(config=model.config, max_cache_len=PROMPT + count + 1)
    else:
        cache = DynamicCache(config=model.config)
    token = model(prompt, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    times = [time.perf_counter()]
    for _ in range(count):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        # A decoder looks at its token, to see whether it is the last.
        token.tolist()
        times.append(time.perf_counter())
    return differences(times)


def chains(model: Transformer) -> dict[str, Run]:
    """Every weight of the model once per token and nothing else, in each layout torch offers."""
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, Linear)]
    inputs = [torch.randn(1, weight.shape[1]) for weight in weights]
    found: dict[str, Run] = {}

    def add(name: str, pack: Callable[[Tensor], Any], product: Callable[[Tensor, Any, Tensor], Tensor]) -> None:
        try:
            packed = [pack(weight) for weight in weights]
            product(inputs[0], packed[0], weights[0])
        except (AttributeError, RuntimeError):
            # A build of torch without it.
            return

        @torch.no_grad()
        def run(count: int) -> list[float]:
            times = [time.perf_counter()]
            for _ in range(count):
                for x, prepared, weight in zip(inputs, packed, weights):
                    product(x, prepared, weight)
                times.append(time.perf_counter())
            return differences(times)

        found[f"weights only, {name}"] = run

    mkldnn, mkl = torch.ops.mkldnn, torch.ops.mkl
    add("F.linear", lambda w: w, lambda x, _, w: torch.nn.functional.linear(x, w))
    add("transposed", lambda w: w.t().contiguous(), lambda x, transposed, _: torch.mm(x, transposed))
    add(
        "oneDNN packed",
        lambda w: mkldnn._reorder_linear_weight(w, 1),
        lambda x, packed, _: mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
    )
    add(
        "MKL packed",
        lambda w: mkl._mkl_reorder_linear_weight(w, 1),
        lambda x, packed, w: mkl._mkl_linear(x, packed, w, None, 1),
    )
    add("in pieces", lambda w: product_of_pieces(reorder("pieces", w, 1), w, None), lambda x, product, _: product(x))
    return found


def measure(variants: dict[str, Run], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Seconds per token of each burst (its median), variants interleaved: A B C A B C …"""
    for run in variants.values():
        run(4)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        for name, run in variants.items():
            samples[name].append(statistics.median(run(tokens)))
        cpu.show_progress("round", index + 1, rounds)
    return samples


def report(result: dict[str, Any], samples: dict[str, list[float]]) -> int:
    """Adds the rows to the result; 0 if the target is met."""
    timings = {
        name: cpu.add_row(result, name, bursts, unit="token", tokens=1, samples="bursts")
        for name, bursts in samples.items()
    }
    code = cpu.judge(result, timings, LEAST_SPEEDUP)
    chain = min(timing.median for name, timing in timings.items() if name.startswith("weights only"))
    fraction = chain / timings["pytransformer"].median
    result["fraction_of_fastest_chain"] = fraction
    print(f"{fraction:.2f} of the fastest weight-only chain (target {CHAIN_FRACTION})")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
