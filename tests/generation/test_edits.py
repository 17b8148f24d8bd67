"""Penalties, bias and constraints: what counts, what is refused, and that a fault is told by row and step."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from pytransformer.generation import Sampler, generate
from pytransformer.generation.sampling import log_probabilities
from tests.generation.test_sampling import chi_square
from tests.model.configs import CONFIGS, make_model, random_ids


def choose(sampler, logits, steps):
    return [sampler.choose(logits).tolist() for _ in range(steps)]


def test_the_repetition_penalty_counts_the_prompt_and_the_others_do_not(device):
    logits = torch.tensor([[3.0, 2.5, 2.0, -9.0]], device=device)
    prompts = [torch.tensor([0, 0])]
    assert choose(Sampler(1, repetition_penalty=2.0, prompts=prompts), logits, 3) == [[1], [2], [0]]
    assert choose(Sampler(1, presence_penalty=0.6, prompts=prompts), logits, 5) == [[0], [1], [0], [0], [0]]
    assert choose(Sampler(1, frequency_penalty=0.6, prompts=prompts), logits, 5) == [[0], [1], [0], [2], [1]]


def test_presence_counts_once_and_frequency_each_time(device):
    logits = torch.zeros(2, 5, device=device)
    sampler = Sampler(2, presence_penalty=0.5, frequency_penalty=0.25)
    sampler.edits.apply(logits, 0)
    for tokens in ([1, 2], [1, 3], [1, 2]):
        sampler.edits.count(torch.tensor(tokens, device=device))
    assert sampler.edits.apply(logits, 3).tolist() == [[0, -1.25, 0, 0, 0], [0, 0, -1.0, -0.75, 0]]


def test_negative_penalties_and_small_ones_invite_repetition(device):
    logits = torch.tensor([[1.0, 1.1]], device=device)
    assert choose(Sampler(1, frequency_penalty=-0.1, temperature=0.0), logits, 3) == [[1], [1], [1]]
    assert choose(Sampler(1, repetition_penalty=0.5, prompts=[torch.tensor([0])]), logits, 2) == [[0], [0]]


def test_edits_change_the_distribution_that_is_drawn_from(device):
    logits = torch.tensor([0.5, 0.0, -0.5, 1.0], device=device)
    sampler = Sampler(2000, temperature=1.0, presence_penalty=1.0, logit_bias={2: 1.0, 0: -math.inf}, seed=range(2000))
    first = sampler.choose(logits.expand(2000, -1)).cpu()
    expected = torch.tensor([-math.inf, 0.0, 0.5, 1.0], dtype=torch.float64)
    assert chi_square(first, expected.softmax(0)) < 5
    second = sampler.choose(logits.expand(2000, -1)).cpu()
    expected[3] -= 1.0
    assert chi_square(second[first == 3], expected.softmax(0)) < 5


def test_a_banned_token_never_comes_however_large_its_logit_is(device):
    logits = torch.tensor([[math.inf, 1.0, 2.0]], device=device)
    assert choose(Sampler(1, logit_bias={0: -math.inf}), logits, 2) == [[2], [2]]


@pytest.mark.parametrize("form", [list, torch.tensor, "mask"])
def test_a_constraint_sees_prompt_and_new_tokens_of_the_rows_that_go_on(form, device):
    model = make_model(CONFIGS["llama"], 0, device)
    prompts = [random_ids(model.config, (length,), length, device) for length in (3, 5)]
    asked = []

    def constraint(row, ids):
        asked.append((row, list(ids)))
        allowed = [(ids[-1] + 1) % 60] if row == 0 else [7]
        ids.clear()  # a list of its own
        if form == "mask":
            return (torch.arange(model.config.vocab_size) == allowed[0]).to(device)
        return form(allowed)

    result = generate(model, prompts, 4, constraint=constraint, eos_token_id=7)
    start = int(prompts[0][-1])
    assert result.token_ids[0][3:].tolist() == [(start + count) % 60 for count in range(1, 5)]
    assert result.stop_reasons == ["length", "eos"]
    assert asked[1] == (1, prompts[1].tolist()) and [row for row, _ in asked] == [0, 1, 0, 0, 0]
    assert asked[-1][1] == result.token_ids[0][:-1].tolist()


def test_a_constraint_may_allow_everything(device):
    model = make_model(CONFIGS["llama"], 0, device)
    ids = random_ids(model.config, (2, 4), 0, device)
    assert torch.equal(model.generate(ids, 5, constraint=lambda row, ids: None), model.generate(ids, 5))


@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ([], ValueError, "constraint allows no token for row 0 in step 0"),
        ([67], ValueError, "constraint gave token id 67 for row 0 in step 0, allowed are 0 to 66"),
        ([-1, 3], ValueError, "constraint gave token id -1"),
        (["a"], TypeError, r"constraint must give token ids, a boolean mask or None, got \['a'\] for row 0"),
        (2.5, TypeError, r"constraint must give token ids, a boolean mask or None, got 2\.5"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"a mask of constraint must have shape \(67,\), got \(3,\)"),
        (torch.zeros(67, dtype=torch.bool), ValueError, "in step 0 for row 0 of the batch: .* no token is allowed"),
    ],
)
def test_what_a_constraint_gives_is_checked(found, error, message, device):
    model = make_model(CONFIGS["llama"], 0, device)
    with pytest.raises(error, match=message):
        model.generate([1, 2], 3, constraint=lambda row, ids: found)


def test_a_broken_model_is_told_also_where_the_constraint_or_a_ban_hides_it(device):
    logits = torch.zeros(2, 5, device=device)
    logits[1, 3] = math.nan
    for options in ({"constraint": lambda row, ids: [1]}, {"logit_bias": {3: -math.inf}}):
        with pytest.raises(ValueError, match="in step 0 for row 1 of the batch: the logits there hold NaN"):
            Sampler(2, **options).choose(logits)


REFUSED = [
    ({"min_p": -0.1}, ValueError, r"min_p must be from 0 \(no limit\) to 1, got -0\.1"),
    ({"min_p": 1.5, "temperature": 1.0}, ValueError, "min_p must be from 0"),
    ({"min_p": "x"}, TypeError, "min_p must be a number, got 'x'"),
    (
        {"top_k": 5},
        ValueError,
        r"top_k=5 limits what is drawn from, but temperature is 0, which draws nothing \(greedy\)",
    ),
    ({"top_p": 0.5}, ValueError, r"top_p=0\.5 limits what is drawn from, .* leave top_p out"),
    ({"min_p": 0.5}, ValueError, r"min_p=0\.5 limits what is drawn from"),
    (
        {"repetition_penalty": 0.0},
        ValueError,
        r"repetition_penalty must be finite and above 0, in float32 \(1 = none\), got 0\.0",
    ),
    ({"repetition_penalty": 1e-50}, ValueError, "repetition_penalty must be finite and above 0, in float32"),
    ({"frequency_penalty": 1e39}, ValueError, "frequency_penalty must be finite in float32"),
    ({"logit_bias": {1: 1e39}}, ValueError, r"logit_bias\[1\] must be finite in float32 or -inf"),
    ({"repetition_penalty": 2.0, "prompts": [[1], [4]]}, ValueError, "prompt 1 holds a token id outside of 0 to 3"),
    ({"repetition_penalty": math.inf}, ValueError, "repetition_penalty must be finite"),
    ({"presence_penalty": math.nan}, ValueError, "presence_penalty must be finite"),
    ({"frequency_penalty": None}, TypeError, "frequency_penalty must be a number, got None"),
    ({"logit_bias": [1]}, TypeError, "logit_bias must be a mapping from token ids to numbers or None, got list"),
    ({"logit_bias": {"a": 1.0}}, TypeError, r"logit_bias must have token ids \(ints\) as keys, got 'a'"),
    ({"logit_bias": {-1: 1.0}}, ValueError, "logit_bias has token id -1"),
    ({"logit_bias": {4: 1.0}}, ValueError, "logit_bias has token id 4, allowed are 0 to 3"),
    ({"logit_bias": {1: math.inf}}, ValueError, r"logit_bias\[1\] must be finite in float32 or -inf .* use constraint"),
    ({"logit_bias": {1: "x"}}, TypeError, r"logit_bias\[1\] must be a number, got 'x'"),
    ({"constraint": [1]}, TypeError, "constraint must be callable or None, got list"),
    ({"prompts": [torch.tensor([1])]}, ValueError, "prompts must be one for each of the 2 sequences, got 1"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_bad_options_are_refused_by_name(options, error, message):
    with pytest.raises(error, match=message):
        Sampler(2, **options).choose(torch.zeros(2, 4))


def test_rows_do_not_feel_each_others_penalties(device):
    logits = torch.randn(12, 3, 30, generator=torch.Generator().manual_seed(0)).to(device)
    prompts = [torch.tensor([1, 2]), torch.tensor([5]), torch.tensor([9, 9, 9])]
    options = {
        "temperature": 1.0,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "min_p": 0.05,
    }
    together = Sampler(3, prompts=prompts, seed=[1, 2, 3], **options)
    found = torch.stack([together.choose(step) for step in logits])
    for row in range(3):
        alone = Sampler(1, prompts=[prompts[row]], seed=row + 1, **options)
        assert [int(alone.choose(step[row : row + 1])) for step in logits] == found[:, row].tolist()


class _Functions(TorchFunctionMode):
    """Names of the functions that are called on tensors."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [False, True])
