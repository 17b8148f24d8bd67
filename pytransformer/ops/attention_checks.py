"""The host-side checks of attention: every argument, before anything is launched, each error naming what was given and what is allowed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks

INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MASK_DTYPES = (torch.bool, *INTEGER_DTYPES)
DENSE_LAYOUT = "(batch, seqlen, num_heads, head_dim)"
PACKED_LAYOUT = "(total_tokens, num_heads, head_dim)"


class AttentionCall(NamedTuple):
    """The arguments of one attention call after the checks: q, k, v of one dtype, masks boolean, softmax_scale a number."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softmax_scale: float = 1.0
    softcap: float = 0.0
    mask: Tensor | None = None
    bias: Tensor | None = None
    key_padding_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int | Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    deterministic: bool | None = None
    return_lse: bool = False


# Functions rather than properties: the tracer of torch 2.10 follows no property of a NamedTuple.
def is_packed(call: AttentionCall) -> bool:
    """Whether q, k, v are packed sequences."""
    return call.cu_seqlens_q is not None


def batch_size(call: AttentionCall) -> int:
    """The number of sequences, dense or packed."""
    return call.q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1


def is_empty(call: AttentionCall) -> bool:
    """Whether there is no query or no key at all."""
    return call.q.shape[0] == 0 or call.q.shape[-3] == 0 or call.k.shape[-3] == 0


def tensors_of(call: AttentionCall) -> tuple[Tensor, ...]:
    """All tensors of the call."""
    return tuple(value for value in call if isinstance(value, Tensor))


def check_attention(call: AttentionCall, softmax_scale: float | None) -> AttentionCall:
    """Checks a call as the user gave it and returns it normalised; see ``attention`` for the errors.

    Under autocast q, k and v are cast to the autocast dtype first, as torch's own attention does.
    """
    call = _check_qkv(call)
    call = _check_score_terms(call)
    return call._replace(
        causal=checks.check_bool("causal", call.causal),
        window=checks.check_window("window", call.window),
        softmax_scale=_scale(softmax_scale, call.q.shape[-1]),
        softcap=checks.check_float("softcap", call.softcap, minimum=0.0),
        dropout_p=checks.check_float("dropout_p", call.dropout_p, minimum=0.0, maximum=1.0),
        dropout_seed=_dropout_seed(call.dropout_seed, call.q.device),
        deterministic=None if call.deterministic is None else checks.check_bool("deterministic", call.deterministic),
        return_lse=checks.check_bool("return_lse", call.return_lse),
    )


def _check_qkv(call: AttentionCall) -> AttentionCall:
    if (call.cu_seqlens_q is None) != (call.cu_seqlens_k is None):
        given, missing = ("q", "k") if call.cu_seqlens_k is None else ("k", "q")
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k go together: cu_seqlens_{given} is given, cu_seqlens_{missing} is None"
        )
    rank, layout = (3, PACKED_LAYOUT) if is_packed(call) else (4, DENSE_LAYOUT)
    allowed = checks.FLOAT_DTYPES_AND_DOUBLE
    q = checks.check_tensor("q", call.q, ndim=rank, dtypes=allowed, layout=layout)
    k = checks.check_tensor("k", call.k, ndim=rank, dtypes=allowed, device=q.device, layout=layout)
    v = checks.check_tensor("v", call.v, ndim=rank, dtypes=allowed, device=q.device, layout=layout)
    q, k, v = (autocast_to_lower(tensor) for tensor in (q, k, v))
    checks.check_same_dtype("k", k, "q", q)
    checks.check_same_dtype("v", v, "q", q)
    head_dim = q.shape[-1]
    if is_packed(call):
        checks.check_shape("k", k, (None, None, head_dim), "(total_k, num_kv_heads, head_dim of q)")
        checks.check_shape("v", v, (*k.shape[:2], None), "(total_k, num_kv_heads, value head_dim)")
    else:
        checks.check_shape("k", k, (q.shape[0], None, None, head_dim), "(batch, seqlen_k, num_kv_heads, head_dim of q)")
        checks.check_shape("v", v, (*k.shape[:3], None), "(batch, seqlen_k, num_kv_heads, value head_dim)")
    if q.shape[-2] == 0:
        raise ValueError(f"q must have at least one head, got shape {tuple(q.shape)}")
    checks.check_gqa(q.shape[-2], k.shape[-2])
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.check_head_dim(name, tensor.shape[-1])
        checks.check_last_dim_contiguous(name, tensor)
    call = call._replace(q=q, k=k, v=v)
    _check_packing(call)
    return call


