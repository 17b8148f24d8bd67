"""Attention over tiles of queries and keys by torch's matrix products: what serves every option where no kernel does.

As in the kernels, no more than one tile of scores exists at a time, forward and backward, and the backward pass computes the scores again
from lse. A :class:`Problem` is one or more dense sequences of the same lengths; a :class:`Tile` is a block of their score matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pytransformer.ops.attention.blocks import Blocks, Heads, Runs, portions
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.attention.dropout import kept
from pytransformer.ops.attention.scratch import Scratch
from pytransformer.ops.score_checks import four_dims

# Scores in a tile, over all heads: as float32 two megabytes, which stay in a core's cache through the passes over it.
TILE_SCORES = 2**19
# Products with fewer keys than this are slow on a CPU, ones with more leave fewer rows.
FEWEST_COLS = 256
_LOG2_E = math.log2(math.e)


class Tile(NamedTuple):
    """A block of the score matrices of some sequences, with all their heads: queries, and runs of keys in ascending order."""

    sequences: slice
    rows: slice
    runs: Runs

    @property
    def num_rows(self) -> int:
        """Queries of each head."""
        return int(self.rows.stop - self.rows.start)

    @property
    def num_cols(self) -> int:
        """Keys."""
        return sum(run.stop - run.start for run in self.runs)

    @property
    def places(self) -> Iterator[tuple[slice, slice]]:
        """Of each run the keys, and which columns of the tile they are."""
        start = 0
        for run in self.runs:
            stop = start + run.stop - run.start
            yield run, slice(start, stop)
            start = stop


class Problem:
    """The scores of dense sequences of the same lengths.

    Args:
        call: what to compute; of its keys and values only the sizes count here.
        first_sequence, heads: where its first sequence is in the batch that it belongs to, and its heads among those there, which dropout
            depends on; None = all heads.
    """

    def __init__(
        self, call: AttentionCall, seqlen_k: int, num_kv_heads: int, first_sequence: int = 0, heads: Heads | None = None
    ) -> None:
        self.call, self.seqlen_k, self.num_kv_heads = call, seqlen_k, num_kv_heads
        self.batch, self.seqlen_q, self.num_heads, self.head_dim = call.q.shape
        self.first_sequence, self.heads = first_sequence, heads or Heads(0, self.num_heads)
        self.blocks = None if call.block_mask is None else Blocks(call.block_mask, call.block_size)
        self.group = self.num_heads // num_kv_heads
        self.dtype = torch.promote_types(call.q.dtype, torch.float32)
        # Scores are in units of log 2, where exp2 needs no factor; beside a bias, which may be as low as numbers go, they are as they are.
        self.unit = _LOG2_E if call.bias is None else 1.0
        # What q is multiplied by before its product with k.
        self.factor = call.softmax_scale * (1 / call.softcap if call.softcap > 0 else self.unit)
        # The last query stands at the last key.
        self.offset = seqlen_k - self.seqlen_q
        self.left, self.right = call.window[0], 0 if call.causal else call.window[1]
        self.mask, self.bias = (None if term is None else four_dims(term) for term in (call.mask, call.bias))
        self.slopes = (
            None if call.alibi_slopes is None else call.alibi_slopes.to(self.dtype).view(-1, self.num_heads, 1, 1)
        )
        self.rows_per_tile = max(1, min(self.seqlen_q, max(32, TILE_SCORES // (self.num_heads * FEWEST_COLS))))
        if self.left >= 0 and self.right >= 0:
            # Of short windows more rows would see fewer keys in common.
            self.rows_per_tile = min(self.rows_per_tile, max(32, (self.left + self.right + 1) // 2))
        if self.blocks is not None:
            # Each block of queries meets its own keys.
            self.rows_per_tile = min(self.rows_per_tile, self.blocks.rows)
        cols = TILE_SCORES // (self.num_heads * self.rows_per_tile) // 64 * 64
        self.cols_per_tile = max(FEWEST_COLS, cols)
        scores = self.num_heads * self.rows_per_tile * min(self.cols_per_tile, max(seqlen_k, 1))
        self.sequences_per_tile = max(1, min(self.batch, TILE_SCORES // scores))
        self.hide: Callable[..., Tensor] = torch.fmin
        self._limit: tuple[tuple[object, ...], Tensor] | None = None

    def heads_first(self, tensor: Tensor) -> Tensor:
        """(batch, seqlen, num_kv_heads, dim) as (batch · num_kv_heads, seqlen, dim), contiguous, in the dtype of the scores."""
        batch, seqlen, num_kv_heads, dim = tensor.shape
        return tensor.to(self.dtype).transpose(1, 2).reshape(batch * num_kv_heads, seqlen, dim)

    def trust(self, q: Tensor, largest_k: Tensor) -> None:
        """Hidden scores may be NaN or inf only if q or k hold such or huge numbers; without them a faster function hides as well."""
        largest = largest_of(q) * largest_k * self.head_dim
        self.hide = torch.minimum if bool(largest < torch.finfo(self.dtype).max) else torch.fmin

    def row_blocks(self) -> Iterator[tuple[slice, slice]]:
        """(sequences, rows) of each block of queries."""
        rows_per_block = max(self.seqlen_q, 1) if self.blocks is None else self.blocks.rows
        for first in range(0, self.batch, self.sequences_per_tile):
            sequences = slice(first, min(self.batch, first + self.sequences_per_tile))
            for block in range(0, self.seqlen_q, rows_per_block):
                stop = min(self.seqlen_q, block + rows_per_block)
                for row in range(block, stop, self.rows_per_tile):
                    yield sequences, slice(row, min(stop, row + self.rows_per_tile))

    def tiles(self, sequences: slice, rows: slice) -> Iterator[Tile]:
        """The tiles of a block of queries; keys that causality, the window or the block mask hide from all of it are skipped."""
        first, stop = 0, self.seqlen_k
        if self.left >= 0:
            # Dropout's words come four keys at a time.
            first = max(0, rows.start + self.offset - self.left) // 4 * 4
        if self.right >= 0:
            stop = min(stop, rows.stop + self.offset + self.right)
        runs = [slice(first, stop)] if self.blocks is None else self.blocks.runs(rows.start, first, stop)
        for portion in portions(runs, self.cols_per_tile):
            yield Tile(sequences, rows, portion)

    def block(self, name: str, tensor: Tensor, sequences: slice, rows: slice, memory: Scratch) -> Tensor:
        """Rows of (batch, seqlen_q, num_heads, dim) in the shape of ``block_shape``, in memory of this name."""
        part = tensor[sequences, rows]
        # Twice: a large tensor is read in its own order, and what lies in the cache then is put in another.
        near = memory.take("near", *part.shape).copy_(part)
        block = memory.take(name, *self.block_shape(sequences, rows, part.shape[-1]))
        block.view(part.shape[0], part.shape[2], part.shape[1], part.shape[3]).copy_(near.transpose(1, 2))
        return block

    def block_shape(self, sequences: slice, rows: slice, dim: int) -> tuple[int, int, int]:
        """(sequences · num_kv_heads, group · rows, dim)."""
        count, length = sequences.stop - sequences.start, rows.stop - rows.start
        return count * self.num_kv_heads, self.group * length, dim

    def unblock(self, block: Tensor, sequences: slice, rows: slice) -> Tensor:
        """The inverse: (sequences, rows, num_heads, dim)."""
        count, length = sequences.stop - sequences.start, rows.stop - rows.start
        return block.view(count, self.num_heads, length, block.shape[-1]).transpose(1, 2)

    def kv_heads(self, sequences: slice) -> slice:
        """Where sequences are in what :meth:`heads_first` returns."""
        return slice(sequences.start * self.num_kv_heads, sequences.stop * self.num_kv_heads)

    def by_head(self, tile_of_scores: Tensor, tile: Tile) -> Tensor:
        """(sequences, num_heads, rows, cols) of a tile as the matrix products have it."""
        return tile_of_scores.view(-1, self.num_heads, tile.num_rows, tile.num_cols)

    def scores(self, q: Tensor, k: Tensor, tile: Tile, memory: Scratch) -> tuple[Tensor, Tensor | None]:
        """Scores of a tile, times ``unit``, -inf where hidden, and tanh(score / softcap) if there is a softcap.

        Args:
            q: (sequences · num_kv_heads, group · rows, head_dim), times ``factor``.
            k: (sequences · num_kv_heads, cols, head_dim).
        """
        call = self.call
        scores = memory.take("scores", q.shape[0], q.shape[1], k.shape[1])
        torch.bmm(q, k.transpose(1, 2), out=scores)
        tanh = None
        if call.softcap > 0:
            tanh = scores.tanh_()
            scores = torch.mul(tanh, call.softcap * self.unit, out=memory.take("capped", *scores.shape))
        heads = self.by_head(scores, tile)
        if self.bias is not None:
            heads.add_(part(self.bias, tile).to(self.dtype))
        if self.slopes is not None:
            heads.addcmul_(part(self.slopes, tile), self.distance(tile).abs_(), value=-self.unit)
        for limit in self.limits(tile):
            self.hide(heads, limit, out=heads)
        return scores, tanh

    def exp_(self, x: Tensor) -> Tensor:
        """exp of differences of scores, in place, and 0 where that is next to nothing beside 1.

        By exp2: on a CPU torch.exp takes up to a hundred times as long where its result is near the end of the range. Denormal results
        would slow down each product that they enter.
        """
        if self.unit != _LOG2_E:
            x.mul_(_LOG2_E / self.unit)
        return torch.threshold_(x, 0.8 * math.log2(torch.finfo(x.dtype).tiny), -math.inf).exp2_()

    def distance(self, tile: Tile) -> Tensor:
        """How far each key lies behind each query: (rows, cols)."""
        device = self.call.q.device
        positions = torch.arange(
            tile.rows.start + self.offset, tile.rows.stop + self.offset, dtype=self.dtype, device=device
        )
        keys = [torch.arange(run.start, run.stop, dtype=self.dtype, device=device) for run in tile.runs]
        return positions[:, None] - (keys[0] if len(keys) == 1 else torch.cat(keys))

    def limits(self, tile: Tile) -> Iterator[Tensor]:
        """inf where a key is seen and -inf where not, by each thing that hides, broadcastable to (sequences, num_heads, rows, cols)."""
        nearest = tile.rows.start + self.offset - (tile.runs[-1].stop - 1)
        farthest = tile.rows.stop - 1 + self.offset - tile.runs[0].start
        if (self.right >= 0 and nearest < -self.right) or (self.left >= 0 and farthest > self.left):
            # Tiles along the diagonal look alike.
            where = tile.num_rows, *((run.start - tile.rows.start, run.stop - run.start) for run in tile.runs)
            if self._limit is None or self._limit[0] != where:
                self._limit = where, self._limit_of_distance(tile)
            yield self._limit[1]
        if self.mask is not None:
            yield self._as_limit(part(self.mask, tile))
        if self.call.key_padding_mask is not None:
            yield self._as_limit(columns(self.call.key_padding_mask[tile.sequences, None, None], tile))

    def _limit_of_distance(self, tile: Tile) -> Tensor:
        distance = self.distance(tile)
        visible = torch.ones_like(distance, dtype=torch.bool)
        if self.right >= 0:
            visible &= distance >= -self.right
        if self.left >= 0:
            visible &= distance <= self.left
        return self._as_limit(visible)

    def _as_limit(self, visible: Tensor) -> Tensor:
        return visible.to(self.dtype).sub_(0.5).mul_(math.inf)

    def kept(self, tile: Tile, memory: Scratch) -> Tensor | None:
        """1 where dropout keeps a weight and 0 where not, (sequences, num_heads, rows, cols); None without dropout."""
        if self.call.dropout_p == 0 or self.call.dropout_seed is None:
            return None
        first, total = self.heads
        begin, end = (self.first_sequence + sequence for sequence in (tile.sequences.start, tile.sequences.stop))
        # All heads, or of each sequence one.
        step = 1 if self.num_heads == total else total
        matrices = range(begin * total + first, end * total + first, step)
        found = kept(self.call.dropout_p, self.call.dropout_seed, matrices, tile.rows, tile.runs, memory)
        return found.view(-1, self.num_heads, tile.num_rows, tile.num_cols)


def largest_of(tensor: Tensor) -> Tensor:
    """The largest magnitude, NaN if there is one; 0 of nothing, as a packed sequence may have no keys."""
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    lowest, highest = torch.aminmax(tensor)
    return torch.maximum(lowest.abs(), highest.abs())


def rows_of(tensor: Tensor, tile: Tile) -> Tensor:
    """The tile's sequences and queries, with all keys, of a tensor that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)."""
    every = slice(None)
    return tensor[tile.sequences if tensor.shape[0] > 1 else every, :, tile.rows if tensor.shape[2] > 1 else every]


def columns(tensor: Tensor, tile: Tile) -> Tensor:
    """The tile's keys of the last dimension, unless that broadcasts."""
    if tensor.shape[-1] == 1:
        return tensor
    parts = [tensor[..., run] for run in tile.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def part(tensor: Tensor, tile: Tile) -> Tensor:
    """The tile of a tensor that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)."""
    return columns(rows_of(tensor, tile), tile)


def add_to_part(sum_: Tensor, tile: Tile, values: Tensor) -> None:
    """Adds (sequences, num_heads, rows, cols) of a tile to that part of a tensor like those of :func:`part`."""
    target = rows_of(sum_, tile)
    if target.shape[-1] == 1:
        target += values.sum_to_size(target.shape)
        return
    for run, cols in tile.places:
        where = target[..., run]
        where += values[..., cols].sum_to_size(where.shape)
