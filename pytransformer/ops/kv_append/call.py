"""A call of KV append, and the checks of every argument before anything is written, each error naming what is allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.backend import Outputs
from pytransformer.ops.cache_checks import (
    CACHE_DTYPES,
    CACHE_LAYOUT,
    capacity_of,
    check_cache_dtype,
    check_index,
    check_pages,
    check_rows,
    check_scales,
)
from pytransformer.ops.overlap import Apart
from pytransformer.ops.precision import is_autocasting

INTEGERS = (torch.int32, torch.int64)
DENSE_LAYOUT = "(batch, seqlen_new, num_kv_heads, head_dim)"
PACKED_LAYOUT = "(total, num_kv_heads, head_dim)"
# Scales that are read (or absent), and scales that are made.
WRITTEN = ("k_cache", "v_cache")
WRITTEN_SCALED = (*WRITTEN, "k_scale", "v_scale")


class AppendCall(NamedTuple):
    """The arguments of one call after the checks; slot_mapping and positions are flat, one entry per token."""

    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    cache_seqlens: Tensor | None
    slot_mapping: Tensor | None
    block_table: Tensor | None
    cu_seqlens: Tensor | None
    cache_batch_idx: Tensor | None
    positions: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    q: Tensor | None
    q_norm_weight: Tensor | None
    k_norm_weight: Tensor | None
    interleaved: bool
    norm_eps: float
    norm_weight_offset: float


NUM_TENSORS = AppendCall._fields.index("interleaved")


# Functions rather than properties: the tracer of torch 2.10 follows no property of a NamedTuple.
def count_tokens(call: AppendCall) -> int:
    """New tokens of all sequences."""
    return call.k.shape[0] if call.k.ndim == 3 else call.k.shape[0] * call.k.shape[1]


def scales_are_written(call: AppendCall) -> bool:
    """Whether the scales are per token, so that the op makes them."""
    return call.k_scale is not None and call.k_scale.ndim > 1


def written_by(call: AppendCall) -> tuple[str, ...]:
    """Names of the tensors that a call changes."""
    return WRITTEN_SCALED if scales_are_written(call) else WRITTEN


def refusal(call: AppendCall) -> Apart:
    """What refuses calls that are laid out like this one, but share memory that is written."""
    return Apart(call._fields, written_by(call), call[:NUM_TENSORS])


def unless_empty(run: Callable[[AppendCall], Outputs]) -> Callable[[AppendCall], Outputs]:
    """``run`` for calls that have tokens; the others write nothing."""
    return lambda call: run(call) if count_tokens(call) > 0 else (None if call.q is None else torch.empty_like(call.q),)


def check_kv_append(call: AppendCall) -> AppendCall:
    """Checks a call as the user gave it and returns it normalised; see ``kv_append`` for the errors."""
    call = _check_new(call)
    _check_caches(call)
    check_scales(call, "per head (read)", "per token (written)")
    if scales_are_written(call):
        checks.check_written("k_scale", call.k_scale)  # type: ignore[arg-type]
        checks.check_written("v_scale", call.v_scale)  # type: ignore[arg-type]
    call = _check_where(call)
    call = _check_rope(call)
    call = _check_norms(call)
    check_values(call)
    return call


def _check_new(call: AppendCall) -> AppendCall:
    """k, v and q; under autocast they are cast to the dtype of the caches."""
    packed = call.cu_seqlens is not None or (isinstance(call.k, Tensor) and call.k.ndim == 3)
    rank, layout = (3, PACKED_LAYOUT) if packed else (4, DENSE_LAYOUT)
    dtypes = checks.FLOAT_DTYPES_AND_DOUBLE
    k = checks.check_tensor("k", call.k, ndim=rank, dtypes=dtypes, layout=layout)
    v = checks.check_tensor("v", call.v, ndim=rank, dtypes=dtypes, device=k.device, layout=layout)
    q = call.q
    if q is not None:
        checks.check_tensor("q", q, ndim=rank, dtypes=dtypes, device=k.device, layout=layout.replace("kv_", ""))
    cache_dtype = call.k_cache.dtype if isinstance(call.k_cache, Tensor) else None
    if is_autocasting(k.device.type) and cache_dtype in checks.FLOAT_DTYPES:
        k, v = k.to(cache_dtype), v.to(cache_dtype)
        q = None if q is None else q.to(cache_dtype)
    checks.check_same_dtype("v", v, "k", k)
    checks.check_shape("v", v, (*k.shape[:-1], None), "(as k, value head_dim)")
    if q is not None:
        checks.check_same_dtype("q", q, "k", k)
        checks.check_shape("q", q, (*k.shape[:-2], None, k.shape[-1]), "(as k, num_heads, head_dim)")
        checks.check_last_dim_contiguous("q", q)
        if q.shape[-2] == 0:
            raise ValueError(f"q must have at least one head, got shape {tuple(q.shape)}")
    if k.shape[-2] == 0:
        raise ValueError(f"k must have at least one head, got shape {tuple(k.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        checks.check_head_dim(name, tensor.shape[-1])
        checks.check_last_dim_contiguous(name, tensor)
    return call._replace(k=k, v=v, q=q)


def _check_caches(call: AppendCall) -> None:
    for name, cache, new_name, new in (
        ("k_cache", call.k_cache, "k", call.k),
        ("v_cache", call.v_cache, "v", call.v),
    ):
        checks.check_tensor(name, cache, ndim=4, dtypes=CACHE_DTYPES, device=new.device, layout=CACHE_LAYOUT)
        check_cache_dtype(name, cache, new_name, new)
        if cache.shape[2:] != new.shape[-2:]:
            raise ValueError(
                f"{name} must have the heads and head_dim of {new_name}, {tuple(new.shape[-2:])}, got shape {tuple(cache.shape)}"
            )
        checks.check_last_dim_contiguous(name, cache)
        checks.check_written(name, cache)
    checks.check_same_dtype("v_cache", call.v_cache, "k_cache", call.k_cache)
    checks.check_shape("v_cache", call.v_cache, (*call.k_cache.shape[:3], None), "(first three sizes of k_cache, any)")


def _check_where(call: AppendCall) -> AppendCall:
    """cache_seqlens or slot_mapping, and what goes with each."""
    if (call.cache_seqlens is None) == (call.slot_mapping is None):
        given = "both" if call.cache_seqlens is not None else "neither"
        raise ValueError(f"give cache_seqlens or slot_mapping, which say where to write; got {given}")
    if call.slot_mapping is not None:
        for name, value in (("block_table", call.block_table), ("cache_batch_idx", call.cache_batch_idx)):
            if value is not None:
                raise ValueError(f"{name} goes with cache_seqlens; slot_mapping says where to write by itself")
        if call.cu_seqlens is not None:
            checks.check_cu_seqlens("cu_seqlens", call.cu_seqlens, call.k.shape[0], call.k.device)
        slots = _per_token("slot_mapping", call.slot_mapping, (torch.int64,), call)
        return call._replace(slot_mapping=slots)
    assert call.cache_seqlens is not None
    device = call.k.device
    checks.check_tensor("cache_seqlens", call.cache_seqlens, ndim=1, dtypes=(torch.int32,), device=device)
    if call.k.ndim == 3 and call.cu_seqlens is None:
        raise ValueError(f"cu_seqlens must be given with packed k of shape {tuple(call.k.shape)} and cache_seqlens")
    batch = call.cache_seqlens.shape[0]
    if call.cu_seqlens is not None:
        checks.check_cu_seqlens("cu_seqlens", call.cu_seqlens, call.k.shape[0], device, batch)
    elif call.k.shape[0] != batch:
        raise ValueError(f"cache_seqlens must have shape (batch) = ({call.k.shape[0]}), got {(batch,)}")
    check_index("cache_seqlens", call.cache_seqlens, batch, device)
    check_rows(call, batch, hint="block_table, cache_batch_idx or slot_mapping")
    if call.k_cache.shape[1] == 0 and count_tokens(call) > 0:
        raise ValueError(f"k_cache must have room for tokens, got shape {tuple(call.k_cache.shape)}")
    return call


def _per_token(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], call: AppendCall) -> Tensor:
    """One entry per token, flat or in the shape of k's first dimensions; returned flat and contiguous."""
    checks.check_tensor(name, value, dtypes=dtypes, device=call.k.device)
    leading = tuple(call.k.shape[:-2])
    if tuple(value.shape) not in (leading, (count_tokens(call),)):
        raise ValueError(f"{name} must have one entry per token, shape {leading}, got {tuple(value.shape)}")
    return value.reshape(-1).contiguous()


