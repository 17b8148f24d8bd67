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

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

# The modules that define the ops.
from pytransformer.ops import attention, decode_attention, linear_cross_entropy  # noqa: F401

_OPS = torch.ops.pytransformer


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


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any, out_val: Any = None) -> int:
    return attention_flops(q, k, v, options[6], options[7])


def _backward(
    dout: Tensor, dlse: Any, want_dbias: bool, out: Tensor, lse: Tensor, *call: Any, out_val: Any = None
) -> int:
    q, k, v, *options = call
    # Scores and dP over head_dim and value head_dim; dQ and dK over head_dim, dV over value head_dim.
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    total: int = attention_flops(q, k, v, options[6], options[7])
    return total * (3 * int(head_dim) + 2 * int(value_dim)) // int(head_dim + value_dim)


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *options: Any, out_val: Any = None
) -> int:
    cu_seqlens_q = options[0]
    features = q.shape[-1] + v_cache.shape[-1]
    if cache_seqlens.is_meta or type(cache_seqlens) is not Tensor:
        raise NotImplementedError(
            "decode_attention: its FLOP depend on cache_seqlens, which a fake tensor does not hold"
        )
    queries = q.shape[1] if cu_seqlens_q is None else cu_seqlens_q.diff().long()
    return int(2 * q.shape[-2] * features * (cache_seqlens.long() * queries).sum())


def _head(x: Tensor, weight: Tensor) -> int:
    """One product of x (..., hidden) and weight (vocab, hidden)."""
    return 2 * x.numel() * weight.shape[0]


def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Any, bias: Any, *options: Any, out_val: Any = None
) -> int:
    want_dx, want_dweight = options[:2]
    return _head(x, weight) * (1 + int(want_dx) + int(want_dweight))


def _losses(x: Tensor, weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _head(x, weight)


def _losses_backward(dlosses: Any, x: Tensor, weight: Tensor, *rest: Any, out_val: Any = None) -> int:
    want_dx, want_dweight = rest[2:4]
    return _head(x, weight) * (1 + int(want_dx) + int(want_dweight))  # the logits are computed again


def _register(op: Any, formula: Any) -> None:
    if op not in flop_registry:
        register_flop_formula(op, get_raw=True)(formula)


_register(_OPS.attention_forward, _forward)
_register(_OPS.attention_backward, _backward)
_register(_OPS.decode_attention, _decode)
_register(_OPS.linear_cross_entropy_total, _linear_cross_entropy)
_register(_OPS.linear_cross_entropy_losses, _losses)
_register(_OPS.linear_cross_entropy_backward, _losses_backward)
