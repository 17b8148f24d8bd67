"""Philox4x32-10: the counter-based random numbers behind reproducible dropout.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011) and its Random123 library.
A counter-based generator has no state: it is a function (counter, key) -> four 32-bit words, so any tile of an attention
matrix can compute its own part of the dropout mask, in any order, again in the backward pass, and always gets the same bits.

**What ``philox(seed, offset, batch, head, i, j)`` means.** One evaluation serves four neighbouring keys of one query::

    key     = (seed mod 2^32, seed >> 32)                                          # 64-bit seed
    counter = (j // 4, i, batch * num_heads + head, offset mod 2^32)               # head, num_heads: of the queries
    word    = output[j mod 4]                                                      # uint32; the key is kept iff word >= p * 2^32

Why so: ten rounds cost about 100 integer instructions, more than the score's own arithmetic at head_dim 64, so all four
output words are used. The four belong to adjacent keys because both kinds of kernel can place them cheaply: a Triton tile
evaluates (BLOCK_M, BLOCK_N / 4) counters and interleaves (``reshape(join(join(w0, w2), join(w1, w3)))``); in an mma accumulator
neighbouring lanes hold adjacent pairs of keys of the rows r and r + 8, and exchange two words by one shuffle each.
In Triton, ``tl.philox(seed, c0, c1, c2, c3)`` on 32-bit counters forms key and rounds exactly as here.
The indices i and j are local to the sequence, so padded, packed and paged layouts of the same sequence drop the same keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW_32_BITS = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_2 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9  # golden ratio
_WEYL_1 = 0xBB67AE85  # sqrt(3) - 1
_ROUNDS = 10


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product of two 32-bit numbers. int64 multiplication wraps, which keeps every bit."""
    product = a * b
    return (product >> 32) & _LOW_32_BITS, product & _LOW_32_BITS


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors holding 32-bit words, broadcastable against each other.
        key: two int64 tensors holding 32-bit words.

    Returns:
        Four int64 tensors holding 32-bit words (0 <= word < 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_2, low_2 = _multiply(_MULTIPLIER_2, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _LOW_32_BITS, (k1 + _WEYL_1) & _LOW_32_BITS
    return c0, c1, c2, c3


def draw_dropout_seed(device: torch.device | str | None = None) -> Tensor:
    """A fresh (seed, offset) pair, int64[2], from torch's generator of that device; nothing is read back to the host."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def seed_and_offset(dropout_seed: int | Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """``dropout_seed`` as two int64 scalars: an int is a seed with offset 0, an int64[2] tensor is (seed, offset)."""
    if isinstance(dropout_seed, Tensor):
        seed, offset = dropout_seed.to(device).unbind()
        return seed, offset
    signed = (dropout_seed + 2**63) % 2**64 - 2**63  # any 64-bit pattern, as torch's signed integer
    return torch.tensor(signed, device=device), torch.tensor(0, device=device)


def dropout_threshold(dropout_p: float) -> int:
    """The smallest word that is kept: ``word >= p * 2^32`` for integer words. 2^32 (nothing is kept) for p = 1."""
    return math.ceil(dropout_p * 2**32)


def philox_words(
    dropout_seed: int | Tensor,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
) -> Tensor:
    """``philox(seed, offset, batch, h, i, j)`` for all heads, queries and keys of the sequence with index ``batch``.

    Returns:
        int64 (num_heads, seqlen_q, seqlen_k), words 0 <= word < 2^32.
    """
    seed, offset = seed_and_offset(dropout_seed, device)
    group_of_four = torch.arange((seqlen_k + 3) // 4, device=device)
    row = torch.arange(seqlen_q, device=device)[:, None]
    batch_head = batch * num_heads + torch.arange(num_heads, device=device)[:, None, None]
    words = philox_4x32(
        (group_of_four, row, batch_head, offset & _LOW_32_BITS), (seed & _LOW_32_BITS, (seed >> 32) & _LOW_32_BITS)
    )
    return torch.stack(words, dim=-1).flatten(-2)[..., :seqlen_k]


def dropout_keep(
    dropout_p: float,
    dropout_seed: int | Tensor,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
) -> Tensor:
    """True where dropout keeps the attention weight: bool (num_heads, seqlen_q, seqlen_k)."""
    words = philox_words(dropout_seed, batch, num_heads, seqlen_q, seqlen_k, device)
    return words >= dropout_threshold(dropout_p)
