"""Checks of key/value caches, for the ops that read and write them: layout, rows, pages, scales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pytransformer.ops import checks

QUANTISED_DTYPES = (torch.int8, torch.float8_e4m3fn)
CACHE_DTYPES = (*checks.FLOAT_DTYPES_AND_DOUBLE, *QUANTISED_DTYPES)
CACHE_LAYOUT = "(batch, capacity, num_kv_heads, head_dim) or (pages, page_size, num_kv_heads, head_dim)"


def capacity_of(call: Any) -> int:
    """Tokens that one sequence of a call can have in the cache."""
    pages = 1 if call.block_table is None else call.block_table.shape[1]
    return int(pages * call.k_cache.shape[1])


def check_cache_dtype(name: str, cache: Tensor, new_name: str, new: Tensor) -> None:
    """That of the new tokens or queries, or a quantised one; TypeError otherwise."""
    if cache.dtype != new.dtype and cache.dtype not in QUANTISED_DTYPES:
        raise TypeError(
            f"{name} must have the dtype of {new_name} ({checks.short(new.dtype)}), or be quantised (int8, float8_e4m3fn), "
            f"got {checks.short(cache.dtype)}"
        )


def check_index(name: str, value: Any, batch: int, device: torch.device) -> None:
    """int32 (batch), contiguous."""
    checks.check_tensor(name, value, ndim=1, dtypes=(torch.int32,), device=device, layout="(batch)")
    if value.shape[0] != batch or not value.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous, of shape (batch) = ({batch}), got {tuple(value.shape)} with strides {value.stride()}"
        )


def check_rows(call: Any, batch: int, *, hint: str) -> None:
    """block_table or cache_batch_idx, or one row of the caches per sequence; ``hint`` names what else says where a sequence is."""
    device = call.k_cache.device
    if call.block_table is not None:
        if call.cache_batch_idx is not None:
            raise ValueError(
                "cache_batch_idx is for contiguous caches: with block_table each sequence's pages are listed there"
            )
        table = checks.check_tensor(
            "block_table", call.block_table, ndim=2, dtypes=(torch.int32,), device=device, layout="(batch, max_pages)"
        )
        checks.check_shape("block_table", table, (batch, None), "(batch, max_pages)")
        checks.check_last_dim_contiguous("block_table", table)
        if call.k_cache.shape[1] == 0:
            raise ValueError(
                f"k_cache must have pages of at least 1 slot with block_table, got shape {tuple(call.k_cache.shape)}"
            )
    elif call.cache_batch_idx is not None:
        check_index("cache_batch_idx", call.cache_batch_idx, batch, device)
    elif call.k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache must have batch = {batch} rows unless {hint} is given, got shape {tuple(call.k_cache.shape)}"
        )


def check_scales(call: Any, per_head: str = "per head", per_token: str = "per token") -> None:
    """k_scale and v_scale: for quantised caches, and there always; the words say in messages what each kind is for."""
    if call.k_cache.dtype not in QUANTISED_DTYPES:
        for name, scale in (("k_scale", call.k_scale), ("v_scale", call.v_scale)):
            if scale is not None:
                raise ValueError(
                    f"{name} is for quantised caches (int8, float8_e4m3fn); k_cache is {checks.short(call.k_cache.dtype)}"
                )
        return
    if call.k_scale is None or call.v_scale is None:
        missing = "k_scale" if call.k_scale is None else "v_scale"
        raise ValueError(f"{missing} must be given with caches of {checks.short(call.k_cache.dtype)}")
    _check_scale("k_scale", call.k_scale, call.k_cache)
    _check_scale("v_scale", call.v_scale, call.v_cache)
    if call.k_scale.ndim != call.v_scale.ndim:
        raise ValueError(
            f"k_scale and v_scale must both be {per_head} or both {per_token}, "
            f"got shapes {tuple(call.k_scale.shape)} and {tuple(call.v_scale.shape)}"
        )
    # Per-token scales of unused slots may hold anything.
    if call.k_scale.ndim == 1:
        checks.check_no_nan("k_scale", call.k_scale)
        checks.check_no_nan("v_scale", call.v_scale)


def _check_scale(name: str, scale: Any, cache: Tensor) -> None:
    """float32, (num_kv_heads) or ``cache.shape[:-1]``."""
    checks.check_tensor(name, scale, dtypes=(torch.float32,), device=cache.device)
    if tuple(scale.shape) not in ((cache.shape[2],), tuple(cache.shape[:3])):
        raise ValueError(
            f"{name} must have shape (num_kv_heads) = ({cache.shape[2]},) or that of the cache without its last "
            f"dimension, {tuple(cache.shape[:3])}, got {tuple(scale.shape)}"
        )


def check_pages(call: Any, spans: Iterable[tuple[int, int]], where: str) -> None:
    """Values of block_table for the slots [first, last) of each sequence; ``where`` says in the message what these are."""
    num_pages, page_size = call.k_cache.shape[:2]
    table = call.block_table.tolist()
    for sequence, (first, last) in enumerate(spans):
        # An empty span that lies inside a page would seem to reach into it.
        for entry in range(first // page_size, -(-last // page_size) if first < last else 0):
            if not 0 <= table[sequence][entry] < num_pages:
                raise ValueError(
                    f"block_table must hold pages from 0 to {num_pages - 1} where {where}, "
                    f"got {table[sequence][entry]} at index [{sequence}, {entry}]"
                )
