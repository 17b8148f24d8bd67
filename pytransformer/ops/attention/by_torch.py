"""Attention by ``torch.nn.functional.scaled_dot_product_attention``: the path of machines without a GPU, and of options Triton lacks.

Its gradient is torch's own. Everything that hides a key or is added to a score goes into one ``attn_mask``, built at the smallest shape
that broadcasts. A row with nothing to attend to is first allowed to see everything and then erased, so that no fused kernel's own idea of
softmax over nothing (NaN in some) reaches the output or the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.attention.call import AttentionCall, batch_size, is_empty, is_packed, unless_empty
from pytransformer.ops.backend import Backend, Limit, Outputs
from pytransformer.ops.checks import readable, short
from pytransformer.ops.registered import autograd_inside_an_op

SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def _is_packed_on_a_gpu(call: AttentionCall) -> str | None:
    if call.q.is_cuda and is_packed(call):
        return "the lengths in cu_seqlens cannot be read back from the GPU without synchronising"
    return None


def _must_be_deterministic_on_a_gpu(call: AttentionCall) -> str | None:
    if call.q.is_cuda and call.deterministic and not torch.are_deterministic_algorithms_enabled():
        return "scaled_dot_product_attention is deterministic by torch.use_deterministic_algorithms(True) only"
    return None


def _would_round_on_a_gpu(call: AttentionCall) -> str | None:
    if not call.q.is_cuda or call.q.dtype not in SIXTEEN_BIT:
        return None
    if call.alibi_slopes is not None:
        return f"its fused kernels would round alibi_slopes' bias to q's dtype ({short(call.q.dtype)})"
    if call.bias is not None and call.bias.dtype != call.q.dtype:
        return f"its fused kernels take a bias of q's dtype ({short(call.q.dtype)}) only, got {short(call.bias.dtype)}"
    return None


# Of decode attention too.
SCORE_LIMITS = (
    Limit("softcap", lambda call: "scaled_dot_product_attention has no softcap" if call.softcap > 0 else None),
    Limit("sinks", lambda call: None if call.sinks is None else "scaled_dot_product_attention has no sinks"),
    Limit(
        "return_lse",
        lambda call: "scaled_dot_product_attention does not return lse (return_lse=True)" if call.return_lse else None,
    ),
)
_LIMITS = (
    *SCORE_LIMITS,
    Limit(
        "dropout_p",
        lambda call: (
            "scaled_dot_product_attention's dropout (dropout_p > 0) cannot reproduce the mask of dropout_seed"
            if call.dropout_p > 0
            else None
        ),
    ),
    Limit("packed sequences on a GPU", _is_packed_on_a_gpu),
    Limit("deterministic on a GPU", _must_be_deterministic_on_a_gpu),
    Limit("16-bit alibi_slopes or a bias of another dtype on a GPU", _would_round_on_a_gpu),
)


def attend(call: AttentionCall) -> Tensor:
    """Output of a checked call within the limits, differentiable by autograd."""
    return _attend_packed(call) if is_packed(call) else _attend_dense(call)


def _attend_packed(call: AttentionCall) -> Tensor:
    """One sequence after another; the lengths are read, which costs nothing on a CPU."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    outputs = []
    for sequence in range(batch_size(call)):
        rows_q = slice(starts_q[sequence], starts_q[sequence + 1])
        rows_k = slice(starts_k[sequence], starts_k[sequence + 1])
        seqlen_q, seqlen_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        if seqlen_q == 0:
            continue
        if seqlen_k == 0:
            outputs.append(_zeros(call, seqlen_q))
            continue
        one = call._replace(
            q=call.q[rows_q][None],
            k=call.k[rows_k][None],
            v=call.v[rows_k][None],
            mask=_part(call.mask, sequence, seqlen_q, seqlen_k),
            bias=_part(call.bias, sequence, seqlen_q, seqlen_k),
            key_padding_mask=None
            if call.key_padding_mask is None
            else call.key_padding_mask[sequence, None, :seqlen_k],
            alibi_slopes=_slopes_of(call.alibi_slopes, sequence),
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        outputs.append(_attend_dense(one)[0])
    return torch.cat(outputs)


def _zeros(call: AttentionCall, seqlen_q: int) -> Tensor:
    """The output of queries without keys: a function of every input still, so that there are gradients, of 0."""
    anchor = call.q[:0].sum() + call.k[:0].sum() + call.v[:0].sum()
    return call.q.new_zeros(seqlen_q, call.q.shape[1], call.v.shape[-1]) + anchor


def _part(tensor: Tensor | None, sequence: int, seqlen_q: int, seqlen_k: int) -> Tensor | None:
    """One sequence's part of a mask or bias in local indices, (1, heads or 1, rows or 1, columns or 1)."""
    if tensor is None:
        return None
    tensor = _four_dims(tensor)
    index = sequence if tensor.shape[0] > 1 else 0
    return tensor[index, None, :, :seqlen_q, :seqlen_k]


def _slopes_of(alibi_slopes: Tensor | None, sequence: int) -> Tensor | None:
    return alibi_slopes[sequence] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes


def _four_dims(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))


