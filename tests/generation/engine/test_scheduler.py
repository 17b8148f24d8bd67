"""The scheduler and the pages alone, without a model: 10,000 requests, and who is served when."""

from __future__ import annotations

import random

import pytest
import torch

from pytransformer.generation.caches.paged import PageGroup
from pytransformer.generation.caches.pool import SCRATCH, PagePool
from pytransformer.generation.engine.pages import RowPages
from pytransformer.generation.engine.scheduler import Job, Scheduler

CPU = torch.device("cpu")
LONGEST, PAGE_SIZE, CHUNK = 24, 3, 5


def make_pages(rows, num_pages, windows=(-1,), chunk=CHUNK):
    groups = [
        PageGroup(PagePool(num_pages, PAGE_SIZE, 1, 1, 1), [index], left, rows, LONGEST // PAGE_SIZE, CPU)
        for index, left in enumerate(windows)
    ]
    return RowPages(groups, chunk)


class Memory:
    """What a cache would hold: for each group and slot the tokens up to there, of which the keys of that token are made."""

    def __init__(self, pages: RowPages) -> None:
        self.pages = pages
        self.slots: list[dict[tuple[int, int], tuple[int, ...]]] = [{} for _ in pages.groups]

    def compute(self, job: Job, size: int) -> None:
        """Writes a piece, and reads as its tokens do."""
        end = job.cached + size
        for group, slots in zip(self.pages.groups, self.slots):
            pages = group.pages[job.row]
            for place in range(job.cached, end):
                page = pages[place // PAGE_SIZE]
                assert group.pool.owners(page) == 1  # nobody writes where others read
                slots[page, place % PAGE_SIZE] = tuple(job.tokens[: place + 1])
            first = 0 if group.left < 0 else max(job.cached - group.left, 0)
            for place in range(first, end):
                page = pages[place // PAGE_SIZE]
                assert page != SCRATCH and group.pool.owners(page) > 0
                assert slots[page, place % PAGE_SIZE] == tuple(job.tokens[: place + 1])


def random_job(rng, identity, stems):
    tokens = rng.choice(stems)[: rng.randint(0, 10)] + [rng.randrange(50) for _ in range(rng.randint(1, 4))]
    return Job(identity, tokens, len(tokens), rng.choice([0.0, 0.0, 1.0]))


@pytest.mark.parametrize(("count", "windows"), [(10_000, (-1,)), (2_000, (4, -1))], ids=["full", "window and full"])
def test_thousands_of_requests(count, windows):
    """Adds, stops, cancels, shared beginnings and preemptions: every token sees what it should, and all pages come back."""
    rng = random.Random(1)
    pages = make_pages(4, 12, windows)
    scheduler, memory = Scheduler(4, CHUNK, pages), Memory(pages)
    stems = [[rng.randrange(50) for _ in range(10)] for _ in range(5)]
    to_come, ends = count, {}
    while to_come or ends:
        while to_come and len(ends) < 8:
            to_come -= 1
            job = random_job(rng, to_come, stems)
            ends[job] = rng.randint(len(job.tokens) + 1, min(len(job.tokens) + 9, LONGEST))
            scheduler.add(job)
        if rng.random() < 0.1:
            cancelled = rng.choice(list(ends))
            del ends[cancelled]
            scheduler.remove(cancelled)
        pieces = scheduler.plan()
        assert (pieces or not ends) and all(size > 0 for _, size in pieces)  # somebody always goes on
        assert sum(size for job, size in pieces if size < job.remaining or job.remaining > 1) <= CHUNK
        over = []
        for job, size in pieces:
            memory.compute(job, size)
            pages.written(job.row, job.cached, job.cached + size, job.name_pages(PAGE_SIZE))
            over += [job] if size == job.remaining else []
        scheduler.done(pieces)
        for job in over:
            job.tokens.append(rng.randrange(50))
            if len(job.tokens) == ends[job]:
                del ends[job]
                scheduler.remove(job)
    assert not scheduler.waiting and not scheduler.running
    assert min(scheduler.preemptions, scheduler.reused, scheduler.recomputed) > 30
    for group in pages.groups:
        assert group.pool.used_pages == 0 and group.pool.free_pages == 12 and not any(group.pages)


def jobs_of(*lengths, priorities=None):
    """Jobs with tokens of their own."""
    priorities = priorities or [0.0] * len(lengths)
    return [
        Job(identity, list(range(100 * identity, 100 * identity + length)), length, priority)
        for identity, (length, priority) in enumerate(zip(lengths, priorities))
    ]


def step(scheduler, pages, chooses=True):
    """One step: {job's id: tokens of it}; each that completes gets a token."""
    pieces = scheduler.plan()
    sizes = {job.id: size for job, size in pieces}
    complete = [job for job, size in pieces if size == job.remaining]
    for job, size in pieces:
        pages.written(job.row, job.cached, job.cached + size, job.name_pages(PAGE_SIZE))
    scheduler.done(pieces)
    for job in complete:
        job.tokens.append(-1 - job.id)
    return sizes


def test_a_long_prompt_does_not_stall_those_that_decode():
    pages = make_pages(3, 20)
    scheduler = Scheduler(3, CHUNK, pages)
    first, second, third = jobs_of(2, 2, 14)
    scheduler.add(first)
    scheduler.add(second)
    assert step(scheduler, pages) == {0: 2, 1: 2}
    scheduler.add(third)
    assert [step(scheduler, pages) for _ in range(4)] == [
        {0: 1, 1: 1, 2: 5},
        {0: 1, 1: 1, 2: 5},
        {0: 1, 1: 1, 2: 4},
        {0: 1, 1: 1, 2: 1},
    ]


def test_the_youngest_gives_its_pages_and_is_served_again():
    pages = make_pages(2, 4)
    scheduler = Scheduler(2, 8, pages)
    old, young = jobs_of(5, 2)
    scheduler.add(old)
    scheduler.add(young)
    assert step(scheduler, pages) == {0: 5, 1: 2}
    assert step(scheduler, pages) == {0: 1, 1: 1}  # each fills its pages: three of four
    assert step(scheduler, pages) == {0: 1}  # the old one takes the fourth, and the young one would need a fifth
    assert scheduler.waiting == [young] and (young.row, young.cached) == (None, 0) and scheduler.preemptions == 1
    scheduler.remove(old)
    assert step(scheduler, pages) == {1: 1}  # its whole page lay idle and is taken up again
    assert scheduler.reused == 3 and scheduler.recomputed == 0


def test_priority_comes_before_age():
    pages = make_pages(1, 8)
    scheduler = Scheduler(1, 8, pages)
    jobs = jobs_of(2, 2, 2, priorities=[0.0, 0.0, 2.0])
    for job in jobs:
        scheduler.add(job)
    served = []
    while scheduler.waiting or scheduler.running:
        served += step(scheduler, pages)
        scheduler.remove(scheduler.running[0])
    assert served == [2, 0, 1]


def test_the_same_plan_until_it_is_done():
    """A step that the model did not survive is planned once more."""
    pages = make_pages(2, 8)
    scheduler = Scheduler(2, CHUNK, pages)
    for job in jobs_of(7, 2):
        scheduler.add(job)
    first = scheduler.plan()
    used = pages.groups[0].pool.used_pages
    assert scheduler.plan() == first and pages.groups[0].pool.used_pages == used
    scheduler.done(first)
    assert scheduler.plan() != first


def test_a_window_needs_only_the_pages_in_it():
    """Of a beginning that is taken up, the window's pages are enough in layers that have one."""
    pages = make_pages(2, 8, windows=(4,))
    scheduler = Scheduler(2, 24, pages)
    (job,) = jobs_of(13)
    scheduler.add(job)
    step(scheduler, pages)
    scheduler.remove(job)
    pages.groups[0].pool.forget([pages.groups[0].pool.find(job.names[0])])
    again = Job(7, job.tokens[:13], 13)
    scheduler.add(again)
    assert step(scheduler, pages) == {7: 1} and again.names == job.names
    assert (
        pages.groups[0].pages[again.row][:3] == [SCRATCH] * 3 and pages.groups[0].held(again.row) == 2
    )  # tokens 9 to 12


def test_names_tell_pages_apart_by_all_that_comes_before():
    first, second = Job(0, [1, 2, 3, 4, 5, 6], 6), Job(1, [9, 2, 3, 4, 5, 6], 6)
    assert first.name_pages(3)[1] != second.name_pages(3)[1] and first.name_pages(3)[0] != second.name_pages(3)[0]
    assert Job(2, [1, 2, 3, 4, 5, 6, 7], 7).name_pages(3) == first.name_pages(3)
