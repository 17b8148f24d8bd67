"""Where :meth:`pytransformer.Transformer.generate` finds the generation loop.

The loop stands above the model and imports it, so the model imports nothing of the loop: the package, which knows both, hands it down.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

find_generate: Callable[[], Callable[..., Any]]
"""Gives :func:`pytransformer.generation.generate`; set by ``pytransformer/__init__.py``, which is always imported first."""
