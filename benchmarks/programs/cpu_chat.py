"""Conversations on a CPU: the time until a turn's first token, from a kept cache and anew, and bfloat16 beside float32.

A GPT-2-124M-shaped model with random weights. A turn has 32 new tokens behind a conversation of 480; its time is that of a call of
``generate`` for one token. Everything is interleaved in one process.

    python -m pytransformer.benchmarks.programs.cpu_chat            # writes benchmarks/results/cpu/chat.json
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu, cpu_decode
from pytransformer.generation import KeptCache, generate

RESULT = RESULTS / "cpu/chat.json"
BEFORE, NEW = 480, 32
LEAST_SPEEDUP = 4.0


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if a turn from the kept cache is as much faster as it should be."""
    parser = cpu.new_parser("cpu_chat", __doc__, 12, "bursts", RESULT)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a burst of decoding")
    arguments = parser.parse_args()
    result = cpu.new_result(
        {"model": "GPT-2 124M, random weights, batch 1", "conversation": BEFORE, "turn": NEW}, arguments.threads
    )
    torch.manual_seed(0)
    config = TransformerConfig.gpt2()
    models = {"float32": Transformer(config).eval()}
    models["bfloat16"] = Transformer(config).eval().to(torch.bfloat16)
    models["bfloat16"].load_state_dict(models["float32"].state_dict())
    code = report_turns(result, measure_turns(models["float32"], arguments.rounds))
    report_dtypes(result, models, arguments.rounds, arguments.tokens)
    cpu.write(arguments.out, result)
    return code


def measure_turns(model: Transformer, rounds: int) -> dict[str, list[float]]:
    """Seconds of each turn, A B A B …; both ways must choose the same token."""
    vocab_size = model.config.vocab_size
    before = torch.randint(vocab_size, (BEFORE,))
    kept = KeptCache(model)
    ways: dict[str, KeptCache | str] = {"turn, kept cache": kept, "turn, anew": "contiguous"}
    generate(model, before, 1, cache=kept)
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds + 1):  # the first one warms up
        prompt = torch.cat([before, torch.randint(vocab_size, (NEW,))])
        tokens = set()
        for name, cache in ways.items():
            started = time.perf_counter()
            tokens.add(int(generate(model, prompt, 1, cache=cache).token_ids[-1]))
            if index:
                samples[name].append(time.perf_counter() - started)
        if len(tokens) != 1 or kept.reused < BEFORE:
            raise SystemExit(f"the ways disagree: tokens {tokens}, {kept.reused} of {BEFORE} tokens reused")
        cpu.show_progress("turn", index, rounds)
    return samples


def report_turns(result: dict[str, Any], samples: dict[str, list[float]]) -> int:
    """Adds the rows; 0 if the target is met."""
    timings = {
        name: cpu.add_row(result, name, turns, unit="turn", tokens=NEW, samples="turns")
        for name, turns in samples.items()
    }
    speedup = timings["turn, anew"].median / timings["turn, kept cache"].median
    result["turn_speedup"] = speedup
    print(f"{speedup:.2f} × a turn computed anew (target {LEAST_SPEEDUP})\n")
    return 0 if speedup >= LEAST_SPEEDUP else 1


def report_dtypes(result: dict[str, Any], models: dict[str, Transformer], rounds: int, tokens: int) -> None:
    """Adds for each dtype the rows of a prefill, and of decoding from packed and from plain weights."""
    vocab_size = models["float32"].config.vocab_size
    prompt, long = (torch.randint(vocab_size, (1, length)) for length in (cpu_decode.PROMPT, BEFORE + NEW))
    prefills: dict[str, Callable[[int], list[float]]] = {}
    decoders: dict[str, Callable[[int], list[float]]] = {}
    for dtype, model in models.items():
        prefills[f"prefill, {dtype}"] = functools.partial(prefill_time, model, long)
        for name, pack in ((f"decode, {dtype}", True), (f"decode, {dtype}, plain weights", False)):
            decoders[name] = functools.partial(cpu_decode.our_times, model, prompt, pack=pack)
    for name, seconds in cpu_decode.measure(prefills, rounds, 1).items():
        cpu.add_row(result, name, seconds, unit="prefill", tokens=BEFORE + NEW, samples="prefills")
    for name, seconds in cpu_decode.measure(decoders, rounds, tokens).items():
        cpu.add_row(result, name, seconds, unit="token", tokens=1, samples="bursts")


def prefill_time(model: Transformer, prompt: torch.Tensor, count: int) -> list[float]:
    """Seconds until the first token, once, whatever the count."""
    started = time.perf_counter()
    generate(model, prompt, 1)
    return [time.perf_counter() - started]


if __name__ == "__main__":
    raise SystemExit(main())
