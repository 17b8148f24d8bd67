"""Floating-point operations of this package's ops, for torch's counter.

    import pytransformer.flops
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode() as counter:
        model(ids).sum().backward()

Importing this module registers the formulas; nothing else imports it, as torch's counter takes most of a second to load. Counted are matrix
products, as torch counts those of its own attention: every (query, key) pair whether or not a mask hides it, 2 products forward (4 ·
batch · heads · seqlen_q · seqlen_k · head_dim) and 2.5 times that backward. Norms, RoPE and cache writes count as 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

# The modules that define the ops.
from pytransformer.ops import (  # noqa: F401
    attention,
    decode_attention,
    grouped_linear,
    linear_attention,
    linear_cross_entropy,
    quantized_linear,
)
from pytransformer.ops.registered import REGISTERED, RegisteredOp


def attention_flops(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> int:
    """Of one forward pass; packed sequences are counted one by one, for which their lengths are read from the device."""
    heads, features = q.shape[-2], q.shape[-1] + v.shape[-1]
    if cu_seqlens_q is None or cu_seqlens_k is None:
        pairs = q.shape[0] * q.shape[1] * k.shape[1]
    elif cu_seqlens_q.is_meta or type(cu_seqlens_q) is not Tensor:
        pairs = q.shape[0] * k.shape[0]  # no lengths to read: an upper bound
    else:
        pairs = int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())
    return 2 * heads * features * pairs


def _attention(call: Any) -> int:
    return attention_flops(call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k)


def _attention_backward(call: Any) -> int:
    # Scores and dP over head_dim and value head_dim; dQ and dK over head_dim, dV over value head_dim.
    head_dim, value_dim = int(call.q.shape[-1]), int(call.v.shape[-1])
    return _attention(call) * (3 * head_dim + 2 * value_dim) // (head_dim + value_dim)


def _decode_attention(call: Any) -> int:
    lengths = call.cache_seqlens
    if lengths.is_meta or type(lengths) is not Tensor:
        raise NotImplementedError(
            "decode_attention: its FLOP depend on cache_seqlens, which a fake tensor does not hold"
        )
    features = call.q.shape[-1] + call.v_cache.shape[-1]
    queries = call.q.shape[1] if call.cu_seqlens_q is None else call.cu_seqlens_q.diff().long()
    return int(2 * call.q.shape[-2] * features * (lengths.long() * queries).sum())


def _head(call: Any) -> int:
    """One product of x (..., hidden) and weight (vocab, hidden)."""
    return int(2 * call.x.numel() * call.weight.shape[0])


def _head_with_gradients(call: Any) -> int:
    """The logits, once or again, and the products of the gradients that are wanted."""
    return _head(call) * (1 + int(call.want_dx) + int(call.want_dweight))


def _grouped_linear(call: Any) -> int:
    """Each row of x (total, in) times one group's weight (out, in)."""
    return int(2 * call.x.numel() * call.weight.shape[1])


def _grouped_linear_backward(call: Any) -> int:
    return _grouped_linear(call) * (int(call.want_dx) + int(call.want_dweight))


def _quantized_linear_backward(call: Any) -> int:
    codes_of_byte = 2 if call.weight.dtype == torch.uint8 else 1
    return int(2 * call.dy.numel() * call.weight.shape[1] * codes_of_byte)


def _state_products(call: Any) -> tuple[int, int]:
    """(of queries with states, of keys with values or states): linear attention as a recurrence, whatever a chunk's own products are."""
    value_dim = int(call.v.shape[-1])
    return 2 * int(call.q.numel()) * value_dim, 2 * int(call.k.numel()) * value_dim


def _linear_attention(call: Any) -> int:
    return sum(_state_products(call))


def _linear_attention_backward(call: Any) -> int:
    # dq and the states' gradients over the queries; the states, dk and dv over the keys.
    of_queries, of_keys = _state_products(call)
    return 2 * of_queries + 3 * of_keys


# By the name of a registered op, of its call.
_FORMULAS: dict[str, Callable[[Any], int]] = {
    "attention_forward": _attention,
    "attention_backward": _attention_backward,
    "decode_attention": _decode_attention,
    "grouped_linear_forward": _grouped_linear,
    "grouped_linear_backward": _grouped_linear_backward,
    "linear_attention": _linear_attention,
    "linear_attention_backward": _linear_attention_backward,
    "quantized_linear_forward": _head,
    "quantized_linear_backward": _quantized_linear_backward,
    "linear_cross_entropy_total": _head_with_gradients,
    "linear_cross_entropy_losses": _head,
    "linear_cross_entropy_backward": _head_with_gradients,
}


def _register(op: RegisteredOp, formula: Callable[[Any], int]) -> None:
    packet = getattr(torch.ops.pytransformer, op.name)
    if packet not in flop_registry:
        register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None: formula(op.call(*args[:-1])))


for _op in REGISTERED:
    if _op.name in _FORMULAS:
        _register(_op, _FORMULAS[_op.name])