def _check_rope(call: AppendCall) -> AppendCall:
    call = call._replace(interleaved=checks.check_bool("interleaved", call.interleaved))
    if (call.cos is None) != (call.sin is None):
        given, missing = ("cos", "sin") if call.sin is None else ("sin", "cos")
        raise ValueError(f"cos and sin go together: {given} is given, {missing} is None")
    positions = call.positions
    if positions is not None:
        if positions.ndim == 1 and call.k.ndim == 4 and positions.shape[0] == call.k.shape[1]:
            positions = positions.expand(call.k.shape[:2])  # one row for all sequences
        positions = _per_token("positions", positions, INTEGERS, call)
    if call.cos is None or call.sin is None:
        return call._replace(positions=positions)
    layout = "(length, rotary_dim / 2)"
    cos = checks.check_tensor("cos", call.cos, ndim=2, dtypes=(torch.float32,), device=call.k.device, layout=layout)
    sin = checks.check_tensor("sin", call.sin, ndim=2, dtypes=(torch.float32,), device=call.k.device, layout=layout)
    checks.check_shape("sin", sin, tuple(cos.shape), "of cos")
    if cos.shape[1] == 0 or 2 * cos.shape[1] > call.k.shape[-1]:
        raise ValueError(
            f"cos must have shape {layout} with rotary_dim from 2 to the head_dim of k ({call.k.shape[-1]}), got {tuple(cos.shape)}"
        )
    if cos.shape[0] == 0 and count_tokens(call) > 0:
        raise ValueError(f"cos must have a row for each position, got shape {tuple(cos.shape)}")
    if positions is None and call.slot_mapping is not None:
        raise ValueError("positions must be given with slot_mapping and cos: slots say nothing about positions")
    return call._replace(positions=positions, cos=cos.contiguous(), sin=sin.contiguous())


