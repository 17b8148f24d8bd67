"""Block masks for attention over tiles: which keys each block of queries meets, and calls whose heads or sequences meet different ones.

A block mask is read once for a call. Blocks that follow each other are one run of keys; the runs of a block of queries lie side by side in
its tiles, so that what is not listed is neither read nor multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.score_checks import four_dims

Runs = tuple[slice, ...]


class Blocks:
    """The runs of keys that queries meet, by a mask that is the same for all sequences and heads.

    Args:
        block_mask: (1, 1, blocks of queries, blocks of keys), boolean.
        block_size: (queries, keys).
    """

    def __init__(self, block_mask: Tensor, block_size: tuple[int, int]) -> None:
        self.rows, self.cols = block_size
        self._listed: list[list[bool]] = block_mask[0, 0].tolist()

    def runs(self, row: int, first: int, stop: int) -> list[slice]:
        """What the block of query ``row`` lists of the keys from ``first`` up to ``stop``."""
        found: list[slice] = []
        for block, is_listed in enumerate(self._listed[row // self.rows]):
            start, end = max(first, block * self.cols), min(stop, (block + 1) * self.cols)
            if not is_listed or start >= end:
                continue
            if found and found[-1].stop == start:
                start = found.pop().start
            found.append(slice(start, end))
        return found


def portions(runs: list[slice], most: int) -> Iterator[Runs]:
    """The runs in groups of at most ``most`` keys; only a group's last run is cut."""
    group: list[slice] = []
    left = most
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + left)
            group.append(slice(start, stop))
            left -= stop - start
            start = stop
            if left == 0:
                yield tuple(group)
                group, left = [], most
    if group:
        yield tuple(group)


class Heads(NamedTuple):
    """Which heads of a larger call a call has: those from ``first`` on, of ``total``."""

    first: int
    total: int


class Piece(NamedTuple):
    """Some sequences and heads of a dense call, as slices of its dimensions."""

    sequences: slice
    heads: slice
    kv_heads: slice

    def of_rows(self, tensor: Tensor, *, kv: bool = False) -> Tensor:
        """A part of a (batch, seqlen, heads, …) tensor."""
        return tensor[self.sequences, :, self.kv_heads if kv else self.heads]

    def of_statistics(self, tensor: Tensor) -> Tensor:
        """A part of a (batch, heads, seqlen) tensor."""
        return tensor[self.sequences, self.heads]

    def of_scores(self, tensor: Tensor) -> Tensor:
        """A part, with four dimensions, of what broadcasts to (batch, heads, …)."""
        tensor = four_dims(tensor)
        every = slice(None)
        return tensor[self.sequences if tensor.shape[0] > 1 else every, self.heads if tensor.shape[1] > 1 else every]

    def _maybe_of_scores(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self.of_scores(tensor)

    def of_slopes(self, slopes: Tensor) -> Tensor:
        """A part of (heads) or (batch, heads)."""
        return slopes[self.heads] if slopes.ndim == 1 else slopes[self.sequences, self.heads]

    def of_call(self, call: AttentionCall) -> AttentionCall:
        """The piece as a call."""
        padding, slopes, sinks = call.key_padding_mask, call.alibi_slopes, call.sinks
        return call._replace(
            q=self.of_rows(call.q),
            k=self.of_rows(call.k, kv=True),
            v=self.of_rows(call.v, kv=True),
            mask=self._maybe_of_scores(call.mask),
            bias=self._maybe_of_scores(call.bias),
            block_mask=self._maybe_of_scores(call.block_mask),
            key_padding_mask=None if padding is None else padding[self.sequences],
            alibi_slopes=None if slopes is None else self.of_slopes(slopes),
            sinks=None if sinks is None else sinks[self.heads],
        )

    def of_gradients(self, given: Any) -> Any:
        """What the backward pass of the piece is given."""
        return given._replace(
            dout=self.of_rows(given.dout),
            out=self.of_rows(given.out),
            lse=self.of_statistics(given.lse),
            dlse=None if given.dlse is None else self.of_statistics(given.dlse),
        )


def pieces(call: AttentionCall) -> list[Piece]:
    """The pieces of a dense call that have one block mask each; empty where the call is such a piece itself."""
    mask = call.block_mask
    if mask is None:
        return []
    # What is expanded is one for all.
    by_sequence, by_head = (mask.shape[axis] > 1 and mask.stride(axis) != 0 for axis in (0, 1))
    if not by_sequence and not by_head:
        return []
    batch, num_heads = call.q.shape[0], call.q.shape[2]
    group = num_heads // call.k.shape[2]
    every = Piece(slice(0, batch), slice(0, num_heads), slice(0, num_heads // group))
    return [
        Piece(
            slice(sequence, sequence + 1) if by_sequence else every.sequences,
            slice(head, head + 1) if by_head else every.heads,
            slice(head // group, head // group + 1) if by_head else every.kv_heads,
        )
        for sequence in range(batch if by_sequence else 1)
        for head in range(num_heads if by_head else 1)
    ]
