"""Taking back tokens: what follows is computed as if they had never been there, for every kind of cache."""

from __future__ import annotations

import math
import re

import pytest
import torch

from pytransformer import TransformerConfig
from pytransformer.generation import DraftModel, PromptLookup, generate
from pytransformer.generation.caches import KINDS, KVCache, PagedCache, make_cache
from pytransformer.generation.caches.part import raw
from tests.model.configs import CONFIGS, make_model, random_ids

WINDOW = TransformerConfig.llama(
    vocab_size=50, hidden_size=32, num_layers=1, num_heads=2, max_seqlen=64, sliding_window=8
)


def feed(model, cache, ids):
    """Hidden states of (batch, seqlen) ids behind what the cache has."""
    hidden = model.model(ids, cache=cache)
    cache.advance(ids.shape[1])
    return hidden


def poison(cache, lengths):
    """Writes NaN (of 8-bit codes: into their scales) behind so many tokens of each sequence of a contiguous cache."""
    tensors = (cache.k_cache, cache.v_cache) if cache.k_scale is None else (cache.k_scale, cache.v_scale)
    for tensor in tensors:
        for row, length in enumerate(lengths):
            tensor[:, row, length:] = math.nan


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_sees_nothing_of_what_was_taken_back(kind, device):
    config = CONFIGS["llama"]
    model, ids = make_model(config, 0, device), random_ids(config, (3, 16), 0, device)
    options = {"page_size": 3, "poison": True} if kind.startswith("paged") else {}
    kept, found = [7, 9, 2], []
    for wrong in (0, 5):
        cache = make_cache(kind, config, 3, 24, device, **options)
        feed(model, cache, ids[:, :9])
        if wrong:
            feed(model, cache, random_ids(config, (3, wrong), 1, device))
        cache.truncate(torch.tensor(kept, device=device))
        if isinstance(cache, KVCache):
            poison(cache, kept)
        assert cache.lengths.tolist() == kept and cache.max_length == 9
        found.append(feed(model, cache, ids[:, 9:12]))
    assert found[0].isfinite().all() and torch.equal(*found)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_it_is_as_if_they_had_never_been_there(kind, device):
    config = CONFIGS["llama"]
    model, ids = make_model(config, 0, device, torch.float64), random_ids(config, (2, 16), 0, device)
    cache = make_cache(kind, config, 2, 24, device, torch.float64)
    feed(model, cache, ids[:, :12])
    cache.truncate([7, 3])
    actual = feed(model, cache, ids[:, 12:])
    for row, length in enumerate((7, 3)):
        whole = torch.cat([ids[row, :length], ids[row, 12:]])
        expected = model.model(whole[None])[0, length:]
        torch.testing.assert_close(actual[row], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["paged", "paged-int8", "paged-fp8"])
def test_pages_are_freed_and_shared_ones_are_copied_before_they_are_written(kind, device):
    config = CONFIGS["llama"]
    model, ids = make_model(config, 0, device), random_ids(config, (2, 14), 0, device)
    cache = make_cache(kind, config, 2, 24, device, page_size=4, poison=True)
    assert isinstance(cache, PagedCache)
    feed(model, cache, ids)
    pool = cache.groups[0].pool
    assert pool.used_pages == 8
    cache.truncate([5, 0])
    assert pool.used_pages == 2 and cache.groups[0].pages[1] == []
    cache.reorder(torch.tensor([0, 0], device=device))
    before = [raw(tensor)[:, cache.groups[0].pages[0]].clone() for tensor in pool.part.tensors()]
    assert pool.used_pages == 2
    cache.truncate([5, 4])
    feed(model, cache, ids[:, :1])
    for old, tensor in zip(before, pool.part.tensors()):
        assert torch.equal(raw(tensor)[:, cache.groups[0].pages[1]][:, 0], old[:, 0])
        assert torch.equal(raw(tensor)[:, cache.groups[0].pages[0]][:, 1, :1], old[:, 1, :1])
    cache.truncate([0, 0])
    assert pool.used_pages == 0


@torch.no_grad()
def test_pages_that_a_window_passed_do_not_come_back(device):
    model, ids = make_model(WINDOW, 0, device), random_ids(WINDOW, (2, 30), 0, device)
    cache = PagedCache(WINDOW, 2, 40, device=device, page_size=4)
    feed(model, cache, ids)
    # A token sees 7 before it: of 30 tokens those from 23 on are needed, so pages from token 20 on are there.
    cache.truncate([27, 30])
    used, pages = cache.groups[0].pool.used_pages, [list(row) for row in cache.groups[0].pages]
    with pytest.raises(
        ValueError, match=r"lengths has 26 for sequence 1: .* window of 8 tokens .* from 19 .* before 20"
    ):
        cache.truncate([27, 26])
    assert cache.lengths.tolist() == [27, 30] and cache.groups[0].pool.used_pages == used
    assert cache.groups[0].pages == pages
    cache.truncate([0, 28])
    feed(model, cache, ids[:, :2])
    assert cache.lengths.tolist() == [2, 30]


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_tokens_that_were_not_accepted_leave_a_paged_cache(name, small_pages, device):
    """Small pages, poisoned when they are freed: whoever reads what was taken back finds NaN."""
    model, small = make_model(CONFIGS[name], 0, device), make_model(CONFIGS[name], 1, device)
    prompts = [random_ids(model.config, (length,), length, device) for length in (1, 9, 4, 17)]
    plain = generate(model, prompts, 20, eos_token_id=())
    for draft in (DraftModel(small, 5), DraftModel(model, 3), PromptLookup(1, 4)):
        found = generate(model, prompts, 20, eos_token_id=(), cache="paged", draft=draft)
        assert all(map(torch.equal, found.token_ids, plain.token_ids)) and sum(found.drafted) > 0
    assert len(small_pages) == 3


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3], ValueError, "lengths must be one for each of the 2 sequences, got 1"),
        ([3, 5], ValueError, "from 0 to the tokens of each sequence, got 5 for sequence 1, which has 4"),
        ([-1, 4], ValueError, "got -1 for sequence 0, which has 4"),
        ([1.0, 4.0], TypeError, "lengths must be integers of shape (2,)"),
        (torch.tensor(3), TypeError, "lengths must be integers of shape (2,)"),
    ],
)
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_other_lengths_are_refused(kind, lengths, error, message):
    cache = make_cache(kind, CONFIGS["llama"], 2, 8, torch.device("cpu"))
    cache.advance(4)
    with pytest.raises(error, match=re.escape(message)):
        cache.truncate(lengths)
    assert cache.lengths.tolist() == [4, 4]
