"""Decode attention by the CUDA extension: float16 and bfloat16 queries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.ops.backend import Backend, Limit, Outputs, head_dim_limit
from pytransformer.ops.cache_checks import capacity_of
from pytransformer.ops.checks import short
from pytransformer.ops.decode_attention.call import DecodeCall, batch_size

_op = functools.cache(lambda: extension.op("decode_attention"))


def _decode(call: DecodeCall) -> Outputs:
    """(out, lse)."""
    return tuple(
        _op()(
            call.q, call.k_cache, call.v_cache, call.cache_seqlens, call.cu_seqlens_q, call.max_seqlen_q, call.block_table,
            call.cache_batch_idx, call.cache_leftpad, _expanded(call.mask, call), _expanded(call.bias, call), call.alibi_slopes,
            call.sinks, call.k_scale, call.v_scale, call.softmax_scale, call.causal, *call.window, call.softcap, call.num_splits,
        )
    )  # fmt: skip


def _plan(call: DecodeCall) -> Callable[[DecodeCall], Any] | None:
    """The op checks its arguments itself, all but the views of a mask or bias."""
    if call.mask is not None or call.bias is not None:
        return None
    op, hint = _op(), call.max_seqlen_q
    options = (call.softmax_scale, call.causal, *call.window, call.softcap, call.num_splits)

    def launch(given: DecodeCall) -> Any:
        q, k_cache, v_cache, lengths, cu_seqlens, table, rows, leftpad, _, _, slopes, sinks, k_scale, v_scale, *_ = (
            given
        )
        caches = (q, k_cache, v_cache, lengths, cu_seqlens, hint, table, rows, leftpad)
        return tuple(op(*caches, None, None, slopes, sinks, k_scale, v_scale, *options))

    return launch if call.return_lse else lambda given: launch(given)[0]


def _expanded(tensor: Tensor | None, call: DecodeCall) -> Tensor | None:
    """A mask or bias with strides of 0 where it broadcasts: (batch, num_heads, queries, keys)."""
    if tensor is None:
        return None
    rows = max(tensor.shape[2], call.q.shape[-3])
    keys = capacity_of(call) if tensor.shape[3] == 1 else tensor.shape[3]
    return tensor.expand(batch_size(call), call.q.shape[-2], rows if tensor.shape[2] == 1 else tensor.shape[2], keys)


def _not_16_bit(call: DecodeCall) -> str | None:
    if call.q.dtype in (torch.float16, torch.bfloat16):
        return None
    return f"the kernels are for float16 and bfloat16 queries, got {short(call.q.dtype)}"


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1])), q.new_empty(lse, dtype=torch.float32)


extension.register_fake("decode_attention", _fake)
_LIMITS = (Limit("float32 and float64", _not_16_bit), head_dim_limit("q", "v_cache", multiple=8))
BACKEND = Backend("cuda", _decode, _LIMITS, plan=_plan)
