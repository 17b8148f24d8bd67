"""A call of attention, and the checks of every argument on the host, each error naming what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer.ops import checks
from pytransformer.ops.backend import Outputs
from pytransformer.ops.precision import autocast_to_lower
from pytransformer.ops.score_checks import (
    Extent,
    Scores,
    check_length_hint,
    check_mask,
    check_score_terms,
    check_softmax_scale,
    longest,
    shown,
)

DENSE_LAYOUT = "(batch, seqlen, num_heads, head_dim)"
PACKED_LAYOUT = "(total_tokens, num_heads, head_dim)"
BLOCK_LAYOUT = "(batch or 1, num_heads or 1, blocks of queries, blocks of keys)"
# Tiles of the kernels, which divide a block, have at least so many rows: the least that the tensor cores take.
BLOCK_MULTIPLE = 16
_ADDITIVE_PADDING = "pass an additive one as bias=key_padding_mask[:, None, None, :]"


class AttentionCall(NamedTuple):
    """The arguments of one call. Checked: q, k, v of one dtype, masks boolean, dropout_seed a tensor, softmax_scale a number, block_size a
    pair."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    key_padding_mask: Tensor | None = None
    block_mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_seed: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    softmax_scale: float = 1.0
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    return_lse: bool = False
    block_size: tuple[int, int] = (64, 64)


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


def unless_empty(run: Callable[[AttentionCall], Outputs]) -> Callable[[AttentionCall], Outputs]:
    """``run`` for calls that have queries and keys; the others need no kernel."""
    return lambda call: _of_nothing(call) if is_empty(call) else run(call)


