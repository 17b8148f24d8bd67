"""The choice of a KV cache by its name."""

from __future__ import annotations

from typing import Any

import torch

from pytransformer.model.config import TransformerConfig

from .contiguous import KVCache
from .paged import PagedCache
from .sequence import SequenceCache
from .sizes import predict, require_memory, split_kind


def make_cache(
    kind: str,
    config: TransformerConfig,
    batch: int,
    capacity: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    memory_seqlen: int = 0,
    **options: Any,
) -> SequenceCache:
    """A KV cache for ``batch`` sequences of up to ``capacity`` tokens.

    Args:
        kind: "contiguous" or "paged", in the model's dtype; "int8", "fp8" (contiguous) and "paged-int8", "paged-fp8" hold codes of 8 bits
            with a scale for each token and head.
        config, batch, capacity, device, dtype: see :class:`KVCache`.
        memory_seqlen: of an encoder–decoder: tokens of the longest source, whose keys and values will lie beside the cache; for them there
            must be memory, too.
        options: of a paged cache: ``page_size``, ``num_pages``, ``longest_step``, see :class:`PagedCache`; others have no use for them.

    Raises:
        ValueError: an unknown kind, sizes out of range, more memory than is free (:class:`NotEnoughMemory`).
    """
    layout, quantised = split_kind(kind)
    if memory_seqlen:
        sizes = {name: value for name, value in options.items() if name in ("page_size", "num_pages", "longest_step")}
        size = predict(kind, config, batch, capacity, dtype, memory_seqlen=memory_seqlen, **sizes)
        require_memory(
            size.total, torch.empty(0, device=device).device, f"the {kind} KV cache with the memory's keys and values"
        )
    if layout == "paged":
        return PagedCache(config, batch, capacity, device=device, dtype=dtype, quantised=quantised, **options)
    return KVCache(config, batch, capacity, device=device, dtype=dtype, quantised=quantised)
