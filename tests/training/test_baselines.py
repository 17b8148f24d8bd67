"""The unigram and bigram lines, against counting by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pytransformer.training.baselines import PRIOR_STRENGTHS, fit_and_evaluate
from pytransformer.training.data import validation_windows


def test_against_counting_by_hand():
    train = np.array([0, 1, 2, 0, 1, 1, 2, 0, 3], dtype=np.uint16)
    held_out = np.array([0, 1, 3, 2, 0], dtype=np.uint16)
    windows = validation_windows(held_out, 2, 100, 1)
    found = fit_and_evaluate(train, windows, vocab_size=5)

    tokens, pairs = train.tolist(), list(zip(held_out.tolist(), held_out.tolist()[1:]))
    unigram = {token: (tokens.count(token) + 1) / (len(tokens) + 5) for token in range(5)}
    assert found.unigram == pytest.approx(-sum(math.log(unigram[b]) for _, b in pairs) / len(pairs), rel=1e-12)

    def bigram_loss(strength: float) -> float:
        total = 0.0
        for a, b in pairs:
            followers = [after for before, after in itertools.pairwise(tokens) if before == a]
            total -= math.log((followers.count(b) + strength * unigram[b]) / (len(followers) + strength))
        return total / len(pairs)

    assert found.bigram == pytest.approx(min(map(bigram_loss, PRIOR_STRENGTHS)), rel=1e-12)


def test_a_sequence_that_pairs_predict():
    train = np.tile(np.arange(50, dtype=np.uint16), 200)
    found = fit_and_evaluate(train, validation_windows(train[:501], 100, 500, 2), vocab_size=50)
    assert found.unigram == pytest.approx(math.log(50), abs=0.01)
    assert found.bigram < 0.1


def test_probabilities_sum_to_one():
    """Scoring every possible next token once gives Σ p = 1 for both tables."""
    generator = np.random.default_rng(0)
    vocab_size = 7
    train = generator.integers(0, vocab_size, 40).astype(np.uint16)
    for previous in range(vocab_size):
        total = 0.0
        for token in range(vocab_size):
            window = [(torch.tensor([[previous]]), torch.tensor([[token]]))]
            # One target: the best strength may differ between tokens, so pin it.
            total += math.exp(-_with_one_strength(train, window, vocab_size))
        assert total == pytest.approx(1.0, rel=1e-12)


def _with_one_strength(train, windows, vocab_size) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytransformer.training.baselines.PRIOR_STRENGTHS", (10.0,))
        return fit_and_evaluate(train, windows, vocab_size).bigram


def test_a_single_training_token_is_enough():
    train = np.array([3], dtype=np.uint16)
    found = fit_and_evaluate(train, validation_windows(np.array([1, 2], dtype=np.uint16), 1, 1, 1), vocab_size=4)
    assert found.bigram == pytest.approx(found.unigram)
