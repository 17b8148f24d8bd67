"""The page pool and the tables over it: no page lost, freed twice or read after it was freed, whatever the order of requests."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pytransformer import TransformerConfig
from pytransformer.generation import PagedCache, PoolExhausted
from pytransformer.generation.caches import PagePool

CPU = torch.device("cpu")  # bookkeeping is the host's
BATCH, CAPACITY = 3, 14
CONFIG = TransformerConfig.llama(
    vocab_size=8, hidden_size=4, num_layers=3, num_heads=1, intermediate_size=4, max_seqlen=CAPACITY,
    sliding_window=4, layer_types=("sliding", "full", "sliding"),
)  # fmt: skip


class PoolMachine(RuleBasedStateMachine):
    """Owners with lists of pages, each page filled with a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, 2, 1, 1, 2, poison=True)
        self.owned: list[list[int]] = []
        self.content: dict[int, float] = {}
        self.names: dict[float, int] = {}  # content -> the page that is found by it
        self.idle: list[int] = []  # named pages without owners, the longest idle first
        self.idle_content: dict[int, float] = {}
        self.stamp = 0.0

    def write(self, page: int) -> None:
        self.stamp += 1.0
        self.pool.part.k[:, page] = self.content[page] = self.stamp

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        free = self.pool.free_pages
        if count > free:
            with pytest.raises(PoolExhausted, match=f"{count} pages of 2 tokens are needed and {free} of 6 are free"):
                self.pool.allocate(count)
            return
        plain = 6 - len(self.content) - len(self.idle)
        pages = self.pool.allocate(count)
        assert not set(pages) & set(self.content)
        # Idle pages are taken when no other is left, in the order in which they became idle.
        evicted = self.idle[: max(count - plain, 0)]
        assert set(pages) & set(self.idle) == set(evicted)
        del self.idle[: len(evicted)]
        for page in evicted:
            del self.names[self.idle_content.pop(page)]
        assert bool(self.pool.part.k[:, pages].isnan().all())
        self.owned.append(pages)
        for page in pages:
            self.write(page)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from(self.owned))
        self.pool.share(pages)
        self.owned.append(list(pages))

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        self.pool.free(pages)
        kept = {page for pages in self.owned for page in pages}
        last = [page for place, page in enumerate(pages) if page not in kept and page not in pages[place + 1 :]]
        for page in last:  # a page that is freed twice goes with the second time
            content = self.content.pop(page)
            if page in self.names.values():
                self.idle.append(page)
                self.idle_content[page] = content
            else:
                assert bool(self.pool.part.k[:, page].isnan().all())

    @precondition(lambda self: self.content)
    @rule(data=st.data(), name=st.none() | st.just(-1.0))
    def remember(self, data: st.DataObject, name: float | None) -> None:
        page = data.draw(st.sampled_from(sorted(self.content)))
        name = self.content[page] if name is None else name
        taken = name in self.names and self.names[name] != page
        assert self.pool.remember(page, name) == (not taken)
        if not taken:
            self.content[page] = name
            self.names = {other: place for other, place in self.names.items() if place != page}
            self.names[name] = page
            self.pool.part.k[:, page] = name

    @rule(count=st.integers(1, 3))
    def a_sequence_comes_and_goes(self, count: int) -> None:
        """Its pages lie idle."""
        if count > self.pool.free_pages:
            return
        self.allocate(count)
        pages = self.owned.pop()
        for page in pages:
            assert self.pool.remember(page, self.content[page])
            self.names[self.content[page]] = page
        self.pool.free(pages)
        for page in pages:
            self.idle.append(page)
            self.idle_content[page] = self.content.pop(page)

    @precondition(lambda self: self.idle)
    @rule(data=st.data())
    def take_up_an_idle_page(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.idle))
        assert self.pool.find(self.idle_content[page]) == page
        self.pool.share([page])
        self.idle.remove(page)
        self.content[page] = self.idle_content.pop(page)
        self.owned.append([page])

    @rule(page=st.integers(1, 6))
    def forget(self, page: int) -> None:
        self.pool.forget([page])
        self.names = {name: place for name, place in self.names.items() if place != page}
        if page in self.idle:
            self.idle.remove(page)
            del self.idle_content[page]
            assert bool(self.pool.part.k[:, page].isnan().all())

    @precondition(lambda self: any(self.owned))
    @rule(data=st.data())
    def write_to_a_page_of_its_own(self, data: st.DataObject) -> None:
        pages = data.draw(st.sampled_from([pages for pages in self.owned if pages]))
        page = data.draw(st.sampled_from(pages))
        if self.pool.owners(page) > 1 and self.pool.free_pages == 0:
            with pytest.raises(PoolExhausted):
                self.pool.own(page)
            return
        before = self.content[page]
        copy = self.pool.own(page)
        if copy == page:  # written to by its only owner: not what its name says any more
            self.names = {name: place for name, place in self.names.items() if place != page}
        elif copy in self.idle:
            self.idle.remove(copy)
            del self.names[self.idle_content.pop(copy)]
        assert self.pool.part.k[0, copy].unique().tolist() == [before]
        pages[pages.index(page)] = copy
        self.write(copy)

    @rule(page=st.integers(-1, 8))
    def a_page_that_is_free_cannot_be_freed_or_shared(self, page: int) -> None:
        if page in self.content or page in self.idle:
            page = 0  # of nobody
        for refused in (self.pool.free, self.pool.share, lambda pages: self.pool.remember(pages[0], "it")):
            with pytest.raises(ValueError, match=r"cannot be|page must be from 1 to 6"):
                refused([page])

    @invariant()
    def every_page_is_free_or_owned(self) -> None:
        for page in range(1, 7):
            owners = sum(pages.count(page) for pages in self.owned)
            assert self.pool.owners(page) == owners
            if owners:
                assert self.pool.part.k[0, page].unique().tolist() == [self.content[page]]
        for page in self.idle:
            assert self.pool.part.k[0, page].unique().tolist() == [self.idle_content[page]]
        assert all(self.pool.find(name) == self.names.get(name) for name in range(-1, int(self.stamp) + 1))
        assert self.pool.idle_pages == len(self.idle)
        assert self.pool.used_pages == len(self.content) and self.pool.free_pages + self.pool.used_pages == 6


