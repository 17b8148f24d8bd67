"""Decode attention by ``scaled_dot_product_attention``: the path of machines without a GPU.

This is the inner loop of text generation on a CPU, so nothing is copied that lies contiguous: sequences of one length are one call on a
view of the cache, others one call each, and the queries that share a key head become rows of one matrix instead of repeating the keys.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.attention.by_torch import SCORE_LIMITS
from pytransformer.ops.attention.by_torch import attend as attend_whole
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.backend import Backend, Limit, Outputs
from pytransformer.ops.cache_checks import QUANTISED_DTYPES
from pytransformer.ops.decode_attention.call import DecodeCall, first_visible_key

_LIMITS = (
    *SCORE_LIMITS,
    Limit(
        "anything on a GPU",
        lambda call: (
            "the lengths in cache_seqlens cannot be read back from the GPU without synchronising"
            if call.q.is_cuda
            else None
        ),
    ),
)


def attend(call: DecodeCall) -> Tensor:
    """Output of a checked call within the limits; contiguous, in q's dtype."""
    lengths = call.cache_seqlens.tolist()
    if _is_one_rectangle(call, lengths):
        first = first_visible_key(call, 0, lengths[0])
        keys = slice(first, lengths[0])
        return _attend_plain(call, call.q, call.k_cache[:, keys], call.v_cache[:, keys])
    out = call.q.new_empty((*call.q.shape[:-1], call.v_cache.shape[-1]))
    starts = None if call.cu_seqlens_q is None else call.cu_seqlens_q.tolist()
    for sequence, length in enumerate(lengths):
        rows = slice(sequence, sequence + 1) if starts is None else slice(starts[sequence], starts[sequence + 1])
        q = call.q[rows] if starts is None else call.q[rows][None]
        result = _attend_one(call, q, sequence, length)
        out[rows] = result if starts is None else result[0]
    return out


def _is_one_rectangle(call: DecodeCall, lengths: list[int]) -> bool:
    """Whether all sequences are one slice of the cache and every query sees all of it."""
    if (
        call.q.ndim != 4
        or call.q.shape[1] != 1
        or call.k_cache.dtype in QUANTISED_DTYPES
        or not lengths
        or lengths[0] == 0
    ):
        return False
    if (
        call.block_table is not None
        or call.cache_batch_idx is not None
        or call.cache_leftpad is not None
        or call.mask is not None
        or call.bias is not None
        or call.alibi_slopes is not None
    ):
        return False
    return lengths.count(lengths[0]) == len(lengths)


def _attend_plain(call: DecodeCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query per sequence over keys that it sees all: (batch, 1, num_heads, value_dim)."""
    batch, _, num_heads, head_dim = q.shape
    num_kv_heads, value_dim = v.shape[-2:]
    if head_dim != value_dim:
        # On a CPU the fused kernel wants one head_dim; zero features change no product.
        width = max(head_dim, value_dim)
        q, k, v = (F.pad(tensor, (0, width - tensor.shape[-1])) for tensor in (q, k, v))
    grouped = q.reshape(batch, num_kv_heads, num_heads // num_kv_heads, q.shape[-1])
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), scale=call.softmax_scale)
    return out[..., :value_dim].reshape(batch, 1, num_heads, value_dim)


def _attend_one(call: DecodeCall, q: Tensor, sequence: int, length: int) -> Tensor:
    """One sequence with every option: q (1, seqlen_q, num_heads, head_dim)."""
    seqlen_q = q.shape[1]
    first = first_visible_key(call, sequence, length)
    if seqlen_q == 0 or first == length:
        return q.new_zeros((*q.shape[:-1], call.v_cache.shape[-1]))
    k = _keys(call, call.k_cache, call.k_scale, sequence, first, length)
    v = _keys(call, call.v_cache, call.v_scale, sequence, first, length)
    slopes = call.alibi_slopes
    attention_call = AttentionCall(
        q,
        k,
        v,
        causal=call.causal,
        window=call.window,
        softmax_scale=call.softmax_scale,
        mask=_part(call.mask, sequence, seqlen_q, first, length),
        bias=_part(call.bias, sequence, seqlen_q, first, length),
        alibi_slopes=slopes[sequence] if slopes is not None and slopes.ndim == 2 else slopes,
    )
    return attend_whole(attention_call)


def _part(tensor: Tensor | None, sequence: int, seqlen_q: int, first: int, length: int) -> Tensor | None:
    """A sequence's part of a mask or bias, for the keys from ``first`` on."""
    if tensor is None:
        return None
    part = tensor[sequence : sequence + 1] if tensor.shape[0] > 1 else tensor
    return part[:, :, :seqlen_q, first:length] if tensor.shape[3] > 1 else part[:, :, :seqlen_q]


def _keys(call: DecodeCall, cache: Tensor, scale: Tensor | None, sequence: int, first: int, length: int) -> Tensor:
    """Keys (or values) ``first .. length - 1`` of a sequence: (1, keys, num_kv_heads, dim) in q's dtype, a view where possible."""
    leftpad = 0 if call.cache_leftpad is None else int(call.cache_leftpad[sequence])
    slots = slice(leftpad + first, leftpad + length)
    per_token = scale is not None and scale.ndim > 1
    if call.block_table is not None:
        page_size = cache.shape[1]
        first_page = slots.start // page_size
        pages = call.block_table[sequence, first_page : -(-slots.stop // page_size)].long()
        within = slice(slots.start - first_page * page_size, slots.stop - first_page * page_size)
        # Indexing is not defined on float8, but on its bytes.
        rows = cache.view(torch.uint8)[pages].view(cache.dtype) if cache.dtype == torch.float8_e4m3fn else cache[pages]
        found = rows.flatten(0, 1)[within]
        scale = scale[pages].flatten(0, 1)[within] if scale is not None and per_token else scale
    else:
        row = sequence if call.cache_batch_idx is None else int(call.cache_batch_idx[sequence])
        found = cache[row, slots]
        scale = scale[row, slots] if scale is not None and per_token else scale
    if scale is not None:
        wide = torch.promote_types(call.q.dtype, torch.float32)
        found = (found.to(wide) * scale.to(wide)[..., None]).to(call.q.dtype)
    return found[None]


def _torch(call: DecodeCall) -> Outputs:
    return attend(call).contiguous(), None


def _reference(call: DecodeCall) -> Outputs:
    """The reference in at least float32, rounded once at the end."""
    wide = torch.promote_types(call.q.dtype, torch.float32)
    options = {name: getattr(call, name) for name in _REFERENCE_OPTIONS}
    for name in ("k_cache", "v_cache", "bias") if call.k_scale is None else ("bias",):
        options[name] = None if options[name] is None else options[name].to(wide)
    result = reference.decode_attention(call.q.to(wide), **options, return_lse=True)
    assert isinstance(result, tuple)
    return result[0].to(call.q.dtype).contiguous(), result[1].contiguous()


_REFERENCE_OPTIONS = tuple(
    name for name in DecodeCall._fields if name not in ("q", "max_seqlen_q", "num_splits", "return_lse")
)


_NUM_TENSORS = DecodeCall._fields.index("max_seqlen_q")


def _plan(call: DecodeCall) -> Callable[[DecodeCall], Tensor] | None:
    # Where the lengths are read anyway, all that a kept launch spares is the checks.
    options = call[_NUM_TENSORS:]
    return lambda given: attend(DecodeCall(*given[:_NUM_TENSORS], *options)).contiguous()  # type: ignore[arg-type]


BACKEND = Backend("torch", _torch, _LIMITS, plan=_plan)
REFERENCE = Backend("reference", _reference)
