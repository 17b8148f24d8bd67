"""Decoding on a CPU with quantised weights: tokens per second at batch 1 against the same model in float32 and in bfloat16.

A GPT-2-124M-shaped model with random weights. All variants are bursts of the public ``generate`` in one process, one after another, again
and again; each has its weights packed before. Beside the speed of each: the bytes of its parameters, and how far its logits after a
prompt of 32 tokens are from float32's, as a share of their spread.

    python -m pytransformer.benchmarks.programs.cpu_quantized         # writes benchmarks/results/cpu/quantized.json
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu
from pytransformer.benchmarks.programs.cpu_decode import Run, measure, our_times
from pytransformer.model.quantized import memory_of, quantize

RESULT = RESULTS / "cpu/quantized.json"
PROMPT = 32
BASE = "float32"
# tokens/s over those of float32 weights.
LEAST_SPEEDUP = {"int8": 2.5, "int4, groups of 64": 3.5}


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the targets are met."""
    parser = cpu.new_parser("cpu_quantized", __doc__, 16, "bursts", RESULT)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a burst")
    arguments = parser.parse_args()
    result = cpu.new_result("GPT-2 124M, random weights, batch 1", arguments.threads)
    torch.manual_seed(0)
    config = TransformerConfig.gpt2()
    prompt = torch.randint(config.vocab_size, (1, PROMPT))
    models = dict(variants(Transformer(config).eval()))
    about = {name: describe(model, models[BASE], prompt) for name, model in models.items()}
    runs: dict[str, Run] = {name: run_of(model, prompt) for name, model in models.items()}
    code = report(result, measure(runs, arguments.rounds, arguments.tokens), about)
    cpu.write(arguments.out, result)
    return code


def variants(model: Transformer) -> Iterator[tuple[str, Transformer]]:
    """The model in float32, and what becomes of it; with codes the activations are float32, or bfloat16 like the rest of the model."""
    yield BASE, model
    yield "bfloat16", copy.deepcopy(model).bfloat16()
    for name, bits in (("int8", 8), ("int4, groups of 64", 4)):
        quantised = quantize(copy.deepcopy(model), bits, group_size=64)
        yield name, quantised
        yield f"{name}, bfloat16 activations", copy.deepcopy(quantised).bfloat16()


def run_of(model: Transformer, prompt: Tensor) -> Callable[[int], list[float]]:
    """Seconds of each of so many decoded tokens."""
    return lambda count: our_times(model, prompt, count, pack=True)


@torch.no_grad()
def describe(model: Transformer, base: Transformer, prompt: Tensor) -> dict[str, Any]:
    """Bytes of the parameters and of what a token reads of them, and the error of the logits."""
    expected, logits = base(prompt), model(prompt).float()
    embedding = model.model.embed_tokens.weight
    head = 0 if model.has_tied_head else embedding.nbytes
    return {
        "parameter_bytes": memory_of(model),
        "bytes_read_per_token": memory_of(model) - head,
        "relative_error_of_logits": float((logits - expected).square().mean().sqrt() / expected.std()),
    }


def report(result: dict[str, Any], samples: dict[str, list[float]], about: dict[str, dict[str, Any]]) -> int:
    """Adds the rows to the result; 0 if the targets are met."""
    timings = {
        name: cpu.add_row(result, name, bursts, unit="token", tokens=1, samples="bursts", **about[name])
        for name, bursts in samples.items()
    }
    speedups = {name: timings[BASE].median / timing.median for name, timing in timings.items()}
    result["speedup_over_float32"] = speedups
    for name, least in LEAST_SPEEDUP.items():
        print(f"{name}: {speedups[name]:.2f} × float32 (target {least})")
    return 0 if all(speedups[name] >= least for name, least in LEAST_SPEEDUP.items()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