class CacheMachine(RuleBasedStateMachine):
    """Sequences that grow, end, branch and begin alike, each token with a number of its own as key."""

    @initialize(num_pages=st.sampled_from([None, 5, 4]), page_size=st.integers(1, 4))
    def make(self, num_pages: int | None, page_size: int) -> None:
        self.cache = PagedCache(
            CONFIG, BATCH, CAPACITY, device=CPU, page_size=page_size, num_pages=num_pages, poison=True
        )
        self.tokens: list[list[float]] = [[] for _ in range(BATCH)]
        self.ended = [False] * BATCH
        self.stamp = 0.0

    @rule(counts=st.lists(st.integers(0, 3), min_size=BATCH, max_size=BATCH), expected=st.booleans())
    def append(self, counts: list[int], expected: bool) -> None:
        seqlen = max(*counts, 1)
        if self.cache.max_length + seqlen > CAPACITY:
            self.reset()
        if expected:
            self.cache.expect(counts)
        new = torch.arange(BATCH * seqlen, dtype=torch.float32).view(BATCH, seqlen) + self.stamp + 1
        self.stamp = float(new.max())
        k = new[..., None, None].expand(BATCH, seqlen, 1, 4).contiguous()
        before = self.state()
        try:
            for layer in range(3):
                self.cache.layer(layer).append(k, k, -k, rotary=None, positions=None, q_norm=None, k_norm=None)
        except PoolExhausted:
            assert self.state() == before
            self.cache.reset()
            self.tokens, self.ended = [[] for _ in range(BATCH)], [False] * BATCH
            return
        self.cache.advance(torch.tensor(counts))
        for row, count in enumerate(counts):
            self.tokens[row] += new[row, :count].tolist()

    @rule(row=st.integers(0, BATCH - 1), lengths=st.lists(st.integers(1, 3), max_size=4))
    def grow_alone_and_branch(self, row: int, lengths: list[int]) -> None:
        """Pages are few: only where all sequences share long beginnings are there too few for the copies alone."""
        self.reset()
        for length in lengths:
            self.append([length * (index == row) for index in range(BATCH)], expected=True)
        self.branch([row] * BATCH, [1] * BATCH)

    @precondition(lambda self: not any(self.ended))
    @rule(row=st.integers(0, BATCH - 1))
    def drop(self, row: int) -> None:
        self.cache.drop(torch.arange(BATCH) == row)
        self.tokens[row], self.ended[row] = [], True

    @rule(rows=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH))
    def reorder(self, rows: list[int]) -> None:
        self.cache.reorder(torch.tensor(rows))
        self.tokens = [list(self.tokens[row]) for row in rows]
        self.ended = [self.ended[row] for row in rows]

    @rule(
        rows=st.lists(st.integers(0, BATCH - 1), min_size=BATCH, max_size=BATCH),
        counts=st.lists(st.integers(1, 2), min_size=BATCH, max_size=BATCH),
    )
    def branch(self, rows: list[int], counts: list[int]) -> None:
        self.reorder(rows)
        self.append(counts, expected=True)

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.tokens, self.ended = [[] for _ in range(BATCH)], [False] * BATCH
        assert all(group.pool.used_pages == 0 for group in self.cache.groups)

    def state(self) -> str:
        groups = [(group.pages, group.pool.free_pages, group.table.tolist()) for group in self.cache.groups]
        return f"{self.cache.lengths.tolist()} {groups}"

    @invariant()
    def each_sequence_reads_what_it_wrote(self) -> None:
        for group in self.cache.groups:
            pool, page_size = group.pool, self.cache.page_size
            for row, tokens in enumerate(self.tokens):
                if self.ended[row]:
                    assert not group.table[row].any()
                    continue
                first = 0 if group.left < 0 else max(len(tokens) - group.left, 0)  # as the next token sees it
                for place in range(first, len(tokens)):
                    page = int(group.table[row, place // page_size])
                    assert pool.owners(page) > 0
                    read = pool.part.k[:, page, place % page_size]
                    assert read.unique().tolist() == [tokens[place]]
                    assert torch.equal(pool.part.v[:, page, place % page_size], -read)

    @invariant()
    def no_page_is_lost(self) -> None:
        for group in self.cache.groups:
            held = [page for pages in group.pages for page in pages if page != 0]
            assert all(group.pool.owners(page) == held.count(page) for page in range(1, group.pool.num_pages + 1))
            assert group.pool.used_pages == len(set(held))
            if group.left >= 0:
                most = math.ceil(group.left / self.cache.page_size) + 1
                assert all(sum(page != 0 for page in pages) <= most for pages in group.pages)


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
CacheMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase
TestCache = CacheMachine.TestCase


@pytest.mark.parametrize("num_pages", [2, 3])
def test_copies_are_counted_before_anything_changes(num_pages):
    """Three sequences share two pages, of which the second is half full: to go on, two of them need copies of it."""
    cache = PagedCache(CONFIG, BATCH, CAPACITY, device=CPU, page_size=4, num_pages=num_pages, poison=True)
    k = torch.ones(BATCH, 6, 1, 4)

    def append(tokens):
        for layer in range(3):
            cache.layer(layer).append(tokens, tokens, tokens, rotary=None, positions=None, q_norm=None, k_norm=None)

    cache.expect([6, 0, 0])
    append(k)
    cache.advance(torch.tensor([6, 0, 0]))
    cache.reorder(torch.zeros(BATCH, dtype=torch.int64))
    before = [(list(map(list, group.pages)), group.pool.free_pages, group.table.tolist()) for group in cache.groups]
    with pytest.raises(
        PoolExhausted, match=f"2 pages of 4 tokens are needed and {num_pages - 2} of {num_pages} are free"
    ):
        append(k[:, :1])
    assert before == [(group.pages, group.pool.free_pages, group.table.tolist()) for group in cache.groups]
    cache.drop(torch.tensor([False, True, True]))
    append(k[:, :1])  # the last owner keeps it


def test_freeing_twice_in_one_call_is_refused_and_changes_nothing():
    pool = PagePool(3, 2, 1, 1, 2)
    first, second = pool.allocate(2)
    with pytest.raises(ValueError, match=f"page {first} is freed 2 times and has 1 owners"):
        pool.free([second, first, first])
    assert pool.used_pages == 2
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        pool.allocate(-1)


@pytest.mark.parametrize("name", ["num_pages", "page_size"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        PagePool(**{"num_pages": 2, "page_size": 2, "num_layers": 1, "num_kv_heads": 1, "head_dim": 2, name: 0})