def _attend_dense(call: AttentionCall) -> Tensor:
    seqlen_q, seqlen_k = call.q.shape[1], call.k.shape[1]
    left, right = _effective_window(call)
    has_data = call.mask is not None or call.bias is not None or call.key_padding_mask is not None
    if left < 0 and right == 0 and seqlen_q == seqlen_k and not has_data and call.alibi_slopes is None:
        return _sdpa(call, None, is_causal=True)
    visible = _visible(call, left, right)
    if call.bias is None and call.alibi_slopes is None:
        if visible is None:
            return _sdpa(call, None)
        # Rows that a window leaves empty are the first ones, and only of more queries than keys: no need to look at values.
        may_be_empty = has_data or (right >= 0 and seqlen_q - seqlen_k > right)
        if not may_be_empty:
            return _sdpa(call, visible)
        empty = ~visible.any(dim=-1, keepdim=True)
        return _erase(_sdpa(call, visible | empty), empty)
    attn_mask = _added_scores(call, visible)
    empty = (attn_mask == -math.inf).all(dim=-1, keepdim=True)
    return _erase(_sdpa(call, attn_mask.masked_fill(empty, 0.0)), empty)


def _effective_window(call: AttentionCall) -> tuple[int, int]:
    """(left, right) with causality folded in, -1 where no score is cut."""
    left, right = call.window
    seqlen_q, seqlen_k = call.q.shape[1], call.k.shape[1]
    if left >= 0 and left >= seqlen_k - 1:
        left = -1
    if call.causal:
        right = 0
    # A single query stands at the last key: nothing lies to its right.
    return left, (-1 if right >= 0 and right >= seqlen_q - 1 else right)


def _visible(call: AttentionCall, left: int, right: int) -> Tensor | None:
    """Boolean, broadcastable to (batch, num_heads, seqlen_q, seqlen_k); None if everything is visible."""
    parts = []
    if left >= 0 or right >= 0:
        distance = _distance(call)
        if right >= 0:
            parts.append(distance >= -right)
        if left >= 0:
            parts.append(distance <= left)
    if call.mask is not None:
        parts.append(_four_dims(call.mask))
    if call.key_padding_mask is not None:
        parts.append(call.key_padding_mask[:, None, None, :])
    visible = None
    for part in parts:
        visible = part if visible is None else visible & part
    return visible if visible is None else _four_dims(visible)


def _distance(call: AttentionCall) -> Tensor:
    seqlen_q, seqlen_k = call.q.shape[1], call.k.shape[1]
    rows = torch.arange(seqlen_q, device=call.q.device) + (seqlen_k - seqlen_q)
    return rows[:, None] - torch.arange(seqlen_k, device=call.q.device)[None, :]


def _added_scores(call: AttentionCall, visible: Tensor | None) -> Tensor:
    """bias + ALiBi, -inf where hidden, in the dtype scaled_dot_product_attention takes beside q: q's or float32."""
    added = None if call.bias is None else _four_dims(call.bias)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.to(torch.promote_types(call.q.dtype, torch.float32))
        alibi = -slopes.reshape(-1, call.q.shape[2], 1, 1) * _distance(call).abs()
        added = alibi if added is None else added + alibi
    assert added is not None
    if added.dtype != call.q.dtype:
        added = added.to(torch.promote_types(call.q.dtype, torch.float32))
    return added if visible is None else added.masked_fill(~visible, -math.inf)


