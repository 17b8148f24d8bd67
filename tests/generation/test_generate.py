"""Generation: the naive twin's tokens, batches of any lengths, reasons to stop, streaming, packed weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pytransformer import Transformer, TransformerConfig, use_backend
from pytransformer.generation import Sampler, generate, prepare_for_decoding, release
from pytransformer.nn import Linear
from pytransformer.nn.packed_weight import why_not_packed
from tests.model.configs import CONFIGS, TINY_CONFIGS, make_model, make_twin, random_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")
CONFIG = CONFIGS["llama"]


@pytest.fixture
def model(device) -> Transformer:
    return make_model(CONFIG, 0, device)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_the_twin(name, device):
    model = make_model(CONFIGS[name], 0, device)
    ids = random_ids(model.config, (6, 6), 0, device)
    expected = make_twin(model, torch.float64).generate(ids, max_new_tokens=12)
    for options in ({}, {"use_cache": False}):
        assert torch.equal(model.generate(ids, 12, **options), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_backend_generates_the_same_tokens(name, backend, device):
    model = make_model(TINY_CONFIGS[name], 0, device)
    ids = random_ids(model.config, (2, 3), 0, device)
    with use_backend(backend):
        assert torch.equal(model.generate(ids, 5), make_twin(model, torch.float64).generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "mistral-window", "alibi-window-geglu", "original-post-norm-sinusoidal"]
)
def test_each_prompt_of_a_batch_gets_what_it_gets_alone(name, options, device):
    model = make_model(CONFIGS[name], 0, device)
    prompts = [random_ids(model.config, (length,), length, device) for length in (1, 9, 4, 24, 23, 4)]
    together = generate(model, prompts, 8, **options)
    assert together.prompt_lengths == [1, 9, 4, 24, 23, 4]
    for index, prompt in enumerate(prompts):
        for other in ({}, {"use_cache": False}):
            alone = generate(model, prompt, 8, **options, **other)
            assert torch.equal(together.token_ids[index], alone.token_ids)
            assert together.stop_reasons[index] == alone.stop_reasons[0]


def test_the_form_of_the_result_follows_the_prompts(model, device):
    ids = random_ids(CONFIG, (2, 5), 0, device)
    batch, single, ragged = model.generate(ids, 4), model.generate(ids[0], 4), model.generate([ids[0], ids[1, :2]], 4)
    assert batch.shape == (2, 9) and single.shape == (9,) and [len(row) for row in ragged] == [9, 6]
    assert torch.equal(batch[:, :5], ids) and torch.equal(single, batch[0])
    assert model.generate(ids.int(), 4).dtype == torch.int32
    assert torch.equal(model.generate(ids, 0), ids)


def test_lists_of_ints_and_arrays_are_prompts(model, device):
    np = pytest.importorskip("numpy")
    ids = random_ids(CONFIG, (2, 5), 0, device)
    expected, one, ragged = model.generate(ids, 4), model.generate(ids[0], 4), [ids[0], ids[1, :2]]
    for prompt in (
        ids[0].tolist(),
        tuple(ids[0].tolist()),
        ids[0].cpu().numpy(),
        ids[0].cpu().numpy().astype(np.uint8),
        [*ids[0].cpu().numpy()],
    ):
        assert torch.equal(model.generate(prompt, np.int64(4)), one)
    for dtype in (np.int64, np.int16, np.uint64):
        assert torch.equal(model.generate(ids.cpu().numpy().astype(dtype), 4), expected)
    for prompts in (
        [row.tolist() for row in ragged],
        [row.cpu().numpy() for row in ragged],
        [ids[0], tuple(ids[1, :2].tolist())],
        [range(3), ids[0]],
    ):
        found = model.generate(prompts, 4)
        assert isinstance(found, list)
        for prompt, sequence in zip(prompts, found):
            assert torch.equal(
                sequence, model.generate(torch.tensor([int(token) for token in prompt], device=device), 4)
            )
    equal = model.generate([[1, 2], [3, 4]], 4)
    assert isinstance(equal, list) and [len(row) for row in equal] == [6, 6]
    for end in (np.int64(5), np.array([5, 6]), torch.tensor([5, 6]), range(5, 7)):
        model.generate(ids, 4, eos_token_id=end)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0, "seed": 0}, {"temperature": 1.0, "top_p": 0.5, "seed": 0}, {"use_cache": False}],
)
def test_a_diverged_model_says_where(model, options, device):
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(
        ValueError, match="no token can be chosen in step 0 for rows 0, 1 of the batch: the logits there hold NaN"
    ):
        model.generate(torch.zeros(2, 3, dtype=torch.int64, device=device), 4, **options)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_fault_is_named_by_row_and_step_and_ended_sequences_may_hold_anything(model, use_cache, device, monkeypatch):
    ids = random_ids(CONFIG, (3, 4), 0, device)
    first = model.generate(ids, 1)[:, -1].tolist()
    seen: list[list[int | None]] = []

    def spoil(at: int, row: int):
        def draw(sampler, logits):
            if sampler._step == at:
                logits = logits.clone()
                logits[row] = float("nan")
            return plain(sampler, logits)

        return draw

    plain = Sampler.draw
    monkeypatch.setattr(Sampler, "draw", spoil(2, 1))
    with pytest.raises(ValueError, match="in step 2 for row 1 of the batch"):
        model.generate(ids, 5, use_cache=use_cache, callback=lambda step: seen.append(step.tokens))
    assert len(seen) == 2  # nothing is told of the step that failed
    result = generate(model, ids, 5, use_cache=use_cache, eos_token_id=first[1])
    assert result.stop_reasons[1] == "eos" and result.new_tokens[1] == 1


def test_it_stops_at_any_end_token(model, device):
    prompts = [random_ids(CONFIG, (4,), seed, device) for seed in range(6)]
    free = generate(model, prompts, 16)
    first, second = int(free.token_ids[0][4 + 2]), int(free.token_ids[1][4 + 5])
    for use_cache in (True, False):
        result = generate(model, prompts, 16, eos_token_id=[first, second], use_cache=use_cache)
        assert "eos" in result.stop_reasons[:2]
        for row, unlimited, reason, new in zip(
            result.token_ids, free.token_ids, result.stop_reasons, result.new_tokens
        ):
            ends = [place for place, token in enumerate(unlimited[4:].tolist()) if token in (first, second)]
            assert reason == ("eos" if ends else "length")
            assert new == (ends[0] + 1 if ends else 16)
            assert torch.equal(row, unlimited[: 4 + new])


def test_a_tensor_of_results_is_filled_up(model, device):
    ids = random_ids(CONFIG, (6, 4), 0, device)
    end = int(model.generate(ids, 16)[0, 6])
    for options, padding in (({}, end), ({"pad_token_id": 5}, 5)):
        result = generate(model, ids, 16, eos_token_id=end, **options)
        for row, new in zip(result.token_ids, result.new_tokens):
            assert bool((row[4 + new :] == padding).all())


def test_the_configurations_end_tokens_are_the_default(device):
    free = make_model(CONFIG, 0, device)
    ids = random_ids(CONFIG, (4,), 0, device)
    tokens = free.generate(ids, 10)[4:].tolist()
    config = TransformerConfig.from_dict({**CONFIG.to_dict(), "eos_token_id": [tokens[3], tokens[6]]})
    model = make_model(config, 0, device)
    stops = generate(model, ids, 10)
    assert stops.new_tokens[0] <= 4 and stops.stop_reasons == ["eos"]
    assert generate(model, ids, 10, eos_token_id=()).stop_reasons == ["length"]


def test_it_stops_at_the_context_limit(model, device):
    prompts = [random_ids(CONFIG, (length,), length, device) for length in (20, 24, 3)]
    for use_cache in (True, False):
        result = generate(model, prompts, 10, use_cache=use_cache)
        assert result.stop_reasons == ["context", "context", "length"]
        assert result.new_tokens == [4, 0, 10]
    exact = generate(model, prompts[0], 4)
    assert exact.stop_reasons == ["length"] and exact.new_tokens == [4]


def test_the_callback_sees_every_token(model, device):
    prompts = [random_ids(CONFIG, (length,), length, device) for length in (5, 22)]
    steps = []
    result = generate(model, prompts, 6, callback=steps.append)
    assert [step.index for step in steps] == list(range(6))
    assert [step.tokens[0] for step in steps] == result.token_ids[0][5:].tolist()
    assert [step.tokens[1] for step in steps] == [*result.token_ids[1][22:].tolist(), None, None, None, None]
    assert [step.stop_reasons for step in steps] == [[None, None], *[[None, "context"]] * 4, ["length", "context"]]
    for step in steps:
        assert step.logits.shape == (2, CONFIG.vocab_size) and int(step.logits[0].argmax()) == step.tokens[0]


def test_what_the_callback_raises_ends_it(model, device):
    def stop(step):
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        generate(model, random_ids(CONFIG, (3,), 0, device), 6, callback=stop)
    assert model.training


def test_dropout_is_off_and_the_mode_comes_back(device):
    config = TransformerConfig.from_dict({**CONFIG.to_dict(), "residual_dropout": 0.5})
    model = make_model(config, 0, device)
    ids = random_ids(config, (2, 5), 0, device)
    expected = model.generate(ids, 8)
    model.train()
    assert torch.equal(model.generate(ids, 8), expected) and model.training


def test_seeds_reproduce(model, device):
    ids = random_ids(CONFIG, (2, 5), 0, device)
    ids[1] = ids[0]

    def tokens(seed):
        return model.generate(ids, 12, temperature=1.5, seed=seed)

    assert torch.equal(tokens(1), tokens(1)) and not torch.equal(tokens(1), tokens(2))
    assert torch.equal(tokens(1)[0], tokens(1)[1])
    apart = tokens([1, 2])
    assert torch.equal(apart[0], tokens(1)[0]) and torch.equal(apart[1], tokens(2)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_models_generate(dtype, device):
    model = make_model(CONFIG, 0, device, dtype)
    assert model.generate(random_ids(CONFIG, (2, 5), 0, device), 8).shape == (2, 13)


WIDE = TransformerConfig.gpt2(vocab_size=300, hidden_size=256, num_layers=1, num_heads=4, max_seqlen=32)
needs_packing = pytest.mark.skipif(
    why_not_packed(torch.zeros(256, 256)) is not None, reason="this build of torch packs no weights"
)


@needs_packing
def test_packed_weights_give_the_same_tokens_and_follow_the_parameters():
    cpu = torch.device("cpu")
    model, other = make_model(WIDE, 0, cpu), make_model(WIDE, 1, cpu)
    ids = random_ids(WIDE, (1, 5), 0, cpu)
    expected = make_twin(model, torch.float64).generate(ids, max_new_tokens=20)
    # qkv_proj, out_proj, up_proj, down_proj and the head
    assert prepare_for_decoding(model) == 5
    assert torch.equal(model.generate(ids, 20), expected)
    for parameter, source in zip(model.parameters(), other.parameters()):
        parameter.data.copy_(source.data)  # leaves no trace on the parameter
    expected = make_twin(other, torch.float64).generate(ids, max_new_tokens=20)
    assert torch.equal(model.generate(ids, 20), expected)
    batch = random_ids(WIDE, (3, 5), 0, cpu)
    assert torch.equal(model.generate(batch, 8), make_twin(model, torch.float64).generate(batch, max_new_tokens=8))


@needs_packing
def test_weights_are_packed_when_asked_or_when_it_pays():
    cpu = torch.device("cpu")
    config = TransformerConfig.from_dict({**WIDE.to_dict(), "max_seqlen": 64})
    model = make_model(config, 0, cpu)
    ids = random_ids(config, (1, 5), 0, cpu)
    layers = [module for module in model.modules() if isinstance(module, Linear)]

    def packed_after(new_tokens, **options):
        model.generate(ids, new_tokens, **options)
        return {layer.is_packed for layer in layers}

    assert packed_after(2) == {False}
    assert packed_after(50) == {True}
    assert packed_after(2) == {True}  # they are there, and kept up to date
    assert packed_after(50, pack_weights=False) == {False}
    assert packed_after(2, pack_weights=True) == {True}
    release(model)
    assert packed_after(50, use_cache=False) == {False}


REFUSED = [
    (
        torch.zeros(1, 2, 3, dtype=torch.int64),
        {},
        ValueError,
        r"prompts must have shape \(seqlen\) or \(batch, seqlen\), got \(1, 2, 3\)",
    ),
    (
        "def",
        {},
        TypeError,
        "prompts must be a tensor or array of ids .*, got the text 'def'; encode it with the model's tokenizer",
    ),
    (["def"], {}, TypeError, "got the text 'def'; encode it with the model's tokenizer as prompt 0"),
    (3, {}, TypeError, "a list of ints, or a list with a tensor, array or list of ints per prompt, got 3"),
    ([1, 2.5], {}, TypeError, "got 1 as prompt 0"),
    ([1, True], {}, TypeError, "got 1 as prompt 0"),
    ([[1, 2.5]], {}, TypeError, r"prompts must hold ints, got 2\.5 in prompt 0"),
    ([[1], [2, "x"]], {}, TypeError, "prompts must hold ints, got the text 'x'.* in prompt 1"),
    ([[[1]]], {}, TypeError, "prompts must hold ints, got list in prompt 0"),
    ([[1], []], {}, ValueError, "prompt 1 is empty"),
    ([3, 67], {}, ValueError, "prompt 0 holds token id 67, allowed are 0 to 66"),
    ([[1], [3, 2**70]], {}, ValueError, f"prompt 1 holds token id {2**70}, allowed are 0 to 66"),
    (
        [torch.zeros(1, 2, dtype=torch.int64)],
        {},
        ValueError,
        r"a prompt in a list must have shape \(seqlen\), got \(1, 2\) as prompt 0",
    ),
    ([], {}, ValueError, "prompts must hold at least one prompt, got none"),
    (torch.zeros(3), {}, TypeError, "prompts must hold int64 or int32 ids, got torch.float32 in prompt 0"),
    ([torch.tensor([1]), torch.tensor([], dtype=torch.int64)], {}, ValueError, "prompt 1 is empty"),
    (torch.zeros(25, dtype=torch.int64), {}, ValueError, "prompt 0 has 25 tokens, more than the model's context of 24"),
    (torch.tensor([3, 67]), {}, ValueError, "prompt 0 holds token id 67, allowed are 0 to 66"),
    (torch.tensor([3, -1]), {}, ValueError, "prompt 0 holds token id -1, allowed are 0 to 66"),
    (torch.tensor([3]), {"max_new_tokens": -1}, ValueError, "max_new_tokens must be at least 0, got -1"),
    (torch.tensor([3]), {"max_new_tokens": 2.5}, TypeError, r"max_new_tokens must be an int, got 2\.5"),
    (torch.tensor([3]), {"eos_token_id": 67}, ValueError, "eos_token_id must be from 0 to 66, got 67"),
    (torch.tensor([3]), {"eos_token_id": ["x"]}, TypeError, "eos_token_id must be an int or a sequence of ints"),
    (torch.tensor([3]), {"pad_token_id": 1.5}, TypeError, r"pad_token_id must be an int or None, got 1\.5"),
    (torch.tensor([3]), {"temperature": -1.0}, ValueError, "temperature must be finite and at least 0"),
]


@pytest.mark.parametrize(("prompts", "options", "error", "message"), REFUSED)
def test_bad_arguments_are_refused_by_name(model, prompts, options, error, message):
    with pytest.raises(error, match=message):
        model.generate(prompts, **{"max_new_tokens": 3, **options})


@pytest.mark.parametrize(("head", "causal"), [("masked_lm", False), ("lm", False), ("none", True)])
def test_a_model_that_predicts_no_next_token_generates_nothing(head, causal):
    config = dataclasses.replace(CONFIG, head=head, causal=causal, tie_embeddings=False)
    with pytest.raises(ValueError, match=rf"predicts the next token .*got head='{head}', causal={causal}"):
        generate(Transformer(config), [1, 2], 3)
