"""Triton's language as it is imported, for what runs beside Triton's interpreter.

The stock interpreter replaces functions of the language in a launch, and some of them for good: those of a module that only a device
function names, as that of tl.sum (Triton 3.6 to 3.9).
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

_OWNERS: tuple[Any, ...] = (tl, tl.core, tl.math, tl.core.tensor, tl.core.tensor_descriptor_base)
_IMPORTED = [(owner, dict(vars(owner))) for owner in _OWNERS]


def restore() -> None:
    """Undoes what launches of the stock interpreter have left behind."""
    for owner, imported in _IMPORTED:
        for name, value in list(vars(owner).items()):
            if name in imported:
                if value is not imported[name] and name != "__init__":  # which economy.py replaces
                    setattr(owner, name, imported[name])
            elif getattr(value, "__qualname__", "").startswith("_patch_"):
                delattr(owner, name)
