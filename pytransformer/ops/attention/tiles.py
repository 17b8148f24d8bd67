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
    """A block of the score matrices of some sequences, with all their heads."""

    sequences: slice
    rows: slice
    cols: slice

    @property
    def num_rows(self) -> int:
        """Queries of each head."""
        return int(self.rows.stop - self.rows.start)

    @property
    def num_cols(self) -> int:
        """Keys."""
        return int(self.cols.stop - self.cols.start)


class Problem:
    """The scores of dense sequences of the same lengths.

    Args:
        call: what to compute; of its keys and values only the sizes count here.
        first_sequence: the index of the first sequence in the batch that it belongs to, which dropout depends on.
    """

    def __init__(self, call: AttentionCall, seqlen_k: int, num_kv_heads: int, first_sequence: int = 0) -> None:
        self.call, self.seqlen_k, self.num_kv_heads = call, seqlen_k, num_kv_heads
        self.batch, self.seqlen_q, self.num_heads, self.head_dim = call.q.shape
        self.first_sequence = first_sequence
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
        cols = TILE_SCORES // (self.num_heads * self.rows_per_tile) // 64 * 64
        self.cols_per_tile = max(FEWEST_COLS, cols)
        scores = self.num_heads * self.rows_per_tile * min(self.cols_per_tile, max(seqlen_k, 1))
        self.sequences_per_tile = max(1, min(self.batch, TILE_SCORES // scores))
        self.hide: Callable[..., Tensor] = torch.fmin
        self._limit: tuple[tuple[int, int, int], Tensor] | None = None

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
        for first in range(0, self.batch, self.sequences_per_tile):
            sequences = slice(first, min(self.batch, first + self.sequences_per_tile))
            for row in range(0, self.seqlen_q, self.rows_per_tile):
                yield sequences, slice(row, min(self.seqlen_q, row + self.rows_per_tile))

    def tiles(self, sequences: slice, rows: slice) -> Iterator[Tile]:
        """The tiles of a block of queries; keys that causality or the window hide from all of it are skipped."""
        first, stop = 0, self.seqlen_k
        if self.left >= 0:
            # Dropout's words come four keys at a time.
            first = max(0, rows.start + self.offset - self.left) // 4 * 4
        if self.right >= 0:
            stop = min(stop, rows.stop + self.offset + self.right)
        for col in range(first, stop, self.cols_per_tile):
            yield Tile(sequences, rows, slice(col, min(stop, col + self.cols_per_tile)))

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
        return positions[:, None] - torch.arange(tile.cols.start, tile.cols.stop, dtype=self.dtype, device=device)

    def limits(self, tile: Tile) -> Iterator[Tensor]:
        """inf where a key is seen and -inf where not, by each thing that hides, broadcastable to (sequences, num_heads, rows, cols)."""
        nearest = tile.rows.start + self.offset - (tile.cols.stop - 1)
        farthest = tile.rows.stop - 1 + self.offset - tile.cols.start
        if (self.right >= 0 and nearest < -self.right) or (self.left >= 0 and farthest > self.left):
            # Tiles along the diagonal look alike.
            where = nearest, tile.num_rows, tile.num_cols
            if self._limit is None or self._limit[0] != where:
                self._limit = where, self._limit_of_distance(tile)
            yield self._limit[1]
        if self.mask is not None:
            yield self._as_limit(part(self.mask, tile))
        if self.call.key_padding_mask is not None:
            yield self._as_limit(self.call.key_padding_mask[tile.sequences, None, None, tile.cols])

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
        first, stop = (self.first_sequence + sequence for sequence in (tile.sequences.start, tile.sequences.stop))
        heads = range(first * self.num_heads, stop * self.num_heads)
        found = kept(self.call.dropout_p, self.call.dropout_seed, heads, tile.rows, tile.cols, memory)
        return found.view(-1, self.num_heads, tile.num_rows, tile.num_cols)


def largest_of(tensor: Tensor) -> Tensor:
    """The largest magnitude, NaN if there is one; 0 of nothing, as a packed sequence may have no keys."""
    if tensor.numel() == 0:
        return tensor.new_zeros(())
    lowest, highest = torch.aminmax(tensor)
    return torch.maximum(lowest.abs(), highest.abs())


def part(tensor: Tensor, tile: Tile) -> Tensor:
    """The tile of a tensor that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)."""
    sequences, _, rows, cols = (size > 1 for size in tensor.shape)
    return tensor[
        tile.sequences if sequences else slice(None),
        :,
        tile.rows if rows else slice(None),
        tile.cols if cols else slice(None),
    ]
