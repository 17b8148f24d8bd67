"""A pool of pages: memory for keys and values in pieces of some tokens, handed out, shared and taken back.

A page has a count of owners. Sequences that begin alike own the same pages; who writes to a page with other owners copies it first
(copy-on-write). What is taken back goes to the next who asks, newest first, as it is the likeliest to lie in a hardware cache.

A page whose content was given a name (``remember``) is found by it (``find``), also after its last owner has freed it: it then lies idle,
counts as free, and is handed out when no other page is left, the one that has been idle for longest first.

Source: Kwon et al. 2023 (PagedAttention).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import torch

from .part import new_part, raw

# Belongs to nobody: padding is written here, and tables point here where they mean nothing.
SCRATCH = 0


class PoolExhausted(ValueError):
    """More pages were asked for than are free; nothing has been handed out."""


class PagePool:
    """Pages 1 to ``num_pages`` of ``page_size`` tokens, each with keys and values of ``num_layers`` layers.

    Args:
        num_pages, page_size, num_layers, num_kv_heads, head_dim: sizes, at least 1.
        device, dtype: of the model.
        quantised: ``None``, "int8" or "fp8".
        poison: overwrites freed pages with NaN, so that whoever reads one is found out; for tests.

    Attributes:
        part: keys and values (num_layers, num_pages + 1, page_size, num_kv_heads, head_dim), and scales. Page 0 is for padding.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        quantised: str | None = None,
        poison: bool = False,
    ) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.part = new_part((num_layers, num_pages + 1, page_size, num_kv_heads, head_dim), device, dtype, quantised)
        self._poison = poison
        for tensor in self.part.tensors():
            raw(tensor[:, SCRATCH]).zero_()  # its sums mean nothing, but should stay numbers
        self._owners = [0] * (num_pages + 1)
        self._free = list(range(num_pages, 0, -1))
        self._names: dict[int, Hashable] = {}  # of the content of pages
        self._named: dict[Hashable, int] = {}  # the other way round
        self._idle: dict[int, None] = {}  # pages with a name and without owners, the longest idle first
        if poison:
            for page in self._free:
                self._fill_with_nan(page)

    @property
    def free_pages(self) -> int:
        """How many can be handed out, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def idle_pages(self) -> int:
        """How many of the free ones are still found by the name of their content."""
        return len(self._idle)

    @property
    def used_pages(self) -> int:
        """How many have owners."""
        return self.num_pages - self.free_pages

    @property
    def shared_pages(self) -> int:
        """How many have more than one owner."""
        return sum(owners > 1 for owners in self._owners)

    def owners(self, page: int) -> int:
        """How many own a page; 0 = it is free (or idle)."""
        self._check(page)
        return self._owners[page]

    def require(self, count: int) -> None:
        """PoolExhausted unless so many pages are free."""
        if count > self.free_pages:
            raise PoolExhausted(
                f"{count} pages of {self.page_size} tokens are needed and {self.free_pages} of {self.num_pages} are free: "
                "end sequences first, or make the cache with a larger num_pages"
            )

    def allocate(self, count: int) -> list[int]:
        """So many pages, each with one owner; all or none.

        Raises:
            ValueError: a negative count.
            PoolExhausted: there are not so many.
        """
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        self.require(count)
        if (evicted := count - len(self._free)) > 0:
            self.forget(list(itertools.islice(self._idle, evicted)))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each page, the first one for one that lies idle; ValueError if one is free, and then nothing changes."""
        self._check_used([page for page in pages if page not in self._idle], "shared")
        for page in pages:
            self._idle.pop(page, None)
            self._owners[page] += 1

    def remember(self, page: int, name: Hashable) -> bool:
        """Gives the content of a page, which must not be written to any more, a name. False if another page has that name, and keeps it.

        Raises:
            ValueError: the page is free.
        """
        self._check_used([page], "remembered")
        if self._named.setdefault(name, page) != page:
            return False
        if (before := self._names.get(page, name)) != name:
            del self._named[before]
        self._names[page] = name
        return True

    def find(self, name: Hashable) -> int | None:
        """The page whose content has this name, to be shared before anything is allocated; ``None`` = there is none (any more)."""
        return self._named.get(name)

    def forget(self, pages: Iterable[int]) -> None:
        """The content of these pages is not found any more; pages without a name stay as they are."""
        for page in pages:
            if page not in self._names:
                continue
            del self._named[self._names.pop(page)]
            if page in self._idle:
                del self._idle[page]
                self._give_back(page)

    def forget_all(self) -> None:
        """No content is found any more."""
        self.forget(list(self._names))

    def free(self, pages: Sequence[int]) -> None:
        """One owner less for each page; those without any are free again, or lie idle if their content has a name.

        Raises:
            ValueError: a page that has not so many owners (freed twice); nothing changes then.
        """
        self._check_used(pages, "freed")
        for page, count in Counter(pages).items():
            if count > self._owners[page]:
                raise ValueError(f"page {page} is freed {count} times and has {self._owners[page]} owners")
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                if page in self._names:
                    self._idle[page] = None
                else:
                    self._give_back(page)

    def own(self, page: int) -> int:
        """A page with the same content that has no other owner: itself, or a copy in its place.

        Raises:
            ValueError: the page is free.
            PoolExhausted: a copy is needed and there is no page for it.
        """
        self._check_used([page], "written to")
        if self._owners[page] == 1:
            self.forget([page])  # it will hold something else
            return page
        (copy,) = self.allocate(1)
        for tensor in self.part.tensors():
            raw(tensor)[:, copy] = raw(tensor)[:, page]
        self.free([page])
        return copy

    def _give_back(self, page: int) -> None:
        self._free.append(page)
        if self._poison:
            self._fill_with_nan(page)

    def _check(self, page: int) -> None:
        if not 1 <= page <= self.num_pages:
            raise ValueError(f"page must be from 1 to {self.num_pages}, got {page}")

    def _check_used(self, pages: Iterable[int], what: str) -> None:
        for page in pages:
            self._check(page)
            if self._owners[page] == 0:
                raise ValueError(f"page {page} is free and cannot be {what}")

    def _fill_with_nan(self, page: int) -> None:
        for tensor in self.part.tensors():
            if tensor.dtype.is_floating_point:
                tensor[:, page] = torch.full((), math.nan).to(tensor.dtype)
