"""What tables of counts achieve on the same tokens: the lines a trained model has to get below.

Unigram: p(b) = (count(b) + 1) / (N + V).

Bigram with a Dirichlet prior on the unigram (MacKay and Peto 1995): p(b | a) = (count(a, b) + s · p(b)) / (count(a) + s). It never gives
zero, and it is stronger than adding a constant. The strength s is the best of a few *for the validation tokens themselves*, so that
the baseline has every benefit of the doubt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pytransformer.training.data import Tokens

PRIOR_STRENGTHS = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
# Beyond this the counts of a bigram change little, and sorting them takes long.
MAX_COUNTED_TOKENS = 30_000_000


@dataclass(frozen=True)
class Baselines:
    """Mean loss in nats per token of both tables on the same targets."""

    unigram: float
    bigram: float


def fit_and_evaluate(train: Tokens, windows: Sequence[tuple[torch.Tensor, torch.Tensor]], vocab_size: int) -> Baselines:
    """Counts the training tokens and scores the targets of the validation windows.

    Args:
        train: (num_tokens,) ids; the first 30 million are counted.
        windows: inputs and targets, as the model is evaluated on.
        vocab_size: number of different ids.
    """
    counted = np.asarray(train[:MAX_COUNTED_TOKENS], dtype=np.int64)
    previous = np.concatenate([inputs.numpy().ravel() for inputs, _ in windows])
    targets = np.concatenate([targets.numpy().ravel() for _, targets in windows])
    counts = np.bincount(counted, minlength=vocab_size)
    unigram = (counts + 1.0) / (counted.size + vocab_size)
    pair_counts = _count_pairs(counted, previous, targets, vocab_size)
    # Each occurrence of `a` but one at the very end is followed by something.
    followed = np.bincount(counted[:-1], minlength=vocab_size)[previous]
    prior = unigram[targets]
    bigram = min(_mean_loss((pair_counts + s * prior) / (followed + s)) for s in PRIOR_STRENGTHS)
    return Baselines(unigram=_mean_loss(prior), bigram=bigram)


def _count_pairs(
    counted: npt.NDArray[np.int64], previous: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], vocab_size: int
) -> npt.NDArray[np.int64]:
    """How often each pair (previous, target) stands in ``counted``; sorted, so that memory doesn't grow with vocab_size²."""
    pairs, counts = np.unique(counted[:-1] * vocab_size + counted[1:], return_counts=True)
    wanted = previous * vocab_size + targets
    if not pairs.size:
        return np.zeros(wanted.shape, np.int64)
    places = np.minimum(np.searchsorted(pairs, wanted), pairs.size - 1)
    return np.where(pairs[places] == wanted, counts[places], 0)


def _mean_loss(probabilities: npt.NDArray[np.float64]) -> float:
    return float(-np.log(probabilities).mean())