def _check_packing(call: AttentionCall) -> None:
    for side, tokens, cu_seqlens, hint in (
        ("q", call.q, call.cu_seqlens_q, call.max_seqlen_q),
        ("k", call.k, call.cu_seqlens_k, call.max_seqlen_k),
    ):
        if cu_seqlens is not None:
            batch = None if side == "q" else batch_size(call)
            checks.check_cu_seqlens(f"cu_seqlens_{side}", cu_seqlens, tokens.shape[0], call.q.device, batch)
        if hint is None:
            continue
        checks.check_int(f"max_seqlen_{side}", hint, minimum=0)
        if cu_seqlens is None:
            raise ValueError(
                f"max_seqlen_{side} is for packed sequences: pass cu_seqlens_{side} too, got {hint} without it"
            )
        longest = _longest(cu_seqlens)
        if longest is not None and hint < longest:
            raise ValueError(f"max_seqlen_{side} must be at least the longest sequence ({longest}), got {hint}")


def _longest(cu_seqlens: Tensor | None) -> int | None:
    """Length of the longest packed sequence, where it may be read."""
    if cu_seqlens is None or not checks.readable(cu_seqlens):
        return None
    starts = cu_seqlens.tolist()
    return max((end - start for start, end in itertools.pairwise(starts)), default=0)


def _check_score_terms(call: AttentionCall) -> AttentionCall:
    """mask, bias, key_padding_mask, alibi_slopes, sinks; integer masks become boolean."""
    device, num_heads, batch = call.q.device, call.q.shape[-2], batch_size(call)
    mask, padding = call.mask, call.key_padding_mask
    if mask is not None:
        mask = _check_mask("mask", mask, "pass an additive mask as bias", device)
        _check_score_shape("mask", mask, call)
    if call.bias is not None:
        if isinstance(call.bias, Tensor) and call.bias.dtype in MASK_DTYPES:
            raise TypeError(
                f"bias must be floating-point, got {checks.short(call.bias.dtype)}; pass a boolean mask as mask"
            )
        _check_float_term("bias", call.bias, call.q, None)
        _check_score_shape("bias", call.bias, call)
    if padding is not None:
        padding = _check_mask("key_padding_mask", padding, "True = attend", device, ndim=2)
        _check_padding_shape(padding, call)
    if call.alibi_slopes is not None:
        slopes = _check_float_term("alibi_slopes", call.alibi_slopes, call.q, (1, 2))
        if slopes.ndim == 1:
            checks.check_shape("alibi_slopes", slopes, (num_heads,), "(num_heads)")
        else:
            checks.check_shape("alibi_slopes", slopes, (batch, num_heads), "(batch, num_heads)")
    if call.sinks is not None:
        sinks = _check_float_term("sinks", call.sinks, call.q, (1,))
        checks.check_shape("sinks", sinks, (num_heads,), "(num_heads)")
    return call._replace(mask=mask, key_padding_mask=padding)


def _check_mask(name: str, value: Any, advice: str, device: torch.device, ndim: int | None = None) -> Tensor:
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        raise TypeError(f"{name} must be boolean or integer, got {checks.short(value.dtype)}; {advice}")
    mask = checks.check_tensor(name, value, ndim=ndim, dtypes=MASK_DTYPES, device=device, layout="(batch, seqlen_k)")
    return mask if mask.dtype == torch.bool else mask != 0


