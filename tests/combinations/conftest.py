"""What the tests over combinations of options share."""

from __future__ import annotations

import pytest

from tests.kernels.attention_contract import SQUARE_BACKWARD_TILES, SQUARE_FORWARD_TILES
from tests.kernels.conftest import without_overflow_checks  # noqa: F401


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public op with tiles of 32 by 32, so that forty tokens are several tiles."""
    from pytransformer.kernels.attention import backward as attention_backward
    from pytransformer.kernels.attention import forward as attention_forward

    monkeypatch.setattr(attention_forward, "forward_config", lambda *_: SQUARE_FORWARD_TILES)
    monkeypatch.setattr(attention_backward, "backward_config", lambda *_: SQUARE_BACKWARD_TILES)
