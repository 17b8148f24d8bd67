"""Attention by torch's own functions: the path of machines without a GPU, and of what Triton leaves.

``torch.nn.functional.scaled_dot_product_attention`` serves the calls that it can serve in linear memory, and differentiates itself.
Whatever hides a key or is added to a score goes into one ``attn_mask``, built at the smallest shape that broadcasts, while that is small. A
row with nothing to attend to is first allowed to see everything and then erased, so that no fused kernel's own idea of softmax over nothing
(NaN in some) reaches the output or the gradient. All other calls go over tiles (tiled.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.attention import tiled
from pytransformer.ops.attention.call import AttentionCall, batch_size, is_empty, is_packed, unless_empty
from pytransformer.ops.backend import PLAIN_TYPES, Backend, Outputs, functorch_level
from pytransformer.ops.checks import readable
from pytransformer.ops.registered import autograd_inside_an_op
from pytransformer.ops.score_checks import four_dims

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
# Up to so many entries an attn_mask for scaled_dot_product_attention is built: 16 MB of float32, 2048 queries and keys.
_LARGEST_MASK = 2**22


def serves_by_sdpa(call: AttentionCall, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether scaled_dot_product_attention computes sequences of up to these lengths, rightly and in linear memory."""
    if _needs_tiles(call):
        return False
    if _wants_gradient(call.bias) or _wants_gradient(call.alibi_slopes):
        # It would take the way that keeps all scores.
        return False
    if call.q.is_cuda and not _serves_on_a_gpu(call):
        return False
    left, right = _effective_window(call, seqlen_q, seqlen_k)
    if seqlen_q > 1 and left >= 0 and right >= 0 and max(512, 2 * (left + right + 1)) < seqlen_k:
        # It computes what the window hides; tiles skip that.
        return False
    return _is_causal_alone(call, seqlen_q, seqlen_k) or _mask_size(call, seqlen_q, seqlen_k) <= _LARGEST_MASK


def _needs_tiles(call: AttentionCall) -> bool:
    """Whether there is something that it does not have, whatever the lengths."""
    if call.softcap > 0 or call.sinks is not None or call.dropout_p > 0 or call.return_lse:
        return True
    if call.block_mask is not None:
        # It would compute what is not listed.
        return True
    # Its kernel for CPUs writes -inf before it multiplies by the scale.
    return call.causal and call.softmax_scale <= 0


def _wants_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _serves_on_a_gpu(call: AttentionCall) -> bool:
    """Its kernels are deterministic by torch.use_deterministic_algorithms(True) only, and round what is added to 16-bit scores."""
    if call.deterministic and not torch.are_deterministic_algorithms_enabled():
        return False
    if call.q.dtype not in SIXTEEN_BIT:
        return True
    return call.alibi_slopes is None and (call.bias is None or call.bias.dtype == call.q.dtype)


def _mask_size(call: AttentionCall, seqlen_q: int, seqlen_k: int) -> int:
    """Entries of the attn_mask, which broadcasts."""
    left, right = _effective_window(call, seqlen_q, seqlen_k)
    parts = [four_dims(part) for part in (call.mask, call.bias) if part is not None]
    sizes = [max([1] + [part.shape[axis] for part in parts]) for axis in range(4)]
    if left >= 0 or right >= 0 or call.alibi_slopes is not None:
        sizes[2:] = seqlen_q, seqlen_k
    if call.alibi_slopes is not None:
        sizes[1] = call.q.shape[-2]
    if call.key_padding_mask is not None or (call.alibi_slopes is not None and call.alibi_slopes.ndim == 2):
        sizes[0] = batch_size(call)
    return math.prod(sizes)