def _check_float_term(name: str, value: Any, q: Tensor, ndim: Sequence[int] | None) -> Tensor:
    # float64 belongs to golden results: beside float32 queries it would widen the scores on one backend and not on another.
    dtypes = checks.FLOAT_DTYPES_AND_DOUBLE if q.dtype == torch.float64 else checks.FLOAT_DTYPES
    layout = "(num_heads) or (batch, num_heads)" if ndim == (1, 2) else "(num_heads)"
    return checks.check_tensor(name, value, ndim=ndim, dtypes=dtypes, device=q.device, layout=layout)


def _check_score_shape(name: str, tensor: Tensor, call: AttentionCall) -> None:
    """Broadcasts to (batch, num_heads, seqlen_q, seqlen_k); packed: rows and columns reach the longest sequence."""
    num_heads = call.q.shape[-2]
    if not is_packed(call):
        target = (batch_size(call), num_heads, call.q.shape[1], call.k.shape[1])
        checks.check_broadcastable(name, tensor, target, "(batch, num_heads, seqlen_q, seqlen_k)")
        return
    sizes = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    fits = len(sizes) == 4 and sizes[0] in (1, batch_size(call)) and sizes[1] in (1, num_heads)
    limits = _packed_limits(call)
    if not fits or not _reaches(sizes[2], limits[0]) or not _reaches(sizes[3], limits[1]):
        shown = ", ".join("any" if limit is None else f"at least {limit}" for limit in limits)
        raise ValueError(
            f"{name} of packed sequences must broadcast to (batch, num_heads, max_seqlen_q, max_seqlen_k) = "
            f"({batch_size(call)}, {num_heads}, {shown}), got shape {tuple(tensor.shape)}"
        )


def _check_padding_shape(padding: Tensor, call: AttentionCall) -> None:
    if not is_packed(call):
        checks.check_shape("key_padding_mask", padding, (batch_size(call), call.k.shape[1]), "(batch, seqlen_k)")
        return
    limit = _packed_limits(call)[1]
    if padding.shape[0] != batch_size(call) or (limit is not None and padding.shape[1] < limit):
        least = "any" if limit is None else f"at least {limit}"
        raise ValueError(
            f"key_padding_mask of packed sequences must have shape (batch, max_seqlen_k) = ({batch_size(call)}, {least}), "
            f"got {tuple(padding.shape)}"
        )


def _packed_limits(call: AttentionCall) -> tuple[int | None, int | None]:
    """What the longest sequences need: known where cu_seqlens may be read, else from the hints."""
    longest_q, longest_k = _longest(call.cu_seqlens_q), _longest(call.cu_seqlens_k)
    return (
        call.max_seqlen_q if longest_q is None else longest_q,
        call.max_seqlen_k if longest_k is None else longest_k,
    )


def _reaches(size: int, limit: int | None) -> bool:
    return size == 1 or limit is None or size >= limit


def _scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    return checks.check_float("softmax_scale", softmax_scale)


def _dropout_seed(value: Any, device: torch.device) -> int | Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        seed = checks.check_tensor("dropout_seed", value, ndim=1, dtypes=(torch.int64,), device=device, layout="(2)")
        checks.check_shape("dropout_seed", seed, (2,), "(seed, offset)")
        return seed
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(
            f"dropout_seed must be an int, an int64 tensor (seed, offset) or None, got {checks.describe(value)}"
        )
    return checks.check_int("dropout_seed", value, minimum=-(2**63), maximum=2**64 - 1)


def is_autocasting(device_type: str) -> bool:
    """Whether autocast is on for a kind of device (some, like "meta", have none to ask about)."""
    return device_type in ("cuda", "cpu") and torch.is_autocast_enabled(device_type)


def autocast_to_lower(tensor: Tensor) -> Tensor:
    """The tensor in autocast's dtype where autocast is on; float64 is left alone, as torch leaves it."""
    if not is_autocasting(tensor.device.type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))
