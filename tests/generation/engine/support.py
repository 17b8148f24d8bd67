"""What the tests of the engine share: a tiny model, requests at random, and what each of them gets alone."""

from __future__ import annotations

import functools
import random

from pytransformer import TransformerConfig
from pytransformer.generation import Engine, Event, Generation, Request, generate
from tests.model.configs import make_model

VOCABULARY, CONTEXT = 17, 24
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_seqlen": CONTEXT}
TINY = TransformerConfig.llama(**SIZES, num_kv_heads=1, intermediate_size=16)
# Layers that see everything, and layers with a window whose pages are freed.
MIXED = TransformerConfig.llama(
    **{**SIZES, "num_layers": 2}, intermediate_size=16, sliding_window=4, layer_types=("sliding", "full")
)


def random_requests(rng: random.Random, count: int) -> list[Request]:
    """Many begin alike and some are equal; greedy and seeded; some end early by a token."""
    stems = [[rng.randrange(VOCABULARY) for _ in range(9)] for _ in range(3)]
    requests = []
    for index in range(count):
        stem = rng.choice(stems)[: rng.randint(0, 9)]
        prompt = stem + [rng.randrange(VOCABULARY) for _ in range(rng.randint(not stem, 5))]
        sampling = {"temperature": 1.3, "top_k": rng.choice([None, 4]), "seed": index} if rng.random() < 0.5 else {}
        penalty = {"repetition_penalty": 1.5} if rng.random() < 0.2 else {}
        stop = rng.choice([(), (), (3,), (5, 11)])
        new_tokens = rng.randint(1, CONTEXT - len(prompt))
        requests.append(Request(prompt, new_tokens, eos_token_id=stop, **sampling, **penalty))
    return requests


@functools.cache
def alone_of(model, cache: str = "contiguous"):
    """What ``generate`` gives one request alone, computed once for each."""

    @functools.cache
    def alone(request: Request) -> Generation:
        return generate(model, request.prompt, request.max_new_tokens, cache=cache, **request.options())

    return alone


def tiny_model(config: TransformerConfig = TINY, seed: int = 0):
    return make_model(config, seed, "cpu")


def run(engine: Engine, requests: list[Request]) -> dict[int, Event]:
    """The last event of each request, by its place."""
    places = {engine.add(request): place for place, request in enumerate(requests)}
    return {places[event.id]: event for event in engine.run() if event.stop_reason is not None}


def work_through(
    engine: Engine, requests: list[Request], alone, rng: random.Random, *, cancel: float = 0.05, at_a_time: int = 12
) -> None:
    """Requests arrive at random and some are cancelled; every token is what the request gets alone, and no page is lost."""
    requests = list(reversed(requests))
    under_way: dict[int, Request] = {}
    tokens: dict[int, list[int]] = {}
    while requests or not engine.is_idle:
        for _ in range(rng.randint(0, 3)):
            if requests and len(under_way) < at_a_time:
                request = requests.pop()
                identity = engine.add(request)
                under_way[identity], tokens[identity] = request, []
        if under_way and rng.random() < cancel:
            assert engine.cancel(rng.choice(list(under_way)))
        for event in engine.step():
            if event.token is not None:
                tokens[event.id].append(event.token)
            if event.stop_reason is not None:
                expected, new = alone(under_way.pop(event.id)), tokens.pop(event.id)
                row, length = expected.token_ids.tolist(), expected.prompt_lengths[0]
                if event.stop_reason == "cancelled":
                    assert row[length : length + len(new)] == new
                else:
                    assert row[length:] == new and event.stop_reason == expected.stop_reasons[0]
                assert event.result is not None and event.result.token_ids.tolist() == row[:length] + new
    assert_no_page_is_lost(engine)


def assert_no_page_is_lost(engine: Engine) -> None:
    """Nothing runs: every page is free, once, and every idle page is found."""
    assert engine.is_idle
    for group in engine._cache.groups:
        pool = group.pool
        assert pool.used_pages == pool.shared_pages == 0 and pool.free_pages == pool.num_pages
        assert sorted([*pool._free, *pool._idle]) == list(range(1, pool.num_pages + 1))
        assert set(pool._names) == set(pool._idle) == set(pool._named.values())
