"""Attention by the CUDA extension: tensor cores of sm_80 and newer, float16 and bfloat16, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.ops.attention_checks import AttentionCall
from pytransformer.ops.backend import is_plain
from pytransformer.ops.checks import short

LIMITS = "float32, float64, mask, bias, key_padding_mask, sinks, dropout_p, rows that are not 16-byte aligned"


def why_not(call: AttentionCall) -> str | None:
    """What of this call the CUDA kernels cannot do, or ``None``."""
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernels take float16 and bfloat16, got {short(call.q.dtype)}"
    for name in ("mask", "bias", "key_padding_mask", "sinks"):
        if getattr(call, name) is not None:
            return f"the kernels have no {name}"
    if call.dropout_p > 0:
        return "the kernels have no dropout (dropout_p > 0)"
    # What is being traced has no address yet; rows that turn out not to be aligned are copied then.
    if is_plain(call.q, call.k, call.v):
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


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """(out, lse) of a checked call that :func:`why_not` has nothing against."""
    out, lse = _op("attention_forward")(*_arguments(call))
    return out, lse


def backward(
    call: AttentionCall, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, None, None), contiguous, with the same bits each run."""
    if dlse is not None:
        dlse = dlse.contiguous()
    dq, dk, dv = _op("attention_backward")(_aligned(dout), dlse, _aligned(out), lse.contiguous(), *_arguments(call))
    return dq, dk, dv, None, None


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
