"""Generation on a CPU, through both public interfaces: ``generate`` of this package against ``generate`` of transformers.

A GPT-2-124M-shaped model with random float32 weights, the same in both; batch 1 and batch 8, and the time to the first token of a long
prompt. Everything is interleaved in one process: one short call of each variant, again and again. Times are from token to token, ours by
the callback, theirs by a streamer, so that both sides' sampling and bookkeeping are in them. transformers runs with each cache that it has
for this, and compiled where it can be. At batch 1 the weight-only chains stand beside: every matrix-vector product of one token and nothing
else, in each layout torch offers, which no decoder on top of them can beat.

    python -m pytransformer.benchmarks.programs.cpu_generate          # writes benchmarks/results/cpu/generate.json

ctranslate2 is measured too where it is installed (``pip install ctranslate2``); it brings its own kernels and threads.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks.end_to_end import models
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.harness.timing import Timing
from pytransformer.benchmarks.programs import cpu
from pytransformer.benchmarks.programs.cpu_decode import (
    chains,
    check_same_tokens,
    differences,
    measure,
    our_times,
)
from pytransformer.generation import Step, generate

RESULT = RESULTS / "cpu/generate.json"
PROMPT, LONG_PROMPT = 32, 512
BATCHES = (1, 8)
LEAST_SPEEDUP = {1: 1.9, 8: 1.5}
LEAST_PREFILL_SPEEDUP = 1.2
LEAST_CHAIN_FRACTION = 0.95
# Decodes so many tokens; seconds of each step.
Run = Callable[[int], list[float]]


def main() -> int:
    """Measures, prints tables, writes the JSON; 0 if every target is met."""
    parser = cpu.new_parser("cpu_generate", __doc__, 8, "calls", RESULT)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of a call")
    parser.add_argument("--no-compile", action="store_true", help="leave out transformers' compiled variant")
    arguments = parser.parse_args()
    result = cpu.new_result("GPT-2 124M, float32, random weights", arguments.threads)
    result |= {"prompt": PROMPT, "long_prompt": LONG_PROMPT, "new_tokens": arguments.tokens}
    torch.manual_seed(0)
    config = TransformerConfig.gpt2()
    theirs = models.transformers_model(config).eval()
    ours = models.from_transformers(theirs, config)
    result["same_tokens"] = check_same_tokens(ours, theirs, torch.randint(config.vocab_size, (1, PROMPT)))
    result["left_out"] = {}
    codes = [decode(result, ours, theirs, batch, arguments) for batch in BATCHES]
    codes.append(prefill(result, ours, theirs, arguments.rounds))
    cpu.write(arguments.out, result)
    return max(codes)


def decode(result: dict[str, Any], ours: Transformer, theirs: Any, batch: int, arguments: Any) -> int:
    """Rows of decoding at this batch size; 0 if its targets are met."""
    count, config = arguments.tokens, ours.config
    prompt = torch.randint(config.vocab_size, (batch, PROMPT))
    variants: dict[str, Run] = {"pytransformer": lambda count: our_times(ours, prompt, count, pack=True)}
    for name, options in their_options(not arguments.no_compile).items():
        variants[name] = lambda count, options=options: their_steps(theirs, prompt, count, options)[1]  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        variants |= ctranslate2_variant(result, theirs, prompt, Path(folder))
        variants = {name: run for name, run in variants.items() if works(result, name, run, count)}
        if batch == 1:
            variants |= chains(ours)
        samples = measure(variants, arguments.rounds, count)
    timings: dict[str, Timing] = {}
    for name, calls in samples.items():
        timings[name] = cpu.add_row(
            result, name, calls, unit="step", tokens=batch, samples="calls", part="decode", batch=batch
        )
    code = judge(result, timings, f"speedup_at_batch_{batch}", LEAST_SPEEDUP[batch])
    if batch == 1:
        chain = min(timing.median for name, timing in timings.items() if name.startswith("weights only"))
        fraction = chain / timings["pytransformer"].median
        result["fraction_of_fastest_chain"] = fraction
        print(f"{fraction:.2f} of the fastest weight-only chain (target {LEAST_CHAIN_FRACTION})")
        code = max(code, int(fraction < LEAST_CHAIN_FRACTION))
    return code


def prefill(result: dict[str, Any], ours: Transformer, theirs: Any, rounds: int) -> int:
    """Rows of the time to the first token of a long prompt; 0 if the target is met."""
    prompt = torch.randint(ours.config.vocab_size, (1, LONG_PROMPT))
    variants: dict[str, Run] = {"pytransformer": lambda count: [our_first(ours, prompt)]}
    for name, options in their_options(compiled=False).items():
        variants[name] = lambda count, options=options: [their_steps(theirs, prompt, 1, options)[0]]  # type: ignore[misc]
    timings = {
        name: cpu.add_row(
            result, name, calls, unit="prompt", tokens=LONG_PROMPT, samples="calls", part="prefill", batch=1
        )
        for name, calls in measure(variants, 2 * rounds, 1).items()
    }
    return judge(result, timings, "prefill_speedup", LEAST_PREFILL_SPEEDUP)


def our_first(model: Transformer, prompt: Tensor) -> float:
    """Seconds from the call to the first token; what follows is a call of two tokens from packed weights."""
    times: list[float] = []

    def clock(step: Step) -> None:
        times.append(time.perf_counter())

    start = time.perf_counter()
    generate(model, prompt, 2, pack_weights=True, callback=clock)
    return times[0] - start


class Clock:
    """A streamer as transformers' ``generate`` takes one: notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """First the prompt, then one token of each sequence."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to be shown."""


