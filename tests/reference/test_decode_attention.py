"""Decode attention is attention over the keys that lie in a cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from pytransformer.reference import attention, decode_attention

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM = 4, 2, 8, 6
CAPACITY = 12
LENGTHS = [7, 1, 12]
OPTIONS = {"window": (4, -1), "softcap": 3.0}


@pytest.fixture
def cache(device):
    """Contiguous caches whose slots beyond each sequence's length are NaN: whoever reads them shows it."""
    k_cache = torch.randn(3, CAPACITY, NUM_KV_HEADS, HEAD_DIM, dtype=torch.float64, device=device)
    v_cache = torch.randn(3, CAPACITY, NUM_KV_HEADS, VALUE_DIM, dtype=torch.float64, device=device)
    for row, length in enumerate(LENGTHS):
        k_cache[row, length:], v_cache[row, length:] = math.nan, math.nan
    return k_cache, v_cache, torch.tensor(LENGTHS, dtype=torch.int32, device=device)


def queries(seqlen_q, device):
    return torch.randn(len(LENGTHS), seqlen_q, NUM_HEADS, HEAD_DIM, dtype=torch.float64, device=device)


def paged(cache, page_size, device):
    """The same cache cut into pages that lie in another order, with an unused page of NaN first, and its block table."""
    rows, capacity = cache.shape[:2]
    pages = cache.reshape(rows * capacity // page_size, page_size, *cache.shape[2:])
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(1)).to(device)
    shuffled = torch.cat([torch.full_like(pages[:1], math.nan), pages[order]])
    block_table = torch.argsort(order).reshape(rows, capacity // page_size).to(torch.int32) + 1
    for row, length in enumerate(LENGTHS):
        block_table[row, math.ceil(length / page_size) :] = -1  # never to be read
    return shuffled, block_table


@pytest.mark.parametrize("seqlen_q", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_attention_over_each_sequence(seqlen_q, causal, cache, device):
    k_cache, v_cache, cache_seqlens = cache
    q = queries(seqlen_q, device)
    slopes, sinks = torch.rand(3, NUM_HEADS, device=device), torch.randn(NUM_HEADS, device=device)
    mask = torch.rand(3, 1, seqlen_q, CAPACITY, device=device) > 0.2
    bias = torch.randn(1, NUM_HEADS, 1, CAPACITY, dtype=torch.float64, device=device)
    output, lse = decode_attention(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        causal=causal,
        alibi_slopes=slopes,
        sinks=sinks,
        mask=mask,
        bias=bias,
        return_lse=True,
        **OPTIONS,
    )
    for b, length in enumerate(LENGTHS):
        expected, expected_lse = attention(
            q[b : b + 1],
            k_cache[b : b + 1, :length],
            v_cache[b : b + 1, :length],
            causal=causal,
            alibi_slopes=slopes[b],
            sinks=sinks,
            mask=mask[b : b + 1, :, :, :length],
            bias=bias[..., :length],
            return_lse=True,
            **OPTIONS,
        )
        assert torch.equal(output[b : b + 1], expected)
        assert torch.equal(lse[b : b + 1], expected_lse)


def test_newest_queries_give_the_last_rows_of_full_attention(cache, device):
    k_cache, v_cache, cache_seqlens = cache
    k, v = k_cache[2:], v_cache[2:]  # the row that is full
    q = torch.randn(1, CAPACITY, NUM_HEADS, HEAD_DIM, dtype=torch.float64, device=device)
    full = attention(q, k, v, causal=True, window=(5, -1))
    for seqlen_q in (1, 4, CAPACITY):
        last = decode_attention(q[:, -seqlen_q:], k, v, cache_seqlens[2:], window=(5, -1))
        assert_close(last, full[:, -seqlen_q:])


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_paged_equals_contiguous(page_size, cache, device):
    k_cache, v_cache, cache_seqlens = cache
    q = queries(2, device)
    k_pages, block_table = paged(k_cache, page_size, device)
    v_pages, _ = paged(v_cache, page_size, device)
    expected = decode_attention(q, k_cache, v_cache, cache_seqlens, **OPTIONS)
    assert torch.equal(
        decode_attention(q, k_pages, v_pages, cache_seqlens, block_table=block_table, **OPTIONS), expected
    )


def test_cache_batch_idx_chooses_the_row(cache, device):
    k_cache, v_cache, cache_seqlens = cache
    q, order = queries(1, device), torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    expected = decode_attention(q, k_cache[order], v_cache[order], cache_seqlens[order])
    assert torch.equal(decode_attention(q, k_cache, v_cache, cache_seqlens[order], cache_batch_idx=order), expected)


def test_cache_leftpad_skips_slots(cache, device):
    k_cache, v_cache, cache_seqlens = cache
    leftpad = torch.tensor([2, 0, 5], dtype=torch.int32, device=device)
    k_cache[0, :2], k_cache[2, :5], v_cache[0, :2], v_cache[2, :5] = math.nan, math.nan, math.nan, math.nan
    q = queries(2, device)
    output = decode_attention(q, k_cache, v_cache, cache_seqlens - leftpad, cache_leftpad=leftpad)
    for b, (length, first) in enumerate(zip(LENGTHS, leftpad.tolist(), strict=True)):
        k, v = k_cache[b : b + 1, first:length], v_cache[b : b + 1, first:length]
        assert torch.equal(output[b : b + 1], attention(q[b : b + 1], k, v, causal=True))


def test_packed_queries_of_different_lengths(cache, device):
    k_cache, v_cache, cache_seqlens = cache
    cu_seqlens_q = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=device)
    q = torch.randn(5, NUM_HEADS, HEAD_DIM, dtype=torch.float64, device=device)
    output, lse = decode_attention(q, k_cache, v_cache, cache_seqlens, cu_seqlens_q=cu_seqlens_q, return_lse=True)
    assert output.shape == (5, NUM_HEADS, VALUE_DIM) and lse.shape == (NUM_HEADS, 5)
    first = decode_attention(q[None, :3], k_cache[:1], v_cache[:1], cache_seqlens[:1])
    third = decode_attention(q[None, 3:], k_cache[2:], v_cache[2:], cache_seqlens[2:])
    assert torch.equal(output, torch.cat([first[0], third[0]]))


def test_empty_cache_and_queries_before_the_first_key_give_zero(cache, device):
    k_cache, v_cache, _ = cache
    lengths = torch.tensor([0, 1, 2], dtype=torch.int32, device=device)
    output, lse = decode_attention(queries(3, device), k_cache, v_cache, lengths, return_lse=True)
    seen = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1]], dtype=torch.bool, device=device)
    assert torch.equal(output.abs().sum(dim=(2, 3)) > 0, seen)
    assert torch.equal(lse.isfinite(), seen[:, None, :].expand_as(lse))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("page_size", [None, 4])
