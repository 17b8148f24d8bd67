"""Stop strings and stop tokens, texts, log-probabilities and the streaming iterator."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import tokenizers
import torch

from pytransformer import Transformer
from pytransformer.generation import generate, generate_stream
from pytransformer.generation.stopping import NewText
from pytransformer.text import Tokenizer
from tests.model.configs import CONFIGS, FAMILY_CONFIGS, make_model, random_ids

CONFIG = CONFIGS["llama"]
PIECES = ["a", "b", "c", "ab", "bc", "abc", ".", "Ġ", "Ċ", "ĊĊ", "Ã", "©", "Ġthe", "end", *"0123456789"]
IDS = {piece: index for index, piece in enumerate(PIECES)}
END = len(PIECES)


@pytest.fixture
def model(device) -> Transformer:
    return make_model(CONFIG, 0, device)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level, of a few tokens, with a special one behind them."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=IDS, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend)


def writing(*rows):
    """A constraint that makes each row's new tokens these."""
    lengths = {}

    def constraint(row, ids):
        start = lengths.setdefault(row, len(ids))
        written = rows[row]
        return [written[min(len(ids) - start, len(written) - 1)]]

    return constraint


def ids_of(*pieces):
    return [IDS[piece] for piece in pieces]


@pytest.mark.parametrize(
    ("written", "stop", "text", "count"),
    [
        (["a", "b", "c", "a"], "bc", "a", 3),  # across a border
        (["ab", "c", "ab", "a"], "ca", "ab", 3),  # two borders, and the rest of a token is cut too
        (["a", "abc", "."], "b", "aa", 2),  # inside a token
        (["a", "ab", "abc", "."], ["x", "babc"], "aa", 3),
        (["a", "Ġ", "Ċ", "Ċ", "a"], ["\n\n", "."], "a ", 4),
        (["a", "ĊĊ", "a", "."], "\n\n", "a", 2),
        (["Ã", "©", "a"], "é", "", 2),  # a character of two tokens
        (["abc", "a"], ["c", "abc"], "", 1),  # the first of several
        (["a", "b", "a", "b", "."], "abc", "abab.", 5),  # begun twice, never complete
    ],
)
def test_a_stop_string_ends_the_text_wherever_tokens_end(model, tokenizer, written, stop, text, count):
    steps = []
    result = generate(
        model, [1, 2], 5, stop=stop, tokenizer=tokenizer, callback=steps.append,
        constraint=writing([*ids_of(*written), IDS["."]]),
    )  # fmt: skip
    stopped = count < 5
    assert result.new_tokens == [count] and result.stop_reasons == ["stop" if stopped else "length"]
    assert result.texts == [text] and "".join(step.texts[0] for step in steps) == text
    assert result.token_ids[2:].tolist() == ids_of(*written)[:count]  # the tokens are all there


def test_what_may_begin_a_stop_string_is_held_back(model, tokenizer):
    written = ids_of("a", "b", "a", "b", ".")
    stream = generate_stream(model, [1], 5, stop="bc", tokenizer=tokenizer, constraint=writing(written))
    assert [step.texts[0] for step in stream] == ["a", "", "ba", "", "b."]


def test_any_text_in_any_tokens_ends_at_the_first_stop_string(tokenizer):
    """Against looking for them in the whole text after each token; what is held back is always the beginning of one."""
    chance = random.Random(0)
    ended = 0
    for _ in range(300):
        stops = ["".join(chance.choices("abc", k=chance.randint(1, 4))) for _ in range(chance.randint(1, 3))]
        written = chance.choices(["a", "b", "c", "ab", "bc", "abc"], k=8)
        text, shown, whole = NewText(tokenizer, [], stops), "", ""
        for piece in written:
            whole += piece
            shown += text.push(IDS[piece])
            places = [whole.find(stop) for stop in stops if stop in whole]
            assert text.is_stopped == bool(places)
            if places:
                ended += 1
                assert shown == whole[: min(places)]
                break
            held = whole.removeprefix(shown)
            assert whole.startswith(shown) and (not held or any(stop.startswith(held) for stop in stops))
        shown += text.finish()
        assert shown == text.text == (shown if text.is_stopped else whole)
    assert 100 < ended < 300


def test_a_stop_string_in_the_last_token_is_the_reason(model, tokenizer):
    result = generate(model, [1], 2, stop="bc", tokenizer=tokenizer, constraint=writing(ids_of("b", "c")))
    assert result.stop_reasons == ["stop"] and result.texts == [""]


def test_the_prompt_is_no_part_of_the_text(model, tokenizer):
    constraint = writing(ids_of("c", "a"))
    assert generate(model, ids_of("a", "b"), 2, stop="bc", tokenizer=tokenizer, constraint=constraint).texts == ["ca"]


