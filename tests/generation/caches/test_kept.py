"""A cache that stays between calls: each call gets what it gets with a cache of its own, and computes what is new alone."""

from __future__ import annotations

import pytest
import torch

from pytransformer.generation import (
    KeptCache,
    NotEnoughMemory,
    Prefix,
    PromptLookup,
    Step,
    generate,
    generate_stream,
    kept,
)
from pytransformer.generation.caches import KINDS
from tests.model.configs import CONFIGS, make_model, random_ids

from .support import GENERATING

pytestmark = pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")
ROPE = {"longrope": 8, "dynamic-ntk": 8}  # the length behind which frequencies change


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Caches grow by a few tokens, so that they grow often."""
    monkeypatch.setattr(kept, "_STEP", 4)


def _fed(model):
    """The numbers of tokens that the model is given from here on."""
    fed: list[int] = []
    model.model.layers[0].register_forward_hook(lambda module, given, _: fed.append(given[0].shape[1]))
    return fed


def _both(model, prompt, kept_cache, count=3, **options):
    """Tokens and logits with the kept cache and with one of the call's own."""
    found = []
    for cache in (kept_cache, kept_cache.kind):
        steps: list[Step] = []
        result = generate(model, prompt, count, cache=cache, callback=steps.append, **options)
        found.append((result.token_ids.tolist(), torch.stack([step.logits for step in steps])))
    return found


def _talk(model, device):
    """Prompts that go on with the last result, change its end, repeat it, begin otherwise; as functions of that result."""
    new = random_ids(model.config, (24,), 7, device).tolist()
    return [
        lambda last: new[:5],
        lambda last: [*last, *new[:2]],
        lambda last: last,
        lambda last: [*last[:-4], (last[-4] + 1) % 11],
        lambda last: [*last, *new[:4]],
        lambda last: last[:3],
        lambda last: new[8:20],
        lambda last: new[8:12],
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", kind) for kind in KINDS),
        ("gemma2", "contiguous"),
        ("gemma2", "paged"),
        ("mistral-window", "paged-int8"),
        ("gpt2", "contiguous"),
        ("longrope", "contiguous"),
        ("longrope", "paged"),
        ("dynamic-ntk", "contiguous"),
    ],
)
def test_each_call_gets_what_it_gets_alone(name, kind, small_pages, device):
    model = make_model(GENERATING[name], 0, device)
    own, last = KeptCache(model, kind), []
    for make in _talk(model, device):
        prompt = make(last)
        (tokens, logits), (expected, golden) = _both(model, prompt, own)
        assert tokens == expected
        if "8" not in kind:  # where codes round, a last bit can be a step
            torch.testing.assert_close(logits, golden)
        assert own.token_ids == tokens[:-1]  # the newest is not fed
        last = tokens


@pytest.mark.parametrize("kind", ["contiguous", "int8", "paged"])
def test_the_model_is_given_what_is_new_alone(kind, device):
    model = make_model(CONFIGS["llama"], 0, device)
    own, prompt = KeptCache(model, kind), random_ids(model.config, (5,), 0, device).tolist()
    fed = _fed(model)
    last = generate(model, prompt, 4, cache=own).token_ids.tolist()
    assert fed == [5, 1, 1, 1] and own.reused == 0
    fed.clear()
    longer = generate(model, [*last, 3, 4], 2, cache=own).token_ids.tolist()
    assert fed == [3, 1] and own.reused == 8  # the last answer's newest token, and two
    fed.clear()
    generate(model, longer[:-1], 1, cache=own)
    assert fed == [1] and own.reused == 11
    fed.clear()
    own.forget()
    assert own.token_ids == [] and own.cache is None
    generate(model, longer, 1, cache=own)
    assert fed == [13]