def test_quantised_cache_is_codes_times_scales(dtype, per_token, page_size, cache, device):
    _, _, cache_seqlens = cache
    k_codes, v_codes = (torch.randint(-100, 100, (3, CAPACITY, NUM_KV_HEADS, dim), device=device) for dim in (8, 6))
    shape = (3, CAPACITY, NUM_KV_HEADS) if per_token else (NUM_KV_HEADS,)
    k_scale, v_scale = torch.rand(shape, device=device) / 50, torch.rand(shape, device=device) / 50
    k_cache, v_cache = k_codes.float().to(dtype), v_codes.float().to(dtype)
    q = queries(2, device)
    expected = decode_attention(
        q, k_cache.double() * k_scale[..., None].double(), v_cache.double() * v_scale[..., None].double(), cache_seqlens
    )
    block_table = None
    if page_size is not None:
        _, block_table = paged(torch.zeros(3, CAPACITY, 1, 1, device=device), page_size, device)
        k_cache, v_cache = (paged_bytes(tensor, page_size, device) for tensor in (k_cache, v_cache))
        if per_token:
            k_scale, v_scale = (paged(scale, page_size, device)[0] for scale in (k_scale, v_scale))
    output = decode_attention(
        q, k_cache, v_cache, cache_seqlens, block_table=block_table, k_scale=k_scale, v_scale=v_scale
    )
    assert_close(output, expected)


def paged_bytes(cache, page_size, device):
    """:func:`paged` of a cache of codes, whose unused first page is zero instead of NaN."""
    pages, _ = paged(cache.double(), page_size, device)
    return pages.nan_to_num().to(cache.dtype)


def test_lengths_past_the_cache_are_refused(cache, device):
    k_cache, v_cache, cache_seqlens = cache
    if device.type == "cpu":  # on a GPU the index error is an assertion in a kernel, which ends the process
        with pytest.raises(IndexError):
            decode_attention(queries(1, device), k_cache, v_cache, cache_seqlens + 1)


def test_floating_mask_is_refused(cache, device):
    with pytest.raises(TypeError, match=r"pass an additive mask as bias .*one of ones and zeros .* as mask\.bool\(\)"):
        decode_attention(queries(1, device), *cache, mask=torch.zeros(1, CAPACITY, device=device))