def test_half_a_character_at_the_end_is_shown_as_such(model, tokenizer):
    result = generate(model, [1], 2, tokenizer=tokenizer, constraint=writing(ids_of("a", "Ã")))
    assert result.texts == ["a\N{REPLACEMENT CHARACTER}"] and result.stop_reasons == ["length"]


def test_special_tokens_and_ids_stop_too(model, tokenizer):
    written = [*ids_of("a", "b"), END, *ids_of("c")]
    for stop, count in (("<|end|>", 3), (END, 3), (["<|end|>", IDS["b"]], 2), (range(IDS["b"], 3), 2)):
        result = generate(model, [1], 4, stop=stop, tokenizer=tokenizer, constraint=writing(written))
        assert result.stop_reasons == ["stop"] and result.new_tokens == [count] and result.texts == ["ab"]
    # Without a text no tokenizer is needed; an end token is an end token first.
    assert generate(model, [1], 4, stop=1, constraint=writing(written)).stop_reasons == ["stop"]
    assert generate(model, [1], 4, stop=1, eos_token_id=1, constraint=writing(written)).stop_reasons == ["eos"]


def test_rows_stop_each_by_itself(model, tokenizer):
    constraint = writing(ids_of("a", "b", "c"), ids_of("c", "c", "c", "c"), ids_of("abc"))
    result = generate(model, [[1], [1, 2], [3]], 4, stop="bc", tokenizer=tokenizer, constraint=constraint)
    assert result.texts == ["a", "cccc", "a"] and result.stop_reasons == ["stop", "length", "stop"]


def test_an_encoder_decoder_stops_and_streams(tokenizer, device):
    config = next(config for config in FAMILY_CONFIGS.values() if config.is_encoder_decoder)
    model = make_model(config, 0, device)
    options = {"stop": "bc", "tokenizer": tokenizer, "constraint": writing(ids_of("a", "b", "c"), ids_of("c"))}
    *_, last = generate_stream(model, [[1, 2], [3]], 4, repetition_penalty=1.2, **options)
    assert last.stop_reasons == [None, "length"] or last.stop_reasons == ["stop", "length"]
    assert generate(model, [[1, 2], [3]], 4, **options).texts == ["a", "cccc"]


