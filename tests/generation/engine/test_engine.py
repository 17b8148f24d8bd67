"""The engine: shared beginnings, preemption, events and statistics, and requests that are bad or go bad."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.generation import Engine, NotEnoughMemory, Request, generate
from pytransformer.generation.caches.prefix import fingerprint
from pytransformer.model.transformer import Transformer
from tests.generation.engine.support import (
    CONTEXT,
    SIZES,
    TINY,
    VOCABULARY,
    alone_of,
    assert_no_page_is_lost,
    run,
    tiny_model,
)  # fmt: skip
from tests.model.configs import FAMILY_CONFIGS, make_model

PROMPT = [1, 5, 2, 9, 4, 7, 3, 8, 6]


@pytest.fixture
def model():
    return tiny_model()


def engine_of(model, **options):
    return Engine(model, **{"max_batch": 3, "page_size": 2, "prefill_chunk": 8, "poison": True, **options})


def test_what_was_computed_before_is_computed_once(model):
    engine = engine_of(model)
    first = run(engine, [Request(PROMPT, 4)])[0].result.token_ids.tolist()
    before = engine.statistics()
    assert (before.tokens_prefilled, before.tokens_reused) == (9, 0)
    # What follows is a prompt with the answer in it, as in a chat; and the first prompt once more, of which the last token is computed.
    found = run(engine, [Request([*first, 3], 4), Request(PROMPT, 4)])
    assert found[0].result.token_ids.tolist() == alone_of(model)(Request([*first, 3], 4)).token_ids.tolist()
    assert found[1].result.token_ids.tolist() == first
    after = engine.statistics()
    assert after.tokens_reused == 12 + 8 and after.tokens_prefilled == 9 + 2 + 1
    assert_no_page_is_lost(engine)


def test_pages_are_shared_while_they_are_used(model):
    engine = engine_of(model)
    engine.add(Request(PROMPT, 6))
    engine.step(), engine.step()
    engine.add(Request([*PROMPT, 1], 6))
    engine.step()
    statistics = engine.statistics()
    assert (statistics.pages_shared, statistics.running) == (4, 2)
    assert statistics.pages_used == 5 + 5 - 4


def test_nothing_is_shared_if_that_is_not_wanted(model):
    engine = engine_of(model, share_prefixes=False)
    for _ in range(2):
        run(engine, [Request(PROMPT, 4)])
    assert engine.statistics().tokens_reused == engine.statistics().pages_idle == 0


def test_other_parameters_find_no_pages_of_those_before(model):
    engine = engine_of(model)
    run(engine, [Request(PROMPT, 6)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    after = run(engine, [Request(PROMPT, 6)])[0].result.token_ids
    assert torch.equal(after, generate(model, PROMPT, 6).token_ids) and engine.statistics().tokens_reused == 0


def test_pages_are_not_found_any_more_when_the_embedding_of_one_token_has_changed(model):
    """Of which the samples in the model's fingerprint have nothing."""
    token = VOCABULARY - 1
    before = fingerprint(model)
    engine = engine_of(model)
    run(engine, [Request([token, *PROMPT], 6)])
    with torch.no_grad():
        model.model.embed_tokens.weight[token].mul_(-3.0)
    assert fingerprint(model) == before
    after = run(engine, [Request([token, *PROMPT], 6)])[0].result.token_ids
    assert torch.equal(after, generate(model, [token, *PROMPT], 6).token_ids)
    assert engine.statistics().tokens_reused == 0


def test_parameters_may_change_behind_a_cancelled_request(model):
    engine = engine_of(model)
    last = engine.add(Request(PROMPT, 9))
    engine.step(), engine.step()
    engine.cancel(last)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    engine.add(Request(PROMPT, 9))
    cancelled, *_, after = engine.run()
    assert cancelled.stop_reason == "cancelled" and engine.statistics().tokens_reused == 0
    assert torch.equal(after.result.token_ids, generate(model, PROMPT, 9).token_ids)


