"""Decoding on a CPU: tokens per second at batch 1 against transformers and against the weights' own reading time.

A GPT-2-124M-shaped model with random float32 weights, the same in both. Everything is interleaved in one process: one short burst of each
variant, again and again. Ours is measured through the public ``generate``, its sampling and bookkeeping included; transformers through a
bare loop around ``forward``, without the overhead of its ``generate``. The weight-only chains are every matrix-vector product of one token
and nothing else, in each layout torch offers: what no decoder on top of them can beat.

    python -m pytransformer.benchmarks.programs.cpu_decode            # writes benchmarks/results/cpu/decode.json
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.harness.record import environment, save
from pytransformer.benchmarks.harness.timing import Timing
from pytransformer.generation import Step, generate
from pytransformer.nn import Linear

RESULT = RESULTS / "cpu/decode.json"
PROMPT = 32
LEAST_SPEEDUP = 1.2
CHAIN_FRACTION = 0.9


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the target is met."""
    parser = argparse.ArgumentParser(
        prog="python -m pytransformer.benchmarks.programs.cpu_decode", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=24, help="bursts of each variant")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a burst")
    parser.add_argument("--threads", type=int, default=0, help="threads for torch; 0 = its own choice")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    theirs = make_theirs()
    ours = from_theirs(theirs, TransformerConfig.gpt2())
    prompt = torch.randint(ours.config.vocab_size, (1, PROMPT))
    result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "rows": []}
    result["shape"] = "GPT-2 124M, float32, random weights, batch 1"
    result["threads"] = torch.get_num_threads()
    import transformers

    result["transformers"] = transformers.__version__
    result["same_tokens"] = check_same_tokens(ours, theirs, prompt)
    decoders: dict[str, Callable[[int], list[float]]] = {
        "pytransformer": lambda count: our_times(ours, prompt, count, pack=True),
        "pytransformer, plain weights": lambda count: our_times(ours, prompt, count, pack=False),
        "transformers, dynamic cache": lambda count: their_times(theirs, prompt, count, static=False),
        "transformers, static cache": lambda count: their_times(theirs, prompt, count, static=True),
    }
    samples = measure({**decoders, **chains(ours)}, arguments.rounds, arguments.tokens)
    code = report(result, samples, list(decoders))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save(arguments.out, result)
    return code


def make_theirs() -> Any:
    """transformers' GPT-2 of the 124M shape, random, in evaluation mode."""
    import transformers

    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config._attn_implementation = "sdpa"
    return transformers.GPT2LMHeadModel(config).eval()


def from_theirs(theirs: Any, config: TransformerConfig) -> Transformer:
    """Our model of the same shape with the same weights."""
    ours = Transformer(config, device="meta").to_empty(device="cpu").eval()
    state = theirs.state_dict()
    renamed = {
        "model.embed_tokens.weight": state["transformer.wte.weight"],
        "lm_head.weight": state["transformer.wte.weight"],
        "model.embed_positions.weight": state["transformer.wpe.weight"],
        "model.norm.weight": state["transformer.ln_f.weight"],
        "model.norm.bias": state["transformer.ln_f.bias"],
    }
    parts = {
        "attention_norm": "ln_1",
        "attention.qkv_proj": "attn.c_attn",
        "attention.out_proj": "attn.c_proj",
        "feed_forward_norm": "ln_2",
        "feed_forward.up_proj": "mlp.c_fc",
        "feed_forward.down_proj": "mlp.c_proj",
    }
    for index in range(ours.config.num_layers):
        for name, source in parts.items():
            weight = state[f"transformer.h.{index}.{source}.weight"]
            renamed[f"model.layers.{index}.{name}.weight"] = weight.t() if weight.ndim == 2 else weight  # their Conv1D
            renamed[f"model.layers.{index}.{name}.bias"] = state[f"transformer.h.{index}.{source}.bias"]
    ours.load_state_dict(renamed)
    return ours


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


def our_times(model: Transformer, prompt: Tensor, count: int, *, pack: bool) -> list[float]:
    """Seconds of each decoded token of one call of ``generate``, from callback to callback."""
    times: list[float] = []

    def clock(step: Step) -> None:
        times.append(time.perf_counter())

    with contextlib.nullcontext() if pack else packed_weights_kept(model):
        generate(model, prompt, count + 1, pack_weights=pack, callback=clock)
    return [after - before for before, after in itertools.pairwise(times)]


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
        token.tolist()  # a decoder looks at its token, to see whether it is the last
        times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def chains(model: Transformer) -> dict[str, Callable[[int], list[float]]]:
    """Every weight of the model once per token and nothing else, in each layout torch offers."""
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, Linear)]
    inputs = [torch.randn(1, weight.shape[1]) for weight in weights]
    found: dict[str, Callable[[int], list[float]]] = {}

    def add(name: str, pack: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        try:
            packed = [pack(weight) for weight in weights]
            product(inputs[0], packed[0], weights[0])
        except (AttributeError, RuntimeError):  # a build of torch without it
            return

        @torch.no_grad()
        def run(count: int) -> list[float]:
            times = [time.perf_counter()]
            for _ in range(count):
                for x, prepared, weight in zip(inputs, packed, weights):
                    product(x, prepared, weight)
                times.append(time.perf_counter())
            return [after - before for before, after in itertools.pairwise(times)]

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
    return found


def measure(variants: dict[str, Callable[[int], list[float]]], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Seconds per token of each burst (its median), variants interleaved: A B C A B C …"""
    for run in variants.values():
        run(4)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        for name, run in variants.items():
            samples[name].append(statistics.median(run(tokens)))
        print(f"\rround {index + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


def report(result: dict[str, Any], samples: dict[str, list[float]], decoders: list[str]) -> int:
    timings = {name: Timing.of(values, "clock") for name, values in samples.items()}
    for name, timing in timings.items():
        rate = 1 / timing.median
        result["rows"].append(
            {
                "variant": name,
                "tokens_per_second": rate,
                "seconds_per_token": {"median": timing.median, "p10": timing.low, "p90": timing.high},
                "bursts": samples[name],
            }
        )
        print(
            f"{name:32} {rate:7.1f} tokens/s   {timing.median * 1e3:6.1f} ms ({timing.low * 1e3:.1f} to {timing.high * 1e3:.1f})"
        )
    ours = timings["pytransformer"].median
    peer = min(timings[name].median for name in decoders if name.startswith("transformers"))
    chain = min(timing.median for name, timing in timings.items() if name.startswith("weights only"))
    result["speedup_over_transformers"] = peer / ours
    result["fraction_of_fastest_chain"] = chain / ours
    print(f"\n{peer / ours:.2f} × transformers' better cache (target {LEAST_SPEEDUP})")
    print(f"{chain / ours:.2f} of the fastest weight-only chain (target {CHAIN_FRACTION})")
    return 0 if peer / ours >= LEAST_SPEEDUP else 1


if __name__ == "__main__":
    raise SystemExit(main())
