"""Continuous batching on a CPU: 200 requests of skewed lengths through the engine, against static batches of the same size.

Both sides are ours, over the same model with random float32 weights. Static batches take the requests in the order in which they came, as
many at a time, and wait for the longest of each batch; what has ended before is dropped from the cache and costs no attention any more, and
the cache is the faster one, contiguous. The engine takes all requests at once and runs as many at a time. Both give the same tokens.

    python -m pytransformer.benchmarks.programs.cpu_engine            # writes benchmarks/results/cpu/engine.json
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence

import torch

from pytransformer import Transformer, TransformerConfig
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu
from pytransformer.generation import Engine, Request
from pytransformer.generation.engine import Statistics
from pytransformer.generation.generate import start
from pytransformer.generation.modes import evaluation

RESULT = RESULTS / "cpu/engine.json"
LEAST_SPEEDUP = 2.0
CONTEXT, SHORTEST_PROMPT, LONGEST_PROMPT, MOST_NEW = 512, 8, 64, 384
# Of the natural logarithm of the new tokens' number: half of the requests want 20 or fewer, one in twenty more than 140.
MEDIAN_NEW, SPREAD_NEW = 20.0, 1.2


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the target is met."""
    parser = cpu.new_parser("cpu_engine", __doc__, 2, "runs over all requests", RESULT)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="sequences at a time, on both sides")
    arguments = parser.parse_args()
    result = cpu.new_result("GPT-2 style, 8 layers of 512, vocabulary 16384, float32", arguments.threads)
    model = make_model()
    requests = skewed_requests(arguments.requests, model.config.vocab_size)
    tokens = sum(request.max_new_tokens for request in requests)
    result["requests"] = {
        "count": len(requests),
        "batch": arguments.batch,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "new_tokens": tokens,
        "new_tokens_of_each": [request.max_new_tokens for request in requests],
    }
    result["same_tokens"] = check_same_tokens(model, requests[: 2 * arguments.batch], arguments.batch)
    seconds, statistics = measure(model, requests, arguments.batch, arguments.rounds)
    result["engine"] = dataclasses.asdict(statistics)
    timings = {
        name: cpu.add_row(result, name, found, unit="run", tokens=tokens, samples="runs")
        for name, found in seconds.items()
    }
    speedup = timings["static batches"].median / timings["engine"].median
    result["speedup_over_static_batches"] = speedup
    print(f"\n{speedup:.2f} × static batches (target {LEAST_SPEEDUP})")
    cpu.write(arguments.out, result)
    return 0 if speedup >= LEAST_SPEEDUP else 1


def make_model() -> Transformer:
    """Random weights, the same each time."""
    torch.manual_seed(0)
    config = TransformerConfig.gpt2(vocab_size=16384, hidden_size=512, num_layers=8, num_heads=8, max_seqlen=CONTEXT)
    return Transformer(config).eval()


def measure(
    model: Transformer, requests: Sequence[Request], batch: int, rounds: int
) -> tuple[dict[str, list[float]], Statistics]:
    """Seconds of each run over all requests, the two sides in turn; and the engine's statistics."""
    seconds: dict[str, list[float]] = {"engine": [], "static batches": []}
    for index in range(rounds):
        begun = time.perf_counter()
        _, statistics = by_engine(model, requests, batch)
        seconds["engine"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        static_batches(model, requests, batch)
        seconds["static batches"].append(time.perf_counter() - begun)
        cpu.show_progress("round", index + 1, rounds)
    return seconds, statistics


def skewed_requests(count: int, vocab_size: int) -> list[Request]:
    """Prompts of random tokens, and numbers of new tokens with a long tail; the same each time."""
    rng = random.Random(0)
    requests = []
    for _ in range(count):
        length = rng.randint(SHORTEST_PROMPT, LONGEST_PROMPT)
        prompt = [rng.randrange(vocab_size) for _ in range(length)]
        new_tokens = min(max(round(MEDIAN_NEW * rng.lognormvariate(0.0, SPREAD_NEW)), 1), MOST_NEW)
        requests.append(Request(prompt, new_tokens, eos_token_id=()))
    return requests


def by_engine(model: Transformer, requests: Sequence[Request], batch: int) -> tuple[list[list[int]], Statistics]:
    """The new tokens of each request, and the engine's statistics."""
    engine = Engine(model, max_batch=batch, prefill_chunk=LONGEST_PROMPT)
    places = {engine.add(request): place for place, request in enumerate(requests)}
    tokens: list[list[int]] = [[] for _ in requests]
    for event in engine.run():
        if event.token is not None:
            tokens[places[event.id]].append(event.token)
    return tokens, engine.statistics()


@torch.no_grad()
def static_batches(model: Transformer, requests: Sequence[Request], batch: int) -> list[list[int]]:
    """The same by ``generate``, one batch after another, of which each sequence ends after the tokens that it asked for."""
    tokens = []
    for first in range(0, len(requests), batch):
        some = requests[first : first + batch]
        limits = [request.max_new_tokens for request in some]
        run = start(model, [request.prompt for request in some], max(limits), eos_token_id=(), pack_weights=True)
        run.limits = [(limit, "length") for limit in limits]
        with evaluation(list(model.modules())):
            for _ in run.steps():
                pass
        tokens += run.new_tokens
    return tokens


def check_same_tokens(model: Transformer, requests: Sequence[Request], batch: int) -> int:
    """Tokens on which both sides agree; a fast wrong engine is not a result."""
    expected, found = static_batches(model, requests, batch), by_engine(model, requests, batch)[0]
    if found != expected:
        raise SystemExit("the engine and static batches do not give the same tokens")
    return sum(map(len, expected))


if __name__ == "__main__":
    raise SystemExit(main())
