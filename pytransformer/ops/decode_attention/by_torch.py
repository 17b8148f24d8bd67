"""Decode attention by torch's own functions: the path of machines without a GPU.

The lengths are read, which on a GPU waits for it. One query per sequence without terms of its own is the step of text generation: pages and
codes of all sequences are gathered and widened at once, and neighbours of one length are one call of scaled_dot_product_attention, where
the query heads that share a key head become rows of one matrix instead of repeating the keys. A sequence's bits do not depend on its
neighbours: each is a problem of its own in such a call, and none is padded. All else is computed one sequence after another, by
scaled_dot_product_attention if it can serve, else over tiles of keys that are taken from the cache, and dequantised, one tile at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.attention import tiled
from pytransformer.ops.attention.by_torch import attend_by_sdpa, serves_by_sdpa
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.attention.tiles import Problem
from pytransformer.ops.backend import Backend, Outputs
from pytransformer.ops.decode_attention.call import DecodeCall, first_visible_key
from pytransformer.ops.decode_attention.gather import Span, gather, widen

# Keys that are gathered at once, in elements: 64 MB of float32, and as many values. One sequence may have more.
_MOST_GATHERED = 2**24


def attend(call: DecodeCall) -> tuple[Tensor, Tensor | None]:
    """(out, lse) of a checked call, contiguous; lse is None unless ``call.return_lse``."""
    lengths = call.cache_seqlens.tolist()
    if _is_plain(call):
        return _attend_single_queries(call, lengths), None
    out, lse = _outputs(call)
    starts = None if call.cu_seqlens_q is None else call.cu_seqlens_q.tolist()
    for sequence, length in enumerate(lengths):
        where = sequence if starts is None else slice(starts[sequence], starts[sequence + 1])
        out_one, lse_one = _attend_one(call, call.q[where][None], sequence, length)
        out[where] = out_one[0]
        if lse is not None and lse_one is not None:
            lse[where if starts is None else (slice(None), where)] = lse_one[0]
    return out, lse


def _outputs(call: DecodeCall) -> tuple[Tensor, Tensor | None]:
    q = call.q
    out = q.new_empty((*q.shape[:-1], call.v_cache.shape[-1]))
    if not call.return_lse:
        return out, None
    shape = (q.shape[1], q.shape[0]) if call.cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
    return out, torch.empty(shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)


def _is_plain(call: DecodeCall) -> bool:
    """Whether each sequence has one query, which sees all keys from some place on, and nothing but its products with them."""
    if call.q.ndim != 4 or call.q.shape[1] != 1 or call.return_lse or call.softcap > 0:
        return False
    return call.mask is None and call.bias is None and call.alibi_slopes is None and call.sinks is None


def _attend_single_queries(call: DecodeCall, lengths: list[int]) -> Tensor:
    """The result of a call that :func:`_is_plain`."""
    spans = [(first_visible_key(call, sequence, length), length) for sequence, length in enumerate(lengths)]
    if call.block_table is call.k_scale is call.cache_batch_idx is call.cache_leftpad is None:
        return _attend_runs(call, 0, spans, call.k_cache, call.v_cache)
    longest = max((last - first for first, last in spans), default=0)
    if longest == 0:
        return _outputs(call)[0].zero_()
    step = max(1, _MOST_GATHERED // (longest * call.k_cache.shape[2] * call.k_cache.shape[3]))
    parts = []
    for start in range(0, len(spans), step):
        some = spans[start : start + step]
        parts.append(_attend_runs(call, start, [(0, last - first) for first, last in some], *gather(call, start, some)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _attend_runs(call: DecodeCall, start: int, spans: list[Span], k: Tensor, v: Tensor) -> Tensor:
    """The sequences from ``start`` on over their keys in k and v, whose row 0 is the first one's; a run of one span is one call."""
    q = call.q[start : start + len(spans)]
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    for (first, last), run in itertools.groupby(range(len(spans)), spans.__getitem__):
        places = list(run)
        rows = slice(places[0], places[-1] + 1)
        if first < last:
            out[rows] = _attend_plain(call, q[rows], k[rows, first:last], v[rows, first:last])
        else:
            out[rows] = 0
    return out


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


def _attend_one(call: DecodeCall, q: Tensor, sequence: int, length: int) -> tuple[Tensor, Tensor | None]:
    """One sequence with every option: q (1, seqlen_q, num_heads, head_dim)."""
    seqlen_q, num_kv_heads, value_dim = q.shape[1], *call.v_cache.shape[-2:]
    first = first_visible_key(call, sequence, length)
    slopes = call.alibi_slopes
    none = q.new_empty((1, 0, num_kv_heads, q.shape[-1]))
    attention_call = AttentionCall(
        q,
        none,
        none,
        causal=call.causal,
        window=call.window,
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        mask=_part(call.mask, sequence, seqlen_q, first, length),
        bias=_part(call.bias, sequence, seqlen_q, first, length),
        alibi_slopes=slopes[sequence] if slopes is not None and slopes.ndim == 2 else slopes,
        sinks=call.sinks,
        return_lse=call.return_lse,
    )
    if seqlen_q > 0 and first < length and serves_by_sdpa(attention_call, seqlen_q, length - first):
        k = _keys(call, call.k_cache, call.k_scale, sequence, first, length)
        v = _keys(call, call.v_cache, call.v_scale, sequence, first, length)
        return attend_by_sdpa(attention_call._replace(k=k, v=v)), None
    problem = Problem(attention_call, length - first, num_kv_heads)

    def keys(_: slice, cols: slice) -> tuple[Tensor, Tensor]:
        places = sequence, first + cols.start, first + cols.stop
        k = _keys(call, call.k_cache, call.k_scale, *places)
        v = _keys(call, call.v_cache, call.v_scale, *places)
        return problem.heads_first(k), problem.heads_first(v)

    return tiled.attend_keys(problem, keys, value_dim)


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
    return (found if scale is None else widen(found, scale, call.q.dtype))[None]


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


def _plan(call: DecodeCall) -> Callable[[DecodeCall], Tensor | Outputs] | None:
    # Where the lengths are read anyway, all that a kept launch spares is the checks.
    options = call[_NUM_TENSORS:]
    if call.return_lse:
        return lambda given: attend(DecodeCall(*given[:_NUM_TENSORS], *options))  # type: ignore[arg-type]
    return lambda given: attend(DecodeCall(*given[:_NUM_TENSORS], *options))[0]  # type: ignore[arg-type]


BACKEND = Backend("torch", attend, plan=_plan)
REFERENCE = Backend("reference", _reference)
