"""Numbers out of range are refused by name; schedules and parameter groups are what they say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from pytransformer.training.config import CorpusConfig, ModelShape, RunConfig, TrainingConfig, differences
from pytransformer.training.optimizer import learning_rate, make_optimizer, parameter_groups


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("steps", 0, "an integer of at least 1"),
        ("batch_size", -1, "an integer of at least 1"),
        ("context_length", 1.5, "an integer of at least 1"),
        ("accumulation_steps", 0, "an integer of at least 1"),
        ("eval_every", 0, "an integer of at least 1"),
        ("eval_tokens", 0, "an integer of at least 1"),
        ("save_every", 0, "an integer of at least 1"),
        ("keep_checkpoints", 0, "an integer of at least 1"),
        ("log_every", 0, "an integer of at least 1"),
        ("warmup_steps", -1, "an integer of at least 0"),
        ("seed", -1, "an integer of at least 0"),
        ("learning_rate", 0.0, "above 0"),
        ("learning_rate", math.inf, "above 0 and finite"),
        ("epsilon", math.nan, "above 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("max_grad_norm", -1.0, "at least 0"),
        ("beta1", 1.0, "at least 0 and below 1"),
        ("beta2", -0.1, "at least 0 and below 1"),
        ("momentum", 1.0, "at least 0 and below 1"),
        ("decay_fraction", 0.0, "above 0 and at most 1"),
        ("min_learning_rate_ratio", 1.1, "between 0 and 1"),
        ("optimizer", "lion", "one of adamw, adam, sgd"),
        ("schedule", "linear", "one of cosine, wsd, constant"),
        ("precision", "fp8", "one of fp32, bf16"),
    ],
)
def test_bad_training_numbers_are_refused(field, value, allowed):
    with pytest.raises(ValueError) as error:
        TrainingConfig(**{field: value})
    assert str(error.value).startswith(f"{field} must be {allowed}") and str(error.value).endswith(f"but is {value!r}")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrainingConfig(batch_size=8, accumulation_steps=3), r"accumulation_steps must divide batch_size \(8\), but is 3"),
        (lambda: CorpusConfig(vocab_size=256), "vocab_size must be at least 257"),
        (lambda: CorpusConfig(validation_fraction=1.0), "validation_fraction must be between 0 and 1"),
        (lambda: CorpusConfig(bad_bytes="ignore"), "bad_bytes must be one of refuse, skip, but is 'ignore'"),
        (lambda: ModelShape(family="rnn").build(300, 0, 8), "family must be one of llama, gpt2, but is 'rnn'"),
        (lambda: ModelShape(max_seqlen=4).build(300, 0, 8), r"max_seqlen must be at least the context length \(8\), but is 4"),
    ],
)  # fmt: skip
def test_bad_combinations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_shape_becomes_a_model_configuration():
    config = ModelShape(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, dropout=0.1).build(300, 7, 32)
    assert (config.vocab_size, config.eos_token_id, config.max_seqlen) == (300, 7, 32)
    assert (config.num_kv_heads, config.positions, config.norm) == (2, "rope", "rms_norm")
    assert (
        config.attention_dropout
        == config.embedding_dropout
        == config.residual_dropout
        == config.feed_forward_dropout
        == 0.1
    )
    gpt2 = ModelShape(family="gpt2", hidden_size=64, num_heads=4, max_seqlen=48).build(300, 0, 32)
    assert (gpt2.positions, gpt2.norm, gpt2.max_seqlen) == ("learned", "layer_norm", 48)


def test_a_run_configuration_comes_back_from_its_fields():
    config = RunConfig(CorpusConfig("x"), ModelShape(num_layers=3), TrainingConfig(steps=5))
    assert RunConfig.from_dict(config.to_dict()) == config


def test_differences_leave_out_what_changes_no_loss():
    saved, given = {"steps": 1, "save_every": 5, "old": 0}, {"steps": 2, "save_every": 6, "new": None}
    assert differences(saved, given) == [
        "new: absent in the checkpoint, None now",
        "old: 0 in the checkpoint, absent now",
        "steps: 1 in the checkpoint, 2 now",
    ]


def test_cosine_warms_up_and_goes_down_to_its_floor():
    config = TrainingConfig(steps=110, warmup_steps=10, learning_rate=1.0, min_learning_rate_ratio=0.1)
    rates = [learning_rate(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0 and rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))


def test_wsd_is_stable_then_linear():
    config = TrainingConfig(
        steps=100, warmup_steps=0, learning_rate=2.0, schedule="wsd", decay_fraction=0.2, min_learning_rate_ratio=0.0
    )
    rates = [learning_rate(step, config) for step in range(101)]
    assert set(rates[:81]) == {2.0}
    assert rates[80:] == pytest.approx([2.0 * (20 - step) / 20 for step in range(21)])


def test_constant_stays():
    config = TrainingConfig(steps=10, warmup_steps=2, learning_rate=3.0, schedule="constant")
    assert [learning_rate(step, config) for step in (0, 1, 2, 9)] == [1.5, 3.0, 3.0, 3.0]


def test_only_matrices_decay_and_shared_weights_appear_once():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 7, bias=False))
    model[3].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    decaying, others = parameter_groups(model, 0.1)
    assert [tuple(p.shape) for p in decaying["params"]] == [(7, 4), (4, 4)] and decaying["weight_decay"] == 0.1
    assert [tuple(p.shape) for p in others["params"]] == [(4,), (4,)] and others["weight_decay"] == 0.0
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


@pytest.mark.parametrize(
    "name, kind", [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_optimizers_are_torchs_and_move_weights(device, name, kind):
    model = nn.Linear(8, 8).to(device)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, TrainingConfig(optimizer=name, learning_rate=0.1))
    assert type(optimizer) is kind and optimizer.defaults["fused"]
    model(torch.ones(1, 8, device=device)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)
