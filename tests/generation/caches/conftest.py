"""Small pages, whose freed ones hold NaN."""

from __future__ import annotations

import functools

import pytest

from pytransformer.generation import PagedCache
from pytransformer.generation.caches import make


@pytest.fixture
def small_pages(monkeypatch):
    """Paged caches have pages of three tokens, and what is freed becomes NaN; the caches that are made."""
    made = []

    @functools.wraps(PagedCache)
    def small(*arguments, **options):
        made.append(PagedCache(*arguments, **{"page_size": 3, "poison": True, **options}))
        return made[-1]

    monkeypatch.setattr(make, "PagedCache", small)
    return made
