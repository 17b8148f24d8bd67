"""Dropout's random numbers by torch's integer arithmetic: Philox4x32-10 as in reference/philox.py, over one tile of scores.

A word is 32 bits in an int64: only there does torch keep the high half of a product. Of the counter
(j // 4, i, batch · heads + head, offset) each part varies along one dimension of the tile. Two rounds mix no more than two of them, so
broadcasting leaves them small; the other eight work in place, in memory that the next tile uses again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytransformer.reference.philox import dropout_threshold

if TYPE_CHECKING:
    from pytransformer.ops.attention.scratch import Scratch

_LOW = 0xFFFFFFFF
# Salmon et al. 2011: multipliers of philox4x32, and what is added to the two halves of the key in each round.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def kept(p: float, seed: Tensor, heads: range, rows: slice, runs: tuple[slice, ...], memory: Scratch) -> Tensor:
    """1 where dropout keeps the weight, 0 where it drops it: (heads, rows, cols) in memory's dtype.

    Args:
        p: the probability of dropping.
        seed: int64 (seed, offset).
        heads: batch · num_heads + head of each score matrix.
        rows, runs: queries, and keys that follow each other, in their sequence. A run starts at a multiple of 4, and all but the last end
            at one.
        memory: where to work.
    """
    device = seed.device
    groups = torch.cat([torch.arange(run.start // 4, -(-run.stop // 4), device=device) for run in runs])
    positions = torch.arange(rows.start, rows.stop, device=device)[:, None]
    matrices = torch.arange(heads.start, heads.stop, heads.step, device=device)[:, None, None]
    words = _philox((groups, positions, matrices, seed[1]), seed[0], memory)
    threshold = dropout_threshold(p)
    result = memory.take("kept", *words[0].shape, 4)
    for word, values in enumerate(words):
        torch.ge(values, threshold, out=result[..., word])
    return result.flatten(-2)[..., : sum(run.stop - run.start for run in runs)]


def _philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, memory: Scratch) -> tuple[Tensor, ...]:
    """The four words of each counter, 32 bits each."""
    c0, c1, c2, c3 = counter
    c3, k0, k1 = c3 & _LOW, seed & _LOW, (seed >> 32) & _LOW
    for _ in range(2):
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product_2 >> 32) ^ c1 ^ k0) & _LOW, product_2 & _LOW
        c2, c3 = ((product_0 >> 32) ^ c3 ^ k1) & _LOW, product_0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    # Of matrices, positions and groups.
    shape = (counter[2].shape[0], counter[1].shape[0], counter[0].shape[0])
    c0, c1, c2, c3 = (memory.take(f"c{n}", *shape, dtype=torch.int64).copy_(c) for n, c in enumerate((c0, c1, c2, c3)))
    product_0, product_2 = (memory.take(f"product_{n}", *shape, dtype=torch.int64) for n in (0, 2))
    for _ in range(_ROUNDS - 2):
        torch.mul(c0, _MULTIPLIERS[0], out=product_0)
        torch.mul(c2, _MULTIPLIERS[1], out=product_2)
        # c1 and c3 keep their high halves, which no product sees: they are cut off with what they are combined with.
        torch.bitwise_right_shift(product_2, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        torch.bitwise_right_shift(product_0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, product_2, c3, product_0 = product_2, c1, product_0, c3
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1.bitwise_and_(_LOW), c2, c3.bitwise_and_(_LOW)
