"""The mask function: what it recognises means exactly what transformers' own masks mean, and what it does not recognise stays a mask."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MptConfig, masking_utils
from transformers.cache_utils import DynamicCache, StaticCache

from pytransformer.interop.huggingface import DeferredMask, attention_mask

BATCH = 2
KINDS = {
    "causal": (masking_utils.causal_mask_function, {}),
    "bidirectional": (masking_utils.bidirectional_mask_function, {}),
    "window 1": (masking_utils.sliding_window_causal_mask_function(1), {"local_size": 1}),
    "window 3": (masking_utils.sliding_window_causal_mask_function(3), {"local_size": 3}),
    "bidirectional window 0": (masking_utils.sliding_window_bidirectional_mask_function(0), {"local_size": 0}),
    "bidirectional window 2": (masking_utils.sliding_window_bidirectional_mask_function(2), {"local_size": 2}),
}
# (q_length, kv_length, q_offset, kv_offset): a prompt, a continuation, a sliding cache, an empty and a partly filled static cache.
SIZES = [(7, 7, 0, 0), (3, 7, 4, 0), (3, 6, 9, 6), (4, 9, 0, 0), (3, 9, 2, 0), (2, 7, 0, 0), (7, 3, 0, 0)]


def seen_by_the_op(mask: DeferredMask, q_length: int, kv_length: int) -> Tensor:
    """What the op makes of a pattern, by the definition of its options: boolean (batch, 1, q_length, kv_length)."""
    pattern = mask.pattern
    key = torch.arange(kv_length)
    distance = (torch.arange(q_length) + pattern.num_keys - q_length)[:, None] - key
    left, right = pattern.window
    seen = (key < pattern.num_keys).expand(q_length, kv_length)
    if pattern.causal:
        seen = seen & (distance >= 0)
    if left >= 0:
        seen = seen & (distance <= left)
    if right >= 0:
        seen = seen & (distance >= -right)
    seen = seen.expand(BATCH, 1, q_length, kv_length)
    if pattern.padding is not None:
        seen = seen & pattern.padding[:, None, None, :]
    if pattern.cu_seqlens is not None:
        tokens = torch.arange(BATCH * q_length).view(BATCH, q_length)
        ids = torch.bucketize(tokens, pattern.cu_seqlens, right=True)
        seen = seen & (ids[:, None, :, None] == ids[:, None, None, :])
    return seen


def padding_of(kv_end: int) -> Tensor:
    mask = torch.ones(BATCH, kv_end, dtype=torch.bool)
    mask[1, :2] = False
    return mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_recognised_pattern_is_transformers_own_mask(kind, sizes, padded):
    mask_function, options = KINDS[kind]
    q_length, kv_length, q_offset, kv_offset = sizes
    call = {
        "batch_size": BATCH, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": mask_function, "attention_mask": padding_of(kv_offset + kv_length) if padded else None, **options,
    }  # fmt: skip
    expected = masking_utils.sdpa_mask(**call, allow_is_causal_skip=False)
    mask = attention_mask(**call, allow_is_causal_skip=False)
    assert mask.shape == expected.shape and mask.dtype == torch.bool
    assert torch.equal(mask.clone(), expected)
    if isinstance(mask, DeferredMask):
        assert torch.equal(seen_by_the_op(mask, q_length, kv_length), expected)
    else:
        assert kind.startswith("bidirectional window") or q_offset + q_length - kv_offset > kv_length
    skipped = attention_mask(**call, allow_is_bidirectional_skip=True)
    if skipped is None:
        everything = torch.ones(q_length, kv_length, dtype=torch.bool)
        everything = everything.tril(kv_length - q_length) if kind in ("causal", "window 1", "window 3") else everything
        assert torch.equal(everything.expand(expected.shape), expected)


def test_patterns_are_deferred_and_others_are_not():
    call = {"batch_size": BATCH, "q_length": 6, "kv_length": 6}
    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function(3)
    assert attention_mask(**call, mask_function=causal) is None
    assert attention_mask(**call, mask_function=causal, attention_mask=torch.ones(BATCH, 6, dtype=torch.bool)) is None
    assert attention_mask(**call, mask_function=masking_utils.sliding_window_causal_mask_function(6)) is None
    assert attention_mask(**call, mask_function=window).pattern.window == (2, 0)
    assert isinstance(attention_mask(**call, mask_function=causal, attention_mask=padding_of(6)), DeferredMask)
    chunked = masking_utils.chunked_causal_mask_function(2, torch.zeros(BATCH, dtype=torch.long))
    custom = masking_utils.or_masks(causal, lambda batch, head, query, key: key == 0)
    for mask_function in (chunked, custom):
        mask = attention_mask(**call, mask_function=mask_function, allow_is_causal_skip=False)
        assert type(mask) is Tensor
        assert torch.equal(
            mask, masking_utils.sdpa_mask(**call, mask_function=mask_function, allow_is_causal_skip=False)
        )


def test_one_query_gets_a_row():
    mask = attention_mask(BATCH, 1, 6, q_offset=5, attention_mask=padding_of(6))
    assert type(mask) is Tensor and mask.shape == (BATCH, 1, 1, 6)
    assert torch.equal(mask[:, 0, 0], padding_of(6))
    assert attention_mask(BATCH, 1, 6, q_offset=5) is None


def config(name: str, **changes: object) -> LlamaConfig:
    made = LlamaConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=8, **changes)
    made._attn_implementation = name
    return made


def test_packing_is_never_left_out():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2]])
    causal, packed = masking_utils.causal_mask_function, masking_utils.packed_sequence_mask_function(ids)
    for mask_function in (masking_utils.and_masks(causal, packed), masking_utils.and_masks(packed, causal)):
        mask = attention_mask(1, 6, 6, mask_function=mask_function, allow_is_causal_skip=True)
        assert mask.pattern.cu_seqlens.tolist() == [0, 3, 5, 6] and mask.pattern.causal


def test_packed_positions_become_cu_seqlens():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    embeddings = torch.zeros(BATCH, 6, 8)
    for create in (masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask):
        expected = create(config("sdpa", sliding_window=2), embeddings, None, None, positions)
        mask = create(config("pytransformer", sliding_window=2), embeddings, None, None, positions)
        assert mask.pattern.cu_seqlens.tolist() == [0, 3, 5, 6, 12]
        assert mask.pattern.max_seqlen == 6
        assert torch.equal(seen_by_the_op(mask, 6, 6), expected)


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("static", [False, True])
def test_masks_of_caches_stand_at_absolute_positions(static, past):
    made = config("pytransformer")
    cache = StaticCache(config=made, max_cache_len=10) if static else DynamicCache(config=made)
    if past:
        cache.update(torch.zeros(BATCH, 1, past, 8), torch.zeros(BATCH, 1, past, 8), 0)
    embeddings, padding = torch.zeros(BATCH, 4, 8), padding_of(past + 4).long()
    mask = masking_utils.create_causal_mask(made, embeddings, padding, cache)
    expected = masking_utils.create_causal_mask(config("sdpa"), embeddings, padding, cache, allow_is_causal_skip=False)
    assert torch.equal(mask.clone(), expected)
    assert not expected[:, :, :, past + 4 :].any()
    if isinstance(mask, DeferredMask):
        assert torch.equal(seen_by_the_op(mask, 4, mask.shape[-1]), expected)


def test_a_deferred_mask_is_the_tensor_it_stands_for():
    mask = attention_mask(BATCH, 6, 6, attention_mask=padding_of(6))
    expected = masking_utils.sdpa_mask(BATCH, 6, 6, attention_mask=padding_of(6), allow_is_causal_skip=False)
    assert (mask.shape, mask.dtype, mask.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(mask[:, :, :, :4], expected[:, :, :, :4])
    assert torch.equal(~mask & True, ~expected)
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(expected, 0.0, -1.0))
    assert torch.equal(torch.cat([mask, mask], dim=-1), torch.cat([expected, expected], dim=-1))
    for same in (mask.contiguous(), mask.detach()):
        assert isinstance(same, DeferredMask) and same.pattern is mask.pattern
    for read in (mask.to(torch.float32), copy.deepcopy(mask), mask.expand(BATCH, 3, 6, 6)):
        assert torch.equal(read.bool(), expected.expand(read.shape))
    assert "DeferredMask" in repr(mask)


def test_a_deferred_mask_that_was_changed_in_place_counts_as_changed():
    mask, other = (attention_mask(BATCH, 6, 6, attention_mask=padding_of(6)) for _ in range(2))
    alias = mask.detach()
    assert not mask.was_read()
    mask[:, :, :, 3] = False
    expected = other.dense().clone()
    expected[:, :, :, 3] = False
    assert mask.was_read() and alias.was_read()
    assert torch.equal(mask.dense(), expected) and torch.equal(alias.dense(), expected)


def test_models_with_attention_of_their_own_are_refused():
    """They would add a boolean mask to their scores and attend to the future."""
    ids = torch.ones(1, 4, dtype=torch.long)
    for made in (
        BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1),
        MptConfig(vocab_size=8, d_model=8, n_layers=1, n_heads=1),
    ):
        model = AutoModelForCausalLM.from_config(made, attn_implementation="pytransformer")
        assert not model._can_set_attn_implementation()
        with pytest.raises(ValueError, match="does not take its attention from transformers' registry"):
            model(ids)
