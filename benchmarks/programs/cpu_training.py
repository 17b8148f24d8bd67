"""Training on a CPU: tokens per second of the same small GPT-2 in this package and in transformers, interleaved in one process.

Same weights, same batches, same optimizer; a step is forward, loss, backward and update. transformers is measured in its usual way
(``labels=``) and with the loss computed outside, as ours is; the faster of the two counts.

    python -m pytransformer.benchmarks.programs.cpu_training          # writes benchmarks/results/cpu/training.json
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import TransformerConfig, linear_cross_entropy
from pytransformer.benchmarks.harness.paths import RESULTS
from pytransformer.benchmarks.harness.record import environment, save
from pytransformer.benchmarks.harness.timing import Timing
from pytransformer.benchmarks.programs.cpu_decode import from_theirs

RESULT = RESULTS / "cpu/training.json"
SHAPE = {"vocab_size": 2048, "hidden_size": 192, "num_layers": 4, "num_heads": 6, "max_seqlen": 256}
BATCH = 8
LEAST_SPEEDUP = 1.0


def main() -> int:
    """Measures, prints a table, writes the JSON; 0 if the target is met."""
    parser = argparse.ArgumentParser(
        prog="python -m pytransformer.benchmarks.programs.cpu_training", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=30, help="steps of each variant")
    parser.add_argument("--threads", type=int, default=0, help="threads for torch; 0 = its own choice")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    import transformers

    result: dict[str, Any] = {"environment": environment(torch.device("cpu")), "rows": []}
    result["shape"] = {**SHAPE, "batch": BATCH, "dtype": "float32", "optimizer": "AdamW, fused"}
    result["threads"] = torch.get_num_threads()
    result["transformers"] = transformers.__version__
    trainers = make_trainers()
    result["parameters"] = trainers["pytransformer"].parameters
    samples, losses = measure(trainers, arguments.rounds)
    check_same_losses(losses)
    code = report(result, samples, losses)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save(arguments.out, result)
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
    return {
        "pytransformer": Trainer(from_theirs(make_theirs(), config), by_logits),
        "transformers, labels": Trainer(make_theirs(), theirs_by_labels),
        "transformers, loss outside": Trainer(make_theirs(), theirs_by_logits),
        "pytransformer, linear_cross_entropy": Trainer(from_theirs(make_theirs(), config), fused),
    }


def make_theirs() -> Any:
    """transformers' GPT-2 of the small shape without dropout, always with the same weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=SHAPE["vocab_size"],
        n_embd=SHAPE["hidden_size"],
        n_layer=SHAPE["num_layers"],
        n_head=SHAPE["num_heads"],
        n_positions=SHAPE["max_seqlen"],
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    config._attn_implementation = "sdpa"
    return transformers.GPT2LMHeadModel(config)


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
        print(f"\rstep {index + 1} of {warm_up + rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples, losses


def check_same_losses(losses: dict[str, list[float]]) -> None:
    """All variants learn the same: their first losses agree to float32, later ones to what rounding makes of it."""
    reference, *others = losses.values()
    for other in others:
        if abs(other[0] - reference[0]) > 1e-5 * abs(reference[0]) or abs(other[-1] - reference[-1]) > 1e-3:
            raise SystemExit(f"the models do not learn the same: {losses}")


def report(result: dict[str, Any], samples: dict[str, list[float]], losses: dict[str, list[float]]) -> int:
    tokens = BATCH * SHAPE["max_seqlen"]
    timings = {name: Timing.of(values, "clock") for name, values in samples.items()}
    for name, timing in timings.items():
        result["rows"].append(
            {
                "variant": name,
                "tokens_per_second": tokens / timing.median,
                "seconds_per_step": {"median": timing.median, "p10": timing.low, "p90": timing.high},
                "steps": samples[name],
                "first_and_last_loss": [losses[name][0], losses[name][-1]],
            }
        )
        spread = f"{timing.low * 1e3:.0f} to {timing.high * 1e3:.0f}"
        print(f"{name:36} {tokens / timing.median:8.0f} tokens/s   {timing.median * 1e3:6.0f} ms a step ({spread})")
    ours = timings["pytransformer"].median
    peer = min(timing.median for name, timing in timings.items() if name.startswith("transformers"))
    result["speedup_over_transformers"] = peer / ours
    print(f"\n{peer / ours:.2f} × transformers (target {LEAST_SPEEDUP})")
    return 0 if peer / ours >= LEAST_SPEEDUP else 1


if __name__ == "__main__":
    raise SystemExit(main())
