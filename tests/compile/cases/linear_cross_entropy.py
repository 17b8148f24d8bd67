"""What of linear cross-entropy is compiled in the gate: vocabularies, dtypes, with and without every option."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from pytransformer.kernels.linear_cross_entropy import cross_entropy, logits_buffer


def compile_cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and launch of every shipped configuration, for the compile gate."""

    def launch(vocab_size: int, dtype: torch.dtype, *, wants_gradient: bool = True, everything: bool = False) -> None:
        like = torch.empty(1, dtype=dtype)
        per_row = torch.empty(2)
        cross_entropy(
            logits_buffer(2, vocab_size, like),
            vocab_size,
            torch.zeros(2, dtype=torch.int64),
            torch.empty(vocab_size, dtype=dtype) if everything else None,
            per_row if everything else None,
            per_row,
            ignore_index=-100,
            label_smoothing=0.1 if everything else 0.0,
            softcap=30.0 if everything else 0.0,
            z_loss=1e-4 if everything else 0.0,
            wants_gradient=wants_gradient,
        )

    bfloat16, float32 = torch.bfloat16, torch.float32
    yield "linear_cross_entropy-50257-bfloat16", functools.partial(launch, 50257, bfloat16)
    yield "linear_cross_entropy-131072-bfloat16", functools.partial(launch, 131072, bfloat16)
    yield (
        "linear_cross_entropy-131072-bfloat16-losses",
        functools.partial(launch, 131072, bfloat16, wants_gradient=False),
    )
    yield (
        "linear_cross_entropy-256000-bfloat16-everything",
        functools.partial(launch, 256000, bfloat16, everything=True),
    )
    yield "linear_cross_entropy-131072-float32-everything", functools.partial(launch, 131072, float32, everything=True)