def _of_nothing(call: AttentionCall) -> Outputs:
    """Without keys each row is empty: out is 0; lse is -inf, or the sink's logit, which alone is in the denominator."""
    q = call.q
    out = q.new_zeros((*q.shape[:-1], call.v.shape[-1]))
    shape = (q.shape[1], q.shape[0]) if is_packed(call) else (q.shape[0], q.shape[2], q.shape[1])
    lse = torch.full(shape, -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if call.sinks is not None and lse.numel() > 0:
        lse.copy_(call.sinks.to(lse.dtype)[:, None].expand(lse.shape))
    return out, lse


def check_attention(call: AttentionCall) -> AttentionCall:
    """Checks a call as the user gave it and returns it normalised; see ``attention`` for the errors.

    Under autocast q, k and v are cast to the autocast dtype first, as torch's own attention does.
    """
    call = _check_qkv(call)
    call = check_score_terms(call, _scores(call))
    if call.key_padding_mask is not None:
        padding = check_mask("key_padding_mask", call.key_padding_mask, call.q, _ADDITIVE_PADDING, ndim=2)
        _check_padding_shape(padding, call)
        call = call._replace(key_padding_mask=padding)
    call = _check_blocks(call)
    deterministic = call.deterministic
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    dropout_p = checks.check_float("dropout_p", call.dropout_p, minimum=0.0, maximum=1.0)
    return call._replace(
        causal=checks.check_bool("causal", call.causal),
        window=checks.check_window("window", call.window),
        softmax_scale=check_softmax_scale(call.softmax_scale, call.q.shape[-1]),
        softcap=checks.check_float("softcap", call.softcap, minimum=0.0),
        dropout_p=dropout_p,
        deterministic=checks.check_bool("deterministic", deterministic),
        return_lse=checks.check_bool("return_lse", call.return_lse),
        dropout_seed=_dropout_seed(call.dropout_seed, call.q.device, dropout_p > 0.0),
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
    return _check_packing(call)


def _check_packing(call: AttentionCall) -> AttentionCall:
    hints = {}
    for side, tokens, cu_seqlens, hint in (
        ("q", call.q, call.cu_seqlens_q, call.max_seqlen_q),
        ("k", call.k, call.cu_seqlens_k, call.max_seqlen_k),
    ):
        if cu_seqlens is not None:
            batch = None if side == "q" else batch_size(call)
            checks.check_cu_seqlens(f"cu_seqlens_{side}", cu_seqlens, tokens.shape[0], call.q.device, batch)
        hints[f"max_seqlen_{side}"] = check_length_hint(side, hint, cu_seqlens, "sequences")
    return call._replace(**hints)  # type: ignore[arg-type]


def _scores(call: AttentionCall) -> Scores:
    """Packed: rows and columns reach the longest sequence, known where cu_seqlens may be read, else from the hints."""
    batch, num_heads = batch_size(call), call.q.shape[-2]
    if not is_packed(call):
        return Scores(batch, num_heads, Extent(call.q.shape[1]), Extent(call.k.shape[1]))
    rows, cols = longest(call.cu_seqlens_q), longest(call.cu_seqlens_k)
    rows, cols = call.max_seqlen_q if rows is None else rows, call.max_seqlen_k if cols is None else cols
    layout = "(batch, num_heads, max_seqlen_q, max_seqlen_k)"
    return Scores(batch, num_heads, Extent(rows, True), Extent(cols, True), layout, " of packed sequences")


def _check_padding_shape(padding: Tensor, call: AttentionCall) -> None:
    if not is_packed(call):
        checks.check_shape("key_padding_mask", padding, (batch_size(call), call.k.shape[1]), "(batch, seqlen_k)")
        return
    limit = _scores(call).cols.size
    if padding.shape[0] != batch_size(call) or (limit is not None and padding.shape[1] < limit):
        least = "any" if limit is None else f"at least {limit}"
        raise ValueError(
            f"key_padding_mask of packed sequences must have shape (batch, max_seqlen_k) = ({batch_size(call)}, {least}), "
            f"got {tuple(padding.shape)}"
        )


def _check_blocks(call: AttentionCall) -> AttentionCall:
    call = call._replace(block_size=check_block_size(call.block_size))
    if call.block_mask is None:
        return call
    blocks = check_mask(
        "block_mask", call.block_mask, call.q, "pass an additive mask, of scores, as bias", ndim=4, layout=BLOCK_LAYOUT
    )
    scores = _scores(call)
    extents = [num_blocks(extent, size) for extent, size in zip((scores.rows, scores.cols), call.block_size)]
    fits = blocks.shape[0] in (1, scores.batch) and blocks.shape[1] in (1, scores.num_heads)
    if not fits or not all(map(_is_covered, blocks.shape[2:], extents)):
        wanted = ", ".join([f"{scores.batch} or 1", f"{scores.num_heads} or 1", *map(shown, extents)])
        rows, cols = call.block_size
        raise ValueError(
            f"block_mask{scores.what} must have shape {BLOCK_LAYOUT} = ({wanted}) for blocks of {rows} queries and {cols} keys, "
            f"got {tuple(blocks.shape)}"
        )
    return call._replace(block_mask=blocks)


def check_block_size(value: Any) -> tuple[int, int]:
    """``block_size`` as (queries, keys)."""
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sizes) != 2:
        raise TypeError(f"block_size must be an int or a pair (queries, keys) of ints, got {checks.describe(value)}")
    rows, cols = (checks.check_int("block_size", size, minimum=BLOCK_MULTIPLE) for size in sizes)
    if rows % BLOCK_MULTIPLE or cols % BLOCK_MULTIPLE:
        raise ValueError(f"block_size must be a multiple of {BLOCK_MULTIPLE}, got {value}")
    return rows, cols


def num_blocks(extent: Extent, size: int) -> Extent:
    """How many blocks of this size cover an extent; the last one may be short."""
    return extent if extent.size is None else extent._replace(size=-(-extent.size // size))


def _is_covered(size: int, extent: Extent) -> bool:
    """Unlike a mask's, a dimension of blocks does not broadcast: 1 would be read as one block."""
    return extent.size is None or (size >= extent.size if extent.is_least else size == extent.size)


def _dropout_seed(value: Any, device: torch.device, is_needed: bool) -> Tensor | None:
    """(seed, offset), int64 on the device, or None without dropout; made without synchronising."""
    if isinstance(value, Tensor):
        seed = checks.check_tensor("dropout_seed", value, ndim=1, dtypes=(torch.int64,), device=device, layout="(2)")
        checks.check_shape("dropout_seed", seed, (2,), "(seed, offset)")
        return seed if is_needed else None
    if value is not None:
        if isinstance(value, (bool, float, str, tuple, list)):
            raise TypeError(
                f"dropout_seed must be an int, an int64 tensor (seed, offset) or None, got {checks.describe(value)}"
            )
        value = checks.check_int("dropout_seed", value, minimum=-(2**63), maximum=2**64 - 1)
    if not is_needed:
        return None
    if value is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    signed: Any = (value + 2**63) % 2**64 - 2**63
    return torch.stack(
        (torch.full((), signed, dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device))
    )