def _is_causal_alone(call: AttentionCall, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether causality, which is_causal says without an attn_mask, is all that hides a key."""
    left, right = _effective_window(call, seqlen_q, seqlen_k)
    has_data = call.mask is not None or call.bias is not None or call.key_padding_mask is not None
    return left < 0 and right == 0 and seqlen_q == seqlen_k and not has_data and call.alibi_slopes is None


def attend(call: AttentionCall) -> Outputs:
    """(out, lse) of a checked call; lse is None where scaled_dot_product_attention serves, and autograd then sees through."""
    if not _is_transparent(call):
        return _tiled(call)
    if not is_packed(call):
        return attend_by_sdpa(call), None
    outputs = []
    for one, *_ in _sequences(call):
        if one.q.shape[1] > 0:
            outputs.append(_zeros(call, one) if one.k.shape[1] == 0 else attend_by_sdpa(one)[0])
    return torch.cat(outputs), None


def _sequences(call: AttentionCall) -> Iterator[tuple[AttentionCall, slice, slice]]:
    """Each packed sequence as a dense call, and where it lies among queries and keys. The lengths are read, which waits for a GPU."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    rows_per_block, cols_per_block = call.block_size
    for sequence in range(batch_size(call)):
        rows_q = slice(starts_q[sequence], starts_q[sequence + 1])
        rows_k = slice(starts_k[sequence], starts_k[sequence + 1])
        seqlen_q, seqlen_k = rows_q.stop - rows_q.start, rows_k.stop - rows_k.start
        padding = call.key_padding_mask
        one = call._replace(
            q=call.q[rows_q][None],
            k=call.k[rows_k][None],
            v=call.v[rows_k][None],
            mask=_part(call.mask, sequence, seqlen_q, seqlen_k),
            bias=_part(call.bias, sequence, seqlen_q, seqlen_k),
            key_padding_mask=None if padding is None else padding[sequence, None, :seqlen_k],
            block_mask=_part(call.block_mask, sequence, -(-seqlen_q // rows_per_block), -(-seqlen_k // cols_per_block)),
            alibi_slopes=_slopes_of(call.alibi_slopes, sequence),
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        yield one, rows_q, rows_k


def _tiled(call: AttentionCall) -> Outputs:
    """(out, lse) over tiles."""
    if not is_packed(call):
        return tiled.attend(call)
    out = call.q.new_empty((*call.q.shape[:-1], call.v.shape[-1]))
    wide = torch.promote_types(call.q.dtype, torch.float32)
    lse = torch.empty((call.q.shape[1], call.q.shape[0]), dtype=wide, device=call.q.device)
    for sequence, (one, rows, _) in enumerate(_sequences(call)):
        if one.q.shape[1] > 0:
            out_one, lse_one = tiled.attend(one, sequence)
            out[rows], lse[:, rows] = out_one[0], lse_one[0]
    return out, lse


def _zeros(call: AttentionCall, one: AttentionCall) -> Tensor:
    """The output of queries without keys: a function of every input still, so that there are gradients, of 0."""
    anchor = call.q[:0].sum() + call.k[:0].sum() + call.v[:0].sum()
    return call.q.new_zeros(one.q.shape[1], call.q.shape[1], call.v.shape[-1]) + anchor


def _part(tensor: Tensor | None, sequence: int, seqlen_q: int, seqlen_k: int) -> Tensor | None:
    """One sequence's part of a mask or bias in local indices, (1, heads or 1, rows or 1, columns or 1)."""
    if tensor is None:
        return None
    tensor = four_dims(tensor)
    index = sequence if tensor.shape[0] > 1 else 0
    return tensor[index, None, :, :seqlen_q, :seqlen_k]


def _slopes_of(alibi_slopes: Tensor | None, sequence: int) -> Tensor | None:
    return alibi_slopes[sequence] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes


def attend_by_sdpa(call: AttentionCall) -> Tensor:
    """The output of dense sequences by scaled_dot_product_attention; see ``serves_by_sdpa``."""
    seqlen_q, seqlen_k = call.q.shape[1], call.k.shape[1]
    if _is_causal_alone(call, seqlen_q, seqlen_k):
        return _sdpa(call, None, is_causal=True)
    left, right = _effective_window(call, seqlen_q, seqlen_k)
    visible = _visible(call, left, right)
    if call.bias is None and call.alibi_slopes is None:
        if visible is None:
            return _sdpa(call, None)
        # Rows that a window leaves empty are the first ones, and only of more queries than keys: no need to look at values.
        has_data = call.mask is not None or call.key_padding_mask is not None
        may_be_empty = has_data or (right >= 0 and seqlen_q - seqlen_k > right)
        if not may_be_empty:
            return _sdpa(call, visible)
        empty = ~visible.any(dim=-1, keepdim=True)
        return _erase(_sdpa(call, visible | empty), empty)
    attn_mask = _added_scores(call, visible)
    empty = (attn_mask == -math.inf).all(dim=-1, keepdim=True)
    return _erase(_sdpa(call, attn_mask.masked_fill(empty, 0.0)), empty)


def _effective_window(call: AttentionCall, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """(left, right) with causality folded in, -1 where no score is cut."""
    left, right = call.window
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
        parts.append(four_dims(call.mask))
    if call.key_padding_mask is not None:
        parts.append(call.key_padding_mask[:, None, None, :])
    visible = None
    for part in parts:
        visible = part if visible is None else visible & part
    return visible if visible is None else four_dims(visible)


def _distance(call: AttentionCall) -> Tensor:
    seqlen_q, seqlen_k = call.q.shape[1], call.k.shape[1]
    rows, cols = (torch.arange(n, dtype=torch.int32, device=call.q.device) for n in (seqlen_q, seqlen_k))
    return (rows + (seqlen_k - seqlen_q))[:, None] - cols


def _added_scores(call: AttentionCall, visible: Tensor | None) -> Tensor:
    """bias + ALiBi, -inf where hidden, in the dtype scaled_dot_product_attention takes beside q: q's or float32."""
    added = None if call.bias is None else four_dims(call.bias)
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
    width, value_width = _widths(call)
    q, k, v = (
        tensor if tensor.shape[-1] == wanted else F.pad(tensor, (0, wanted - tensor.shape[-1]))
        for tensor, wanted in ((q, width), (k, width), (v, value_width))
    )
    enable_gqa = False
    if q.shape[1] != k.shape[1]:
        is_flash = attn_mask is None and q.dtype in SIXTEEN_BIT and width == value_width <= 256
        if q.is_cuda and not is_flash:
            # On a GPU only that kernel shares key heads; the others get copies, or they would materialise scores.
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
        else:
            enable_gqa = True
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=call.softmax_scale, enable_gqa=enable_gqa
    )
    value_dim = call.v.shape[-1]
    return (out if value_dim == value_width else out[..., :value_dim]).transpose(1, 2)


def _widths(call: AttentionCall) -> tuple[int, int]:
    """The head_dims that the fused kernels want, or the score matrix would be materialised; features of value 0 change no product."""
    head_dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    if not call.q.is_cuda:
        # One for all, of any size.
        return (max(head_dim, value_dim),) * 2
    # Those for GPUs read 16 bytes at once.
    return head_dim + -head_dim % 8, value_dim + -value_dim % 8


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


def reference_backward(given: Any, call: AttentionCall) -> Sequence[Tensor | None]:
    """(dq, dk, dv, dbias, dsinks, dslopes) of :data:`REFERENCE`."""
    return _gradients_by_autograd(_reference, given, call)


def _gradients_by_autograd(
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


def gives_lse(call: AttentionCall) -> bool:
    """Whether :data:`REGISTERED` returns lse: of packed sequences, whose lengths decide what serves, only where tiles do anyway."""
    return not is_packed(call) or _needs_tiles(call)


def _registered(call: AttentionCall) -> Outputs:
    return _tiled(call) if gives_lse(call) else (attend(call)[0], None)


def backward(given: Any, call: AttentionCall) -> Sequence[Tensor | None]:
    """(dq, dk, dv, dbias, dsinks, dslopes) of :data:`REGISTERED`."""
    if not gives_lse(call):
        if _is_transparent(call) and not (given.wants_bias or given.wants_slopes):
            return _gradients_by_autograd(attend, given, call)
        out, lse = _tiled(call)
        given = given._replace(out=out, lse=lse)
    if is_packed(call):
        found = _packed_gradients(given, call)
    else:
        found = tiled.backward(given, call)
    like = (call.q, call.k, call.v, call.bias, call.sinks, call.alibi_slopes)
    return [
        None if gradient is None else gradient.to(tensor.dtype)  # type: ignore[union-attr]
        for gradient, tensor in zip(found, like)
    ]


def _packed_gradients(given: Any, call: AttentionCall) -> tiled.Gradients:
    gradients = tiled.no_gradients(given, call)
    for sequence, (one, rows_q, rows_k) in enumerate(_sequences(call)):
        if one.q.shape[1] == 0:
            continue
        of_one = given._replace(
            dout=given.dout[rows_q][None],
            out=given.out[rows_q][None],
            lse=given.lse[None, :, rows_q],
            dlse=None if given.dlse is None else given.dlse[None, :, rows_q],
        )
        dq, dk, dv, dbias, dsinks, dslopes = tiled.backward(of_one, one, sequence)
        gradients.q[rows_q], gradients.k[rows_k], gradients.v[rows_k] = dq[0], dk[0], dv[0]
        if gradients.bias is not None and dbias is not None:
            where = _part(gradients.bias, sequence, *(slice_.stop - slice_.start for slice_ in (rows_q, rows_k)))
            assert where is not None
            where += dbias
        if gradients.sinks is not None and dsinks is not None:
            gradients.sinks.add_(dsinks)
        if gradients.alibi_slopes is not None and dslopes is not None:
            slopes = _slopes_of(gradients.alibi_slopes, sequence)
            assert slopes is not None
            slopes += dslopes
    return gradients


def _is_transparent(call: AttentionCall) -> bool:
    """Whether scaled_dot_product_attention serves. Neither tracers nor torch.func can read cu_seqlens; on meta there is nothing to read."""
    if is_empty(call):
        return False
    if not is_packed(call):
        return serves_by_sdpa(call, call.q.shape[1], call.k.shape[1])
    starts = call.cu_seqlens_q
    if (
        torch.compiler.is_compiling()
        or functorch_level() is not None
        or type(starts) not in PLAIN_TYPES
        or call.q.is_meta
    ):
        return False
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()  # type: ignore[union-attr]
    lengths = zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k))
    return all(
        serves_by_sdpa(call, stop_q - start_q, stop_k - start_k) for (start_q, stop_q), (start_k, stop_k) in lengths
    )


def _reference_is_transparent(call: AttentionCall) -> bool:
    # The tracer need not see the reference, which hides behind the registered op.
    return not is_empty(call) and not torch.compiler.is_compiling()


BACKEND = Backend("torch", unless_empty(attend), is_transparent=_is_transparent)
# In what is registered autograd does not see through: it gives lse for its backward pass.
REGISTERED = Backend("torch", unless_empty(_registered))
REFERENCE = Backend("reference", unless_empty(_reference), is_transparent=_reference_is_transparent)
