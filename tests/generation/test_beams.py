"""Beam search: the plain search without a cache, all continuations there are, batches and caches of every kind, what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import tokenizers
import torch

from pytransformer.generation import Prefix, generate, generate_stream
from pytransformer.generation.beams import BeamRun
from pytransformer.generation.caches import KVCache, PagedCache
from pytransformer.generation.caches.contiguous import ContiguousLayer
from pytransformer.text import Tokenizer
from tests.model.configs import CONFIGS, FAMILY_CONFIGS, make_model, random_ids

from .support_beams import beam_search, every_continuation, next_log_probabilities

CONFIG = CONFIGS["llama"]
# 12 of 67 tokens end a text, so that texts of many lengths compete.
ENDS = tuple(range(20, 32))
ALL = {**CONFIGS, **FAMILY_CONFIGS}


def prompts_of(config, device, lengths=(3, 7, 1)):
    sizes = dataclasses.replace(config.encoder) if config.is_encoder_decoder else config
    return [random_ids(sizes, (length,), length, device) for length in lengths]


def new_tokens(result, count):
    """Per prompt, of each of its ``count`` results: score and new tokens."""
    spans = zip(result.token_ids, result.prompt_lengths, result.new_tokens)
    tokens = [tuple(row[start : start + length].tolist()) for row, start, length in spans]
    pairs = list(zip(result.scores, tokens))
    return [pairs[start : start + count] for start in range(0, len(pairs), count)]


def assert_found(actual, expected):
    """Equal tokens in order, and scores that float32 sums of logarithms of float32 logits give."""
    assert [tokens for _, tokens in actual] == [found.tokens for found in expected[: len(actual)]]
    for (score, _), found in zip(actual, expected):
        assert math.isclose(score, found.score, rel_tol=2e-5, abs_tol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    ("penalty", "stopping"), [(1.0, False), (2.0, True), (1.5, "never"), (-1.0, "never"), (0.0, False)]
)
def test_it_finds_what_the_plain_search_finds(name, penalty, stopping, device):
    model = make_model(ALL[name], 0, device)
    prompts = prompts_of(model.config, device, (3, 6))
    options = {"length_penalty": penalty, "early_stopping": stopping}
    result = generate(model, prompts, 8, num_beams=3, num_return_sequences=3, eos_token_id=ENDS, **options)
    found = new_tokens(result, 3)
    for prompt, actual in zip(prompts, found):
        assert_found(actual, beam_search(model, prompt.tolist(), 8, 3, ends=ENDS, **options))


@torch.no_grad()
def test_each_option_makes_a_difference_and_is_the_plain_searchs(device):
    model = make_model(CONFIG, 1, device)
    model.lm_head.weight.mul_(2.0)
    ids, found = random_ids(CONFIG, (4, 2), 1, device), {}
    for penalty, stopping in ((1.0, True), (1.0, False), (1.0, "never"), (3.0, False), (-1.0, False)):
        options = {"length_penalty": penalty, "early_stopping": stopping}
        result = generate(model, ids, 8, num_beams=3, num_return_sequences=3, eos_token_id=ENDS, **options)
        found[penalty, stopping] = [[tokens for _, tokens in pairs] for pairs in new_tokens(result, 3)]
        for row, tokens in zip(ids.tolist(), found[penalty, stopping]):
            assert tokens == [other.tokens for other in beam_search(model, row, 8, 3, ends=ENDS, **options)]
    usual = found.pop((1.0, False))
    assert all(tokens != usual for tokens in found.values())
    assert len({len(tokens) for texts in usual for tokens in texts}) > 1


@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_with_beams_enough_it_finds_the_best_of_all(penalty, device):
    model = make_model(dataclasses.replace(CONFIG, vocab_size=5), 2, device)
    result = generate(
        model,
        [[1, 3]],
        3,
        num_beams=125,
        num_return_sequences=20,
        early_stopping="never",
        length_penalty=penalty,
        eos_token_id=(0, 4),
    )
    assert_found(new_tokens(result, 20)[0], every_continuation(model, [1, 3], 3, (0, 4), penalty))


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "falcon-alibi", "longrope", "t5-positions-decoder", "sinks-biases", "bart"]
)
def test_each_prompt_gets_what_it_gets_alone(name, device):
    """Layers with windows and without, every kind of positions, RoPE that changes on the way, and a source."""
    model = make_model(ALL[name], 0, device)
    prompts = prompts_of(model.config, device, (5, 7, 1))
    options = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": ENDS}
    together = {
        kind: new_tokens(generate(model, prompts, 6, cache=kind, **options), 2) for kind in ("contiguous", "paged")
    }
    for index, prompt in enumerate(prompts):
        alone = new_tokens(generate(model, [prompt], 6, **options), 2)[0]
        plain = new_tokens(generate(model, [prompt], 6, use_cache=False, **options), 2)[0]
        for found in (plain, *(kind[index] for kind in together.values())):
            assert [tokens for _, tokens in found] == [tokens for _, tokens in alone]
            assert [score for score, _ in found] == pytest.approx([score for score, _ in alone], rel=1e-5)


@pytest.mark.parametrize("kind", ["int8", "paged-fp8"])
def test_quantised_caches_serve_beams(kind, device):
    model = make_model(CONFIG, 0, device)
    prompts = prompts_of(CONFIG, device)
    options = {"num_beams": 3, "eos_token_id": ENDS, "cache": kind}
    together = new_tokens(generate(model, prompts, 8, **options), 1)
    for prompt, found in zip(prompts, together):
        (alone,) = new_tokens(generate(model, [prompt], 8, **options), 1)
        assert [tokens for _, tokens in alone] == [tokens for _, tokens in found]
        assert math.isclose(alone[0][0], found[0][0], rel_tol=1e-5)
        # The score is that of the tokens, up to what eight bits do to it.
        (exact,) = beam_search(model, prompt.tolist(), 8, 1, edit=forced(prompt, found[0][1]), ends=ENDS)
        assert abs(exact.score - found[0][0]) < 0.1


def forced(prompt, tokens):
    """An edit that leaves nothing but these tokens."""

    def edit(ids, scores):
        masked = torch.full_like(scores, -math.inf)
        token = tokens[len(ids) - len(prompt)]
        masked[token] = scores[token]
        return masked

    return edit


def test_penalties_bias_and_constraint_follow_each_beams_own_tokens(device):
    model = make_model(CONFIG, 3, device)
    prompts = prompts_of(CONFIG, device)
    bias, asked = {5: 1.5, 6: -1.0, 7: -math.inf, 21: 2.0}, []

    def allowed(row, ids):
        asked.append((row, tuple(ids)))
        return [(ids[-1] * 5 + row + step) % 67 for step in range(25)]

    def edit_of(row, start):
        def edit(ids, scores):
            scores = scores.clone()
            for token, value in bias.items():
                scores[token] += value
            for token in set(ids):
                scores[token] = scores[token] * 1.4 if scores[token] < 0 else scores[token] / 1.4
            for token in ids[start:]:
                scores[token] -= 0.3
            for token in set(ids[start:]):
                scores[token] -= 0.2
            mask = torch.full_like(scores, -math.inf)
            mask[allowed(row, ids)] = 0.0
            return scores + mask

        return edit

    options = {"logit_bias": bias, "repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": 0.2}
    result = generate(
        model, prompts, 9, num_beams=4, num_return_sequences=4, eos_token_id=ENDS, constraint=allowed, **options
    )
    assert len(asked) == len(set(asked))  # about each text once, and about none that is not there
    for row, (prompt, found) in enumerate(zip(prompts, new_tokens(result, 4))):
        expected = beam_search(model, prompt.tolist(), 9, 4, ends=ENDS, edit=edit_of(row, len(prompt)))
        assert_found(found, expected)
        assert all(tokens[-1] in ENDS or len(tokens) == 9 for _, tokens in found)


@pytest.mark.parametrize("use_cache", [True, False])
def test_log_probabilities_are_those_of_the_model_and_make_the_score(use_cache, device):
    model = make_model(CONFIG, 4, device)
    prompts = prompts_of(CONFIG, device)
    options = {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": ENDS, "length_penalty": 0.7}
    options.update(return_log_probabilities=True, use_cache=use_cache)
    result = generate(model, prompts, 7, **options)
    biased = generate(model, prompts, 7, logit_bias={3: 2.0}, **options)
    for found in (result, biased):
        for row, values in enumerate(found.log_probabilities):
            ids = found.token_ids[row].tolist()
            start = found.prompt_lengths[row]
            expected = [
                next_log_probabilities(model, [], [ids[:place]])[0, ids[place]].item()
                for place in range(start, len(ids))
            ]
            assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
            if found is result:
                assert found.scores[row] == pytest.approx(sum(values) / len(values) ** 0.7, rel=1e-5)


def test_a_prompt_is_computed_once_and_one_length_takes_the_direct_path(device, monkeypatch):
    model = make_model(CONFIG, 0, device)
    ids = random_ids(CONFIG, (2, 5), 0, device)
    shapes, direct, copied = [], [], []
    choose_path, reorder, append = KVCache.choose_path, KVCache.reorder, ContiguousLayer.append

    def chosen(cache, bound):
        choose_path(cache, bound)
        direct.append(cache.is_direct == bound)

    def reordered(cache, rows, shared=0):
        copied.append((len(rows), shared))
        reorder(cache, rows, shared)

    def appended(layer, q, k, v, **options):
        shapes.append(tuple(k.shape[:2]))
        return append(layer, q, k, v, **options)

    monkeypatch.setattr(KVCache, "choose_path", chosen)
    monkeypatch.setattr(KVCache, "reorder", reordered)
    monkeypatch.setattr(ContiguousLayer, "append", appended)
    generate(model, ids, 6, num_beams=4, eos_token_id=())
    layers = CONFIG.num_layers
    assert shapes == [(2, 5)] * layers + [(8, 1)] * layers * 5
    assert len(direct) == 6 and all(direct)  # the prefill's too
    assert copied[:2] == [(2, 0), (8, 0)]  # before the prefill, and after it
    assert all(size == 8 and shared >= 5 for size, shared in copied[2:])


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_beams_share_their_sources_keys_and_values(name, kind, device, monkeypatch):
    model = make_model(ALL[name], 0, device)
    made, held = [], []
    keys_and_values = model.model.keys_and_values
    monkeypatch.setattr(model.model, "keys_and_values", lambda memory: made.append(keys_and_values(memory)) or made[-1])
    for cache in (KVCache, PagedCache):
        advance = cache.advance
        monkeypatch.setattr(
            cache, "advance", lambda self, *given, step=advance: held.append(self.memory_kv) or step(self, *given)
        )
    prompts = prompts_of(model.config, device)
    result = generate(model, prompts, 6, num_beams=4, eos_token_id=(), cache=kind)
    assert len(made) == 1 and len(held) >= 6 and result.new_tokens == [6, 6, 6]
    for layers in held:
        assert layers is made[0] and all(k.shape[:2] == v.shape[:2] == (3, 7) for k, v in layers)


def test_a_prefix_serves_beams(device):
    model = make_model(CONFIG, 0, device)
    beginning = random_ids(CONFIG, (6,), 0, device)
    prompts = [torch.cat([beginning, row]) for row in prompts_of(CONFIG, device)]
    for kind in ("contiguous", "paged"):
        options = {"num_beams": 3, "eos_token_id": ENDS, "cache": kind}
        prefix = Prefix.of(model, beginning)
        one, other = (generate(model, prompts, 6, prefix=given, **options) for given in (prefix, None))
        assert all(map(torch.equal, one.token_ids, other.token_ids))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={chr(97 + n): n for n in range(12)}, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend)


def test_stop_strings_and_stop_tokens_end_beams(tokenizer, device):
    """As the plain search does; a string that only two tokens make is found across their border."""
    model = make_model(dataclasses.replace(CONFIG, vocab_size=12), 5, device)
    options = {"num_beams": 3, "num_return_sequences": 3, "eos_token_id": (), "tokenizer": tokenizer}
    plain = generate(model, [[1, 2]], 6, **options)
    assert plain.stop_reasons == ["length"] * 3
    # Tokens and pairs of them in the middle of the best text.
    ends = plain.token_ids[0][4:6].tolist()
    result = generate(model, [[1, 2]], 6, stop=ends, **options)
    expected = beam_search(model, [1, 2], 6, 3, ends=ends)
    assert_found(new_tokens(result, 3)[0], expected)
    reasons = ["stop" if found.tokens[-1] in ends else "length" for found in expected]
    assert result.stop_reasons == reasons and "stop" in reasons
    assert result.texts == ["".join(chr(97 + token) for token in found.tokens) for found in expected]
    stop = plain.texts[0][1:3]
    result = generate(model, [[1, 2]], 6, stop=stop, length_penalty=-1.0, **options)
    expected = beam_search(
        model,
        [1, 2],
        6,
        3,
        length_penalty=-1.0,
        ended=lambda tokens: stop in "".join(chr(97 + token) for token in tokens),
    )
    assert_found(new_tokens(result, 3)[0], expected)
    written = ["".join(chr(97 + token) for token in found.tokens) for found in expected]
    assert result.texts == [text.split(stop)[0] for text in written]
    reasons = ["stop" if text.endswith(stop) else "length" for text in written]
    assert result.stop_reasons == reasons and "stop" in reasons


def test_the_form_of_the_results(device):
    model = make_model(CONFIG, 0, device)
    ids = random_ids(CONFIG, (2, 4), 0, device)
    options = {"num_beams": 3, "eos_token_id": ()}
    single, batch, listed = (
        generate(model, prompts, 5, num_return_sequences=2, **options) for prompts in (ids[0], ids, list(ids))
    )
    assert single.token_ids.shape == (2, 9) and batch.token_ids.shape == (4, 9) and len(listed.token_ids) == 4
    assert torch.equal(batch.token_ids, torch.stack(listed.token_ids)) and torch.equal(
        batch.token_ids[:2], single.token_ids
    )
    assert batch.scores[0] >= batch.scores[1] and batch.scores[2] >= batch.scores[3]
    assert len(batch.stop_reasons) == len(batch.prompt_lengths) == len(batch.new_tokens) == 4
    best = generate(model, ids[0], 5, **options)
    assert best.token_ids.shape == (9,) and torch.equal(best.token_ids, single.token_ids[0])
    assert generate(model, ids, 5).scores is None


@pytest.mark.parametrize("pad_token_id", [0, 5])
def test_what_ended_early_is_filled_with_the_padding_token_also_if_that_is_0(pad_token_id, device):
    """transformers 5.23 writes the end token there if the padding token is 0 and there are beams, and the padding token else."""
    model = make_model(CONFIG, 0, device)
    lengths = (1, 4)

    def allowed(row, ids):
        return [9] if len(ids) - 3 >= lengths[row] else [7, 8]

    ids = random_ids(CONFIG, (2, 3), 0, device)
    options = {"eos_token_id": 9, "pad_token_id": pad_token_id, "constraint": allowed}
    result = generate(model, ids, 8, num_beams=2, **options).token_ids
    assert result.shape == (2, 8) and result[0, 4:].tolist() == [9] + [pad_token_id] * 3


def test_limits_are_each_prompts_own(device):
    model = make_model(CONFIG, 0, device)
    prompts = prompts_of(CONFIG, device, (24, 22, 3))
    result = generate(model, prompts, 4, num_beams=2, num_return_sequences=2, eos_token_id=())
    assert result.stop_reasons == ["context"] * 4 + ["length"] * 2 and result.new_tokens == [0, 0, 2, 2, 4, 4]
    assert result.scores[:2] == [0.0, 0.0] and torch.equal(result.token_ids[0], prompts[0])
    assert generate(model, prompts, 0, num_beams=2).stop_reasons == ["length"] * 3


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_is_allowed_may_be_less_than_the_beams(use_cache, device, monkeypatch):
    """Places without a beam stay empty, fill again where a text branches, and their logits mean nothing."""
    model = make_model(CONFIG, 0, device)
    tree = {
        (): [1],
        (1,): [2, 3],
        (1, 2): [20],
        (1, 3): [4, 20, 5],
        (1, 3, 4): [20],
        (1, 3, 5): [6],
        (1, 3, 5, 6): [20],
    }

    sums = BeamRun._sums

    def poisoned(run, logits, places):
        logits[[row for row, reason in enumerate(run.stop_reasons) if reason is not None]] = math.nan
        return sums(run, logits, places)

    monkeypatch.setattr(BeamRun, "_sums", poisoned)

    def allowed(row, ids):
        return None if row == 2 else tree[tuple(ids[2:])]

    def edit(ids, scores):
        mask = torch.full_like(scores, -math.inf)
        mask[tree[tuple(ids[2:])]] = 0.0
        return scores + mask

    options = {"num_beams": 6, "eos_token_id": 20, "constraint": allowed, "use_cache": use_cache}
    prompts = [[7, 8], [9, 8], [5, 5, 5]]
    for stopping in (True, False, "never"):
        result = generate(model, prompts, 9, num_return_sequences=4, early_stopping=stopping, **options)
        for prompt, found in zip(prompts[:2], new_tokens(result, 4)):
            assert {tokens for _, tokens in found} == {(1, 2, 20), (1, 3, 20), (1, 3, 4, 20), (1, 3, 5, 6, 20)}
            assert_found(found, beam_search(model, prompt, 9, 6, early_stopping=stopping, ends=(20,), edit=edit))
    with pytest.raises(ValueError, match="num_return_sequences=5, but of prompt 0 there are only 4 continuations"):
        generate(model, [[7, 8]], 9, num_return_sequences=5, **options)


def broken(model, monkeypatch, value, when):
    """Makes logits of row 1 of some step ``value``."""
    head, steps = type(model.lm_head).forward, []

    def forward(self, hidden):
        logits = head(self, hidden)
        steps.append(None)
        if len(steps) == when + 1:
            logits[-1] = value
        return logits

    monkeypatch.setattr(type(model.lm_head), "forward", forward)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (math.nan, "hold NaN"),
        (-math.inf, "are all -inf, so that no token is allowed"),
        (torch.tensor([math.inf, *[0.0] * 66]), r"hold \+inf"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"logit_bias": {3: 1.0}, "repetition_penalty": 1.2}])
def test_a_broken_model_is_named_by_prompt_and_step(value, what, options, device, monkeypatch):
    model = make_model(CONFIG, 0, device)
    broken(model, monkeypatch, value.to(device) if isinstance(value, torch.Tensor) else value, 2)
    with pytest.raises(
        ValueError, match=f"no token can be chosen in step 2 for row 1 of the batch: the logits there {what}"
    ):
        generate(model, [[1, 2], [3]], 5, num_beams=3, eos_token_id=(), use_cache=False, **options)


def test_a_search_without_a_way_out_is_an_error(device):
    model = make_model(CONFIG, 0, device)
    with pytest.raises(ValueError, match=r"in step 1 for row 1 of the batch: the logits there are all -inf"):
        generate(
            model,
            [[1], [2]],
            4,
            num_beams=2,
            logit_bias={5: -math.inf},
            constraint=lambda row, ids: [5] if row and len(ids) > 1 else None,
        )


REFUSED = [
    ({"num_beams": 0}, ValueError, "num_beams must be at least 1, got 0"),
    ({"num_beams": 2.0}, TypeError, r"num_beams must be an int, got 2\.0"),
    ({"num_beams": True}, TypeError, "num_beams must be an int, got True"),
    ({"num_beams": 2, "num_return_sequences": 3}, ValueError, r"num_return_sequences must be at most num_beams \(2\), got 3"),
    ({"num_return_sequences": 2}, ValueError, r"num_return_sequences must be at most num_beams \(1\), got 2"),
    ({"num_beams": 2, "num_return_sequences": 0}, ValueError, "num_return_sequences must be at least 1, got 0"),
    ({"num_beams": 2, "length_penalty": "long"}, TypeError, "length_penalty must be a number, got 'long'"),
    ({"num_beams": 2, "length_penalty": math.nan}, ValueError, r"length_penalty must be finite \(0 = none\), got nan"),
    ({"num_beams": 2, "length_penalty": 90.0}, ValueError, r"length_penalty must be from -80\.76 to 80\.76, so that float32 holds 3 new"),
    ({"num_beams": 2, "early_stopping": "always"}, ValueError, "early_stopping must be True, False or 'never', got 'always'"),
    ({"num_beams": 2, "early_stopping": None}, ValueError, "early_stopping must be True, False or 'never', got None"),
    ({"early_stopping": True}, ValueError, "early_stopping=True is for beam search: give num_beams above 1"),
    ({"length_penalty": 2.0}, ValueError, r"length_penalty=2\.0 is for beam search: give num_beams above 1"),
    ({"num_beams": 2, "temperature": 0.7}, ValueError, r"temperature=0\.7 draws tokens, num_beams=2 searches"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_options_are_refused_by_name_and_at_once(options, error, message):
    model = make_model(CONFIG, 0, torch.device("cpu"))
    for call in (generate, generate_stream):
        with pytest.raises(error, match=message):
            call(model, [1, 2], 3, **options)


def test_a_search_tells_nothing_before_its_end():
    model = make_model(CONFIG, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"callback is told tokens as they are chosen, a beam search \(num_beams=2\)"):
        generate(model, [1, 2], 3, num_beams=2, callback=print)
    with pytest.raises(
        ValueError, match=r"generate_stream gives tokens as they are chosen, a beam search \(num_beams=2\)"
    ):
        generate_stream(model, [1, 2], 3, num_beams=2)
