"""Speculative decoding: the tokens of plain decoding, or its distribution; whatever proposes them, and however many a pass brings."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.generation import DraftModel, PromptLookup, Sampler, generate, generate_stream, run, speculative
from pytransformer.generation.drafts import ModelDrafter, NgramIndex
from pytransformer.nn import packed_weight
from pytransformer.training.tokenizer import TextTokenizer
from tests.generation.caches.support import GENERATING
from tests.generation.test_sampling import chi_square, limited
from tests.model.configs import CONFIGS, make_model, random_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")
CONFIG = CONFIGS["llama"]
LENGTHS = (1, 9, 4, 13)
# Past every window, past the length at which RoPE changes, and for the longest prompt to the model's last position.
TOKENS = 14
# Between them: each kind of position and score, windows, experts, both sides of an encoder–decoder, RoPE that changes with the length.
NAMES = ("gpt2", "mistral-window", "gemma2", "falcon-alibi", "t5", "mixtral", "longrope", "dynamic-ntk")


def parts(model, lengths=LENGTHS):
    """Prompts, and another model of the same kind."""
    config = model.config
    source = config.encoder if config.is_encoder_decoder else config
    device = model.model.embed_tokens.weight.device
    return [random_ids(source, (n,), n, device) for n in lengths], make_model(config, 1, device)


def same_tokens(one, other):
    return all(map(torch.equal, one.token_ids, other.token_ids)) and one.stop_reasons == other.stop_reasons


@pytest.fixture(scope="module")
def model(device):
    return make_model(CONFIG, 0, device)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_plain_decoding(name, device):
    model = make_model(GENERATING[name], 0, device)
    prompts, small = parts(model)
    plain = generate(model, prompts, TOKENS, eos_token_id=())
    for draft in (PromptLookup(2, 3), small):
        found = generate(model, prompts, TOKENS, eos_token_id=(), draft=draft)
        assert same_tokens(found, plain)
        assert plain.drafted is None and found.drafted is not None and found.accepted is not None
        assert all(0 <= kept <= count for kept, count in zip(found.accepted, found.drafted))
    changes = name in ("longrope", "dynamic-ntk")
    # The model's own proposals all stay.
    own = generate(model, prompts, TOKENS, eos_token_id=(), draft=DraftModel(model, 4))
    assert same_tokens(own, plain)
    assert own.accepted == own.drafted and (changes or sum(own.drafted) > 0)


@pytest.mark.parametrize("name", ["longrope", "dynamic-ntk"])
def test_rope_may_change_on_the_way(name, device):
    config = GENERATING[name]
    first = config.rope_scaling["original_max_position_embeddings"]
    model, short = make_model(config, 0, device), make_model(CONFIGS["llama"], 0, device)
    assert short.config.vocab_size == config.vocab_size
    prompts = [random_ids(config, (length,), length, device) for length in (1, first - 1, 2, first + 1)]
    plain = generate(model, prompts, TOKENS, eos_token_id=())
    for draft in (PromptLookup(1, 3), DraftModel(short, 3)):
        found = generate(model, prompts, TOKENS, eos_token_id=(), draft=draft)
        assert same_tokens(found, plain) and sum(found.drafted) > 0
    for options in ({"draft": DraftModel(short, 3)}, {"draft": PromptLookup(1, 3)}):
        options |= {"temperature": 1.0, "seed": [1, 2, 3, 4]}
        together = generate(model, prompts, TOKENS, eos_token_id=(), **options)
        for index, prompt in enumerate(prompts):
            alone = generate(model, prompt, TOKENS, eos_token_id=(), **{**options, "seed": index + 1})
            assert torch.equal(together.token_ids[index], alone.token_ids)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral-window"])
def test_greedy_tokens_of_many_models_in_float32(name, device):
    for seed in range(5):
        model = make_model(CONFIGS[name], seed, device)
        prompt = random_ids(model.config, (2, 3), seed, device).repeat(1, 3)
        for prompts in (prompt[0], prompt):
            plain = generate(model, prompts, 15, eos_token_id=())
            found = generate(model, prompts, 15, eos_token_id=(), draft=PromptLookup(2, 5))
            assert torch.equal(plain.token_ids, found.token_ids)


@pytest.mark.parametrize("cache", ["int8", "paged-fp8"])
def test_quantised_caches_hold_accepted_tokens_alone(model, cache, device):
    prompts, _ = parts(model)
    plain = generate(model, prompts, 12, eos_token_id=(), cache=cache)
    # Codes of 8 bits turn a rounding into a step, so here it is one token a pass that must agree: all proposals are wrong.
    wrong = make_model(CONFIG, 5, device)
    found = generate(model, prompts, 12, eos_token_id=(), cache=cache, draft=DraftModel(wrong, 3))
    assert same_tokens(found, plain) and sum(found.drafted) > 2 * sum(found.accepted)


OPTIONS = [
    {"repetition_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    {"logit_bias": {3: 2.0, 7: float("-inf")}, "return_log_probabilities": True},
    {"eos_token_id": range(0, 67, 9), "stop": [5, 6], "return_log_probabilities": True},
    {"constraint": lambda row, ids: [(ids[-1] * 7 + step) % 67 for step in range(1, 9)]},
    {"temperature": 1.0, "top_p": 0.9, "seed": [1, 2, 3, 4], "frequency_penalty": 0.5},
    {"temperature": 0.7, "top_k": 9, "min_p": 0.02, "seed": 5, "return_log_probabilities": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_every_step_is_that_of_plain_decoding(model, options, monkeypatch):
    monkeypatch.setattr(speculative, "_FAR_AHEAD", 2)  # sequences wait for each other
    prompts, small = parts(model)
    plain = list(generate_stream(model, prompts, 14, **options))
    drafts = [PromptLookup(2, 4)] if "temperature" in options else [PromptLookup(2, 4), DraftModel(model, 3), small]
    for draft in drafts:
        found = list(generate_stream(model, prompts, 14, draft=draft, **options))
        assert [(step.index, step.tokens, step.stop_reasons) for step in found] == [
            (step.index, step.tokens, step.stop_reasons) for step in plain
        ]
        for mine, theirs in zip(found, plain):
            rows = [row for row, token in enumerate(theirs.tokens) if token is not None]
            torch.testing.assert_close(mine.logits[rows], theirs.logits[rows], rtol=1e-4, atol=1e-4)
            if theirs.log_probabilities is None:
                assert mine.log_probabilities is None
                continue
            assert [value is None for value in mine.log_probabilities] == [token is None for token in mine.tokens]
            values = [[step.log_probabilities[row] for row in rows] for step in (mine, theirs)]
            assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-4)


def test_texts_and_stop_strings_are_those_of_plain_decoding(device):
    tokenizer = TextTokenizer.train(["xyz"], 257)
    config = TransformerConfig.llama(
        vocab_size=257, hidden_size=32, num_layers=1, num_heads=2, max_seqlen=64, eos_token_id=tokenizer.end_token_id
    )
    model = make_model(config, 2, device)
    prompts = [tokenizer.encode(text) for text in ("a", "abcabc", "xyzzy xyz")]
    free = generate(model, prompts, 24, tokenizer=tokenizer)
    stop = [text[9:11] for text in free.texts if len(text) > 11]
    assert stop
    options = {"stop": stop, "tokenizer": tokenizer}
    plain = list(generate_stream(model, prompts, 24, **options))
    assert any("stop" in step.stop_reasons for step in plain)
    for draft in (PromptLookup(2, 4), DraftModel(model, 5)):
        found = list(generate_stream(model, prompts, 24, draft=draft, **options))
        assert [(step.tokens, step.texts, step.stop_reasons) for step in found] == [
            (step.tokens, step.texts, step.stop_reasons) for step in plain
        ]


def test_a_constraint_is_asked_as_in_plain_decoding(model):
    prompts, _ = parts(model)
    calls = {}
    for draft in (None, PromptLookup(1, 4), DraftModel(model, 3)):
        asked: list[tuple[int, tuple[int, ...]]] = []

        def constraint(row, ids, asked=asked):
            asked.append((row, tuple(ids)))

        generate(model, prompts, 9, constraint=constraint, draft=draft)
        assert len(set(asked)) == len(asked)
        calls[type(draft)] = sorted(asked)
    assert calls[type(None)] == calls[PromptLookup] == calls[DraftModel]


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_seeded_samples_do_not_depend_on_the_batch(model, kind, monkeypatch):
    monkeypatch.setattr(speculative, "_FAR_AHEAD", 2)
    prompts, small = parts(model, (1, 9, 4, 13, 9, 6))
    draft = PromptLookup(1, 4) if kind == "lookup" else DraftModel(small, 3)
    options = {"temperature": 0.8, "top_p": 0.9, "draft": draft, "eos_token_id": range(0, 67, 30)}
    together = generate(model, prompts, 24, seed=list(range(6)), **options)
    assert len(set(together.new_tokens)) > 1 and 0 < sum(together.accepted) < sum(together.drafted)
    for index, prompt in enumerate(prompts):
        alone = generate(model, prompt, 24, seed=index, **options)
        assert torch.equal(together.token_ids[index], alone.token_ids)
        assert (alone.drafted, alone.accepted) == ([together.drafted[index]], [together.accepted[index]])


TINY = TransformerConfig.llama(vocab_size=5, hidden_size=16, num_layers=1, num_heads=2, max_seqlen=16)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.5, 4, 1.0), (0.7, None, 0.85)], ids=str)
def test_sampled_tokens_have_the_distribution_of_the_model(temperature, top_k, top_p):
    """Three tokens after one prompt, of which a draft with quite another distribution proposes two at a time."""
    device = torch.device("cpu")
    model, small = make_model(TINY, 0, device), make_model(TINY, 3, device)
    prompt, count = torch.tensor([1, 2]), 1500
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": list(range(count))}
    found = generate(model, prompt.expand(count, -1), 3, eos_token_id=(), draft=DraftModel(small, 2), **options)
    # Both ways are taken often.
    assert 0.1 < sum(found.accepted) / sum(found.drafted) < 0.9
    texts = torch.tensor(list(itertools.product(range(5), repeat=3)))
    with torch.no_grad():
        logits = model(torch.cat([prompt.expand(len(texts), -1), texts], dim=1))[:, 1:-1]
    chances = torch.stack(
        [
            torch.stack([limited(row, temperature, top_k, top_p)[token] for row, token in zip(rows, text)])
            for rows, text in zip(logits, texts)
        ]
    )
    joint, new = chances.prod(dim=1).view(5, 5, 5), found.token_ids[:, 2:]
    for first, second in ((0, 1), (1, 2), (0, 2)):
        (other,) = {0, 1, 2} - {first, second}
        pairs = new[:, first] * 5 + new[:, second]
        assert chi_square(pairs, joint.sum(dim=other).flatten()) < 4.0


def longest_match(ids, max_ngram):
    """The place behind the last earlier run that ends as the text does, the longest first; 0 = none."""
    for count in range(min(max_ngram, len(ids) - 1), 0, -1):
        for end in range(len(ids) - 1, count - 1, -1):
            if ids[end - count : end] == ids[-count:]:
                return end
    return 0


@pytest.mark.parametrize("max_ngram", [1, 2, 4])
def test_the_index_finds_the_longest_match_and_of_those_the_last(max_ngram):
    ids = torch.randint(4, (80,), generator=torch.Generator().manual_seed(max_ngram)).tolist()
    index, found = NgramIndex(max_ngram), 0
    for end, token in enumerate(ids, start=1):
        index.push([token])
        place = longest_match(ids[:end], max_ngram)
        text = ids[:end]
        expected = []
        for _ in range(6 if place else 0):
            expected.append(text[place + len(expected)])
            text = text + expected[-1:]
        assert index.propose(6) == expected
        found += bool(expected)
    assert found > 60 and index.propose(0) == [] and NgramIndex(2).propose(3) == []


def test_a_source_is_looked_up_too(device):
    model = make_model(GENERATING["bart"], 0, device)
    source = random_ids(model.config.encoder, (9,), 0, device)
    own = generate(model, source, 8, eos_token_id=(), draft=PromptLookup(1, 2))
    # A source that holds what will be written is found again.
    repeated = torch.cat([source, own.token_ids[:-1]])
    target = generate(model, repeated, 8, eos_token_id=())
    found = generate(model, repeated, 8, eos_token_id=(), draft=PromptLookup(1, 2))
    assert torch.equal(found.token_ids, target.token_ids) and found.drafted[0] > 0


@pytest.mark.parametrize("draft", [PromptLookup(1, 4), None], ids=["lookup", "model"])
def test_a_fault_is_told_where_plain_decoding_meets_it(model, draft, monkeypatch):
    prompts, _ = parts(model)
    draft = DraftModel(model, 4) if draft is None else draft
    free = list(generate_stream(model, prompts, 8))
    bad = free[5].tokens[2]
    plain = type(model.lm_head).forward

    def spoil(head, x):
        """Wherever sequence 2's sixth token would be chosen the logits are NaN."""
        logits = plain(head, x).clone()
        logits[(logits - free[5].logits[2]).abs().amax(dim=-1) < 1e-3] = float("nan")
        return logits

    monkeypatch.setattr(type(model.lm_head), "forward", spoil)
    monkeypatch.setattr(run, "bind", lambda model, packed=True: (model.model, model.lm_head))
    steps = []
    small = make_model(CONFIG, 1, prompts[0].device) if isinstance(draft, DraftModel) else None
    with pytest.raises(ValueError, match="in step 5 for row 2 of the batch: the logits there hold NaN"):
        for step in generate_stream(model, prompts, 8, draft=draft if small is None else small):
            steps.append(step.tokens)
    assert steps == [step.tokens for step in free[:5]] and bad is not None