def test_a_request_that_was_preempted_goes_on_as_if_nothing_had_been(model):
    requests = [Request(PROMPT[: 4 + index], 14, temperature=1.5, seed=index) for index in range(3)]
    engine = engine_of(model, num_pages=10)
    for place, event in run(engine, requests).items():
        assert event.result.token_ids.tolist() == alone_of(model)(requests[place]).token_ids.tolist()
    assert engine.statistics().preemptions > 0


def test_log_probabilities_penalties_and_constraints_are_those_of_generate(model):
    options = [
        {"return_log_probabilities": True},
        {"temperature": 0.8, "min_p": 0.05, "seed": 4, "return_log_probabilities": True},
        {
            "repetition_penalty": 1.7,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.2,
            "logit_bias": {3: -math.inf, 4: 2.0},
        },
        {"constraint": lambda row, ids: [(ids[-1] + 1) % VOCABULARY, (ids[-1] + 5) % VOCABULARY]},
    ]
    requests = [Request(PROMPT[: 3 + index], 8, **given) for index, given in enumerate(options)]
    for place, event in run(engine_of(model), requests).items():
        expected = alone_of(model)(requests[place])
        assert event.result.token_ids.tolist() == expected.token_ids.tolist()
        if expected.log_probabilities is None:
            assert event.log_probability is None and event.result.log_probabilities is None
        else:
            # The batch changes the order of a sum of float32 products, no more.
            assert event.result.log_probabilities[0] == pytest.approx(expected.log_probabilities[0], rel=1e-4)
            assert event.log_probability == event.result.log_probabilities[0][-1]


def test_texts_and_stop_strings_of_each_request(model):
    """Written by constraints, so that a stop string lies across tokens; what may be its beginning is held back."""
    tokenizers = pytest.importorskip("tokenizers")
    from pytransformer.text import Tokenizer

    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate("abcdefghijklmnopq")}, merges=[])
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = Tokenizer(backend)

    def writing(text):
        return lambda row, ids: [ord(text[len(ids) - 2]) - ord("a")]

    requests = [
        Request([1, 2], 5, constraint=writing(text), stop=stop)
        for text, stop in (("abcde", "cd"), ("edcba", ["x", "ba"]), ("aabbc", 2))
    ]
    ends = run(engine_of(model, tokenizer=tokenizer), requests)
    assert [(ends[place].stop_reason, ends[place].result.texts) for place in range(3)] == [
        ("stop", ["ab"]), ("stop", ["edc"]), ("stop", ["aabbc"]),
    ]  # fmt: skip
    engine = engine_of(model, tokenizer=tokenizer)
    engine.add(Request([1, 2], 5, constraint=writing("abcde"), stop="cq"))
    events = [event for _ in range(3) for event in engine.step()]
    assert [event.text for event in events] == ["a", "b", ""]  # "c" may be the beginning of the stop string
    engine.cancel(0)
    (event,) = engine.step()
    assert (event.text, event.result.texts) == ("c", ["abc"])


def test_events_tell_each_token_once_and_the_end_with_the_last(model):
    engine = engine_of(model)
    identity = engine.add(Request(PROMPT, 3, stop=[16]))
    assert not engine.is_idle
    events = [event for event in engine.run() if event.id == identity]
    assert [event.stop_reason for event in events] in ([None, None, "length"], [None, "stop"], ["stop"])
    assert [event.token for event in events] == events[-1].result.token_ids.tolist()[9:]
    assert engine.is_idle and engine.step() == [] and not model.training


