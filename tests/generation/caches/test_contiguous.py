"""The contiguous cache: memory, lengths, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from pytransformer.generation import KVCache
from tests.model.configs import CONFIGS, make_model, random_ids

CONFIG = CONFIGS["llama"]


def test_memory_is_what_the_formula_says(device):
    cache = KVCache(CONFIG, 3, 20, device=device, dtype=torch.bfloat16)
    assert cache.nbytes == 2 * CONFIG.num_layers * 3 * 20 * CONFIG.num_kv_heads * CONFIG.head_dim * 2
    assert cache.layer(1).k_cache.shape == (3, 20, CONFIG.num_kv_heads, CONFIG.head_dim)
    assert cache.layer(1).k_cache.data_ptr() == cache.k_cache[1].data_ptr()


def test_lengths_and_positions(device):
    cache = KVCache(CONFIG, 2, 12, device=device)
    cache.advance(torch.tensor([3, 5], device=device))
    assert cache.lengths.tolist() == [3, 5] and cache.max_length == 5
    assert cache.lengths.dtype == torch.int32
    assert cache.positions(2).tolist() == [[3, 4], [5, 6]]
    cache.advance(1)
    assert cache.lengths.tolist() == [4, 6] and cache.max_length == 6
    assert cache.attended(2).tolist() == [6, 8]
    cache.drop(torch.tensor([False, True], device=device))
    assert cache.lengths.tolist() == [4, 0] and cache.attended(2).tolist() == [6, 2]
    cache.reset()
    assert cache.lengths.tolist() == [0, 0] and cache.max_length == 0


@torch.no_grad()
def test_a_cache_that_was_reset_starts_anew(device):
    model = make_model(CONFIG, 0, device)
    cache = KVCache(CONFIG, 2, 8, device=device)
    ids = random_ids(CONFIG, (2, 8), 0, device)
    first = model(ids, cache=cache)
    cache.advance(8)
    cache.reset()
    assert torch.equal(model(ids, cache=cache), first)


@torch.no_grad()
def test_past_the_capacity_is_an_error_with_numbers_and_nothing_is_written(device):
    model = make_model(CONFIG, 0, device)
    cache = KVCache(CONFIG, 2, 8, device=device)
    model(random_ids(CONFIG, (2, 6), 0, device), cache=cache)
    cache.advance(6)
    before = cache.k_cache[:, :, :6].clone()
    with pytest.raises(ValueError, match="the KV cache holds 8 tokens per sequence: 3 more do not fit behind 6"):
        model(random_ids(CONFIG, (2, 3), 0, device), cache=cache)
    assert torch.equal(cache.k_cache[:, :, :6], before) and cache.lengths.tolist() == [6, 6]


@torch.no_grad()
def test_padding_and_neighbours_leave_no_trace(device):
    """Sequence 0 gets the same bits whatever sequence 1, the padding and the memory behind the lengths hold."""
    model = make_model(CONFIG, 0, device)
    lengths = torch.tensor([4, 7], device=device)
    prompt = random_ids(CONFIG, (1, 4), 1, device)
    tokens = random_ids(CONFIG, (3, 2, 1), 2, device)

    def logits(seed, poison):
        cache = KVCache(CONFIG, 2, 12, device=device)
        cache.k_cache.fill_(poison)
        cache.v_cache.fill_(poison)
        ids = random_ids(CONFIG, (2, 7), seed, device)
        ids[0, :4] = prompt
        parts = [model(ids, cache=cache)[:1, :4]]
        cache.advance(lengths)
        for step in tokens:
            step = torch.stack([step[0], (step[1] + seed) % CONFIG.vocab_size])
            parts.append(model(step, cache=cache)[:1])
            cache.advance(1)
        return torch.cat(parts, dim=1)

    expected = logits(3, 0.0)
    assert bool(expected.isfinite().all())
    for seed, poison in ((4, float("nan")), (5, float("inf"))):
        assert torch.equal(logits(seed, poison), expected)


@pytest.mark.parametrize(
    ("batch", "capacity", "message"),
    [
        (0, 8, "batch must be at least 1, got 0"),
        (1, 0, r"capacity must be from 1 to the model's max_seqlen \(24\), got 0"),
        (1, 25, r"capacity must be from 1 to the model's max_seqlen \(24\), got 25"),
    ],
)
def test_bad_sizes_are_refused(batch, capacity, message):
    with pytest.raises(ValueError, match=message):
        KVCache(CONFIG, batch, capacity)