def test_a_broken_draft_is_named(model, device):
    broken = make_model(CONFIG, 1, device)
    with torch.no_grad():
        broken.lm_head.weight[5] = float("nan")
    for options in ({}, {"temperature": 1.0, "seed": 0}):
        with pytest.raises(ValueError, match="the draft model can propose nothing for rows 0 of the batch"):
            generate(model, [1, 2], 8, draft=broken, **options)


def test_a_draft_with_a_shorter_context_stops_proposing(model, device):
    small = make_model(
        TransformerConfig.llama(vocab_size=67, hidden_size=16, num_layers=1, num_heads=2, max_seqlen=12), 0, device
    )
    prompts, _ = parts(model)
    plain, found = (
        generate(model, prompts, 24, eos_token_id=(), draft=draft) for draft in (None, DraftModel(small, 2))
    )
    assert same_tokens(found, plain)
    assert found.drafted[0] > 0 and found.drafted[3] == 0


def test_a_draft_model_proposes_what_it_says_itself(model, monkeypatch, device):
    """Also after some of its proposals were refused and left its cache."""
    prompts, other = parts(model)
    small = make_model(CONFIG, 0, device)  # the model, a little changed
    with torch.no_grad():
        for parameter, change in zip(small.parameters(), other.parameters()):
            parameter.lerp_(change, 0.2)
    seen = []
    propose = ModelDrafter.propose

    def watched(drafter, counts):
        found = propose(drafter, counts)
        run = drafter._run
        texts = [row.tolist() + new for row, new in zip(run.rows, run.new_tokens)]
        seen.extend((text, tokens) for text, tokens in zip(texts, found.tokens) if tokens)
        return found

    monkeypatch.setattr(ModelDrafter, "propose", watched)
    result = generate(model, prompts, 12, eos_token_id=(), draft=DraftModel(small, 3))
    assert 0 < sum(result.accepted) < sum(result.drafted)
    for text, tokens in seen[::3]:
        assert generate(small, text, len(tokens), eos_token_id=()).token_ids[len(text) :].tolist() == tokens