def _check_norms(call: AppendCall) -> AppendCall:
    eps = checks.check_float("norm_eps", call.norm_eps, minimum=0.0)
    offset = checks.check_float("norm_weight_offset", call.norm_weight_offset)
    if call.q_norm_weight is not None and call.q is None:
        raise ValueError("q_norm_weight is given without q")
    for name, weight in (("q_norm_weight", call.q_norm_weight), ("k_norm_weight", call.k_norm_weight)):
        if weight is not None:
            dtypes = checks.FLOAT_DTYPES_AND_DOUBLE if call.k.dtype == torch.float64 else checks.FLOAT_DTYPES
            checks.check_tensor(name, weight, ndim=1, dtypes=dtypes, device=call.k.device, layout="(head_dim)")
            checks.check_shape(name, weight, (call.k.shape[-1],), "(head_dim)")
            checks.check_last_dim_contiguous(name, weight)
    return call._replace(norm_eps=eps, norm_weight_offset=offset)


def check_values(call: AppendCall) -> None:
    """What is only known from values: places and positions, where they may be read."""
    if count_tokens(call) == 0:
        return
    if call.slot_mapping is not None:
        if checks.readable(call.slot_mapping):
            _check_slots(call, call.slot_mapping)
    elif call.cache_seqlens is not None and checks.readable(call.cache_seqlens):
        _check_lengths(call, call.cache_seqlens.tolist())
    if call.positions is not None and call.cos is not None and call.slot_mapping is None:
        checks.check_values("positions", call.positions, 0, call.cos.shape[0] - 1, "rows of cos and sin")


def _check_slots(call: AppendCall, slot_mapping: Tensor) -> None:
    pages, page_size = call.k_cache.shape[:2]
    written = slot_mapping >= 0
    checks.check_values(
        "slot_mapping", slot_mapping.clamp(min=-1), -1, pages * page_size - 1, "slots (negative = skip)"
    )
    slots = slot_mapping[written].sort().values
    twice = slots[1:][slots[1:] == slots[:-1]]
    if twice.numel() > 0:
        raise ValueError(f"slot_mapping must name each slot once, got slot {int(twice[0])} more than once")
    if call.positions is not None and call.cos is not None:
        checks.check_values("positions", call.positions[written], 0, call.cos.shape[0] - 1, "rows of cos and sin")


def _check_lengths(call: AppendCall, lengths: list[int]) -> None:
    counts = [call.k.shape[-3]] * len(lengths)
    if call.cu_seqlens is not None:
        counts = [end - start for start, end in itertools.pairwise(call.cu_seqlens.tolist())]
    for sequence, (length, count) in enumerate(zip(lengths, counts)):
        if not 0 <= length <= capacity_of(call) - count:
            raise ValueError(
                f"cache_seqlens must be from 0 to {capacity_of(call) - count}, so that {count} new tokens fit into the capacity of "
                f"{capacity_of(call)}, got {length} for sequence {sequence}"
            )
        if call.cos is not None and call.positions is None and length + count > call.cos.shape[0]:
            raise ValueError(
                f"cos must have a row for each position: sequence {sequence} reaches {length + count}, got shape {tuple(call.cos.shape)}"
            )
    if call.cache_batch_idx is not None:
        checks.check_values("cache_batch_idx", call.cache_batch_idx, 0, call.k_cache.shape[0] - 1, "rows of the cache")
        rows = call.cache_batch_idx.tolist()
        if len(set(rows)) != len(rows):
            raise ValueError(f"cache_batch_idx must name each row once, got {rows}")
    if call.block_table is not None:
        spans = ((length, length + count) for length, count in zip(lengths, counts))
        check_pages(call, spans, "new tokens go")
