"""Random workloads: whatever runs beside a request, it gets what it gets alone, and no page is lost or read after it was freed."""

from __future__ import annotations

import random

import pytest

from pytransformer.generation import Engine, Request, generate
from pytransformer.generation.caches.prefix import lengths_that_change_rope
from tests.generation.caches.support import GENERATING
from tests.generation.engine.support import MIXED, TINY, alone_of, random_requests, run, tiny_model, work_through
from tests.model.configs import make_model, random_ids


@pytest.fixture(scope="module")
def models():
    return {"tiny": tiny_model(TINY), "mixed": tiny_model(MIXED)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["tiny", "mixed"])
def test_every_request_gets_what_it_gets_alone(models, name, seed):
    rng = random.Random(seed)
    model = models[name]
    page_size = rng.choice([1, 3, 4])
    pages = rng.randint(-(-(23 if name == "tiny" else 24) // page_size), 40 // page_size)
    engine = Engine(
        model, max_batch=rng.randint(2, 6), page_size=page_size, num_pages=pages, prefill_chunk=rng.choice([1, 2, 5, 16]),
        share_prefixes=seed != 2, poison=True,
    )  # fmt: skip
    work_through(engine, random_requests(rng, 20), alone_of(model), rng)
    statistics = engine.statistics()
    assert statistics.finished + statistics.cancelled == 20 and statistics.failed == 0
    assert (statistics.tokens_reused > 0) == (seed != 2)


# Every kind of positions, windows, sinks, QK-norm, experts, and tables of RoPE by layer.
KINDS = (
    "original-post-norm-sinusoidal",
    "llama-partial-interleaved",
    "mistral-window",
    "alibi-window-geglu",
    "no-positions-gelu",
    "gemma3",
    "olmo2",
    "falcon-alibi",
    "bloom",
    "longrope",
    "dynamic-ntk",
    "sinks-biases",
    "gpt-oss",
)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model(name):
    """Ragged prompts in chunks beside decoding sequences, pages shared and preempted."""
    model = make_model(GENERATING[name], 0, "cpu")
    stem = random_ids(model.config, (7,), 1, "cpu").tolist()
    longest = min(lengths_that_change_rope(model), default=model.config.max_seqlen)
    requests = []
    for index, shared in enumerate((1, 7, 4, 7)):
        prompt = (stem[:shared] + random_ids(model.config, (2,), shared, "cpu").tolist())[: longest - 2]
        sampling = {"temperature": 1.0, "top_p": 0.9, "seed": index} if index % 2 else {}
        requests.append(Request(prompt, min(6 + index, longest - len(prompt)), **sampling))
    engine = Engine(model, max_batch=3, page_size=3, num_pages=8, prefill_chunk=4, poison=True)
    for place, event in run(engine, requests).items():
        request = requests[place]
        expected = generate(model, request.prompt, request.max_new_tokens, **request.options())
        assert event.result.token_ids.tolist() == expected.token_ids.tolist()


@pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")
@pytest.mark.parametrize("kind", ["paged-int8", "paged-fp8"])
def test_quantised_pages(models, kind):
    """Every query sees the stored numbers, so pieces and shared pages change nothing here either."""
    rng = random.Random(0)
    engine = Engine(models["tiny"], max_batch=3, page_size=4, num_pages=9, prefill_chunk=5, cache=kind, poison=True)
    work_through(engine, random_requests(rng, 12), alone_of(models["tiny"], kind), rng, cancel=0.0)


def test_hundreds_of_requests_through_few_pages(models):
    """The short form of the workload below."""
    workload(models["tiny"], 200)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a minute and a half alone on a core
def test_ten_thousand_requests_through_few_pages(models):
    """Adds, stops, cancels, shared beginnings and preemptions, with freed pages that hold NaN."""
    workload(models["tiny"], 10_000)


def workload(model, count):
    rng = random.Random(count)
    kinds = random_requests(rng, 60)
    engine = Engine(model, max_batch=6, page_size=3, num_pages=22, prefill_chunk=6, poison=True)
    work_through(engine, [rng.choice(kinds) for _ in range(count)], alone_of(model), rng, cancel=0.04)
    statistics = engine.statistics()
    assert statistics.finished + statistics.cancelled == count
    assert min(statistics.cancelled, statistics.preemptions, statistics.tokens_recomputed) > 0
    assert statistics.tokens_reused > count
