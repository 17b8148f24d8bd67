"""The paged KV cache: a sequence has pages for the tokens that it has, not for those that it may get.

Layers whose tokens see equally far back share a table: one pool of pages for the layers without a window, one for those with it, whose
pages are freed as soon as the window has passed. Sequences that begin alike share pages until one of them writes (copy-on-write).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer.model.config import TransformerConfig

from .contiguous import ContiguousLayer
from .part import CachePart, raw
from .pool import SCRATCH, PagePool
from .sequence import SequenceCache, check_rows
from .sizes import PAGE_SIZE, layers_by_window, predict, require_memory


class PagedCache(SequenceCache):
    """Keys and values of every layer for ``batch`` sequences, in pages.

    Args:
        config, batch, capacity, device: see :class:`SequenceCache`.
        dtype: of the model.
        quantised: ``None``, "int8" or "fp8": codes with a scale for each token and head.
        page_size: tokens of a page.
        num_pages: of each pool; ``None`` = enough for every sequence to reach the capacity. With fewer, sequences that grow at the same
            time may find none left: :class:`PoolExhausted`, before anything is written.
        longest_step: tokens that one step appends at most; ``None`` = the capacity. Layers with a window need fewer pages then.
        poison: see :class:`PagePool`.

    Attributes:
        groups: one for each window that layers have.

    Raises:
        ValueError: sizes out of range; more memory than is free (:class:`NotEnoughMemory`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantised: str | None = None,
        page_size: int = PAGE_SIZE,
        num_pages: int | None = None,
        longest_step: int | None = None,
        poison: bool = False,
    ) -> None:
        super().__init__(config, batch, capacity, device=device)
        for name, value in (("page_size", page_size), ("num_pages", num_pages), ("longest_step", longest_step)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        kind = "paged" if quantised is None else f"paged-{quantised}"
        dtype = torch.get_default_dtype() if dtype is None else dtype
        size = predict(
            kind, config, batch, capacity, dtype, page_size=page_size, num_pages=num_pages, longest_step=longest_step
        )
        require_memory(size.total, self.lengths.device, f"the {kind} KV cache")
        self.page_size = page_size
        self.groups: list[PageGroup] = []
        self._layers: dict[int, PagedLayer] = {}
        for (left, layers), pages in zip(layers_by_window(config).items(), size.pages):
            pool = PagePool(
                pages, page_size, len(layers), config.num_kv_heads, config.head_dim,
                device=device, dtype=dtype, quantised=quantised, poison=poison,
            )  # fmt: skip
            group = PageGroup(pool, layers, left, batch, -(-capacity // page_size), self.lengths.device)
            self.groups.append(group)
            for place, index in enumerate(layers):
                self._layers[index] = self._make_layer(group, pool.part.map(operator.itemgetter(place)))
        self._host_lengths = [0] * batch
        self._ended = [False] * batch
        self._expected: list[int] | None = None
        self._reserved: int | None = None

    def _make_layer(self, group: PageGroup, part: CachePart) -> PagedLayer:
        return PagedLayer(self, group, *part)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and tables, used or not."""
        return sum(group.pool.part.nbytes + group.all_tables.nbytes for group in self.groups)

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages that some sequence owns."""
        return sum(
            group.pool.part.nbytes * group.pool.used_pages // (group.pool.num_pages + 1) for group in self.groups
        )

    def read_kind(self) -> tuple[torch.dtype, str | None]:
        """See :class:`SequenceCache`."""
        part = self.groups[0].pool.part
        return part.k.dtype, part.quantised

    def layer(self, index: int) -> PagedLayer:
        """The part of layer ``index``."""
        return self._layers[index]

    def expect(self, new_tokens: Sequence[int]) -> None:
        """Says before a step how many of each sequence's new tokens are real: only those get pages."""
        self._expected = [int(count) for count in new_tokens]
        self._reserved = None

    def reserve(self, seqlen: int) -> None:
        """Pages for the next ``seqlen`` tokens of each sequence, before the first layer writes. A second call in a step does nothing.

        Raises:
            ValueError: they would not fit.
            PoolExhausted: there are not enough pages; nothing has changed then.
        """
        if self._reserved == seqlen:
            return
        self.require(seqlen)
        counts = [seqlen] * self.batch if self._expected is None else self._expected
        spans = {
            row: (length, length + min(count, seqlen))
            for row, (length, count) in enumerate(zip(self._host_lengths, counts))
            if not self._ended[row]
        }
        for group in self.groups:
            group.pool.require(group.missing(spans))
        for group in self.groups:
            for row, span in spans.items():
                group.extend(row, *span)
            group.upload()
        self._reserved = seqlen

    def advance(self, new_tokens: Tensor | int, longest: int | None = None) -> None:
        """See :class:`SequenceCache`. Pages of what was padding, and those behind a window, are free afterwards."""
        super().advance(new_tokens, longest)
        counts = [new_tokens] * self.batch if isinstance(new_tokens, int) else new_tokens.tolist()
        self._host_lengths = [length + count for length, count in zip(self._host_lengths, counts)]
        self._trim()

    def drop(self, ended: Tensor, longest: int | None = None) -> None:
        """See :class:`SequenceCache`; the pages of those sequences are free at once, and they get no others until :meth:`reset`."""
        super().drop(ended, longest)
        for row, is_over in enumerate(ended.tolist()):
            if is_over:
                self._ended[row] = True
                self._host_lengths[row] = 0
                for group in self.groups:
                    group.clear(row)
        self._trim()

    def _truncate(self, lengths: list[int]) -> None:
        for group in self.groups:
            for row, length in enumerate(lengths):
                if not self._ended[row]:
                    group.check_kept(row, length)
        super()._truncate(lengths)
        self._host_lengths = list(lengths)
        for group in self.groups:
            for row, length in enumerate(lengths):
                if length == 0 and not self._ended[row]:
                    group.clear(row)
        self._trim()

    def reset(self) -> None:
        """Forgets every token and frees every page."""
        super().reset()
        self._host_lengths = [0] * self.batch
        self._ended = [False] * self.batch
        for group in self.groups:
            for row in range(self.batch):
                group.clear(row)
        self._trim()

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        """See :class:`SequenceCache`. Pages are shared, nothing is copied, whatever ``shared`` is."""
        check_rows("rows", rows, self.batch, self.most)
        order: list[int] = rows.tolist()
        self.batch = len(order)
        self._set_lengths(self.lengths[rows.to(self.lengths.device)])
        self._host_lengths = [self._host_lengths[row] for row in order]
        self._ended = [self._ended[row] for row in order]
        for group in self.groups:
            group.reorder(order)
        self._trim()

    def write_prefix(self, part: CachePart, length: int) -> None:
        """See :class:`SequenceCache`: one copy, whose pages all sequences share."""
        if any(self._host_lengths):
            raise ValueError(f"a prefix goes into an empty cache, this one has lengths {self._host_lengths}")
        for group in self.groups:
            first = group.begin(0, length)
            for own, new in zip(group.pool.part.tensors(), part.tensors()):
                layers = raw(new)[group.layers, first * self.page_size : length]
                group.scatter(raw(own), layers.to(own.device), 0, first)
            group.reorder([0] * self.batch)
        self.advance(length)

    def read_prefix(self, row: int, length: int) -> CachePart:
        """See :class:`SequenceCache`; ValueError if a window has passed some of it, whose pages are gone."""
        if not 1 <= length <= self._host_lengths[row]:
            raise ValueError(
                f"length must be from 1 to that of sequence {row} ({self._host_lengths[row]}), got {length}"
            )
        sizes = self.config.num_layers, length
        result = self.groups[0].pool.part.map(lambda own: own.new_empty((*sizes, *own.shape[3:])))
        for group in self.groups:
            pages = group.pages[row][: -(-length // self.page_size)]
            if SCRATCH in pages:
                raise ValueError(
                    f"the first {length} tokens of sequence {row} are not all there: layers with a window freed the first of them"
                )
            for new, own in zip(result.tensors(), group.pool.part.tensors()):
                raw(new)[group.layers] = raw(own)[:, pages].flatten(1, 2)[:, :length]
        return result

    def _trim(self) -> None:
        for group in self.groups:
            for row, length in enumerate(self._host_lengths):
                if not self._ended[row]:
                    group.trim(row, length)
            group.upload()
        self._expected = self._reserved = None


class PageGroup:
    """Layers that keep the same keys: their pool, and each sequence's pages.

    Attributes:
        pool: see there.
        layers: their indices.
        left: keys before itself that a token sees, -1 = all.
        pages: of each sequence, in order of its tokens; ``SCRATCH`` in the place of one that a window has passed.
        table: int32 (batch, max_pages), the same for the ops; ``SCRATCH`` where a sequence has no page.
        all_tables: of as many sequences as there is memory for; ``table`` is the beginning of it.
    """

    def __init__(
        self, pool: PagePool, layers: list[int], left: int, batch: int, max_pages: int, device: torch.device
    ) -> None:
        self.pool = pool
        self.layers = layers
        self.left = left
        self.pages: list[list[int]] = [[] for _ in range(batch)]
        self._passed = [0] * batch  # pages in front that are freed
        self._host_table = torch.full((batch, max_pages), SCRATCH, dtype=torch.int32)
        self.all_tables = self._host_table.to(device)
        self.table = self.all_tables
        self._changed: set[int] = set()

    def missing(self, spans: Mapping[int, tuple[int, int]]) -> int:
        """Pages to be allocated so that tokens ``length .. end - 1`` of each sequence of ``spans`` can be written."""
        page_size = self.pool.page_size
        new = sum(max(-(-end // page_size) - len(self.pages[row]), 0) for row, (_, end) in spans.items())
        partial = Counter(
            self.pages[row][length // page_size] for row, (length, _) in spans.items() if length % page_size
        )
        # Of the owners of a page that all write to it the last one keeps it.
        return new + sum(min(writers, self.pool.owners(page) - 1) for page, writers in partial.items())

    def extend(self, row: int, length: int, end: int) -> None:
        """Allocates them; a page that is half full and has other owners is copied, for padding is written behind its tokens too."""
        pages, page_size = self.pages[row], self.pool.page_size
        if length % page_size:
            place = length // page_size
            if (owned := self.pool.own(pages[place])) != pages[place]:
                pages[place] = owned
                self._changed.add(row)
        if (count := -(-end // page_size) - len(pages)) > 0:
            pages += self.pool.allocate(count)
            self._changed.add(row)

    def trim(self, row: int, length: int) -> None:
        """Frees the pages behind the last token, and those that no later token's window reaches."""
        pages, page_size = self.pages[row], self.pool.page_size
        kept = -(-length // page_size)
        if len(pages) > kept:
            self.pool.free(pages[kept:])
            del pages[kept:]
            self._changed.add(row)
        if self.left < 0:
            return
        passed = min(max(length - self.left, 0) // page_size, len(pages))
        if passed > self._passed[row]:
            gone = slice(self._passed[row], passed)
            self.pool.free(pages[gone])
            pages[gone] = [SCRATCH] * (passed - self._passed[row])
            self._passed[row] = passed
            self._changed.add(row)

    def check_kept(self, row: int, length: int) -> None:
        """ValueError if the token behind the first ``length`` would see keys whose pages are freed."""
        first_kept = self._passed[row] * self.pool.page_size
        if length > 0 and max(length - self.left, 0) < first_kept:
            raise ValueError(
                f"lengths has {length} for sequence {row}: layers with a window of {self.left + 1} tokens would see tokens from "
                f"{max(length - self.left, 0)} on again, and have freed those before {first_kept}; keep more, or use a contiguous cache"
            )

    def clear(self, row: int) -> None:
        """Frees a sequence's pages."""
        if self.pages[row]:
            # The last ones first: of pages that lie idle, the beginning of a sequence is then kept for longest.
            self.pool.free(self.pages[row][self._passed[row] :][::-1])
            self._changed.add(row)
        self.pages[row] = []
        self._passed[row] = 0

    def held(self, row: int) -> int:
        """How many pages a sequence has."""
        return len(self.pages[row]) - self._passed[row]

    def adopt(self, row: int, pages: Sequence[int]) -> None:
        """Begins an empty sequence with pages that hold what it begins with; ``SCRATCH`` in front for those that a window has passed."""
        passed = pages.count(SCRATCH)
        self.pool.share(pages[passed:])
        self.pages[row] = list(pages)
        self._passed[row] = passed
        self._changed.add(row)

    def begin(self, row: int, length: int) -> int:
        """Pages for the first ``length`` tokens of an empty sequence, without those that a window has passed: the first page."""
        page_size = self.pool.page_size
        count = -(-length // page_size)
        first = 0 if self.left < 0 else min(max(length - self.left, 0) // page_size, count)
        self.pages[row] = [SCRATCH] * first + self.pool.allocate(count - first)
        self._passed[row] = first
        self._changed.add(row)
        return first

    def scatter(self, own: Tensor, new: Tensor, row: int, first: int) -> None:
        """Writes new (layers, tokens, …) into own (layers, pages, page_size, …), from page ``first`` of a sequence on."""
        page_size = self.pool.page_size
        for place, page in enumerate(self.pages[row][first:]):
            piece = new[:, place * page_size : (place + 1) * page_size]
            own[:, page, : piece.shape[1]] = piece

    def reorder(self, order: Sequence[int]) -> None:
        """Sequence b gets the pages of ``order[b]``."""
        before, passed = self.pages, self._passed
        for row in order:
            self.pool.share(before[row][passed[row] :])
        for row, pages in enumerate(before):
            self.pool.free(pages[passed[row] :])
        self.pages = [list(before[row]) for row in order]
        self._passed = [passed[row] for row in order]
        self._changed = set(range(len(order)))
        self.table = self.all_tables[: len(order)]

    def upload(self) -> None:
        """Brings the table up to date, in its place."""
        if not self._changed:
            return
        for row in self._changed:
            pages = self.pages[row]
            self._host_table[row] = SCRATCH
            self._host_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self.all_tables.copy_(self._host_table)
        self._changed.clear()


class PagedLayer(ContiguousLayer):
    """One layer's pages: (pages, page_size, num_kv_heads, head_dim) of keys and of values."""

    def __init__(
        self,
        cache: PagedCache,
        group: PageGroup,
        k_cache: Tensor,
        v_cache: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        super().__init__(cache, k_cache, v_cache, k_scale, v_scale)
        self._paged = cache
        self._group = group

    def _table(self) -> dict[str, Any]:
        return {"block_table": self._group.table}

    def _before_writing(self, seqlen: int) -> None:
        self._paged.reserve(seqlen)
