"""What the tests of the caches share."""

from __future__ import annotations

import functools

import pytest

from pytransformer.generation import PagedCache
from pytransformer.generation.caches import make
from tests.model.configs import CONFIGS, EXPERT_CONFIGS, FAMILY_CONFIGS


def serves(config) -> bool:
    """Whether a model of this configuration generates with a cache."""
    positions = config.positions not in ("relative_key", "relative_key_query") and not config.positions_skip_padding
    return config.head == "lm" and config.causal and positions


ALL_CONFIGS = {**CONFIGS, **FAMILY_CONFIGS, **EXPERT_CONFIGS}
GENERATING = {name: config for name, config in ALL_CONFIGS.items() if serves(config)}


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
