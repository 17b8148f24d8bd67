"""End to end: training steps of GPT-2 124M and of Llama 1B's shape, decoding with Llama 8B's shape, in tokens per second."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pytransformer.benchmarks import peers
from pytransformer.benchmarks.end_to_end import decoding, training
from pytransformer.benchmarks.harness.rows import Measurement
from pytransformer.benchmarks.suites.common import Wanted

# (trainer, under torch.compile, also where no peers are asked for, also in the quick grid)
TRAINERS = (
    ("pytransformer", False, True, True),
    ("pytransformer", True, True, False),
    ("torch_modules", True, True, False),
    ("transformers", True, False, False),
    ("nanogpt", True, False, False),
)


def rows(wanted: Wanted) -> Iterator[Measurement]:
    """GPT-2's training and decoding at batch 1 in the quick grid; the rest in the full one."""
    yield _training(wanted, training.gpt2(wanted.tiny), 0)
    yield _decoding(wanted, decoding.llama_8b(1, wanted.tiny), 0)
    yield _training(wanted, training.llama_1b(wanted.tiny), 0 if wanted.tiny else 1)
    for batch in (2,) if wanted.tiny else (8, 64):
        yield _decoding(wanted, decoding.llama_8b(batch, wanted.tiny), 0 if wanted.tiny else 1)


def _training(wanted: Wanted, shape: training.TrainingShape, priority: int) -> Measurement:
    variants: dict[str, Callable[[torch.device], dict[str, Any]]] = {}
    for trainer, compiled, always, quick in TRAINERS:
        here = always or (wanted.peers and peers.is_here(trainer, wanted.device))
        if not here or (wanted.quick and not quick):
            continue
        # nanoGPT is GPT-2.
        if trainer == "nanogpt" and shape.config.positions != "learned":
            continue
        # torch.compile takes half a minute on a CPU, whatever the size.
        compiled = compiled and not wanted.tiny
        name = f"{trainer} compiled" if compiled else trainer
        variants[name] = functools.partial(training.measure, shape, trainer, compiled)
    return Measurement(
        "training",
        f"{shape.name} bf16, {shape.micro_batches} × {shape.batch} × {shape.seqlen} tokens a step",
        "tokens/s",
        variants,
        higher_is_better=True,
        priority=priority,
    )


def _decoding(wanted: Wanted, shape: decoding.DecodingShape, priority: int) -> Measurement:
    theirs = wanted.peers and peers.is_here("transformers", wanted.device)
    names = [name for name in decoding.DECODERS if theirs or name.startswith("pytransformer")]
    if wanted.quick or wanted.tiny:
        names = [name for name in names if name != "transformers compiled"]
    return Measurement(
        "decoding",
        f"{shape.name} {str(shape.dtype).removeprefix('torch.')}, batch {shape.batch}, context {shape.context}",
        "tokens/s",
        {name: functools.partial(decoding.measure, shape, name) for name in names},
        higher_is_better=True,
        priority=priority,
    )
