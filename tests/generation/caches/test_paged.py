"""The paged cache: each prompt gets the tokens that it gets alone from the contiguous one, and pages come and go as they should."""

from __future__ import annotations

import pytest
import torch

from pytransformer import TransformerConfig, use_backend
from pytransformer.generation import KVCache, PagedCache, PoolExhausted, generate, make_cache
from pytransformer.verification import SEEDS, Contract
from tests.model.configs import CONFIGS, TINY_CONFIGS, make_model, make_twin, random_ids

from .support import GENERATING, logits_through

LENGTHS = (1, 9, 4, 12, 2, 7, 4, 10, 3, 8, 5, 1, 11, 6, 9, 2)


def test_every_kind_of_cache_meets_every_kind_of_score():
    found = {config.positions for config in GENERATING.values()}
    assert found == {"learned", "sinusoidal", "rope", "alibi", "t5", "none"}
    for wanted in ("sinks", "is_encoder_decoder", "sliding_window", "alibi_bfloat16", "local_rope_base", "num_experts"):
        assert any(getattr(config, wanted) for config in GENERATING.values()), wanted
    assert any((config.rope_scaling or {}).get("rope_type") == "longrope" for config in GENERATING.values())


@pytest.mark.parametrize("name", GENERATING)
def test_sixteen_prompts_get_what_each_gets_alone(name, small_pages, device):
    model = make_model(GENERATING[name], 0, device)
    source = model.config.encoder if model.config.is_encoder_decoder else model.config
    prompts = [random_ids(source, (length,), index, device) for index, length in enumerate(LENGTHS)]
    together = generate(model, prompts, 4, cache="paged", eos_token_id=())
    assert all(map(torch.equal, together.token_ids, generate(model, prompts, 4, eos_token_id=()).token_ids))
    if (model.config.rope_scaling or {}).get("rope_type") == "dynamic":
        # Frequencies that change with every length: each prefill gives a sequence others, whatever the cache.
        return
    for index in range(0, len(prompts), 4):
        alone = generate(model, prompts[index], 4, eos_token_id=())
        assert torch.equal(together.token_ids[index], alone.token_ids)
        assert together.stop_reasons[index] == alone.stop_reasons[0]
    assert len(small_pages) == 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss"])
def test_seeded_samples_and_ended_sequences_too(name, small_pages, device):
    model = make_model(GENERATING[name], 1, device)
    prompts = [random_ids(model.config, (length,), length, device) for length in (1, 9, 4, 17)]
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 3, "eos_token_id": range(0, model.config.vocab_size, 9)}
    together = generate(model, prompts, 12, cache="paged", **options)
    assert len(set(together.new_tokens)) > 1
    for index, prompt in enumerate(prompts):
        assert torch.equal(together.token_ids[index], generate(model, prompt, 12, **options).token_ids)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_of_16_bits_by_the_contract(name, device):
    config, contract = GENERATING[name], Contract(torch.bfloat16)
    for seed in range(SEEDS):
        model, ids = make_model(config, seed, device, torch.bfloat16), random_ids(config, (2, 10), seed, device)
        cache = PagedCache(config, 2, 10, device=device, dtype=torch.bfloat16, page_size=3, poison=True)
        plain, golden = make_twin(model)(ids), make_twin(model, torch.float64)(ids)
        contract.add("logits", actual=logits_through(model, cache, ids), plain=plain, golden=golden)
    contract.check()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")
def test_other_backends_too(backend, small_pages, device):
    model = make_model(TINY_CONFIGS["llama-qk-norm-window"], 0, device)
    prompts = [random_ids(model.config, (length,), length, device) for length in (2, 4)]
    expected = model.generate(prompts, 4)
    with use_backend(backend):
        actual = model.generate(prompts, 4, cache="paged")
    assert all(map(torch.equal, actual, expected))


