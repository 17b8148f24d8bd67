"""The engine's KV cache: rows that come and go, and steps in which some rows append one token and others a piece of a prompt.

A step's tokens reach the model as sequences of one token each, (total, 1), so that its linear layers see every token once and no padding.
Only the attention must know which of them belong together: it gets them packed, with the starts of the rows (cu_seqlens). A step in which
every row appends one token needs no packing, and goes the way of :class:`PagedLayer`. A bound step on a CPU goes without the ops, as
direct.py says.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer.generation.caches.contiguous import has_terms
from pytransformer.generation.caches.paged import PagedCache, PagedLayer, PageGroup
from pytransformer.generation.caches.part import CachePart

from .direct import DirectStep, Row, Scratch


class EngineCache(PagedCache):
    """A :class:`PagedCache` of which each step uses some rows. Pages are taken and given back by :class:`RowPages`, over its groups.

    Attributes:
        starts: of the step's rows in its tokens: int32 (rows + 1), or ``None`` where each has one token.
        longest_piece: tokens of one row in the step.
    """

    starts: Tensor | None = None
    longest_piece = 1

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._scratch = Scratch()
        self._direct: dict[int, DirectStep] = {}

    def choose_path(self, bound: bool) -> None:
        """Decides for the next step whether the layers do without the ops: they do if it is ``bound`` (see bound.py), without codes."""
        self.is_direct = bound and self.read_kind()[1] is None

    def begin(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        new_tokens: Sequence[Sequence[int]],
        chosen: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Before a step, when all of its pages have been taken.

        Args:
            rows: that take part.
            lengths: tokens of each in the cache.
            new_tokens: of each, at least one.
            chosen: places among the rows of those whose last token is followed by one that is to be chosen.

        Returns:
            The new tokens (total, 1), and the places of the last ones of ``chosen`` among them (chosen): int64.
        """
        for group in self.groups:
            group.upload()
        counts = [len(tokens) for tokens in new_tokens]
        ends = [length + count for length, count in zip(lengths, counts)]
        starts = [0, *itertools.accumulate(counts)]
        tokens = list(itertools.chain.from_iterable(new_tokens))
        places = list(itertools.chain.from_iterable(map(range, lengths, ends)))
        # All of it goes to the device in one piece.
        parts = [tokens, places, list(rows), list(lengths), ends, starts, [starts[place + 1] - 1 for place in chosen]]
        numbers = upload(list(itertools.chain.from_iterable(parts)), self.lengths.device)
        on_device = torch.split(numbers, [len(part) for part in parts])
        ids, places_of_tokens, row_index, step_lengths, step_ends, step_starts, last = on_device
        self._places: Tensor = places_of_tokens
        self._set_lengths(step_lengths.int())
        self._ends: Tensor = step_ends.int()
        self.max_length = max(ends) - 1  # the longest row has a token more when it attends
        self.longest_piece = max(counts)
        self.starts = None if self.longest_piece == 1 else step_starts.int()
        self._row_index: Tensor = row_index
        self._tables: dict[int, Tensor] = {}
        if self.is_direct:
            for group in self.groups:
                parts_of_rows = [Row(group.pages[row], *one) for row, *one in zip(rows, lengths, counts)]
                self._direct[group.left] = DirectStep(parts_of_rows, group.left, group.pool.part.k[0], self._scratch)
        return ids[:, None], last

    def table(self, group: PageGroup) -> Tensor:
        """The pages of the step's rows: int32 (rows, max_pages)."""
        if group.left not in self._tables:
            self._tables[group.left] = group.table.index_select(0, self._row_index)
        return self._tables[group.left]

    def direct(self, group: PageGroup) -> DirectStep:
        """The step for layers of a group, where it :attr:`is_direct`."""
        return self._direct[group.left]

    def positions(self, seqlen: int) -> Tensor:
        """Of the step's tokens: int64 (total, 1)."""
        return self._places[:, None]

    def attended(self, seqlen: int) -> Tensor:
        """Lengths of the step's rows with its tokens appended: int32 (rows)."""
        return self._ends

    def _make_layer(self, group: PageGroup, part: CachePart) -> PagedLayer:
        return EngineLayer(self, group, *part)


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Integers of the host as int64 on the device, without waiting for it."""
    host = torch.tensor(numbers, device="cpu")
    # From pageable memory the copy would wait.
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class EngineLayer(PagedLayer):
    """One layer of an :class:`EngineCache`."""

    _paged: EngineCache

    def append(self, q: Tensor, k: Tensor, v: Tensor, *, positions: Tensor | None, **options: Any) -> Tensor:
        """See :class:`pytransformer.nn.LayerCache`."""
        if self._paged.is_direct and positions is None:
            positions = self._paged.positions(1)
        if self._paged.is_direct or self._paged.starts is None:
            return super().append(q, k, v, positions=positions, **options)
        positions = None if positions is None else positions.flatten()
        return super().append(q[:, 0], k[:, 0], v[:, 0], positions=positions, **options)[:, None]

    def _write(self, k: Tensor, v: Tensor) -> None:
        step = self._paged.direct(self._group)
        step.write(self.k_cache, k)
        step.write(self.v_cache, v)

    def attend(self, q: Tensor, **options: Any) -> Tensor:
        """See :class:`pytransformer.nn.LayerCache`."""
        if self._paged.is_direct and not has_terms(options):
            step = self._paged.direct(self._group)
            return step.attend(q, self.k_cache, self.v_cache, options["softmax_scale"])
        if self._paged.starts is None:
            return super().attend(q, **options)
        return super().attend(q[:, 0], **options)[:, None]

    def _table(self) -> dict[str, Any]:
        table = {"block_table": self._paged.table(self._group)}
        return table if self._paged.starts is None else {**table, "cu_seqlens": self._paged.starts}

    def _read_table(self) -> dict[str, Any]:
        table: dict[str, Any] = {"block_table": self._paged.table(self._group)}
        if self._paged.starts is None:
            return table
        return {**table, "cu_seqlens_q": self._paged.starts, "max_seqlen_q": self._paged.longest_piece}

    def _before_writing(self, seqlen: int) -> None:
        """The pages were taken when the step was planned."""
