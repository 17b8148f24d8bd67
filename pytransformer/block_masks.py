"""Patterns of block-sparse attention, for ``attention(..., block_mask=…, block_size=…)``.

Each is boolean (1, 1, blocks of queries, blocks of keys), True = attend: the same for all sequences and heads. Patterns are combined by
``|`` and ``&``; heads with patterns of their own are ``torch.cat((one, other, …), dim=1)``.

    blocks = local_global_blocks(16384, 16384, 128, local=4, global_=1, causal=True)
    out = attention(q, k, v, causal=True, block_mask=blocks, block_size=128)

A pattern lists whole blocks: with ``causal`` it leaves out those that lie in the future altogether, and the block on the diagonal is cut by
``attention(..., causal=True)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.attention.call import check_block_size


def local_global_blocks(
    seqlen_q: int,
    seqlen_k: int,
    block_size: int | tuple[int, int] = 64,
    *,
    local: int,
    global_: int = 0,
    causal: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Neighbours, and a few blocks at the beginning that everybody sees and that see everybody.

    Args:
        seqlen_q, seqlen_k: as of the call; the last query stands at the last key.
        block_size: as of the call: queries and keys in a block, or (queries, keys).
        local: how many blocks of keys are seen on either side of those in which a block of queries stands, which are seen too. A window
            of ``(2 · local + 1)`` blocks, or ``local + 1`` if causal.
        global_: how many blocks of keys at the beginning all queries see, and of queries at the beginning see all keys.
        causal: leaves out blocks in the future of all their queries.
        device: where the mask is made.

    Returns:
        Boolean (1, 1, blocks of queries, blocks of keys). With 0 queries or keys there are no blocks of them.

    Raises:
        TypeError, ValueError: a number that is none or out of range.

    Sources: Beltagy et al. 2020 (Longformer); Zaheer et al. 2020 (BigBird, there with random blocks too); Xiao et al. 2023 (first tokens
    seen by all, as attention sinks).
    """
    local = checks.check_int("local", local, minimum=0)
    count = checks.check_int("global_", global_, minimum=0)
    first, last, keys = _own_blocks(seqlen_q, seqlen_k, block_size, device)
    queries = torch.arange(first.shape[0], device=device)[:, None]
    listed = ((keys >= first - local) & (keys <= last + local)) | (keys < count) | (queries < count)
    return _finished(listed, last, keys, causal)


def strided_blocks(
    seqlen_q: int,
    seqlen_k: int,
    block_size: int | tuple[int, int] = 64,
    *,
    local: int,
    stride: int,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Tensor:
    """Neighbours, and beyond them each ``stride``-th block, counted from a query's own.

    Args:
        stride: blocks from one that is seen to the next. Near the square root of their number it costs least for the distance covered.
        Others, returns, raises: as in :func:`local_global_blocks`.

    Source: Child et al. 2019 (the strided pattern of Sparse Transformers, of both kinds of heads at once).
    """
    local = checks.check_int("local", local, minimum=0)
    stride = checks.check_int("stride", stride, minimum=1)
    first, last, keys = _own_blocks(seqlen_q, seqlen_k, block_size, device)
    listed = ((keys >= first - local) & (keys <= last + local)) | ((last - keys) % stride == 0)
    return _finished(listed, last, keys, causal)


def _own_blocks(
    seqlen_q: int, seqlen_k: int, block_size: int | tuple[int, int], device: torch.device | str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each block of queries the first and the last block of keys at its own positions, (blocks of queries, 1); all blocks of keys."""
    seqlen_q = checks.check_int("seqlen_q", seqlen_q, minimum=0)
    seqlen_k = checks.check_int("seqlen_k", seqlen_k, minimum=0)
    rows, cols = check_block_size(block_size)
    start = torch.arange(0, seqlen_q, rows, device=device)[:, None]
    stop = (start + rows).clamp(max=seqlen_q)
    offset = seqlen_k - seqlen_q
    keys = torch.arange(-(-seqlen_k // cols), device=device)
    return (start + offset).div(cols, rounding_mode="floor"), (stop - 1 + offset).div(cols, rounding_mode="floor"), keys


def _finished(listed: Tensor, last: Tensor, keys: Tensor, causal: bool) -> Tensor:
    if checks.check_bool("causal", causal):
        listed = listed & (keys <= last)
    return listed[None, None]