def their_options(compiled: bool) -> dict[str, dict[str, Any]]:
    """transformers' caches, as options of its ``generate``."""
    from transformers import CompileConfig

    found: dict[str, dict[str, Any]] = {
        "transformers, dynamic cache": {},
        "transformers, static cache": {"cache_implementation": "static", "disable_compile": True},
    }
    if compiled:
        compile_config = CompileConfig(fullgraph=False, mode="default", dynamic=False)
        # Without it only GPUs are compiled for.
        compile_config._compile_all_devices = True
        found["transformers, static cache, compiled"] = {
            "cache_implementation": "static", "compile_config": compile_config,
        }  # fmt: skip
    return found


@torch.no_grad()
def their_steps(model: Any, prompt: Tensor, count: int, options: dict[str, Any]) -> tuple[float, list[float]]:
    """Seconds to the first token, and of each of ``count`` tokens after it."""
    clock = Clock()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=count + 1,
            max_new_tokens=count + 1,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
            **options,
        )
    if len(clock.times) != count + 2:
        raise RuntimeError(f"transformers gave {len(clock.times) - 1} tokens instead of {count + 1}")
    return clock.times[1] - start, differences(clock.times[1:])


def works(result: dict[str, Any], name: str, run: Run, count: int) -> bool:
    """Whether a variant runs here; why not is noted in the result. A compiled one is compiled then, for the length to be measured."""
    try:
        run(count)
    except Exception as error:
        if name == "pytransformer":
            raise
        result["left_out"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        return False
    return True


def ctranslate2_variant(result: dict[str, Any], theirs: Any, prompt: Tensor, folder: Path) -> dict[str, Run]:
    """The same model in ctranslate2, if it is installed and converts it."""
    name = "ctranslate2, float32"
    if importlib.util.find_spec("ctranslate2") is None:
        result["left_out"][name] = "not installed"
        return {}
    import ctranslate2

    words = [f"w{index}" for index in range(theirs.config.vocab_size)]
    try:
        convert(ctranslate2, theirs, words, folder)
    except Exception as error:
        result["left_out"][name] = f"{type(error).__name__}: {error}"
        return {}
    generator = ctranslate2.Generator(
        os.fspath(folder / "converted"), device="cpu", intra_threads=torch.get_num_threads(), compute_type="float32"
    )
    starts = [[words[token] for token in row] for row in prompt.tolist()]

    def seconds(new_tokens: int) -> float:
        start = time.perf_counter()
        generator.generate_batch(
            starts, max_length=new_tokens, min_length=new_tokens, include_prompt_in_result=False, sampling_topk=1
        )
        return time.perf_counter() - start

    # It tells no times of single tokens of a batch: what a long call takes longer than a short one.
    return {name: lambda count: [(seconds(count + 1) - seconds(1)) / count]}


def convert(ctranslate2: Any, theirs: Any, words: list[str], folder: Path) -> None:
    """transformers' GPT-2 as a folder of ctranslate2, without a tokenizer's files."""
    from ctranslate2.converters.transformers import GPT2Loader

    spec = GPT2Loader().get_model_spec(theirs)
    spec.register_vocabulary(words)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = words[0]
    spec.validate()
    spec.optimize(quantization="float32")
    (folder / "converted").mkdir()
    spec.save(os.fspath(folder / "converted"))


def judge(result: dict[str, Any], timings: dict[str, Timing], name: str, least: float) -> int:
    """Stores and prints how many times as fast as transformers' fastest way ours is; 0 if it is ``least`` or more."""
    peer = min(timing.median for variant, timing in timings.items() if variant.startswith("transformers"))
    result[name] = peer / timings["pytransformer"].median
    print(f"{name}: {result[name]:.2f} × transformers' fastest (target {least})\n")
    return int(result[name] < least)


if __name__ == "__main__":
    raise SystemExit(main())
