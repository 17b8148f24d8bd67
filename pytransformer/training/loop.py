"""The training loop: forward, backward, step; now and then look, now and then save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pytransformer.model.transformer import Transformer
from pytransformer.training import metrics
from pytransformer.training.config import TrainingConfig
from pytransformer.training.data import Batches
from pytransformer.training.loss import accumulate_gradients, evaluate
from pytransformer.training.optimizer import learning_rate, set_learning_rate
from pytransformer.training.progress import Progress


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is no longer a number; the message names the step."""


@dataclass
class _Pending:
    """Steps whose losses are still on the device: reading each one at once would make a GPU wait."""

    steps: list[int] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    grad_norms: list[torch.Tensor] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)


class Trainer:
    """Trains ``model`` from ``first_step`` to ``config.steps``.

    Step numbers given out (metrics, checkpoints, messages) count finished steps, so the first is 1.

    Args:
        model: on ``device``.
        optimizer: over its parameters.
        config: what to do.
        batches: step -> (inputs, targets).
        validation: the fixed windows that every evaluation uses.
        device: where the model is.
        metrics_path: the file that records are appended to.
        save: called with the step when a checkpoint is due.
        progress: the display.
        first_step: steps already done.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        batches: Batches,
        validation: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        device: torch.device,
        metrics_path: Path,
        save: Callable[[int], None],
        progress: Progress,
        first_step: int = 0,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._batches = batches
        self._validation = validation
        self._device = device
        self._metrics_path = metrics_path
        self._save = save
        self._progress = progress
        self._first_step = first_step
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._pending = _Pending()
        self._clock = time.perf_counter()

    def run(self) -> None:
        """Trains to the end.

        Raises:
            TrainingDiverged: a loss or gradient norm is NaN or infinite. Nothing of that step is saved.
        """
        config = self._config
        self._model.train()
        self._clock = time.perf_counter()
        for step in range(self._first_step, config.steps):
            self._train_step(step)
            done, last = step + 1, step + 1 == config.steps
            looks, saves = last or done % config.eval_every == 0, last or done % config.save_every == 0
            if looks or saves or done % config.log_every == 0:
                self._record()
            if looks:
                self._evaluate(done)
            if saves:
                self._save(done)
            if looks or saves:
                self._clock = time.perf_counter()  # tokens per second counts training only

    def _train_step(self, step: int) -> None:
        config = self._config
        inputs, targets = self._batches(step)
        rate = learning_rate(step, config)
        set_learning_rate(self._optimizer, rate)
        self._optimizer.zero_grad(set_to_none=True)
        loss = accumulate_gradients(
            self._model, inputs, targets, config.accumulation_steps, device=self._device, precision=config.precision
        )
        norm = nn.utils.clip_grad_norm_(self._parameters, config.max_grad_norm or math.inf)
        self._optimizer.step()
        pending = self._pending
        pending.steps.append(step + 1)
        pending.losses.append(loss)
        pending.grad_norms.append(norm)
        pending.learning_rates.append(rate)

    def _record(self) -> None:
        """Reads the pending losses, checks them, and writes them down."""
        pending, self._pending = self._pending, _Pending()
        losses = torch.stack(pending.losses).tolist()  # waits for the device
        norms = torch.stack(pending.grad_norms).tolist()
        now = time.perf_counter()
        tokens = len(losses) * self._config.batch_size * self._config.context_length
        speed = tokens / max(now - self._clock, 1e-9)
        self._clock = now
        records: list[metrics.Record] = []
        for step, loss, norm, rate in zip(pending.steps, losses, norms, pending.learning_rates):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                metrics.append(self._metrics_path, records)
                raise TrainingDiverged(
                    f"training diverged at step {step}: loss {loss}, gradient norm {norm}; "
                    "try a lower learning rate, a longer warm-up or a smaller max_grad_norm"
                )
            record: dict[str, Any] = {"step": step, "loss": loss, "learning_rate": rate, "grad_norm": norm}
            records.append({**record, "tokens_per_second": round(speed, 1)})
        metrics.append(self._metrics_path, records)
        self._progress.update(pending.steps[-1], loss=losses[-1], tokens_per_second=speed)

    def _evaluate(self, done: int) -> None:
        loss = evaluate(self._model, self._validation, device=self._device, precision=self._config.precision)
        if not math.isfinite(loss):
            raise TrainingDiverged(f"training diverged at step {done}: the validation loss is {loss}")
        metrics.append(self._metrics_path, [{"step": done, "validation_loss": loss}])
        self._progress.evaluated(done, loss)
