"""A pool of pages: memory for keys and values in pieces of some tokens, handed out, shared and taken back.

A page has a count of owners. Sequences that begin alike own the same pages; who writes to a page with other owners copies it first
(copy-on-write). What is taken back goes to the next who asks, newest first, as it is the likeliest to lie in a hardware cache.

Source: Kwon et al. 2023 (PagedAttention).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

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
        if poison:
            for page in self._free:
                self._fill_with_nan(page)

    @property
    def free_pages(self) -> int:
        """How many can be handed out."""
        return len(self._free)

    @property
    def used_pages(self) -> int:
        """How many have owners."""
        return self.num_pages - len(self._free)

    def owners(self, page: int) -> int:
        """How many own a page; 0 = it is free."""
        self._check(page)
        return self._owners[page]

    def require(self, count: int) -> None:
        """PoolExhausted unless so many pages are free."""
        if count > len(self._free):
            raise PoolExhausted(
                f"{count} pages of {self.page_size} tokens are needed and {len(self._free)} of {self.num_pages} are free: "
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
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each page; ValueError if one is free, and then nothing changes."""
        self._check_used(pages, "shared")
        for page in pages:
            self._owners[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """One owner less for each page; those without any are free again.

        Raises:
            ValueError: a page that has not so many owners (freed twice); nothing changes then.
        """
        self._check_used(pages, "freed")
        for page in set(pages):
            if pages.count(page) > self._owners[page]:
                raise ValueError(f"page {page} is freed {pages.count(page)} times and has {self._owners[page]} owners")
        for page in pages:
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)
                if self._poison:
                    self._fill_with_nan(page)

    def own(self, page: int) -> int:
        """A page with the same content that has no other owner: itself, or a copy in its place.

        Raises:
            ValueError: the page is free.
            PoolExhausted: a copy is needed and there is no page for it.
        """
        self._check_used([page], "written to")
        if self._owners[page] == 1:
            return page
        (copy,) = self.allocate(1)
        for tensor in self.part.tensors():
            raw(tensor)[:, copy] = raw(tensor)[:, page]
        self.free([page])
        return copy

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
