"""KV append by the CUDA extension's ops, which check their arguments themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pytransformer import extension
from pytransformer.ops.backend import Backend, Limit, Outputs, head_dim_limit, mark_changed, no_float64
from pytransformer.ops.kv_append.call import AppendCall


@functools.cache
def _ops() -> tuple[Any, ...]:
    """The extension's ops: for most calls two with few arguments, each of which costs as much as a dictionary look-up; then the others."""
    # What OpOverload.__call__ calls: a tenth of the time of a small call is in that step.
    names = ("kv_store", "kv_rotate_store", "kv_append", "kv_append_scaled")
    return tuple(extension.op(name)._op for name in names)


def _append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, cache_seqlens: Tensor | None,
    slot_mapping: Tensor | None, block_table: Tensor | None, cu_seqlens: Tensor | None, cache_batch_idx: Tensor | None,
    positions: Tensor | None, cos: Tensor | None, sin: Tensor | None, q: Tensor | None, q_norm_weight: Tensor | None,
    k_norm_weight: Tensor | None, interleaved: bool, norm_eps: float, norm_weight_offset: float,
) -> Tensor | None:  # fmt: skip
    new_q: Tensor
    if (
        k_scale is v_scale is cu_seqlens is cache_batch_idx is q_norm_weight is k_norm_weight is None
        and (cache_seqlens is None) != (slot_mapping is None)
        and (cos is None) == (q is None)
        and (q is not None or positions is None)
    ):
        where = slot_mapping if cache_seqlens is None else cache_seqlens
        if q is None:
            _ops()[0](k, v, k_cache, v_cache, where, block_table)
            mark_changed((k_cache, v_cache))
            return None
        new_q = _ops()[1](q, k, v, k_cache, v_cache, where, block_table, cos, sin, positions, interleaved)
        mark_changed((k_cache, v_cache))
        return new_q
    makes_scales = k_scale is not None and v_scale is not None and k_scale.ndim > 1
    new_q = _ops()[3 if makes_scales else 2](
        k, v, k_cache, v_cache, k_scale, v_scale, cache_seqlens, slot_mapping, block_table, cu_seqlens, cache_batch_idx,
        positions, cos, sin, q, q_norm_weight, k_norm_weight, interleaved, norm_eps, norm_weight_offset,
    )  # fmt: skip
    mark_changed((k_cache, v_cache, k_scale, v_scale) if makes_scales else (k_cache, v_cache))
    return None if q is None else new_q


def _run(call: AppendCall) -> Outputs:
    return (_append(*call),)


def _fake(*arguments: Any) -> Tensor:
    call = AppendCall(*arguments)
    return call.k.new_empty(0) if call.q is None else call.q.new_empty(call.q.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "kv_append": _fake,
    "kv_append_scaled": _fake,
    "kv_store": lambda *arguments: None,
    "kv_rotate_store": lambda q, *arguments: q.new_empty(q.shape),
}
for _name, _function in _FAKES.items():
    extension.register_fake(_name, _function)

_LIMITS = (Limit("float64", no_float64), head_dim_limit("k", "v", multiple=8))
BACKEND = Backend("cuda", _run, _LIMITS, direct=_append)