@pytest.mark.parametrize("pack_weights", [True, False, None])
def test_a_model_that_is_its_own_draft_proposes_by_its_present_weights(pack_weights, monkeypatch):
    monkeypatch.setattr(packed_weight, "MIN_PACKED_ELEMENTS", 1)
    model = make_model(CONFIG, 0, "cpu")
    generate(model, [[3, 1, 4]], 2, pack_weights=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    own = generate(model, [[3, 1, 4]], 12, eos_token_id=(), draft=DraftModel(model, 4), pack_weights=pack_weights)
    assert own.accepted == own.drafted and sum(own.drafted) > 0


def test_both_models_get_their_mode_back(model, device):
    small = make_model(CONFIG, 1, device).train()
    modes = []
    generate(model, [1, 2], 4, draft=small, callback=lambda step: modes.append(small.training))
    assert modes == [False] * 4 and small.training and not model.training
    assert generate(model, [1, 2], 0, draft=small).drafted == [0]


@pytest.mark.parametrize(
    ("draft", "options", "error", "message"),
    [
        (3, {}, TypeError, "draft must be a DraftModel, a PromptLookup, a Transformer or None, got int"),
        (PromptLookup(), {"use_cache": False}, ValueError, "draft is for use_cache=True"),
        ("words", {}, ValueError, "draft must have the model's vocabulary of 67 tokens, got a model with vocab_size=5"),
        ("pair", {}, ValueError, "draft and model must both be encoder-decoders or both not"),
    ],
)
def test_drafts_that_do_not_fit_are_refused(model, draft, options, error, message, device):
    if draft == "words":
        draft = make_model(TINY, 0, device)
    if draft == "pair":
        draft = make_model(GENERATING["t5"], 0, device)
        assert draft.config.vocab_size == 67
    with pytest.raises(error, match=re.escape(message)):
        generate(model, [1, 2], 4, draft=draft, **options)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
@pytest.mark.parametrize("name", ["max_ngram", "num_tokens"])
def test_bad_numbers_of_a_lookup_are_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        PromptLookup(**{name: value})


def test_bad_draft_models_are_refused(model):
    with pytest.raises(ValueError, match="num_tokens must be at least 1, got 0"):
        DraftModel(model, 0)
    with pytest.raises(TypeError, match="model of DraftModel must be a Transformer, got str"):
        DraftModel("model")


def test_weights_of_the_sampler_are_what_it_draws_by():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"top_k": 7}, {"top_p": 0.6}, {"top_k": 20, "min_p": 0.1}):
        weights, faults = Sampler(3, temperature=0.9, **options).weights(logits)
        found = weights.double() / weights.sum(dim=-1, keepdim=True)
        scores, tokens = Sampler(3, temperature=0.9, **options)._candidates(logits)
        expected = torch.softmax(scores, dim=-1)
        if tokens is not None:
            expected = torch.zeros(3, 50, dtype=torch.float64).scatter(1, tokens, expected)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        assert faults.tolist() == [0, 0, 0]
