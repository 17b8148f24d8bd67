"""Attention by the CUDA extension: tensor cores of sm_80 and newer, float16 and bfloat16, forward and backward."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.ops.attention.call import AttentionCall, is_empty, unless_empty
from pytransformer.ops.attention.padding import is_padded, padded
from pytransformer.ops.backend import Backend, Limit, Outputs, head_dim_limit, is_plain
from pytransformer.ops.checks import short


def _not_16_bit(call: AttentionCall) -> str | None:
    if call.q.dtype in (torch.float16, torch.bfloat16):
        return None
    return f"the kernels take float16 and bfloat16, got {short(call.q.dtype)}"


def _has(name: str) -> Limit:
    return Limit(name, lambda call: None if getattr(call, name) is None else f"the kernels have no {name}")


def _drops_out(call: AttentionCall) -> str | None:
    return "the kernels have no dropout (dropout_p > 0)" if call.dropout_p > 0 else None


def _trains_slopes(call: AttentionCall) -> str | None:
    slopes = call.alibi_slopes
    if slopes is None or not (slopes.requires_grad and torch.is_grad_enabled()):
        return None
    return "the kernels give no gradient of alibi_slopes, which require grad"


def _has_unaligned_rows(call: AttentionCall) -> str | None:
    # What is being traced has no address yet; rows that turn out not to be aligned are copied then. What is padded is copied anyway.
    if is_plain(call.q, call.k, call.v) and not is_padded(call):
        for name, tensor in (("q", call.q), ("k", call.k), ("v", call.v)):
            if not _has_aligned_rows(tensor):
                return (
                    f"the kernels read 16 bytes at once, and the rows of {name} do not all begin at a multiple of 16 bytes "
                    f"(strides {tuple(tensor.stride())})"
                )
    return None


def _has_aligned_rows(tensor: Tensor) -> bool:
    """Whether features are contiguous and those of every row begin at a multiple of 16 bytes."""
    if tensor.stride(-1) != 1 or tensor.data_ptr() % 16 != 0:
        return False
    per_chunk = 16 // tensor.element_size()
    return all(stride % per_chunk == 0 for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1)


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if _has_aligned_rows(tensor) else tensor.clone(memory_format=torch.contiguous_format)


_op = functools.cache(extension.op)


def _forward(call: AttentionCall) -> Outputs:
    """(out, lse)."""
    return tuple(_op("attention_forward")(*_arguments(call)))


def _plan(call: AttentionCall) -> Callable[[AttentionCall], Any] | None:
    """The op checks its arguments itself: of a call like this one it refuses, by ValueError, rows that happen not to be aligned."""
    if (
        is_empty(call)
        or is_padded(call)
        or (call.alibi_slopes is not None and call.alibi_slopes.dtype != torch.float32)
    ):
        return None
    op, options = _op("attention_forward"), (call.softmax_scale, call.causal, *call.window, call.softcap)
    places = operator.itemgetter(
        *map(call._fields.index, ("q", "k", "v", "alibi_slopes", "cu_seqlens_q", "cu_seqlens_k"))
    )
    return_lse = call.return_lse

    def launch(given: AttentionCall) -> Any:
        out, lse = op(*places(given), *options)
        return (out, lse) if return_lse else out

    return launch


def backward(given: Any, call: AttentionCall) -> Outputs:
    """(dq, dk, dv, None, None, None), contiguous, with the same bits each run."""
    if given.wants_slopes:
        # Whoever differentiates a call that did not look like it, as torch.func does of what it has wrapped.
        raise NotImplementedError(
            "attention: backend 'cuda' gives no gradient of alibi_slopes; name another one (backend='triton')"
        )
    dlse = None if given.dlse is None else given.dlse.contiguous()
    gradients = _op("attention_backward")(
        _aligned(given.dout), dlse, _aligned(given.out), given.lse.contiguous(), *_arguments(call)
    )
    return (*gradients, None, None, None)


def _arguments(call: AttentionCall) -> tuple[Any, ...]:
    slopes = None if call.alibi_slopes is None else call.alibi_slopes.float()
    return (
        _aligned(call.q), _aligned(call.k), _aligned(call.v), slopes, call.cu_seqlens_q, call.cu_seqlens_k, call.softmax_scale,
        call.causal, *call.window, call.softcap,
    )  # fmt: skip


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = (q.shape[1], q.shape[0]) if q.ndim == 3 else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse, dtype=torch.float32)


def _fake_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


extension.register_fake("attention_forward", _fake_forward)
extension.register_fake("attention_backward", _fake_backward)

BACKEND = Backend(
    "cuda",
    unless_empty(padded(_forward)),
    (
        Limit("float32 and float64", _not_16_bit),
        head_dim_limit("q", "v"),
        *map(_has, ("mask", "bias", "key_padding_mask", "block_mask", "sinks")),
        Limit("dropout_p", _drops_out),
        Limit("gradient of alibi_slopes", _trains_slopes),
        Limit("rows that are not 16-byte aligned", _has_unaligned_rows),
    ),
    plan=_plan,
)
