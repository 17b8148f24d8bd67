"""The random numbers of dropout: Random123's known answers, and what each index of the mapping means."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from pytransformer.reference.philox import (
    draw_dropout_seed,
    dropout_keep,
    dropout_threshold,
    philox_4x32,
    philox_words,
    seed_and_offset,
)

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, expected.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words_of(text: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(int(word, 16), device=device) for word in text.split())


def philox_in_python_integers(counter: list[int], key: list[int]) -> list[int]:
    """A second, independent writing of the rounds, with Python's unbounded integers."""
    low = 2**32
    for _ in range(10):
        product_0, product_2 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            product_2 // low ^ counter[1] ^ key[0],
            product_2 % low,
            product_0 // low ^ counter[3] ^ key[1],
            product_0 % low,
        ]
        key = [(key[0] + 0x9E3779B9) % low, (key[1] + 0xBB67AE85) % low]
    return counter


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers_of_random123(counter, key, expected, device):
    assert philox_4x32(words_of(counter, device), words_of(key, device)) == words_of(expected, device)


def test_each_index_goes_where_the_definition_says(device):
    seed, offset, batch, num_heads, seqlen_q, seqlen_k = 0x123456789ABCDEF0, 2**32 + 77, 3, 2, 3, 6
    words = philox_words(torch.tensor([seed, offset]), batch, num_heads, seqlen_q, seqlen_k, device)
    assert words.shape == (num_heads, seqlen_q, seqlen_k)
    for head in range(num_heads):
        for i in range(seqlen_q):
            for j in range(seqlen_k):
                counter = [j // 4, i, batch * num_heads + head, 77]
                expected = philox_in_python_integers(counter, [0x9ABCDEF0, 0x12345678])[j % 4]
                assert words[head, i, j].item() == expected


@triton.jit
def _philox_tile(out_ptr, seed, batch_head, offset, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of the mask as a kernel would compute it, four words to a counter."""
    rows = tl.arange(0, BLOCK_M)[:, None] + tl.zeros((1, BLOCK_N // 4), dtype=tl.int32)
    groups = tl.arange(0, BLOCK_N // 4)[None, :] + tl.zeros((BLOCK_M, 1), dtype=tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, groups, rows, groups * 0 + batch_head, groups * 0 + offset)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_N))
    tl.store(out_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], words.to(tl.int64))


def test_triton_computes_the_same_words_in_a_tile(device):
    seed, batch, num_heads = 0x7EADBEEF12345678, 5, 3
    tile = torch.empty(8, 16, dtype=torch.int64, device=device)
    _philox_tile[(1,)](tile, seed, batch * num_heads + 1, 9, BLOCK_M=8, BLOCK_N=16)
    expected = philox_words(torch.tensor([seed, 9]), batch, num_heads, 8, 16, device)[1]
    assert torch.equal(tile & 0xFFFFFFFF, expected)


def test_a_tile_of_a_longer_sequence_has_the_same_words(device):
    short, long = (philox_words(5, 1, 2, seqlen, seqlen + 3, device) for seqlen in (4, 40))
    assert torch.equal(short, long[:, :4, :7])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 - 1])
def test_integer_seeds_are_taken_modulo_2_to_64(seed, device):
    signed = seed - 2**64 if seed >= 2**63 else seed
    as_tensor = torch.tensor([signed, 0], device=device)
    assert torch.equal(philox_words(seed, 0, 1, 2, 5, device), philox_words(as_tensor, 0, 1, 2, 5, device))
    assert torch.equal(philox_words(seed, 0, 1, 2, 5, device), philox_words(seed + 2**64, 0, 1, 2, 5, device))


def test_a_drawn_seed_follows_the_generator_and_changes(device):
    torch.manual_seed(3)
    first, second = draw_dropout_seed(device), draw_dropout_seed(device)
    torch.manual_seed(3)
    assert torch.equal(first, draw_dropout_seed(device))
    assert not torch.equal(first, second)
    assert first.shape == (2,) and first.dtype == torch.int64
    assert torch.equal(torch.stack(seed_and_offset(first, device)), first)


def test_threshold_is_exact():
    assert dropout_threshold(0.0) == 0
    assert dropout_threshold(0.5) == 2**31
    assert dropout_threshold(2**-32) == 1
    assert dropout_threshold(2**-33) == 1  # a word of 0 is below 0.5: dropped
    assert dropout_threshold(1.0) == 2**32


def test_kept_fraction_is_one_minus_p(device):
    keep = dropout_keep(0.3, 11, 0, 4, 128, 128, device).double()
    deviation = (0.3 * 0.7 / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - 0.7) < 4 * deviation
    assert (keep.mean(dim=(1, 2)) - 0.7).abs().max().item() < 4 * deviation * 2


def test_a_word_equal_to_the_threshold_is_kept(device):
    word = int(philox_words(11, 0, 1, 4, 4, device)[0, 2, 3])
    assert dropout_keep(word / 2**32, 11, 0, 1, 4, 4, device)[0, 2, 3]
    assert not dropout_keep((word + 1) / 2**32, 11, 0, 1, 4, 4, device)[0, 2, 3]
