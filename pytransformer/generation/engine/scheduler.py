"""Who computes which tokens in the next step, and who has to wait: bookkeeping only, without tensors.

Jobs are served in order of priority, then of age. A step computes one token of every sequence that decodes, and beside them up to
``prefill_chunk`` tokens of prompts, so that a long prompt delays nobody by more than such a chunk. Pages are handed out in the same order.
Where there are not enough, the last of the order gives its pages back and waits (preemption); its tokens are kept, and what it had in the
cache is computed again later, unless it is still found there. The first of the order is never preempted, and no job is let in that needs
more pages than there are, so some job always goes on: nothing can block for ever.

Sources: Yu et al. 2022 (Orca: iterations, not requests, are scheduled), Kwon et al. 2023 (preemption by recomputing), Agrawal et al. 2023
(chunked prefill beside decoding).
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Pages(Protocol):
    """What the scheduler asks of the cache. Rows are numbered from 0."""

    page_size: int

    def adopt(self, row: int, names: Sequence[bytes]) -> int:
        """Begins an empty row with pages that hold what it begins with, as many of those named as are there: their number."""
        ...

    def has_room(self, row: int, length: int, spare: int) -> bool:
        """Whether a row could grow to this length, and ``spare`` pages would be left."""
        ...

    def can_write(self, row: int, start: int, end: int) -> bool:
        """Whether there are pages for tokens ``start .. end - 1`` of a row."""
        ...

    def extend(self, row: int, start: int, end: int) -> None:
        """Takes them."""
        ...

    def release(self, row: int) -> None:
        """Gives all pages of a row back."""
        ...


@dataclass(eq=False)
class Job:
    """A sequence on its way.

    Attributes:
        id: counts up; of two jobs the one with the lower id is older.
        tokens: the prompt's and the new ones.
        prompt_length: how many are the prompt's.
        priority: higher is served first.
        row: of the cache, or ``None`` while it waits.
        cached: tokens whose keys and values are in the cache.
        computed: the largest number that ``cached`` has had: what is computed below it is computed again.
        names: of its whole pages, each made of the one before and the page's tokens.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    priority: float = 0.0
    row: int | None = None
    cached: int = 0
    computed: int = 0
    names: list[bytes] = field(default_factory=list)

    @property
    def remaining(self) -> int:
        """Tokens to be computed before the next one can be chosen."""
        return len(self.tokens) - self.cached

    @property
    def order(self) -> tuple[float, int]:
        """Who has less is served first."""
        return -self.priority, self.id

    def name_pages(self, page_size: int) -> list[bytes]:
        """The names of all pages that its tokens fill."""
        for page in range(len(self.names), len(self.tokens) // page_size):
            content = array("q", self.tokens[page * page_size : (page + 1) * page_size]).tobytes()
            before = self.names[-1] if self.names else b""
            self.names.append(hashlib.sha256(before + content).digest())
        return self.names


class Piece(NamedTuple):
    """What one job computes in a step: tokens ``job.cached .. job.cached + size - 1``."""

    job: Job
    size: int

    @property
    def completes(self) -> bool:
        """Whether a new token can be chosen after it."""
        return self.size == self.job.remaining


class Scheduler:
    """See the module.

    Args:
        rows: jobs that run at a time, at most.
        prefill_chunk: tokens of prompts in one step, at most.
        pages: of the cache.
        share: whether a job begins with the pages of others that began alike.

    Attributes:
        waiting, running: in order.
        preemptions: how often a job was sent back to wait.
        prefilled: tokens of prompts that were computed.
        reused, recomputed: tokens that were found in the cache, and that were computed once more.
    """

    def __init__(self, rows: int, prefill_chunk: int, pages: Pages, *, share: bool = True) -> None:
        self.prefill_chunk = prefill_chunk
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.preemptions = self.prefilled = self.reused = self.recomputed = 0
        self._pages = pages
        self._share = share
        self._free_rows = list(range(rows - 1, -1, -1))

    def add(self, job: Job) -> None:
        """A job that waits from now on."""
        bisect.insort(self.waiting, job, key=lambda one: one.order)

    def remove(self, job: Job) -> None:
        """A job that is over; its pages are given back."""
        if job.row is None:
            self.waiting.remove(job)
        else:
            self.running.remove(job)
            self._release(job)

    def plan(self) -> list[Piece]:
        """The next step. Its pages are taken; calling again before :meth:`done` plans the same step once more."""
        pieces: list[Piece] = []
        budget = self.prefill_chunk
        preempted = self.preemptions
        place = 0
        while place < len(self.running):
            job = self.running[place]
            count = 1 if job.remaining == 1 else min(job.remaining, budget)
            if count > 0 and not self._take_pages(job, count):
                break  # it was the last of the order, and is not among them any more
            if count > 0:
                pieces.append(Piece(job, count))
                budget -= count if job.remaining > 1 else 0
            place += 1
        # Whoever came in now would take the place of the one that has just gone.
        if self.preemptions == preempted:
            self._admit(pieces, budget)
        return pieces

    def done(self, pieces: Sequence[Piece]) -> None:
        """The step has been computed."""
        for job, size in pieces:
            end = job.cached + size
            self.recomputed += max(min(job.computed, end) - job.cached, 0)
            self.prefilled += max(min(job.prompt_length, end) - max(job.computed, job.cached), 0)
            job.cached, job.computed = end, max(job.computed, end)

    def _take_pages(self, job: Job, count: int) -> bool:
        """Pages for a job's next tokens, from later ones if need be; False if it had to give back its own."""
        assert job.row is not None
        while not self._pages.can_write(job.row, job.cached, job.cached + count):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is job:
                return False
        self._pages.extend(job.row, job.cached, job.cached + count)
        return True

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        self._release(job)
        self.preemptions += 1
        self.add(job)

    def _release(self, job: Job) -> None:
        assert job.row is not None
        self._pages.release(job.row)
        self._free_rows.append(job.row)
        job.row, job.cached = None, 0

    def _admit(self, pieces: list[Piece], budget: int) -> None:
        """Lets waiting jobs in, in order, as long as there are rows, tokens in the step and pages for all of their tokens."""
        while self.waiting and self._free_rows and budget > 0:
            job = self.waiting[0]
            row = self._free_rows.pop()
            if self._share:
                # The last token is computed in any case: what comes after it is asked for.
                whole = (len(job.tokens) - 1) // self._pages.page_size
                job.cached = (
                    self._pages.adopt(row, job.name_pages(self._pages.page_size)[:whole]) * self._pages.page_size
                )
            job.row = row
            # A page for each of those that run: a newcomer should not be preempted at once.
            if not self._pages.has_room(row, len(job.tokens), spare=len(self.running)):
                self._release(job)
                return
            self.reused += job.cached
            job.computed = max(job.computed, job.cached)
            count = min(job.remaining, budget)
            budget -= count
            self._pages.extend(row, job.cached, job.cached + count)
            self.waiting.pop(0)
            bisect.insort(self.running, job, key=lambda one: one.order)
            pieces.append(Piece(job, count))
