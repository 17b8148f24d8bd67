"""Training on a CPU: tokens per second of the same small GPT-2 in this package and in transformers, interleaved in one process.

Same weights, same batches, same optimizer; a step is forward, loss, backward and update. transformers is measured in its usual way
(``labels=``) and with the loss computed outside, as ours is; the faster of the two counts.

    python -m pytransformer.benchmarks.programs.cpu_training          # writes benchmarks/results/cpu/training.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import TransformerConfig, linear_cross_entropy
from pytransformer.benchmarks.end_to_end import models
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.programs import cpu

RESULT = RESULTS / "cpu/training.json"
SHAPE = {"vocab_size": 2048, "hidden_size": 192, "num_layers": 4, "num_heads": 6, "max_seqlen": 256}
BATCH = 8
LEAST_SPEEDUP = 1.0


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the target is met."""
    arguments = cpu.new_parser("cpu_training", __doc__, 30, "steps", RESULT).parse_args()
    shape = {**SHAPE, "batch": BATCH, "dtype": "float32", "optimizer": "AdamW, fused"}
    result = cpu.new_result(shape, arguments.threads)
    trainers = make_trainers()
    result["parameters"] = trainers["pytransformer"].parameters
    samples, losses = measure(trainers, arguments.rounds)
    check_same_losses(losses)
    code = report(result, samples, losses)
    cpu.write(arguments.out, result)
    return code


class Trainer:
    """A model with its optimizer and the way its loss is computed."""

    def __init__(self, model: Any, loss: Callable[[Any, Tensor], Tensor]) -> None:
        self.model = model.train()
        self.loss = loss
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

    def step(self, ids: Tensor) -> float:
        """One training step on (batch, seqlen + 1) ids; the loss before the update."""
        loss = self.loss(self.model, ids)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def make_trainers() -> dict[str, Trainer]:
    """Each way of training, on a model of its own with the same initial weights."""

    def by_logits(model: Any, ids: Tensor) -> Tensor:
        return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    def fused(model: Any, ids: Tensor) -> Tensor:
        return linear_cross_entropy(model.model(ids[:, :-1]).flatten(0, 1), model.lm_head.weight, ids[:, 1:].flatten())

    def theirs_by_labels(model: Any, ids: Tensor) -> Tensor:
        loss: Tensor = model(
            ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), use_cache=False
        ).loss
        return loss

    def theirs_by_logits(model: Any, ids: Tensor) -> Tensor:
        logits = model(ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    config = TransformerConfig.gpt2(**SHAPE)

    def theirs() -> Any:
        torch.manual_seed(0)
        return models.transformers_model(config)

    return {
        "pytransformer": Trainer(models.from_transformers(theirs(), config), by_logits),
        "transformers, labels": Trainer(theirs(), theirs_by_labels),
        "transformers, loss outside": Trainer(theirs(), theirs_by_logits),
        "pytransformer, linear_cross_entropy": Trainer(models.from_transformers(theirs(), config), fused),
    }


def measure(trainers: dict[str, Trainer], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of each step, variants interleaved: A B C A B C …; the first steps warm up and are not counted."""
    generator = torch.Generator().manual_seed(0)
    samples: dict[str, list[float]] = {name: [] for name in trainers}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    warm_up = 3
    for index in range(warm_up + rounds):
        ids = torch.randint(SHAPE["vocab_size"], (BATCH, SHAPE["max_seqlen"] + 1), generator=generator)
        for name, trainer in trainers.items():
            start = time.perf_counter()
            loss = trainer.step(ids)
            if index >= warm_up:
                samples[name].append(time.perf_counter() - start)
            losses[name].append(loss)
        cpu.show_progress("step", index + 1, warm_up + rounds)
    return samples, losses


def check_same_losses(losses: dict[str, list[float]]) -> None:
    """All variants learn the same: their first losses agree to float32, later ones to what rounding makes of it."""
    reference, *others = losses.values()
    for other in others:
        if abs(other[0] - reference[0]) > 1e-5 * abs(reference[0]) or abs(other[-1] - reference[-1]) > 1e-3:
            raise SystemExit(f"the models do not learn the same: {losses}")


def report(result: dict[str, Any], samples: dict[str, list[float]], losses: dict[str, list[float]]) -> int:
    """Adds the rows to the result; 0 if the target is met."""
    tokens = BATCH * SHAPE["max_seqlen"]
    timings = {}
    for name, steps in samples.items():
        ends = [losses[name][0], losses[name][-1]]
        timings[name] = cpu.add_row(
            result, name, steps, unit="step", tokens=tokens, samples="steps", first_and_last_loss=ends
        )
    return cpu.judge(result, timings, LEAST_SPEEDUP)


if __name__ == "__main__":
    raise SystemExit(main())
