"""Beam search on a CPU: seconds per new token of one prompt with four beams, against transformers' ``generate`` with the same options.

A GPT-2-124M-shaped model with random float32 weights, the same in both, which must find the same tokens. Whole calls of both, prefill
included, one after the other in one process, again and again.

    python -m pytransformer.benchmarks.programs.cpu_beams            # writes benchmarks/results/cpu/beams.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks.end_to_end import models
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu
from pytransformer.generation import generate

RESULT = RESULTS / "cpu/beams.json"
PROMPT, BEAMS = 128, 4
LEAST_SPEEDUP = 1.2


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the target is met."""
    parser = cpu.new_parser("cpu_beams", __doc__, 7, "calls", RESULT)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens of a call")
    arguments = parser.parse_args()
    result = cpu.new_result(f"GPT-2 124M, float32, random weights, batch 1, {BEAMS} beams", arguments.threads)
    torch.manual_seed(0)
    config = TransformerConfig.gpt2()
    theirs = models.transformers_model(config).eval()
    ours = models.from_transformers(theirs, config)
    prompt = torch.randint(config.vocab_size, (1, PROMPT))
    samples = measure(searches(ours, theirs, prompt, arguments.tokens), arguments.rounds)
    timings = {
        name: cpu.add_row(result, name, calls, unit="call", tokens=arguments.tokens, samples="calls")
        for name, calls in samples.items()
    }
    code = cpu.judge(result, timings, LEAST_SPEEDUP)
    cpu.write(arguments.out, result)
    return code


def searches(ours: Transformer, theirs: Any, prompt: Tensor, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """What is compared, by name; each gives prompt and new tokens (1, seqlen)."""

    def search() -> Tensor:
        found = generate(ours, prompt, tokens, num_beams=BEAMS, eos_token_id=(), pack_weights=True).token_ids
        assert isinstance(found, Tensor)
        return found

    def their_search() -> Tensor:
        options = {"max_new_tokens": tokens, "num_beams": BEAMS, "do_sample": False, "pad_token_id": 0}
        found = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **options)
        assert isinstance(found, Tensor)
        return found

    return {"pytransformer": search, "transformers, dynamic cache": their_search}


def measure(variants: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, variants interleaved, after one call each that must find the same tokens."""
    (name, first), *others = ((name, run()) for name, run in variants.items())
    for other, found in others:
        if not torch.equal(first, found):
            raise SystemExit(f"{name} and {other} disagree: {first[0].tolist()} and {found[0].tolist()}")
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds):
        for variant, run in variants.items():
            start = time.perf_counter()
            run()
            samples[variant].append(time.perf_counter() - start)
        cpu.show_progress("round", index + 1, rounds)
    return samples


if __name__ == "__main__":
    raise SystemExit(main())