def test_cancelling(model):
    engine = engine_of(model, max_batch=1)
    running, waiting = engine.add(Request(PROMPT, 9)), engine.add(Request(PROMPT, 9))
    engine.step(), engine.step()  # a chunk of eight, then the last token of the prompt
    assert (engine.statistics().running, engine.statistics().waiting) == (1, 1)
    assert engine.cancel(running) and engine.cancel(waiting) and not engine.cancel(running)
    ends = {event.id: event for event in engine.run()}
    assert {event.stop_reason for event in ends.values()} == {"cancelled"}
    assert ends[running].result.new_tokens == [1] and ends[waiting].result.new_tokens == [0]
    assert engine.statistics().cancelled == 2
    assert_no_page_is_lost(engine)
    for unknown in (2, -1, "0"):
        with pytest.raises(KeyError, match="there is no request"):
            engine.cancel(unknown)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": [1] * (CONTEXT + 1)}, ValueError, f"prompt 0 has 25 tokens, more than the model's context of {CONTEXT}"),
        ({"prompt": [1] * CONTEXT}, ValueError, "prompt has 24 tokens, all of the model's context of 24: there is no room"),
        ({"prompt": []}, ValueError, "prompts must hold at least one prompt"),
        ({"prompt": [3, VOCABULARY]}, ValueError, "prompt 0 holds token id 17, allowed are 0 to 16"),
        ({"prompt": [3, -1]}, ValueError, "prompt 0 holds token id -1"),
        ({"prompt": "a text"}, TypeError, "encode it with the model's tokenizer"),
        ({"prompt": [[1], [2]]}, ValueError, "prompt must be one prompt"),
        ({"prompt": torch.ones(1, 3)}, TypeError, "prompts must hold int64 or int32 ids, got torch.float32"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1 for an engine, got 0"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an int, got 2.0"),
        ({"top_k": 3}, ValueError, "top_k=3 limits what is drawn from, but temperature is 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"stop": "end"}, ValueError, "stop has the string 'end', which needs tokenizer="),
        ({"stop": 17}, ValueError, "stop has token id 17, allowed are 0 to 16"),
        ({"eos_token_id": 99}, ValueError, "eos_token_id must be from 0 to 16, got 99"),
        ({"constraint": 3}, TypeError, "constraint must be callable or None"),
        ({"priority": math.nan}, ValueError, "priority must be a number that can be compared"),
        ({"priority": "high"}, TypeError, "priority must be a number, got 'high'"),
        ({"max_new_tokens": 15}, ValueError, "9 tokens with 15 new ones needs up to 12 pages of 2 tokens, and the engine has 11"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_and_harm_nobody(model, change, error, message):
    engine = engine_of(model, num_pages=11)
    good = Request(PROMPT, 6)
    identity = engine.add(good)
    engine.step()
    with pytest.raises(error, match=message):
        engine.add(dataclasses.replace(Request(PROMPT, 3), **change))
    ends = [event for event in engine.run() if event.stop_reason]
    assert [event.id for event in ends] == [identity]
    assert ends[0].result.token_ids.tolist() == alone_of(model)(good).token_ids.tolist()
    assert_no_page_is_lost(engine)


def fail(row, ids):
    if len(ids) > 11:
        raise KeyError("no rule for this")


def test_requests_that_go_bad_end_alone(model):
    """A constraint that raises or allows nothing, and a bias beyond the vocabulary, which is known with the first logits."""
    engine = engine_of(model, max_batch=4)
    bad = [
        Request(PROMPT, 6, constraint=fail),
        Request(PROMPT, 6, constraint=lambda row, ids: []),
        Request(PROMPT, 6, logit_bias={VOCABULARY: 1.0}),
    ]
    requests = [bad[0], Request(PROMPT, 8), *bad[1:], Request(PROMPT[:4], 12, temperature=1.0, seed=1)]
    ends = run(engine, requests)
    expected = (
        (0, KeyError, "no rule for this", 3),
        (2, ValueError, "allows no token", 0),
        (3, ValueError, "logit_bias has token id 17", 0),
    )
    for place, kind, message, count in expected:
        event = ends[place]
        assert event.stop_reason == "error" and isinstance(event.error, kind) and message in str(event.error)
        assert event.result.new_tokens == [count] and event.result.stop_reasons == ["error"]
    for place in (1, 4):
        assert ends[place].result.token_ids.tolist() == alone_of(model)(requests[place]).token_ids.tolist()
    assert engine.statistics().failed == 3 and engine.statistics().finished == 2
    assert_no_page_is_lost(engine)


def test_a_model_that_breaks_for_one_sequence_breaks_no_other(model):
    """NaN comes of one token. Its keys lie in pages that are freed, and are not found by the next who begins alike."""
    with torch.no_grad():
        model.model.embed_tokens.weight[15] = math.nan
        model.lm_head.weight[15] = 0.0
    engine = engine_of(model, poison=False)
    requests = [Request([1, 15, 2, 4, 5], 6), Request(PROMPT, 9), Request([1, 15, 2, 4, 5], 6)]
    ends = run(engine, requests)
    for place in (0, 2):
        assert ends[place].stop_reason == "error" and "the logits there hold NaN" in str(ends[place].error)
    good = ends[1].result.token_ids.tolist()
    assert good == alone_of(model)(requests[1]).token_ids.tolist()
    assert engine.statistics().tokens_reused == 0
    assert run(engine, [requests[1]])[0].result.token_ids.tolist() == good
    assert_no_page_is_lost(engine)


@pytest.mark.parametrize("part", ["block", "head"])
def test_a_step_that_raises_can_be_done_again(model, part):
    engine = engine_of(model, num_pages=24)
    requests = [Request(PROMPT[:3], 6, temperature=1.0, seed=5), Request(PROMPT, 6)]

    def break_down(*_):
        raise RuntimeError("out of order")

    hook = {"block": model.model.layers[0], "head": model.lm_head}[part].register_forward_hook(break_down)
    places = {engine.add(request): place for place, request in enumerate(requests)}
    cancelled = engine.add(Request(PROMPT, 3))
    engine.cancel(cancelled)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="out of order"):
            engine.step()
    hook.remove()
    ends = {event.id: event for event in engine.run() if event.stop_reason}
    assert ends.pop(cancelled).stop_reason == "cancelled"
    for identity, event in ends.items():
        assert event.result.token_ids.tolist() == alone_of(model)(requests[places[identity]]).token_ids.tolist()
    assert_no_page_is_lost(engine)


def test_nothing_may_change_within_a_step(model):
    engine = engine_of(model)
    engine.add(Request(PROMPT, 3, constraint=lambda row, ids: engine.cancel(0)))
    (event,) = list(engine.run())
    assert isinstance(event.error, RuntimeError) and "cancel was called within a step" in str(event.error)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_batch": 0}, ValueError, "max_batch must be at least 1, got 0"),
        ({"prefill_chunk": 1.5}, TypeError, "prefill_chunk must be an int, got 1.5"),
        ({"num_pages": 0}, ValueError, "num_pages must be at least 1, got 0"),
        ({"memory": 10}, ValueError, "memory must hold at least one page and the tables"),
        ({"memory": 10**6, "num_pages": 3}, ValueError, "give num_pages or memory, got both: 3 and 1000000"),
        ({"num_pages": 10**12}, NotEnoughMemory, "the paged KV cache needs"),
        ({"cache": "contiguous"}, ValueError, "cache must be 'paged', 'paged-int8' or 'paged-fp8' for an engine"),
        ({"cache": "pages"}, ValueError, "cache must be one of"),
    ],
)
def test_bad_engines_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        Engine(model, **options)


