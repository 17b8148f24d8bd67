"""Loss normalisation, evaluation, and the loop on a model small enough to follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pytransformer import Transformer, TransformerConfig
from pytransformer.training import metrics
from pytransformer.training.config import TrainingConfig
from pytransformer.training.data import IGNORE_INDEX, Batches, validation_windows
from pytransformer.training.loop import Trainer, TrainingDiverged
from pytransformer.training.loss import accumulate_gradients, evaluate
from pytransformer.training.optimizer import make_optimizer
from pytransformer.training.progress import Quiet

VOCAB = 16


class _Model(nn.Module):
    """As much of a Transformer as the loss asks for."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.model: nn.Module = nn.Sequential(nn.Embedding(VOCAB, 8), nn.Dropout(dropout))
        self.lm_head = nn.Linear(8, VOCAB, bias=False)
        self.lm_head.softcap = 0.0
        self.lm_head.features = nn.Identity()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(ids))


def _model(device, dropout: float = 0.0) -> _Model:
    torch.manual_seed(0)
    return _Model(dropout).to(device)


def _tokens(count: int = 400) -> np.ndarray:
    """Each token but a few follows from the one before."""
    tokens = np.arange(count, dtype=np.uint16) * 3 % VOCAB
    tokens[::7] = 5
    return tokens


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_loss_is_the_mean_over_all_real_targets_of_the_step(device, parts):
    """Parts with different numbers of real targets: averaging the parts' means would be wrong."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(VOCAB, (4, 10), generator=generator)
    targets = torch.randint(VOCAB, (4, 10), generator=generator)
    targets[0, 1:] = IGNORE_INDEX
    targets[1, :] = IGNORE_INDEX
    model, golden = _model(device).double(), _model("cpu").double()
    loss = accumulate_gradients(model, inputs, targets, parts, device=device)
    kept = targets.flatten() != IGNORE_INDEX
    expected = F.cross_entropy(golden(inputs).flatten(0, 1)[kept], targets.flatten()[kept])
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)  # the total is float32
    for found, wanted in zip(model.parameters(), golden.parameters()):
        torch.testing.assert_close(found.grad.cpu(), wanted.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("changes", [{}, {"logit_softcap": 2.0}, {"tie_embeddings": False}], ids=str)
def test_the_loss_is_that_of_the_models_logits(device, changes):
    """Its head goes into the loss as it is: tied or not, with its softcap."""
    torch.manual_seed(0)
    config = TransformerConfig.gpt2(
        vocab_size=VOCAB, hidden_size=16, num_layers=1, num_heads=2, max_seqlen=8, **changes
    )
    model = Transformer(config, device=device)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    windows = validation_windows(_tokens(), 8, 100, 5)
    inputs, targets = (torch.cat(side).to(device) for side in zip(*windows))
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    assert evaluate(model, windows, device=device) == pytest.approx(float(expected.detach()), rel=1e-5)
    accumulate_gradients(model, inputs.cpu(), targets.cpu(), 1, device=device)
    for parameter, gradient in zip(model.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_batch_without_targets_is_an_error(device):
    nothing = torch.full((1, 3), IGNORE_INDEX)
    with pytest.raises(ValueError, match="no target token"):
        accumulate_gradients(_model(device), torch.zeros(1, 3, dtype=torch.int64), nothing, 1, device=device)


def test_evaluation_is_the_mean_without_dropout_and_keeps_mode_and_random_state(device):
    windows = validation_windows(_tokens(), 8, 100, 5)
    model = _model(device, dropout=0.5).train()
    state = torch.get_rng_state()
    loss = evaluate(model, windows, device=device)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    model.eval()
    inputs, targets = (torch.cat(side).to(device) for side in zip(*windows))
    assert loss == pytest.approx(
        float(F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).detach()), rel=1e-5
    )
    evaluate(model, windows, device=device)
    assert not model.training


def test_bf16_computes_in_bf16_and_keeps_float32_weights(device):
    windows = validation_windows(_tokens(), 8, 100, 5)
    model = _model(device)
    exact, rounded = (evaluate(model, windows, device=device, precision=precision) for precision in ("fp32", "bf16"))
    assert exact != rounded and rounded == pytest.approx(exact, rel=1e-2)
    accumulate_gradients(model, *windows[0], 1, device=device, precision="bf16")
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


class _Recorder(Quiet):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def update(self, step: int, *, loss: float, tokens_per_second: float) -> None:
        assert loss > 0 and tokens_per_second > 0
        self.seen.append(("update", step))

    def evaluated(self, step: int, validation_loss: float) -> None:
        self.seen.append(("evaluated", step))


def _trainer(device, folder, model=None, **changes):
    config = TrainingConfig(**{"steps": 10, "batch_size": 4, "context_length": 8, "warmup_steps": 2, "eval_every": 4, "save_every": 5,
                               "log_every": 3, "learning_rate": 0.05, **changes})  # fmt: skip
    model = model or _model(device)
    saved: list[int] = []
    progress = _Recorder()
    trainer = Trainer(
        model,
        make_optimizer(model, config),
        config,
        Batches(_tokens(), config.batch_size, config.context_length, config.seed),
        validation_windows(_tokens(100), 8, 64, 4),
        device=torch.device(device),
        metrics_path=folder / "metrics.jsonl",
        save=saved.append,
        progress=progress,
    )
    return trainer, saved, progress


def test_the_loop_records_every_step_looks_and_saves_when_due(device, tmp_path):
    trainer, saved, progress = _trainer(device, tmp_path)
    trainer.run()
    records = metrics.read(tmp_path / "metrics.jsonl")
    steps, losses = metrics.series(records, "loss")
    assert steps == list(range(1, 11)) and losses[-1] < losses[0]
    assert metrics.series(records, "validation_loss")[0] == [4, 8, 10]
    assert saved == [5, 10]
    assert metrics.series(records, "learning_rate")[1][:2] == [0.025, 0.05]
    assert all(
        set(r) == {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} for r in records if "loss" in r
    )
    assert [step for what, step in progress.seen if what == "update"] == [3, 4, 5, 6, 8, 9, 10]
    assert [step for what, step in progress.seen if what == "evaluated"] == [4, 8, 10]


def test_losses_do_not_depend_on_accumulation_or_logging(device, tmp_path):
    curves = []
    for name, changes in (("a", {}), ("b", {"accumulation_steps": 4}), ("c", {"log_every": 7, "eval_every": 100})):
        (tmp_path / name).mkdir()
        _trainer(device, tmp_path / name, **changes)[0].run()
        curves.append(metrics.series(metrics.read(tmp_path / name / "metrics.jsonl"), "loss")[1])
    assert curves[0] == curves[2]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_clipping_bounds_the_gradient_that_the_optimizer_sees(device, tmp_path):
    model = _model(device)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    trainer, _, _ = _trainer(
        device, tmp_path, model, steps=1, optimizer="sgd", momentum=0.0, weight_decay=0.0, max_grad_norm=1e-3,
        learning_rate=1.0, warmup_steps=0,
    )  # fmt: skip
    trainer.run()
    moved = torch.cat([(after - was).flatten() for after, was in zip(model.parameters(), before)])
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert metrics.read(tmp_path / "metrics.jsonl")[0]["grad_norm"] > 1e-2


def test_no_clipping(device, tmp_path):
    trainer, _, _ = _trainer(device, tmp_path, steps=2, max_grad_norm=0.0)
    trainer.run()
    assert all(
        math.isfinite(value) for value in metrics.series(metrics.read(tmp_path / "metrics.jsonl"), "grad_norm")[1]
    )


class _Broken(nn.Module):
    """Gives NaN from the forward pass of call ``at`` on, counted from 1; in evaluation always."""

    def __init__(self, inner: nn.Module, at: int) -> None:
        super().__init__()
        self.inner, self.at, self.calls = inner, at, 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        broken = self.calls >= self.at or not self.training
        return self.inner(ids) * (math.nan if broken else 1.0)


def _broken_model(device, at: int) -> _Model:
    model = _model(device)
    model.model = _Broken(model.model, at)
    return model


def test_a_nan_loss_names_the_step_and_saves_nothing_of_it(device, tmp_path):
    trainer, saved, _ = _trainer(device, tmp_path, _broken_model(device, at=7), eval_every=100)
    with pytest.raises(TrainingDiverged, match=r"diverged at step 7: loss nan, .*lower learning rate"):
        trainer.run()
    assert saved == [5]
    assert metrics.series(metrics.read(tmp_path / "metrics.jsonl"), "loss")[0] == [1, 2, 3, 4, 5, 6]


def test_a_nan_validation_loss_stops_too(device, tmp_path):
    trainer, saved, _ = _trainer(device, tmp_path, _broken_model(device, at=100))
    with pytest.raises(TrainingDiverged, match="step 4: the validation loss is nan"):
        trainer.run()
    assert saved == []
