"""A corpus and a model small enough that a whole run takes a second."""

from __future__ import annotations

from pathlib import Path

from pytransformer.training.config import CorpusConfig, ModelShape, RunConfig, TrainingConfig


def write_corpus(folder: Path) -> Path:
    """Twenty little files with some structure to learn."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(20):
        lines = [f"def function_{index}_{line}(value):\n    return value + {line}\n" for line in range(8)]
        (folder / f"file{index:02d}.py").write_text("\n\n".join(lines))
    return folder


def tiny_config(corpus: Path, **training: object) -> RunConfig:
    """A run of 12 steps with dropout, so that resuming has random numbers to get right."""
    numbers: dict[str, object] = {
        "steps": 12,
        "batch_size": 4,
        "context_length": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_every": 4,
        "eval_tokens": 64,
        "save_every": 3,
        "log_every": 2,
        **training,
    }
    return RunConfig(
        CorpusConfig(str(corpus), vocab_size=280, validation_fraction=0.2),
        ModelShape(hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, intermediate_size=32, dropout=0.1),
        TrainingConfig(**numbers),  # type: ignore[arg-type]
    )


def cli_options(corpus: Path) -> list[str]:
    """The same run as options of ``pytransformer train``."""
    return (
        f"--data {corpus} --vocab-size 280 --validation-fraction 0.2 --hidden-size 16 --layers 2 --heads 2 --kv-heads 1 "
        "--intermediate-size 32 --dropout 0.1 --steps 12 --batch-size 4 --context-length 16 --lr 1e-2 --warmup-steps 2 "
        "--eval-every 4 --eval-tokens 64 --save-every 3 --log-every 2"
    ).split()