def test_memory_becomes_pages(model):
    engine = engine_of(model, memory=20_000)
    assert 20_000 - 2 * 2 * 8 * 2 * 4 < engine._cache.nbytes <= 20_000  # less than a page is left
    assert run(engine, [Request(PROMPT, 4)])[0].stop_reason == "length"


def test_models_that_an_engine_does_not_serve():
    with pytest.raises(TypeError, match="model must be a Transformer, got Linear"):
        Engine(torch.nn.Linear(2, 2))
    encoder_decoder = next(config for config in FAMILY_CONFIGS.values() if config.is_encoder_decoder)
    with pytest.raises(ValueError, match="models without an encoder: use generate"):
        Engine(make_model(encoder_decoder, 0, "cpu"))
    with pytest.raises(ValueError, match=r"an engine serves positions 'learned', .*, got 't5'"):
        Engine(Transformer(TransformerConfig.gpt2(**SIZES, positions="t5")))


def test_lengths_behind_which_rope_changes_are_refused():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 12}
    model = tiny_model(dataclasses.replace(TINY, rope_scaling=scaling))
    engine = engine_of(model)
    with pytest.raises(
        ValueError, match=r"prompt and new tokens are 9 \+ 5: beyond 12 RoPE's frequencies depend on the length"
    ):
        engine.add(Request(PROMPT, 5))
    request = Request(PROMPT, 4)
    assert run(engine, [request])[0].result.token_ids.tolist() == alone_of(model)(request).token_ids.tolist()