@torch.no_grad()
def test_a_window_keeps_its_own_pages_only(device):
    config = GENERATING["gemma2"]  # a layer with a window of 4, one without
    model = make_model(config, 0, device)
    cache = PagedCache(config, 2, 20, device=device, page_size=2, longest_step=5, poison=True)
    plain = KVCache(config, 2, 20, device=device)
    windowed, full = sorted(cache.groups, key=lambda group: group.left < 0)
    # 3 keys before the token, 5 tokens of a step: 4 pages, and one more for both ends; each pool has a page for padding besides.
    assert (windowed.pool.num_pages, full.pool.num_pages) == (2 * 5, 2 * 10)
    ids = random_ids(config, (2, 20), 0, device)
    for start in range(0, 20, 5):
        step = ids[:, start : start + 5]
        torch.testing.assert_close(model(step, cache=cache), model(step, cache=plain))
        cache.advance(5)
        plain.advance(5)
        assert full.pool.used_pages == 2 * -(-(start + 5) // 2)
        # The next token sees the three before it.
        assert windowed.pool.used_pages == 2 * (-(-(start + 5) // 2) - (start + 5 - 3) // 2)


@torch.no_grad()
def test_sequences_that_branch_share_pages_until_they_write(device):
    config = CONFIGS["llama"]
    model = make_model(config, 0, device)
    ids = random_ids(config, (1, 7), 0, device).expand(3, 7)
    caches = [PagedCache(config, 3, 12, device=device, page_size=4, poison=True), KVCache(config, 3, 12, device=device)]
    pool = caches[0].groups[0].pool
    for cache in caches:
        model(
            random_ids(config, (3, 7), 1, device).index_copy(0, torch.tensor([1], device=device), ids[:1]), cache=cache
        )
        cache.advance(7)
    assert pool.used_pages == 6
    for cache in caches:
        cache.reorder(torch.ones(3, dtype=torch.int64))
    assert pool.used_pages == 2
    tokens = random_ids(config, (3, 3), 2, device)
    expected = model(torch.cat([ids, tokens], dim=1))[:, 7:]
    for cache in caches:
        torch.testing.assert_close(model(tokens[:, :1], cache=cache), expected[:, :1])
        cache.advance(1)
        torch.testing.assert_close(model(tokens[:, 1:], cache=cache), expected[:, 1:])
        cache.advance(2)
    # The first page is everybody's still; the half-full one became three, and each got one more.
    assert pool.used_pages == 1 + 3 + 3
    for cache in caches:
        for rows in (torch.zeros(4, dtype=torch.int64), torch.zeros(3), torch.zeros(0, dtype=torch.int64)):
            with pytest.raises(ValueError, match=r"rows must be integers of shape \(n,\), n from 1 to 3"):
                cache.reorder(rows)
        with pytest.raises(ValueError, match="rows must hold sequences from 0 to 2, got 3"):
            cache.reorder(torch.tensor([0, 3]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8", "paged-fp8"])
def test_sequences_may_become_fewer_and_more(kind, device):
    """As many as there is memory for: those that are left out are forgotten, and a prefill may be of some of them."""
    config = CONFIGS["mistral-window"]
    model = make_model(config, 0, device)
    cache, plain = (make_cache(kind, config, batch, 20, device) for batch in (4, 4))
    ids = random_ids(config, (2, 9), 0, device)
    whole = cache.nbytes
    cache.reorder(torch.arange(2))
    for own, rows in ((cache, ids), (plain, ids[[1, 1, 0, 1]])):
        model(rows, cache=own)
        own.advance(9)
    cache.reorder(torch.tensor([1, 1, 0, 1]))
    assert cache.nbytes == whole == plain.nbytes and cache.batch == 4
    for seed, order in enumerate(([1, 0, 3, 2], [2, 2, 0], [0, 1, 1, 2], [3])):
        tokens = random_ids(config, (cache.batch, 1), seed, device)
        logits = [model(tokens, cache=own) for own in (cache, plain)]
        torch.testing.assert_close(*logits)
        for own in (cache, plain):
            own.advance(1)
            # The tokens before are the same where they come from one prompt.
            own.reorder(torch.tensor(order))
    assert cache.batch == 1 and cache.lengths.tolist() == [13]


@torch.no_grad()
@pytest.mark.parametrize("shared", [0, 5, 7])
def test_shared_tokens_are_not_copied(shared, device):
    cache = KVCache(CONFIGS["llama"], 2, 9, device=device)
    cache.advance(7)
    for tensor in cache.part.tensors():
        tensor[:] = torch.arange(2, device=device)[None, :, None, None, None]
    cache.reorder(torch.tensor([1, 1]), shared)
    for tensor in cache.part.tensors():
        assert bool((tensor[:, 0, :shared] == 0).all() and (tensor[:, 0, shared:7] == 1).all())
        assert bool((tensor[:, 0, 7:] == 0).all() and (tensor[:, 1] == 1).all())


@torch.no_grad()
def test_an_exhausted_pool_is_an_error_with_numbers_and_the_others_go_on(device):
    config = CONFIGS["llama"]
    model = make_model(config, 0, device)
    cache = PagedCache(config, 2, 16, device=device, page_size=4, num_pages=3)
    ids = random_ids(config, (2, 4), 0, device)
    model(ids, cache=cache)
    cache.advance(4)
    with pytest.raises(PoolExhausted, match="2 pages of 4 tokens are needed and 1 of 3 are free"):
        model(ids, cache=cache)
    assert cache.lengths.tolist() == [4, 4] and cache.groups[0].pool.used_pages == 2
    cache.drop(torch.tensor([False, True], device=device))
    logits = model(ids, cache=cache)
    torch.testing.assert_close(logits[:1], model(torch.cat([ids, ids], dim=1)[:1])[:, 4:])


@torch.no_grad()
@pytest.mark.parametrize("num_pages", [1, 2])
def test_copies_of_shared_pages_are_counted_beforehand(num_pages, device):
    """Two that share one page and both write need one more page, not two and not none."""
    config = CONFIGS["llama"]
    model = make_model(config, 0, device)
    cache = PagedCache(config, 2, 8, device=device, page_size=4, num_pages=num_pages)
    ids = random_ids(config, (2, 2), 0, device)
    cache.expect([2, 0])
    model(ids, cache=cache)
    cache.advance(torch.tensor([2, 0], device=device))
    cache.reorder(torch.tensor([0, 0]))
    before = cache.groups[0].table.clone()
    if num_pages == 1:
        with pytest.raises(PoolExhausted, match="1 pages of 4 tokens are needed and 0 of 1 are free"):
            model(ids, cache=cache)
        assert torch.equal(cache.groups[0].table, before) and cache.groups[0].pool.owners(1) == 2
    else:
        torch.testing.assert_close(model(ids, cache=cache)[:1], model(torch.cat([ids, ids], dim=1)[:1])[:, 2:])
        assert cache.groups[0].pool.used_pages == 2


def test_padding_gets_no_pages_where_it_is_announced(device):
    config = CONFIGS["llama"]
    model = make_model(config, 0, device)
    cache = PagedCache(config, 2, 16, device=device, page_size=4, num_pages=4, poison=True)
    cache.expect([2, 12])
    with torch.no_grad():
        logits = model(random_ids(config, (2, 12), 0, device), cache=cache)
    assert cache.groups[0].pool.used_pages == 4 and bool(logits[1].isfinite().all() & logits[0, :2].isfinite().all())
    cache.advance(torch.tensor([2, 12], device=device))
    assert cache.groups[0].pool.used_pages == 4 and cache.used_bytes < cache.nbytes


@pytest.mark.parametrize("name", ["page_size", "num_pages", "longest_step"])
def test_bad_sizes_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PagedCache(CONFIGS["llama"], 1, 8, **{name: 0})


def test_unknown_kinds_are_refused(device):
    message = "cache must be one of 'contiguous', 'paged', 'int8', 'fp8', 'paged-int8', 'paged-fp8', got 'int4'"
    with pytest.raises(ValueError, match=message):
        make_cache("int4", CONFIGS["llama"], 1, 8)
    with pytest.raises(ValueError, match=message):
        generate(
            make_model(TransformerConfig.llama(vocab_size=9, hidden_size=8, num_layers=1, num_heads=1), 0, device),
            [1],
            2,
            cache="int4",
        )