@pytest.mark.parametrize("name", ROPE)
def test_where_rope_changes_nothing_is_taken_over(name, device):
    model, border = make_model(GENERATING[name], 0, device), ROPE[name]
    own, fed = KeptCache(model), _fed(model)
    text = random_ids(model.config, (20,), 0, device).tolist()
    reused = []
    for length in (border - 3, border - 1, border + 2, border + 4, border - 2):
        generate(model, text[:length], 1, cache=own)
        reused.append(own.reused)
    again = border + 2 if name == "longrope" else 0  # "dynamic" has others for each length
    assert reused == [0, border - 3, 0, again, 0] and fed[0] == border - 3


def test_a_call_that_is_left_or_fails_harms_no_other(device, monkeypatch):
    model = make_model(CONFIGS["llama"], 0, device)
    own, prompt = KeptCache(model), random_ids(model.config, (5,), 0, device).tolist()
    steps = generate_stream(model, prompt, 9, cache=own)
    tokens = [next(steps).tokens[0] for _ in range(3)]
    assert own.token_ids == [*prompt, *tokens[:2]]
    (found, _), (expected, _) = _both(model, [*prompt, *tokens, 1], own)
    assert found == expected
    with pytest.raises(ValueError, match="another call has taken the kept cache"):
        next(steps)
    (found, _), (expected, _) = _both(model, [*expected, 2], own)
    assert found == expected

    def stop(*arguments):
        raise KeyboardInterrupt

    layer = model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        generate(model, [*expected, 2, 3], 3, cache=own)
    layer.remove()
    assert own.token_ids == []
    (found, _), (expected, _) = _both(model, [*expected, 2, 3], own)
    assert found == expected


@pytest.mark.parametrize("draft", [None, PromptLookup(1, 2)])
def test_a_call_that_comes_too_late_leaves_the_cache_to_the_one_that_has_it(draft, device):
    model = make_model(CONFIGS["llama"], 0, device)
    own, options = KeptCache(model), {"eos_token_id": (), "draft": draft}
    late = generate_stream(model, [1, 2, 3], 9, cache=own, **options)
    next(late)
    steps = generate_stream(model, [1, 2, 4], 9, cache=own, **options)
    tokens = [next(steps).tokens[0]]
    with pytest.raises(ValueError, match="another call has taken the kept cache"):
        list(late)
    assert own.token_ids[:3] == [1, 2, 4]
    tokens += [step.tokens[0] for step in steps]
    assert tokens == generate(model, [1, 2, 4], 9, **options).token_ids.tolist()[3:]


def test_a_prefix_fills_an_empty_one(device):
    model = make_model(CONFIGS["llama"], 0, device)
    text = random_ids(model.config, (12,), 0, device)
    own, fed = KeptCache(model), _fed(model)
    prefix = Prefix.of(model, text[:7])
    fed.clear()
    for end, count in ((9, 2), (12, 3)):
        generate(model, text[:end], 1, cache=own, prefix=prefix)
        assert fed.pop() == count and not fed


def test_errors_come_before_anything_is_computed(device, monkeypatch):
    model, other = make_model(CONFIGS["llama"], 0, device), make_model(CONFIGS["llama"], 1, device)
    own, ids = KeptCache(model), random_ids(model.config, (2, 5), 0, device)
    for call, message in (
        (lambda: generate(other, ids[0], 2, cache=own), "cache is a KeptCache of another model"),
        (lambda: generate(model, ids, 2, cache=own), "there are 2 prompts"),
        (lambda: generate(model, ids[0], 2, cache=own, use_cache=False), "needs use_cache=True"),
        (lambda: KeptCache(model, "int4"), "cache must be one of 'contiguous', .* got 'int4'"),
        (lambda: KeptCache(make_model(GENERATING["original"], 0, device)), "without an encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    generate(model, ids[0], 2, cache=own)
    held = own.token_ids

    def none_free(*arguments, **options):
        raise NotEnoughMemory("no memory")

    monkeypatch.setattr(kept, "make_cache", none_free)
    with pytest.raises(NotEnoughMemory):
        generate(model, ids[0], 12, cache=own)
    assert held and own.token_ids == []