def _erase(out: Tensor, empty: Tensor) -> Tensor:
    """0 in the rows that see nothing, and therefore gradient 0 from them. ``empty``: (batch or 1, heads or 1, rows or 1, 1)."""
    if readable(empty) and not bool(empty.any()):
        return out
    return out.masked_fill(empty.transpose(1, 2), 0.0)


def _sdpa(call: AttentionCall, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor:
    q, k, v = call.q.transpose(1, 2), call.k.transpose(1, 2), call.v.transpose(1, 2)
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    # On a CPU the fused kernel wants one head_dim; without it the score matrix would be materialised. Zero features change no product.
    padded = head_dim != value_dim and not q.is_cuda
    if padded:
        width = max(head_dim, value_dim)
        q, k, v = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (q, k, v))
    enable_gqa = False
    if q.shape[1] != k.shape[1]:
        if q.is_cuda and (attn_mask is not None or q.dtype not in SIXTEEN_BIT):
            # On a GPU only the 16-bit kernel without a mask shares key heads; the others get copies, or they would materialise scores.
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        else:
            enable_gqa = True
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=call.softmax_scale, enable_gqa=enable_gqa
    )
    return (out[..., :value_dim] if padded else out).transpose(1, 2)


def _reference(call: AttentionCall) -> Outputs:
    """The reference in at least float32, rounded once at the end."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    q, k, v = call.q.to(wide), call.k.to(wide), call.v.to(wide)
    bias = None if call.bias is None else call.bias.to(wide)
    options = {name: getattr(call, name) for name in _REFERENCE_OPTIONS}
    result = reference.attention(q, k, v, bias=bias, **options, return_lse=True)
    assert isinstance(result, tuple)
    return result[0].to(call.q.dtype), result[1]


_NOT_OPTIONS = ("q", "k", "v", "bias", "max_seqlen_q", "max_seqlen_k", "deterministic", "return_lse")
_REFERENCE_OPTIONS = tuple(name for name in AttentionCall._fields if name not in _NOT_OPTIONS)


def _torch(call: AttentionCall) -> Outputs:
    return attend(call), None


def _gradients_by_recomputing(
    run: Callable[[AttentionCall], Outputs], given: Any, call: AttentionCall
) -> Sequence[Tensor | None]:
    """Gradients of torch's own functions, by running them again."""
    slopes = call.alibi_slopes if given.wants_slopes else None
    differentiable = (call.q, call.k, call.v, call.bias if given.wants_bias else None, call.sinks, slopes)
    inputs = [None if tensor is None else tensor.detach().requires_grad_() for tensor in differentiable]
    q, k, v, bias, sinks, slopes = inputs
    assert q is not None and k is not None and v is not None
    with autograd_inside_an_op():
        bias, slopes = call.bias if bias is None else bias, call.alibi_slopes if slopes is None else slopes
        out, lse = run(call._replace(q=q, k=k, v=v, bias=bias, sinks=sinks, alibi_slopes=slopes))
    outputs, gradients = ([out], [given.dout]) if given.dlse is None else ([out, lse], [given.dout, given.dlse])
    wanted = [tensor for tensor in inputs if tensor is not None]
    found = iter(torch.autograd.grad(outputs, wanted, gradients, materialize_grads=True))  # type: ignore[arg-type]
    return [None if tensor is None else next(found) for tensor in inputs]


def backward(given: Any, call: AttentionCall) -> Sequence[Tensor | None]:
    """(dq, dk, dv, dbias, dsinks, dslopes) of :data:`BACKEND`."""
    return _gradients_by_recomputing(_torch, given, call)


def reference_backward(given: Any, call: AttentionCall) -> Sequence[Tensor | None]:
    """(dq, dk, dv, dbias, dsinks, dslopes) of :data:`REFERENCE`."""
    return _gradients_by_recomputing(_reference, given, call)


# The tracer of torch.compile cannot read cu_seqlens, nor need it see the reference: there both hide behind the registered ops.


def _torch_is_transparent(call: AttentionCall) -> bool:
    return not is_empty(call) and not (torch.compiler.is_compiling() and is_packed(call))


def _reference_is_transparent(call: AttentionCall) -> bool:
    return not is_empty(call) and not torch.compiler.is_compiling()


BACKEND = Backend("torch", unless_empty(_torch), _LIMITS, is_transparent=_torch_is_transparent)
REFERENCE = Backend("reference", unless_empty(_reference), is_transparent=_reference_is_transparent)
