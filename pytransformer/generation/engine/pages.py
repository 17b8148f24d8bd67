"""Pages for the engine's rows, in every group of layers alike: taken, given back, and found again by what they hold."""

from __future__ import annotations

from collections.abc import Sequence

from pytransformer.generation.caches.paged import PageGroup
from pytransformer.generation.caches.pool import SCRATCH
from pytransformer.generation.caches.sizes import pages_per_sequence


class RowPages:
    """See :class:`pytransformer.generation.engine.scheduler.Pages`, which this is.

    Args:
        groups: of the cache.
        longest_step: tokens of one sequence in one step, at most.
    """

    def __init__(self, groups: Sequence[PageGroup], longest_step: int) -> None:
        self.groups = groups
        self.page_size = groups[0].pool.page_size
        self.longest_step = longest_step

    def most(self, group: PageGroup, length: int) -> int:
        """Pages of a group that a sequence of this length has had at a time, at most."""
        return pages_per_sequence(group.left, length, self.page_size, self.longest_step)

    def adopt(self, row: int, names: Sequence[bytes]) -> int:
        """Begins an empty row with the pages that hold what it begins with: as many as each group has all of, or all in its window."""
        found = [[group.pool.find(name) for name in names] for group in self.groups]
        for count in range(self._whole(found), 0, -1):
            first = [self._first(group, count) for group in self.groups]
            if all(None not in pages[begin:count] for pages, begin in zip(found, first)):
                for group, pages, begin in zip(self.groups, found, first):
                    group.adopt(row, [SCRATCH] * begin + [page for page in pages[begin:count] if page is not None])
                return count
        return 0

    def has_room(self, row: int, length: int, spare: int) -> bool:
        """Whether a row could grow to this length, and ``spare`` pages would be left."""
        return all(self.most(group, length) - group.held(row) + spare <= group.pool.free_pages for group in self.groups)

    def can_write(self, row: int, start: int, end: int) -> bool:
        """Whether there are pages for tokens ``start .. end - 1`` of a row."""
        span = {row: (start, end)}
        return all(group.missing(span) <= group.pool.free_pages for group in self.groups)

    def extend(self, row: int, start: int, end: int) -> None:
        """Takes them."""
        for group in self.groups:
            group.extend(row, start, end)

    def written(self, row: int, start: int, end: int, names: Sequence[bytes]) -> None:
        """Tokens ``start .. end - 1`` are there: what is full now gets its name, what a window has passed is given back.

        ``names``: of the row's pages; empty = none is to be found by others.
        """
        full = min(end // self.page_size, len(names))
        for group in self.groups:
            for place in range(start // self.page_size, full):
                group.pool.remember(group.pages[row][place], names[place])
            group.trim(row, end)

    def release(self, row: int) -> None:
        """Gives all pages of a row back."""
        for group in self.groups:
            group.clear(row)

    def forget(self, row: int) -> None:
        """What a row's pages hold is not found any more."""
        for group in self.groups:
            group.pool.forget(group.pages[row])

    def forget_all(self) -> None:
        """Nothing that pages hold is found any more."""
        for group in self.groups:
            group.pool.forget_all()

    def _whole(self, found: Sequence[Sequence[int | None]]) -> int:
        """How many pages from the first on all groups without a window have."""
        counts = [len(found[0])]
        for group, pages in zip(self.groups, found):
            if group.left < 0:
                counts.append(pages.index(None) if None in pages else len(pages))
        return min(counts)

    def _first(self, group: PageGroup, count: int) -> int:
        """The first of a sequence's pages that the token behind the first ``count`` pages sees."""
        return 0 if group.left < 0 else max(count * self.page_size - group.left, 0) // self.page_size
