"""The choice of a KV cache by its name."""

from __future__ import annotations

from typing import Any

import torch

from pytransformer.model.config import TransformerConfig

from .contiguous import KVCache
from .paged import PagedCache
from .sequence import SequenceCache
from .sizes import split_kind


def make_cache(
    kind: str,
    config: TransformerConfig,
    batch: int,
    capacity: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> SequenceCache:
    """A KV cache for ``batch`` sequences of up to ``capacity`` tokens.

    Args:
        kind: "contiguous" or "paged", in the model's dtype; "int8", "fp8" (contiguous) and "paged-int8", "paged-fp8" hold codes of 8 bits
            with a scale for each token and head.
        config, batch, capacity, device, dtype: see :class:`KVCache`.
        options: of a paged cache: ``page_size``, ``num_pages``, ``longest_step``, see :class:`PagedCache`; others have no use for them.

    Raises:
        ValueError: an unknown kind, sizes out of range, more memory than is free (:class:`NotEnoughMemory`).
    """
    layout, quantised = split_kind(kind)
    if layout == "paged":
        return PagedCache(config, batch, capacity, device=device, dtype=dtype, quantised=quantised, **options)
    return KVCache(config, batch, capacity, device=device, dtype=dtype, quantised=quantised)