REFUSED = [
    ({"stop": "x"}, ValueError, "stop has the string 'x', which needs tokenizer= to be found in the text"),
    ({"stop": [""]}, ValueError, "stop has an empty string, which would stop everything"),
    ({"stop": 2.5}, TypeError, r"stop must be a string, a token id, or several of them, got 2\.5"),
    ({"stop": [None]}, TypeError, "stop must be a string, .* got None"),
    ({"stop": 67}, ValueError, "stop has token id 67, allowed are 0 to 66"),
    ({"tokenizer": "gpt2"}, TypeError, r"tokenizer must be a pytransformer\.text\.Tokenizer or None, got str"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_options_are_refused_by_name_and_at_once(model, options, error, message):
    for call in (generate, generate_stream):
        with pytest.raises(error, match=message):
            call(model, [1, 2], 3, **options)


@pytest.mark.parametrize("use_cache", [True, False])
def test_log_probabilities_are_those_of_the_model(model, use_cache, device):
    prompts = [random_ids(CONFIG, (length,), length, device) for length in (3, 7)]
    options = {"temperature": 0.7, "top_k": 9, "repetition_penalty": 1.3, "seed": 1}
    plain = generate(model, prompts, 6, use_cache=use_cache, **options)
    end = int(plain.token_ids[0][5])
    steps = []
    result = generate(
        model, prompts, 6, use_cache=use_cache, eos_token_id=end, return_log_probabilities=True, callback=steps.append, **options
    )  # fmt: skip
    assert plain.log_probabilities is None and result.log_probabilities is not None
    for row, (ids, found) in enumerate(zip(result.token_ids, result.log_probabilities)):
        assert torch.equal(ids, plain.token_ids[row][: len(ids)]) and len(found) == result.new_tokens[row]
        logits = model(ids[None, :-1])[0].detach()
        whole = torch.log_softmax(logits.double(), dim=-1).gather(-1, ids[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(found), whole[-len(found) :].cpu().float(), check_dtype=False)
        each = [step.log_probabilities[row] for step in steps]
        assert each == found + [None] * (len(steps) - len(found))
    assert min(map(len, result.log_probabilities)) < 6  # one has ended early


def test_log_probabilities_of_infinite_logits_are_those_of_the_draw():
    from pytransformer.generation.sampling import log_probabilities

    logits = torch.tensor([[0.0, math.inf, math.inf], [-math.inf, 1.0, 1.0], [-math.inf] * 3, [0.0, math.nan, 0.0]])
    found = log_probabilities(logits, torch.tensor([1, 2, 0, 0]))
    torch.testing.assert_close(found[:2], torch.full((2,), 0.5, dtype=torch.float64).log())
    assert bool(found[2:].isnan().all())
    assert log_probabilities(logits[:1], torch.tensor([0])).tolist() == [-math.inf]


def test_the_stream_has_the_steps_of_generate(model, device):
    prompts = [random_ids(CONFIG, (length,), length, device) for length in (5, 22)]
    expected = []
    result = generate(model, prompts, 6, temperature=1.0, seed=[3, 4], callback=expected.append)

    def collected():
        final = yield from generate_stream(model, prompts, 6, temperature=1.0, seed=[3, 4])
        assert final.stop_reasons == result.stop_reasons
        assert all(map(torch.equal, final.token_ids, result.token_ids))

    steps = list(collected())
    assert [step.tokens for step in steps] == [step.tokens for step in expected]
    assert [step.stop_reasons for step in steps] == [step.stop_reasons for step in expected]
    assert list(generate_stream(model, prompts, 0)) == []


def test_a_stream_may_be_closed_at_any_time_and_leaves_the_model_as_it_was(model, device):
    ids = random_ids(CONFIG, (2, 4), 0, device)
    expected = model.generate(ids, 6)
    model.train()
    model.lm_head.eval()  # frozen by its owner
    before = [module.training for module in model.modules()]
    for taken in range(3):
        stream = generate_stream(model, ids, 6)
        for _ in range(taken):
            next(stream)
            assert [module.training for module in model.modules()] == before and torch.is_grad_enabled()
        stream.close()
        assert next(stream, None) is None
    assert [module.training for module in model.modules()] == before
    assert torch.equal(model.generate(ids, 6), expected)
    assert [module.training for module in model.modules()] == before


def test_two_streams_of_one_model_do_not_disturb_each_other(model, device):
    ids = random_ids(CONFIG, (2, 4), 0, device)
    model.train()
    one, other = (generate_stream(model, row, 6, temperature=1.0, seed=2) for row in ids)
    tokens = [[first.tokens[0], second.tokens[0]] for first, second in zip(one, other)]
    assert torch.tensor(tokens).T.tolist() == model.generate(ids, 6, temperature=1.0, seed=2)[:, 4:].tolist()


def test_a_fault_ends_the_stream_and_says_where(model):
    model.train()
    stream = generate_stream(model, [1, 2], 5, constraint=lambda row, ids: [3] if len(ids) < 4 else [])
    assert [next(stream).tokens, next(stream).tokens] == [[3], [3]]
    with pytest.raises(ValueError, match="constraint allows no token for row 0 in step 2"):
        next(stream)
    assert next(stream, None) is None and model.training


def test_the_snippets_of_the_page_run(model, tokenizer):
    page = Path(__file__).parents[2] / "docs/sampling.md"
    found = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(found) == 3
    names = {"model": model, "tokenizer": tokenizer, "prompts": [[1, 2], [3], [4]], "prompt": [1, 2, 3]}
    for block in found:
        exec(compile(block, str(page), "exec"), names)
        if result := names.get("result"):
            values = result.log_probabilities or [None] * len(result.new_tokens)
            assert all(row is None or len(row) == count for row, count in zip(values, result.new_tokens))
    assert len(names["result"].scores) == 6


SAMPLING = {
    "temperature": 1.0, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2, "presence_penalty": 0.2, "frequency_penalty": 0.1,
    "logit_bias": {3: 1.0},
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_sixteen_prompts_together_are_sixteen_alone(model, options, device):
    """Each with a seed of its own, and those that end early beside the others."""
    prompts = [random_ids(CONFIG, (1 + (5 * row) % 11,), row, device) for row in range(16)]
    seeds = {"seed": [100 + row for row in range(16)]} if options else {}
    together = generate(model, prompts, 8, eos_token_id=range(8), return_log_probabilities=True, **options, **seeds)
    assert {"eos", "length"} == set(together.stop_reasons)
    for row, prompt in enumerate(prompts):
        seed = {"seed": 100 + row} if options else {}
        alone = generate(model, prompt, 8, eos_token_id=range(8), return_log_probabilities=True, **options, **seed)
        assert torch.equal(together.token_ids[row], alone.token_ids)
        assert together.stop_reasons[row] == alone.stop_reasons[0]
        torch.testing.assert_close(
            torch.tensor(together.log_probabilities[row]), torch.tensor(alone.log_probabilities[0])
        )