def test_a_step_never_waits_for_the_device(counts, device, monkeypatch):
    """No value is read and no shape depends on one. On a CPU top-k counts its tokens, which this must notice."""
    monkeypatch.setattr(Sampler, "_counts_tokens", staticmethod(lambda logits: counts))
    sampler = Sampler(
        2, temperature=1.0, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1,
        logit_bias={1: 1.0, 2: -math.inf}, constraint=lambda row, ids: [3, 4, 5], prompts=[torch.tensor([3])] * 2, seed=0,
    )  # fmt: skip
    logits = torch.randn(2, 30, device=device)
    sampler.choose(logits)
    with _Functions() as functions:
        tokens, _ = sampler.draw(logits)
        log_probabilities(logits, tokens)
    assert {"searchsorted", "scatter_add_", "index_fill"} <= functions.names
    reading = {
        "item",
        "tolist",
        "cpu",
        "numpy",
        "nonzero",
        "masked_select",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    }
    assert bool(functions.names & reading) == counts


def test_a_sequence_that_changes_its_place_takes_everything_along(device):
    asked = []
    sampler = Sampler(
        2, repetition_penalty=2.0, frequency_penalty=1.0, prompts=[torch.tensor([1]), torch.tensor([2])],
        constraint=lambda row, ids: asked.append((row, ids)),
    )  # fmt: skip
    logits, edits = torch.ones(2, 5, device=device), sampler.edits
    edits.apply(logits, 0)
    edits.count(torch.tensor([3, 4], device=device))
    edits.take([3, 4], [True, False])
    edits.reorder([1, 0, 1])
    del asked[:]
    first, second = [1.0, 1.0, 0.5, 1.0, -0.5], [1.0, 0.5, 1.0, -0.5, 1.0]
    assert edits.apply(logits[[0, 0, 0]], 1).tolist() == [first, second, first]
    assert asked == [(1, [2, 4]), (1, [2, 4])]  # about prompt 1, twice; prompt 0 has ended
