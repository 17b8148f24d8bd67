"""Attention in plain PyTorch: the specification that every attention kernel is compared with.

    scores  = softcap(q kᵀ · softmax_scale) + bias + alibi            (−inf where the query may not see the key)
    output  = dropout(softmax(scores)) v

Sources: Vaswani et al. 2017 (attention); Ainslie et al. 2023 (GQA); Press et al. 2022 (ALiBi); Gemma 2 (softcap);
Xiao et al. 2023 and gpt-oss (attention sinks); Beltagy et al. 2020 (sliding window); Child et al. 2019 (block-sparse attention).

Everything is computed in the dtype of the inputs, with two exceptions that every plain implementation makes: the scores
of 16-bit inputs are widened to float32 for the softmax, and lse is float32. float64 inputs stay float64 throughout.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .philox import draw_dropout_seed, dropout_keep


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    block_mask: Tensor | None = None,
    block_size: int | tuple[int, int] = 64,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v with every option, written out.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with ``cu_seqlens_q``.
        k: (batch, seqlen_k, num_kv_heads, head_dim) or (total_k, num_kv_heads, head_dim). num_kv_heads divides num_heads:
            query head h reads key head ``h // (num_heads // num_kv_heads)``.
        v: like k, with a head_dim of its own.
        causal: query i sees key j only if d >= 0, where ``d = i + seqlen_k - seqlen_q - j`` is the distance back to the key
            (bottom-right alignment: the last query sees every key).
        window: (left, right), inclusive, -1 = unlimited: -right <= d <= left.
        softmax_scale: 1 / sqrt(head_dim) if None.
        softcap: c > 0 replaces a scaled score s by c · tanh(s / c).
        mask: boolean (True = attend) or integer (nonzero = attend), broadcast to (batch, num_heads, seqlen_q, seqlen_k). A hidden
            value has weight 0, and 0 · NaN is NaN: what is hidden must be finite, as with torch's own function.
        bias: floating, same broadcasting, added to the scores; -inf hides, any finite number is just a number.
        key_padding_mask: (batch, seqlen_k), True = attend. Does not shift the causal alignment.
        block_mask: (batch or 1, num_heads or 1, blocks of queries, blocks of keys), True = attend: a mask with one element for each block
            of scores. Block (I, J) is the queries from I · block_size and the keys from J · block_size on, counted in the tensors
            whatever their lengths; the last ones may be short.
        block_size: queries and keys in a block, or (queries, keys).
        alibi_slopes: (num_heads) or (batch, num_heads); -slope · |d| is added to the scores.
        sinks: (num_heads), a logit that joins each row's denominator but brings no value.
        dropout_p: probability that a weight is dropped; the kept ones are divided by 1 - p. See philox.py for which.
        dropout_seed: int, int64[2] tensor (seed, offset), or None: drawn from torch's generator.
        cu_seqlens_q, cu_seqlens_k: int32 (batch + 1), starts of the packed sequences; both or neither. Then mask and bias are
            (batch, heads, max_q, max_k), key_padding_mask (batch, max_k) and block_mask (batch, heads, blocks of max_q, blocks of max_k),
            indexed from the start of each sequence.
        max_seqlen_q, max_seqlen_k: hints for kernels, unused here.
        return_lse: return lse as well.

    Returns:
        (batch, seqlen_q, num_heads, v's head_dim) or (total_q, num_heads, v's head_dim), in q's dtype; with ``return_lse`` also
        the natural log of each row's softmax denominator, sinks included and dropout not: (batch, num_heads, seqlen_q), packed
        (num_heads, total_q), float32 (float64 for float64 inputs), differentiable. A row that may see no key gives output 0,
        gradient 0 and lse -inf (or the sink's logit where there are sinks, the denominator being exp(sink)).

    Raises:
        TypeError: a floating-point mask (additive masks are passed as ``bias``, those of ones and zeros as ``mask.bool()``).
        ValueError: only one of cu_seqlens_q and cu_seqlens_k is given.
    """
    _refuse_floating_mask("mask", mask)
    _refuse_floating_mask("key_padding_mask", key_padding_mask)
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must be given together")
    if dropout_p > 0 and dropout_seed is None:
        dropout_seed = draw_dropout_seed(q.device)

    packed = cu_seqlens_q is not None
    num_sequences = len(cu_seqlens_q) - 1 if cu_seqlens_q is not None else q.shape[0]
    results = []
    for sequence in range(num_sequences):
        rows_q, rows_k = _rows(sequence, cu_seqlens_q), _rows(sequence, cu_seqlens_k)
        seqlen_q, seqlen_k = len(q[rows_q]), len(k[rows_k])
        distance = _distance(seqlen_q, seqlen_k, q.device)
        visible = (
            _inside_window(distance, causal, window)
            & (True if mask is None else _local_part(mask, sequence, seqlen_q, seqlen_k) != 0)
            & (True if key_padding_mask is None else key_padding_mask[sequence, :seqlen_k] != 0)
            & (
                True
                if block_mask is None
                else _local_part(_written_out(block_mask, block_size), sequence, seqlen_q, seqlen_k)
            )
        )
        results.append(
            _attend_one_sequence(
                q[rows_q],
                k[rows_k],
                v[rows_k],
                visible,
                distance,
                softmax_scale=softmax_scale,
                softcap=softcap,
                bias=None if bias is None else _local_part(bias, sequence, seqlen_q, seqlen_k),
                alibi_slopes=_slopes_of(alibi_slopes, sequence),
                sinks=sinks,
                keep=None
                if dropout_seed is None or dropout_p == 0
                else dropout_keep(dropout_p, dropout_seed, sequence, q.shape[-2], seqlen_q, seqlen_k, q.device),
                dropout_p=dropout_p,
            )
        )
    output, lse = _assemble(results, q, v, packed)
    return (output, lse) if return_lse else output


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    block_table: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    softmax_scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries per sequence over keys and values that lie in a cache.

    For each sequence: collect its keys from the cache, then attend as in :func:`attention`. The newest key is the last one,
    so query t of seqlen_q sits at position ``cache_seqlens - seqlen_q + t`` among them.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), or packed (total_q, num_heads, head_dim) with ``cu_seqlens_q``.
        k_cache: (batch, capacity, num_kv_heads, head_dim), or (pages, page_size, num_kv_heads, head_dim) with ``block_table``.
            Any floating dtype, or int8 / float8_e4m3fn with ``k_scale``.
        v_cache: like k_cache, with a head_dim of its own.
        cache_seqlens: int32 (batch), the number of keys to attend to, the newest included.
        block_table: int32 (batch, max_pages): key p of sequence b is at ``cache[block_table[b, p // page_size], p % page_size]``.
            Entries whose keys no query sees by ``causal`` and ``window``, and those behind the last key, may hold anything; so may
            what lies in the cache there.
        cache_batch_idx: int32 (batch), the cache row of each sequence; its own index if None. Contiguous caches only.
        cache_leftpad: int32 (batch), slots to skip at the beginning: the keys lie at leftpad … leftpad + cache_seqlens - 1.
        k_scale, v_scale: float32 multipliers of quantised caches, (num_kv_heads) or per token ``cache.shape[:-1]``.
        mask, bias: broadcast to (batch, num_heads, max seqlen_q, max cache_seqlens), indexed from each sequence's first key.
        max_seqlen_q, num_splits: hints for kernels, unused here.
        Others: as in :func:`attention`.

    Returns:
        Like :func:`attention`: output in q's shape and dtype (v's head_dim), and lse with ``return_lse``.

    Raises:
        TypeError: a floating-point mask.
        IndexError: a key that is seen lies outside of the cache: past its end, or in a row or page that does not exist.
    """
    _refuse_floating_mask("mask", mask)
    num_sequences = len(cache_seqlens)
    results = []
    for sequence in range(num_sequences):
        q_new = q[_rows(sequence, cu_seqlens_q)]
        num_keys = int(cache_seqlens[sequence])
        distance = _distance(len(q_new), num_keys, q.device)
        visible = _inside_window(distance, causal, window)
        # What no query sees may lie anywhere: pages before the window may have been freed.
        seen = visible.any(dim=0)
        positions = seen.nonzero().flatten() + (0 if cache_leftpad is None else int(cache_leftpad[sequence]))
        if block_table is not None:
            page_size = k_cache.shape[1]
            places = block_table[sequence, positions // page_size].long(), positions % page_size
        else:
            cache_row = sequence if cache_batch_idx is None else int(cache_batch_idx[sequence])
            places = torch.full_like(positions, cache_row), positions
        _refuse_outside(places, k_cache)
        if mask is not None:
            visible = visible & (_local_part(mask, sequence, len(q_new), num_keys) != 0)
        results.append(
            _attend_one_sequence(
                q_new,
                _from_cache(k_cache, k_scale, places, seen, q.dtype),
                _from_cache(v_cache, v_scale, places, seen, q.dtype),
                visible,
                distance,
                softmax_scale=softmax_scale,
                softcap=softcap,
                bias=None if bias is None else _local_part(bias, sequence, len(q_new), num_keys),
                alibi_slopes=_slopes_of(alibi_slopes, sequence),
                sinks=sinks,
            )
        )
    output, lse = _assemble(results, q, v_cache, packed=cu_seqlens_q is not None)
    return (output, lse) if return_lse else output


def standard_alibi_slopes(num_heads: int) -> Tensor:
    """The slopes of Press et al. 2022: 2^(-8/n), 2^(-16/n), …, 2^-8 for n heads, n a power of 2. float32 (num_heads).

    For other n, as in the paper's code: the slopes for the power of 2 below n, then every other slope of the power above.
    """
    power_below = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power_below) for head in range(power_below)]
    slopes += [2 ** (-8 * (head + 0.5) / power_below) for head in range(num_heads - power_below)]
    return torch.tensor(slopes)


def _attend_one_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    distance: Tensor,
    *,
    softmax_scale: float | None,
    softcap: float,
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(seqlen_q, num_heads, v's head_dim) and lse (num_heads, seqlen_q) for q, k, v of shape (seqlen, heads, head_dim)."""
    num_heads, head_dim = q.shape[-2:]
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    q_heads = q.transpose(0, 1)  # (num_heads, seqlen_q, head_dim)
    k_heads = k.transpose(0, 1).repeat_interleave(num_heads // k.shape[-2], dim=0)
    v_heads = v.transpose(0, 1).repeat_interleave(num_heads // v.shape[-2], dim=0)

    scores = q_heads @ k_heads.transpose(-1, -2) * scale  # (num_heads, seqlen_q, seqlen_k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[:, None, None] * distance.abs()
    scores = scores.masked_fill(~visible, -math.inf)

    weights, lse = _softmax(scores, sinks)
    if keep is not None:
        weights = weights * keep / (1 - dropout_p) if dropout_p < 1 else torch.zeros_like(weights)
    output = weights.to(v.dtype) @ v_heads
    return output.transpose(0, 1), lse


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax over the keys and log of its denominator, where a row of nothing but -inf gives 0 and -inf, with gradient 0.

    The sink is one more column that takes part in the denominator and is then left out.
    """
    num_keys = scores.shape[-1]
    if sinks is not None:
        sink_column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[-2], 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    # exp(-inf - (-inf)) is NaN, also in the backward pass: an empty row is first made harmless, then erased.
    scores = scores.masked_fill(empty, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty.squeeze(-1), -math.inf)
    return weights[..., :num_keys], lse


def _distance(seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
    """d = i + seqlen_k - seqlen_q - j: how far key j lies behind query i. int64 (seqlen_q, seqlen_k)."""
    position_q = torch.arange(seqlen_q, device=device) + seqlen_k - seqlen_q
    return position_q[:, None] - torch.arange(seqlen_k, device=device)[None, :]


def _inside_window(distance: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """True where the causal condition and the window let the query see the key."""
    left, right = window
    visible = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        visible = visible & (distance >= 0)
    if left >= 0:
        visible = visible & (distance <= left)
    if right >= 0:
        visible = visible & (distance >= -right)
    return visible


def _refuse_floating_mask(name: str, mask: Tensor | None) -> None:
    if mask is not None and (mask.is_floating_point() or mask.is_complex()):
        additive = "an additive mask as bias" if name == "mask" else f"an additive one as bias={name}[:, None, None, :]"
        raise TypeError(
            f"{name} must be boolean or integer, got {mask.dtype}; pass {additive} (0 = attend, -inf = hide), "
            f"and one of ones and zeros (1 = attend, 0 = hide) as {name}.bool()"
        )


def _written_out(block_mask: Tensor, block_size: int | tuple[int, int]) -> Tensor:
    """An element for each score in place of one for each block."""
    rows, cols = (block_size, block_size) if isinstance(block_size, int) else block_size
    return (block_mask != 0).repeat_interleave(rows, dim=-2).repeat_interleave(cols, dim=-1)


def _rows(sequence: int, cu_seqlens: Tensor | None) -> int | slice:
    """Where a sequence lies along the first dimension: its row of a batch, or its slice of a packed tensor."""
    if cu_seqlens is None:
        return sequence
    return slice(int(cu_seqlens[sequence]), int(cu_seqlens[sequence + 1]))


def _local_part(tensor: Tensor, sequence: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """One sequence's part of a mask or bias that broadcasts to (batch, num_heads, seqlen_q, seqlen_k)."""
    tensor = tensor.reshape((1,) * (4 - tensor.dim()) + tensor.shape)
    return tensor[sequence if len(tensor) > 1 else 0, :, :seqlen_q, :seqlen_k]


def _slopes_of(alibi_slopes: Tensor | None, sequence: int) -> Tensor | None:
    return alibi_slopes[sequence] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes


def _refuse_outside(places: tuple[Tensor, Tensor], cache: Tensor) -> None:
    """A negative index would be counted from the end."""
    for name, index, size in zip(("page or row", "slot"), places, cache.shape):
        if bool(((index < 0) | (index >= size)).any()):
            raise IndexError(f"{name} must be from 0 to {size - 1}, got {index[(index < 0) | (index >= size)][0]}")


def _from_cache(
    cache: Tensor, scale: Tensor | None, places: tuple[Tensor, Tensor], seen: Tensor, dtype: torch.dtype
) -> Tensor:
    """Keys or values at ``cache[places]``, multiplied by their scales, for the keys that are seen; 0 for the others.

    (seqlen_k, num_kv_heads, head_dim) in ``dtype``.
    """
    if cache.dtype == torch.float8_e4m3fn:  # indexing is defined on its bytes only
        entries = cache.view(torch.uint8)[places].view(cache.dtype)
    else:
        entries = cache[places]
    if scale is not None:
        wide = torch.promote_types(dtype, torch.float32)
        entries = entries.to(wide) * (scale if scale.dim() == 1 else scale[places]).to(wide)[..., None]
    keys = torch.zeros(len(seen), *cache.shape[2:], dtype=dtype, device=cache.device)
    keys[seen] = entries.to(dtype)
    return keys


def _assemble(results: list[tuple[Tensor, Tensor]], q: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """The sequences' outputs and lse in the layout of q. Rows of a packed q that belong to no sequence give 0 and -inf."""
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    if not packed:
        if not results:
            return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(0, q.shape[2], q.shape[1], dtype=lse_dtype)
        outputs, lses = zip(*results, strict=True)
        return torch.stack(outputs), torch.stack(lses)
    rows_left = q.shape[0] - sum(len(output) for output, _ in results)
    no_output = q.new_zeros(rows_left, q.shape[1], v.shape[-1])
    no_lse = q.new_full((q.shape[1], rows_left), -math.inf, dtype=lse_dtype)
    output = torch.cat([output for output, _ in results] + [no_output], dim=0)
    return output, torch.cat([lse for _, lse in results] + [no_lse], dim=1)
