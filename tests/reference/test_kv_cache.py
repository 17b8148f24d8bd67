"""KV append: where each token goes, what is left untouched, and the quantisation rules, bit by bit."""

from __future__ import annotations

import math

import pytest
import torch

from pytransformer.reference import attention, decode_attention, kv_append, rms_norm, rope, rope_tables
from pytransformer.reference.kv_cache import per_token_scale, quantize

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, VALUE_DIM, CAPACITY = 4, 2, 8, 6, 6


def new_tokens(device, batch=2, seqlen=3, dtype=torch.float32):
    k = torch.randn(batch, seqlen, NUM_KV_HEADS, HEAD_DIM, dtype=dtype, device=device)
    return k, torch.randn(batch, seqlen, NUM_KV_HEADS, VALUE_DIM, dtype=dtype, device=device)


def empty_caches(device, rows=4, slots=CAPACITY, dtype=torch.float32, fill=math.nan):
    return tuple(
        torch.full((rows, slots, NUM_KV_HEADS, dim), fill, device=device).to(dtype) for dim in (HEAD_DIM, VALUE_DIM)
    )


def lengths(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def assert_written(cache, expected_at):
    """The cells named by (row, slot) hold exactly these bits, and every other cell is still NaN."""
    for row in range(cache.shape[0]):
        for slot in range(cache.shape[1]):
            if (row, slot) in expected_at:
                assert torch.equal(cache[row, slot], expected_at[row, slot])
            else:
                assert cache[row, slot].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_contiguous_cache_at_each_length(dtype, device):
    k, v = new_tokens(device, dtype=dtype)
    k_cache, v_cache = empty_caches(device, dtype=dtype)
    assert kv_append(k, v, k_cache, v_cache, cache_seqlens=lengths([2, 0], device)) is None
    for x, cache in ((k, k_cache), (v, v_cache)):
        assert_written(cache, {(0, 2 + t): x[0, t] for t in range(3)} | {(1, t): x[1, t] for t in range(3)})


def test_cache_batch_idx_and_writes_past_the_end_or_outside_are_dropped(device):
    k, v = new_tokens(device, batch=3)
    k_cache, v_cache = empty_caches(device)
    rows = lengths([3, 99, 1], device)
    kv_append(k, v, k_cache, v_cache, cache_seqlens=lengths([4, 0, -1], device), cache_batch_idx=rows)
    expected = {(3, 4): 0, (3, 5): 1}  # the third token of the first sequence is past the end
    assert_written(k_cache, {place: k[0, t] for place, t in expected.items()} | {(1, 0): k[2, 1], (1, 1): k[2, 2]})
    assert_written(v_cache, {place: v[0, t] for place, t in expected.items()} | {(1, 0): v[2, 1], (1, 1): v[2, 2]})


def test_paged_cache_by_block_table(device):
    k, v = new_tokens(device, batch=3)
    k_cache, v_cache = empty_caches(device, rows=5, slots=2)
    table = torch.tensor([[4, 1, 2], [-1, 3, 0], [2, 77, -1]], dtype=torch.int32, device=device)
    kv_append(k, v, k_cache, v_cache, cache_seqlens=lengths([1, 4, 1], device), block_table=table)
    for x, cache in ((k, k_cache), (v, v_cache)):
        first = {(4, 1): x[0, 0], (1, 0): x[0, 1], (1, 1): x[0, 2]}
        second = {(0, 0): x[1, 0], (0, 1): x[1, 1]}  # positions 4 and 5; position 6 is past its table
        third = {(2, 1): x[2, 0]}  # position 1; positions 2 and 3 are on a page that does not exist
        assert_written(cache, first | second | third)


def test_slot_mapping_skips_negative_and_drops_outside(device):
    k, v = (x.flatten(0, 1) for x in new_tokens(device))
    k_cache, v_cache = empty_caches(device, rows=5, slots=2)
    slots = torch.tensor([9, -1, 0, 10, 3, -(2**40)], device=device)
    kv_append(k, v, k_cache, v_cache, slot_mapping=slots)
    for x, cache in ((k, k_cache), (v, v_cache)):
        assert_written(cache, {(4, 1): x[0], (0, 0): x[2], (1, 1): x[4]})


def test_slot_mapping_of_a_batch_equals_packed(device):
    k, v = new_tokens(device)
    slots = torch.tensor([[5, 0, 3], [7, -1, 9]], device=device)
    batched, packed = empty_caches(device, rows=5, slots=2), empty_caches(device, rows=5, slots=2)
    kv_append(k, v, *batched, slot_mapping=slots)
    kv_append(k.flatten(0, 1), v.flatten(0, 1), *packed, slot_mapping=slots.flatten())
    for one, other in zip(batched, packed, strict=True):
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


def test_packed_tokens_go_to_their_sequences_and_padding_nowhere(device):
    k, v = (x.flatten(0, 1) for x in new_tokens(device))
    k_cache, v_cache = empty_caches(device)
    cu_seqlens = lengths([0, 3, 3, 5], device)  # the sixth token belongs to no sequence
    kv_append(k, v, k_cache, v_cache, cache_seqlens=lengths([0, 2, 4], device), cu_seqlens=cu_seqlens)
    for x, cache in ((k, k_cache), (v, v_cache)):
        assert_written(cache, {(0, 0): x[0], (0, 1): x[1], (0, 2): x[2], (2, 4): x[3], (2, 5): x[4]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_norm_and_rope_are_those_of_the_separate_ops(dtype, interleaved, device):
    k, v = new_tokens(device, dtype=dtype)
    q = torch.randn(2, 3, NUM_HEADS, HEAD_DIM, dtype=dtype, device=device)
    q_before, k_before = q.clone(), k.clone()
    q_weight, k_weight = torch.rand(2, HEAD_DIM, device=device)
    cos, sin = rope_tables(4, 20, device=device)
    before = lengths([2, 0], device)
    k_cache, v_cache = empty_caches(device, dtype=dtype)
    new_q = kv_append(
        k,
        v,
        k_cache,
        v_cache,
        cache_seqlens=before,
        cos=cos,
        sin=sin,
        interleaved=interleaved,
        q=q,
        q_norm_weight=q_weight,
        k_norm_weight=k_weight,
        norm_eps=1e-4,
        norm_weight_offset=1.0,
    )
    norm = {"eps": 1e-4, "weight_offset": 1.0}
    expected_q, expected_k = rope(
        rms_norm(q, q_weight, **norm), rms_norm(k, k_weight, **norm), cos, sin, offsets=before, interleaved=interleaved
    )
    assert torch.equal(new_q, expected_q)
    assert torch.equal(k_cache[0, 2:5], expected_k[0]) and torch.equal(k_cache[1, :3], expected_k[1])
    assert torch.equal(v_cache[0, 2:5], v[0])
    assert torch.equal(q, q_before) and torch.equal(k, k_before)


def test_given_positions_rotate_but_do_not_move_the_write(device):
    k, v = new_tokens(device)
    cos, sin = rope_tables(HEAD_DIM, 20, device=device)
    # 1000 is past the table and in a dropped write.
    positions = torch.tensor([[10, 11, 12], [0, 5, 1000]], device=device)
    k_cache, v_cache = empty_caches(device, slots=4)
    kv_append(k, v, k_cache, v_cache, cache_seqlens=lengths([0, 2], device), positions=positions, cos=cos, sin=sin)
    assert torch.equal(k_cache[0, :3], rope(k[:1], None, cos, sin, offsets=10)[0][0])
    assert torch.equal(k_cache[1, 2:], rope(k[1:, :2], None, cos, sin, positions=positions[1:, :2])[0][0])
    slots = torch.tensor([0, 1, 2, 8, 9, -1], device=device)
    by_slot = empty_caches(device, slots=4)
    kv_append(k, v, *by_slot, slot_mapping=slots.view(2, 3), positions=positions, cos=cos, sin=sin)
    assert torch.equal(by_slot[0][0, :3], k_cache[0, :3]) and torch.equal(by_slot[0][2, :2], k_cache[1, 2:])


def test_q_without_norm_or_rope_comes_back_as_a_copy(device):
    k, v = new_tokens(device)
    q = torch.randn(2, 3, NUM_HEADS, HEAD_DIM, device=device)
    new_q = kv_append(k, v, *empty_caches(device), cache_seqlens=lengths([0, 0], device), q=q)
    assert torch.equal(new_q, q) and new_q.data_ptr() != q.data_ptr()


def test_int8_codes_round_half_to_even_and_saturate(device):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.6, 127.4, 1e9, -128.4, -1e9], device=device)
    expected = torch.tensor([0, 2, 2, 0, -2, 127, 127, 127, -128, -128], dtype=torch.int8, device=device)
    assert torch.equal(quantize(x, torch.ones(1, device=device), torch.int8), expected)
    assert torch.equal(quantize(x * 0.25, torch.full((1,), 0.25, device=device), torch.int8), expected)


def test_fp8_codes_round_half_to_even_and_saturate(device):
    # e4m3 has 3 mantissa bits: between 16 and 32 its numbers are 2 apart
    x = torch.tensor([17.0, 19.0, 21.0, -17.0, 447.0, 1e6, -1e6, 2.0**-10], device=device)
    codes = quantize(x, torch.ones(1, device=device), torch.float8_e4m3fn)
    expected = torch.tensor([16.0, 20.0, 20.0, -16.0, 448.0, 448.0, -448.0, 0.0], device=device)
    assert torch.equal(codes.float(), expected)


def test_per_token_scale_uses_the_whole_range(device):
    x = torch.tensor([[1.0, -254.0, 3.0], [0.0, 0.0, 0.0], [1e-45, 0.0, 0.0]], device=device)
    assert torch.equal(per_token_scale(x, torch.int8), torch.tensor([2.0, 1.0, 1.0], device=device))
    x = torch.tensor([[896.0, 1.0]], dtype=torch.bfloat16, device=device)
    assert torch.equal(per_token_scale(x, torch.float8_e4m3fn), torch.tensor([2.0], device=device))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fixed_scales_are_read_and_per_token_scales_are_written(cache_dtype, dtype, device):
    k, v = new_tokens(device, dtype=dtype)
    before = lengths([1, 3], device)
    fixed = torch.rand(2, NUM_KV_HEADS, device=device) / 20
    k_cache, v_cache = empty_caches(device, dtype=cache_dtype, fill=7.0)
    untouched = k_cache.float()
    unchanged = fixed.clone()
    kv_append(k, v, k_cache, v_cache, cache_seqlens=before, k_scale=fixed[0], v_scale=fixed[1])
    assert torch.equal(fixed, unchanged)
    for x, cache, scale in ((k, k_cache, fixed[0]), (v, v_cache, fixed[1])):
        codes = quantize(x, scale[:, None], cache_dtype).float()
        assert torch.equal(cache[0, 1:4].float(), codes[0]) and torch.equal(cache[1, 3:6].float(), codes[1])
    assert torch.equal(k_cache[2:].float(), untouched[2:]) and torch.equal(k_cache[0, 4:].float(), untouched[0, 4:])

    k_cache, v_cache = empty_caches(device, dtype=cache_dtype, fill=7.0)
    k_scale, v_scale = torch.full((2, 4, CAPACITY, NUM_KV_HEADS), math.nan, device=device)
    kv_append(k, v, k_cache, v_cache, cache_seqlens=before, k_scale=k_scale, v_scale=v_scale)
    expected_scale = per_token_scale(k, cache_dtype)
    assert torch.equal(k_scale[0, 1:4], expected_scale[0]) and torch.equal(k_scale[1, 3:6], expected_scale[1])
    assert k_scale.isnan().sum() == k_scale.numel() - expected_scale.numel()
    highest = 127.0 if cache_dtype == torch.int8 else 448.0
    assert torch.equal(k_cache[0, 1:4].float().abs().amax(-1), torch.full((3, NUM_KV_HEADS), highest, device=device))


def test_quantised_cache_without_scale_has_scale_one(device):
    k, v = new_tokens(device)
    k_cache, v_cache = empty_caches(device, dtype=torch.int8, fill=0.0)
    kv_append(k * 10, v * 10, k_cache, v_cache, cache_seqlens=lengths([0, 0], device))
    assert torch.equal(k_cache[0, :3].float(), (k[0] * 10).round())


def test_appending_token_by_token_then_decoding_equals_full_attention(device):
    """The whole way of a cached decode, with RoPE, against attention over the sequence at once."""
    seqlen = 5
    q = torch.randn(2, seqlen, NUM_HEADS, HEAD_DIM, dtype=torch.float64, device=device)
    k, v = (x.double() for x in new_tokens(device, seqlen=seqlen))
    cos, sin = rope_tables(HEAD_DIM, 20, device=device)
    k_cache, v_cache = (cache.double() for cache in empty_caches(device, rows=2))
    expected = attention(*rope(q, k, cos, sin), v, causal=True)
    for t in range(seqlen):
        before = lengths([t, t], device)
        now = slice(t, t + 1)
        new_q = kv_append(k[:, now], v[:, now], k_cache, v_cache, cache_seqlens=before, cos=cos, sin=sin, q=q[:, now])
        output = decode_attention(new_q, k_cache, v_cache, before + 1)
        torch.testing.assert_close(output, expected[:, now])


def test_places_must_be_given_once(device):
    k, v = new_tokens(device)
    with pytest.raises(ValueError, match="either cache_seqlens or slot_mapping"):
        kv_append(k, v, *empty_caches(device))
    with pytest.raises(ValueError, match="either cache_seqlens or slot_mapping"):
        slots = torch.zeros(6, dtype=torch.int64, device=device)
        kv_append(k, v, *empty_caches(device), cache_seqlens=lengths([0, 0], device), slot_mapping=slots)


def test_slot_mapping_with_rope_needs_positions(device):
    k, v = new_tokens(device)
    cos, sin = rope_tables(HEAD_DIM, 20, device=device)
    with pytest.raises(ValueError, match="positions are required"):
        slots = torch.zeros(6, dtype=torch.int64, device=device)
        kv_append(k, v, *empty_caches(device), slot_mapping=slots, cos=cos, sin=sin)
