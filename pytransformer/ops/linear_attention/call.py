"""A call of linear attention, and the checks of every argument on the host, each error naming what was given and what is allowed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.precision import autocast_to_lower

_LAYOUT = "(batch, seqlen, num_heads, head_dim)"


class LinearAttentionCall(NamedTuple):
    """The arguments of one call. ``initial_state`` is split in two; checked, ``feature_map`` is "elu" or "identity"."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | None
    state: Tensor | None
    normalizer: Tensor | None
    feature_map: str
    causal: bool
    normalize: bool
    return_state: bool


def split_state(initial_state: Any) -> tuple[Any, Any]:
    """(S, z), or two None; TypeError for what is no pair."""
    if initial_state is None:
        return None, None
    if not isinstance(initial_state, (tuple, list)) or len(initial_state) != 2:
        raise TypeError(
            f"initial_state must be a pair (S, z) as return_state=True returns it, or None, got {checks.describe(initial_state)}"
        )
    return initial_state[0], initial_state[1]


def check_linear_attention(call: LinearAttentionCall) -> LinearAttentionCall:
    """Checks a call as the user gave it; see ``linear_attention`` for the errors. Under autocast q, k and v are cast to its dtype."""
    call = _check_qkv(call)
    flags = {name: checks.check_bool(name, getattr(call, name)) for name in ("causal", "normalize", "return_state")}
    call = call._replace(**flags)  # type: ignore[arg-type]
    if call.causal and call.q.shape[1] != call.k.shape[1]:
        raise ValueError(
            f"causal=True needs a query for each key, got seqlen {call.q.shape[1]} of q and {call.k.shape[1]} of k"
        )
    if call.decay is not None:
        _check_decay(call.decay, call)
    if call.state is not None or call.normalizer is not None:
        _check_state(call)
    return call._replace(feature_map=_feature_map(call.feature_map))


def _check_qkv(call: LinearAttentionCall) -> LinearAttentionCall:
    allowed = checks.FLOAT_DTYPES_AND_DOUBLE
    q = checks.check_tensor("q", call.q, ndim=4, dtypes=allowed, layout=_LAYOUT)
    k = checks.check_tensor("k", call.k, ndim=4, dtypes=allowed, device=q.device, layout=_LAYOUT)
    v = checks.check_tensor("v", call.v, ndim=4, dtypes=allowed, device=q.device, layout=_LAYOUT)
    q, k, v = (autocast_to_lower(tensor) for tensor in (q, k, v))
    checks.check_same_dtype("k", k, "q", q)
    checks.check_same_dtype("v", v, "q", q)
    k_layout, v_layout = (f"(batch, seqlen_k, num_kv_heads, {dim})" for dim in ("head_dim of q", "value_dim"))
    checks.check_shape("k", k, (q.shape[0], None, None, q.shape[-1]), k_layout)
    checks.check_shape("v", v, (*k.shape[:3], None), v_layout)
    if q.shape[2] == 0:
        raise ValueError(f"q must have at least one head, got shape {tuple(q.shape)}")
    checks.check_gqa(q.shape[2], k.shape[2])
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_last_dim_contiguous(name, tensor)
    return call._replace(q=q, k=k, v=v)


def _check_decay(decay: Any, call: LinearAttentionCall) -> None:
    dtypes = _wide_dtypes(call)
    checks.check_tensor("decay", decay, ndim=1, dtypes=dtypes, device=call.q.device, layout="(num_kv_heads)")
    checks.check_shape("decay", decay, (call.k.shape[2],), "(num_kv_heads)")
    if not call.causal:
        raise ValueError("decay is by the distance of a query from the keys before it: it needs causal=True")
    if checks.readable(decay):
        for head, factor in enumerate(decay.tolist()):
            if not 0.0 <= factor <= 1.0:
                raise ValueError(f"decay must hold factors from 0 to 1, got {factor:g} of head {head}")


def _check_state(call: LinearAttentionCall) -> None:
    batch, _, num_kv_heads, head_dim = call.k.shape
    for name, tensor, shape, layout in (
        ("S", call.state, (head_dim, call.v.shape[-1]), "(batch, num_kv_heads, head_dim, value_dim)"),
        ("z", call.normalizer, (head_dim,), "(batch, num_kv_heads, head_dim)"),
    ):
        title = f"initial_state's {name}"
        given = checks.check_tensor(title, tensor, dtypes=_wide_dtypes(call), device=call.q.device)
        checks.check_shape(title, given, (batch, num_kv_heads, *shape), layout)
        checks.check_last_dim_contiguous(title, given)


def _wide_dtypes(call: LinearAttentionCall) -> tuple[torch.dtype, ...]:
    # In 16 bits a factor near 1 would be 1, and a long sum would stand still.
    return (torch.float32, torch.float64) if call.q.dtype == torch.float64 else (torch.float32,)


def _feature_map(value: Any) -> str:
    if value is None:
        return "identity"
    if value != "elu":
        raise ValueError(
            f"feature_map must be 'elu', or None for q and k that are features already, got {checks.describe(value)}"
        )
    return "elu"
