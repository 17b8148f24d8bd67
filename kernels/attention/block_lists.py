"""Block-sparse attention: which key tiles a block of queries meets, and which query tiles a block of keys, as lists.

The kernels loop over such a list in place of a range of tiles, so that what a block mask leaves out is neither loaded nor multiplied. Lists
are made on the device from the mask's values, anew for each call, by a few small operations and with nothing read back. One row of them:

    how many entries stand before tile 0, 1, …, ``tiles``; then the entries, ascending

so that a range of tiles, as causality and the window give it, becomes a range of entries by two loads. An entry is ``tile · heads + head``,
where a block of keys lists the tiles of each query head of its group, which may have masks of their own, and else there is one head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

if TYPE_CHECKING:
    from pytransformer.ops.attention.call import AttentionCall


class ListStrides(NamedTuple):
    """Of lists (batch, heads, blocks, entries), 0 where one serves all; the blocks, the tiles that a row counts, positions in a block."""

    batch: Any
    head: Any
    block: Any
    blocks: Any
    tiles: Any
    block_size: Any


@triton.jit
def list_row(lists_ptr, strides, sequence, head, start):
    """The list of the block that holds position ``start``. Never one behind the mask, and no tile in :func:`entries_before`: the host may
    not know how long packed sequences are."""
    block = tl.minimum(start // strides.block_size, strides.blocks - 1)
    return lists_ptr + sequence * strides.batch + head * strides.head + tl.cast(block, tl.int64) * strides.block


@triton.jit
def first_entry(row_ptr, strides):
    """Where the entries of a row begin."""
    return row_ptr + strides.tiles + 1


@triton.jit
def entries_before(row_ptr, strides, tile):
    """How many entries stand before a tile."""
    return tl.load(row_ptr + tl.minimum(tile, strides.tiles))


@triton.jit
def listed_ranges(row_ptr, strides, bounds):
    """The ranges of entries in place of those of tiles (see tile.tile_ranges)."""
    inside_begin = entries_before(row_ptr, strides, bounds[0])
    inside_end = entries_before(row_ptr, strides, bounds[1])
    end = entries_before(row_ptr, strides, bounds[3])
    begin = entries_before(row_ptr, strides, bounds[4])
    return inside_begin, inside_end, inside_end, end, begin, inside_begin


class BlockLists:
    """Makes the lists for calls that are alike.

    Args:
        call: has a block mask.
        tile: positions in a tile of the other axis; divides its block.
        of_keys: whether blocks of keys list tiles of queries.
    """

    __slots__ = ("_group", "_of_keys", "_order", "_per_block", "strides")

    def __init__(self, call: AttentionCall, tile: int, *, of_keys: bool = False) -> None:
        mask = call.block_mask
        assert mask is not None
        batch, heads, own_blocks, blocks = (mask.mT if of_keys else mask).shape
        own_size, size = call.block_size[::-1] if of_keys else call.block_size
        assert size % tile == 0
        self._of_keys, self._per_block = of_keys, size // tile
        self._group = call.q.shape[-2] // call.k.shape[-2] if of_keys else 1
        tiles = blocks * self._per_block
        self._order = torch.arange(tiles * self._group, dtype=torch.int32, device=mask.device)
        row = tiles + 1 + tiles * self._group
        rows = (heads // self._group if heads > 1 else 1) * own_blocks
        self.strides = ListStrides(
            rows * row if batch > 1 else 0, own_blocks * row if heads > 1 else 0, row, own_blocks, tiles, own_size
        )

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """int32 (batch, heads, blocks, tiles + 1 + entries) of the mask of a call that is like the first."""
        mask, group = call.block_mask, self._group
        assert mask is not None
        if self._of_keys:
            mask = mask.mT
        # (batch, heads, rows, blocks, tiles in a block, heads of the group); the last two are repeated where they have no values.
        if group > 1 and mask.shape[1] > 1:
            mask = mask.unflatten(1, (-1, group)).movedim(2, -1)[..., None, :]
        else:
            mask = mask[..., None, None]
        listed = mask.expand(*mask.shape[:4], self._per_block, group).flatten(3)
        entries = torch.where(listed, self._order, self._order.shape[0]).sort(dim=-1).values
        before = listed.cumsum(-1, dtype=torch.int32)[..., group - 1 :: group]
        return torch.cat([F.pad(before, (1, 0)), entries], dim=-1)


def arguments(lists: BlockLists | None) -> tuple[None, ListStrides | None]:
    """What a kernel is prepared with: a pointer, and its strides."""
    return None, None if lists is None else lists.strides


def pointers(lists: BlockLists | None, name: str) -> tuple[str | None, ...]:
    """Which tensors calls give in the places of :func:`arguments`, where strides that are None count as a pointer too."""
    return (None, None) if lists is None else (name,)
