"""Calls of the ops that write into their arguments, with tensors that share memory and with tensors that only lie in one buffer.

Of the buffers a bit-exact copy is compared after a refusal; a call that is served is compared with one on tensors of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer import kv_append, reference, rope

Arguments = dict[str, Tensor | None]
INT32, INT64 = torch.int32, torch.int64


class Layout(NamedTuple):
    """Where the tensors of a call lie.

    Attributes:
        op: "rope" or "kv_append".
        tensors: makes them, on a device.
        pair: the two that the refusal names; ``None`` = the call is legal.
    """

    op: str
    tensors: Callable[[torch.device], Arguments]
    pair: tuple[str, str] | None


def run(op: str, tensors: Arguments, backend: str) -> Any:
    """One call."""
    if op == "rope":
        options = {name: tensors[name] for name in ("positions", "offsets", "cu_seqlens") if name in tensors}
        return rope(*(tensors[name] for name in ("q", "k", "cos", "sin")), inplace=True, backend=backend, **options)
    return kv_append(**tensors, backend=backend)


def apart(tensors: Arguments) -> Arguments:
    """The same values in the same layout, each tensor in a buffer of its own."""
    found = {}
    for name, tensor in tensors.items():
        if tensor is None:
            found[name] = None
            continue
        length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        buffer = torch.zeros(length, dtype=tensor.dtype, device=tensor.device)
        found[name] = buffer.as_strided(tensor.shape, tensor.stride())
        found[name].copy_(tensor)
    return found


def _values(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(device, dtype)


def _rope(device: torch.device, **changes: Any) -> Arguments:
    cos, sin = (table.to(device) for table in reference.rope_tables(8, 16))
    q, k = _values(2, 5, 4, 8, device=device), _values(2, 5, 2, 8, device=device)
    return {"q": q, "k": k, "cos": cos, "sin": sin, **changes}


def _packed(device: torch.device, k_head: int) -> Arguments:
    qkv = _values(2, 5, 8, 8, device=device)
    return _rope(device, q=qkv[:, :, :4], k=qkv[:, :, k_head : k_head + 2])


def _interleaved_heads(device: torch.device) -> Arguments:
    qk = _values(2, 5, 4, 2, 8, device=device)
    return _rope(device, q=qk[:, :, :, 0], k=qk[:, :, :, 1])


def _one_tensor(device: torch.device) -> Arguments:
    q = _values(2, 5, 4, 8, device=device)
    return _rope(device, q=q, k=q)


def _shifted(device: torch.device) -> Arguments:
    buffer = _values(2 * 5 * 4 * 8 + 8, device=device)
    return _rope(device, q=buffer[:-8].view(2, 5, 4, 8), k=buffer[8:].view(2, 5, 4, 8))


def _table_in_q(device: torch.device, name: str) -> Arguments:
    q = _values(2, 5, 4, 8, device=device)
    return _rope(device, q=q, **{name: q.view(-1)[:64].view(16, 4)})


def _table_beside_q(device: torch.device) -> Arguments:
    buffer = _values(320 + 64, device=device)
    return _rope(device, q=buffer[:320].view(2, 5, 4, 8), cos=buffer[320:].view(16, 4))


def _indices_in_k(device: torch.device, name: str) -> Arguments:
    k = torch.zeros(2, 5, 2, 8, device=device)
    return _rope(device, k=k, **{name: k.view(INT32).flatten()[: 5 if name == "positions" else 2]})


def _append(device: torch.device, **changes: Any) -> Arguments:
    k, v = _values(2, 3, 2, 8, device=device), _values(2, 3, 2, 8, device=device)
    caches = {name: torch.zeros(2, 7, 2, 8, device=device) for name in ("k_cache", "v_cache")}
    return {"k": k, "v": v, **caches, "cache_seqlens": torch.ones(2, dtype=INT32, device=device), **changes}


def _one_cache(device: torch.device) -> Arguments:
    cache = torch.zeros(2, 7, 2, 8, device=device)
    return _append(device, k_cache=cache, v_cache=cache)


def _caches_of(device: torch.device, shape: tuple[int, ...], dim: int, second: int) -> Arguments:
    both = torch.zeros(shape, device=device)
    return _append(device, k_cache=both.narrow(dim, 0, 2), v_cache=both.narrow(dim, second, 2))


def _halves(device: torch.device, dim: int) -> Arguments:
    """The caches of k and v stacked along a dimension of one buffer, as servers keep them."""
    shape = [2, 7, 2, 8]
    shape.insert(dim, 2)
    both = torch.zeros(shape, device=device)
    return _append(device, k_cache=both.select(dim, 0), v_cache=both.select(dim, 1))


def _features_side_by_side(device: torch.device) -> Arguments:
    both = torch.zeros(2, 7, 2, 16, device=device)
    return _append(device, k_cache=both[..., :8], v_cache=both[..., 8:])


def _new_in_cache(device: torch.device, name: str, first: int) -> Arguments:
    """New tokens that are rows of a buffer of which the first seven are the cache."""
    rows = _values(2, 10, 2, 8, device=device)
    return _append(device, k_cache=rows[:, :7], **{name: rows[:, first : first + 3]})


def _lengths_in_cache(device: torch.device) -> Arguments:
    cache = torch.zeros(2, 7, 2, 8, device=device)
    return _append(device, v_cache=cache, cache_seqlens=cache.view(INT32).flatten()[-2:])


def _quantised(device: torch.device, **changes: Any) -> Arguments:
    caches = {name: torch.zeros(2, 7, 2, 8, dtype=torch.int8, device=device) for name in ("k_cache", "v_cache")}
    scales = {name: torch.zeros(2, 7, 2, device=device) for name in ("k_scale", "v_scale")}
    return _append(device, **caches, **scales) | changes


def _one_scale(device: torch.device) -> Arguments:
    scale = torch.zeros(2, 7, 2, device=device)
    return _quantised(device, k_scale=scale, v_scale=scale)


def _scale_in_cache(device: torch.device) -> Arguments:
    memory = torch.zeros(2 * 7 * 2 * 8, dtype=torch.int8, device=device)
    return _quantised(device, v_cache=memory.view(2, 7, 2, 8), v_scale=memory[:112].view(torch.float32).view(2, 7, 2))


def _read_scale_in_cache(device: torch.device) -> Arguments:
    memory = torch.zeros(2 * 7 * 2 * 8, dtype=torch.int8, device=device)
    scale = memory[:8].view(torch.float32)
    return _quantised(device, k_cache=memory.view(2, 7, 2, 8), k_scale=scale, v_scale=torch.ones(2, device=device))


def _fused(device: torch.device, name: str) -> Arguments:
    cos, sin = (table.to(device) for table in reference.rope_tables(8, 16))
    weight = torch.ones(8, device=device)
    tensors = _append(
        device, q=_values(2, 3, 4, 8, device=device), cos=cos, sin=sin, q_norm_weight=weight, k_norm_weight=weight
    )
    cache = tensors["k_cache"]
    assert cache is not None
    views = {
        "q": cache.flatten()[:192].view(2, 3, 4, 8),
        "cos": cache.flatten()[:64].view(16, 4),
        "q_norm_weight": cache[0, 0, 0],
    }
    return tensors | {name: views[name]}


LAYOUTS = {
    "rope, q and k of one packed projection": Layout("rope", lambda device: _packed(device, 4), None),
    "rope, q and k interleaved by head": Layout("rope", _interleaved_heads, None),
    "rope, a table behind q in one buffer": Layout("rope", _table_beside_q, None),
    "rope, one tensor for q and k": Layout("rope", _one_tensor, ("q", "k")),
    "rope, k begins inside q": Layout("rope", _shifted, ("q", "k")),
    "rope, packed heads of k that are q's": Layout("rope", lambda device: _packed(device, 3), ("q", "k")),
    "rope, cos is a view of q": Layout("rope", lambda device: _table_in_q(device, "cos"), ("q", "cos")),
    "rope, sin is a view of q": Layout("rope", lambda device: _table_in_q(device, "sin"), ("q", "sin")),
    "rope, positions are a view of k": Layout(
        "rope", lambda device: _indices_in_k(device, "positions"), ("k", "positions")
    ),
    "rope, offsets are a view of k": Layout("rope", lambda device: _indices_in_k(device, "offsets"), ("k", "offsets")),
    "append, caches stacked in front": Layout("kv_append", lambda device: _halves(device, 0), None),
    "append, caches stacked by row": Layout("kv_append", lambda device: _halves(device, 1), None),
    "append, caches stacked by head": Layout("kv_append", lambda device: _halves(device, 3), None),
    "append, caches side by side in the features": Layout("kv_append", _features_side_by_side, None),
    "append, new tokens behind the cache": Layout("kv_append", lambda device: _new_in_cache(device, "k", 7), None),
    "append, one tensor for both caches": Layout("kv_append", _one_cache, ("k_cache", "v_cache")),
    "append, caches that share rows": Layout(
        "kv_append", lambda device: _caches_of(device, (3, 7, 2, 8), 0, 1), ("k_cache", "v_cache")
    ),
    "append, caches that share heads": Layout(
        "kv_append", lambda device: _caches_of(device, (2, 7, 3, 8), 2, 1), ("k_cache", "v_cache")
    ),
    "append, k is a view of its cache": Layout(
        "kv_append", lambda device: _new_in_cache(device, "k", 1), ("k_cache", "k")
    ),
    "append, v reaches into the cache of k": Layout(
        "kv_append", lambda device: _new_in_cache(device, "v", 6), ("k_cache", "v")
    ),
    "append, lengths are a view of a cache": Layout("kv_append", _lengths_in_cache, ("v_cache", "cache_seqlens")),
    "append, one tensor for both scales": Layout("kv_append", _one_scale, ("k_scale", "v_scale")),
    "append, scales that are made lie in a cache": Layout("kv_append", _scale_in_cache, ("v_cache", "v_scale")),
    "append, a scale that is read lies in a cache": Layout("kv_append", _read_scale_in_cache, ("k_cache", "k_scale")),
    "append, q is a view of a cache": Layout("kv_append", lambda device: _fused(device, "q"), ("k_cache", "q")),
    "append, cos is a view of a cache": Layout("kv_append", lambda device: _fused(device, "cos"), ("k_cache", "cos")),
    "append, a norm weight is a view of a cache": Layout(
        "kv_append", lambda device: _fused(device, "q_norm_weight"), ("k_cache", "q_norm_weight")
    ),
}
