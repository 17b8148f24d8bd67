"""The contiguous KV cache: one preallocated tensor each for keys and values, filled per sequence from the left.

Size: 2 · num_layers · batch · capacity · num_kv_heads · head_dim elements. A cell is written before it is read, so the memory is not
cleared; what lies behind a sequence's length is never attended to.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.model.config import TransformerConfig
from pytransformer.nn import RMSNorm, RotaryEmbedding
from pytransformer.ops.attention import attention
from pytransformer.ops.decode_attention import decode_attention
from pytransformer.ops.kv_append import kv_append

from .part import CachePart, new_part, raw
from .sequence import SequenceCache, check_rows
from .sizes import predict_bytes, require_memory


class KVCache(SequenceCache):
    """Keys and values of every layer for ``batch`` sequences of up to ``capacity`` tokens, one preallocated tensor each.

    Args:
        config, batch, capacity, device: see :class:`SequenceCache`.
        dtype: of the model.
        quantised: ``None``, or "int8" or "fp8" (float8_e4m3fn): codes with a scale for each token and head, in float32.

    Raises:
        ValueError: sizes out of range; more memory than is free (:class:`NotEnoughMemory`).
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantised: str | None = None,
    ) -> None:
        super().__init__(config, batch, capacity, device=device)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        kind = "contiguous" if quantised is None else quantised
        require_memory(predict_bytes(kind, config, batch, capacity, dtype), self.lengths.device, f"the {kind} KV cache")
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        self.k_cache, self.v_cache, self.k_scale, self.v_scale = new_part(shape, device, dtype, quantised)
        self._spans: dict[tuple[int, int, bool], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self._layers = self._first_rows(batch)

    def _first_rows(self, batch: int) -> list[DirectLayer]:
        """Each layer's part, of so many sequences."""
        part = self.part.map(lambda tensor: tensor[:, :batch])
        return [
            DirectLayer(self, index, part.map(operator.itemgetter(index))) for index in range(self.config.num_layers)
        ]

    def spans(self, first: int, end: int, *, by_head: bool = False) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Keys and values of the places from ``first`` to before ``end``, layer by layer.

        (batch, tokens, num_kv_heads, head_dim) each, or ``by_head`` (batch, num_kv_heads, tokens, head_dim). Made for all layers at once
        and kept for as long as the lengths stay: one by one, views are a fifth of a step's calls.
        """
        key = first, end, by_head
        if key not in self._spans:
            parts = (tensor[:, : self.batch].narrow(2, first, end - first) for tensor in (self.k_cache, self.v_cache))
            k, v = ((part.transpose(2, 3) if by_head else part).unbind(0) for part in parts)
            self._spans[key] = k, v
        return self._spans[key]

    def _set_lengths(self, lengths: Tensor) -> None:
        super()._set_lengths(lengths)
        self._spans = {}

    @property
    def part(self) -> CachePart:
        """All of it: keys, values and their scales, (num_layers, batch, capacity, …) each."""
        return CachePart(self.k_cache, self.v_cache, self.k_scale, self.v_scale)

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values, and by their scales."""
        return self.part.nbytes

    def read_kind(self) -> tuple[torch.dtype, str | None]:
        """See :class:`SequenceCache`."""
        return self.k_cache.dtype, self.part.quantised

    def layer(self, index: int) -> ContiguousLayer:
        """The part of layer ``index``."""
        return self._layers[index]

    def choose_path(self, bound: bool) -> None:
        """Decides for the next step whether the layers write and read by plain slices, without the ops' checks and choices.

        They may where the step is ``bound`` (see bound.py) and all sequences have one length, known to the host.
        """
        bound = bound and self.k_scale is None
        self.is_direct = bound and self.lengths.tolist().count(self.max_length) == self.batch

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        """See :class:`SequenceCache`. Copied is what changes its place, from token ``shared`` on."""
        check_rows("rows", rows, self.batch, self.most)
        order: list[int] = rows.tolist()
        moves = [(row, place) for place, row in enumerate(order) if row != place]
        if moves and shared < self.max_length:
            sources, places = torch.tensor(moves, device=self.lengths.device).unbind(1)
            for tensor in self.part.tensors():
                used = raw(tensor)[:, :, shared : self.max_length]
                used.index_copy_(1, places, used.index_select(1, sources))
        self._set_lengths(self.lengths[rows.to(self.lengths.device)])
        if len(order) != self.batch:
            self.batch = len(order)
            self._layers = self._first_rows(self.batch)

    def write_prefix(self, part: CachePart, length: int) -> None:
        """See :class:`SequenceCache`."""
        for own, new in zip(self.part.tensors(), part.tensors()):
            raw(own)[:, : self.batch, :length] = raw(new)[:, None, :length].to(own.device)
        self.advance(length)

    def read_prefix(self, row: int, length: int) -> CachePart:
        """See :class:`SequenceCache`."""
        return self.part.map(lambda tensor: tensor[:, row, :length].clone())


class ContiguousLayer:
    """One layer's keys and values: (batch, capacity, num_kv_heads, head_dim) each."""

    def __init__(
        self,
        cache: SequenceCache,
        k_cache: Tensor,
        v_cache: Tensor,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        self._cache = cache
        self.k_cache = k_cache
        self.v_cache = v_cache
        self.scales: dict[str, Any] = {} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}

    def _table(self) -> dict[str, Any]:
        """Where the pages of the sequences are, if there are pages."""
        return {}

    def _read_table(self) -> dict[str, Any]:
        """The same for the new tokens' queries."""
        return self._table()

    def _before_writing(self, seqlen: int) -> None:
        """ValueError unless so many tokens fit."""
        self._cache.require(seqlen)

    def append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rotary: RotaryEmbedding | None,
        positions: Tensor | None,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
    ) -> Tensor:
        """See :class:`pytransformer.nn.LayerCache`; the norms, RoPE and the write are one op."""
        cache = self._cache
        self._before_writing(k.shape[1])
        if cache.is_direct:
            if q_norm is not None and k_norm is not None:
                q, k = q_norm(q), k_norm(k)
            if rotary is not None:
                offsets = cache.max_length if positions is None else 0
                q, k = rotary(q, k, positions=positions, offsets=offsets)
            self._write(k, v)
            return q
        changes_q = rotary is not None or q_norm is not None
        new_q = kv_append(
            k,
            v,
            self.k_cache,
            self.v_cache,
            cache_seqlens=cache.lengths,
            positions=positions if rotary is not None else None,
            q=q if changes_q else None,
            cos=None if rotary is None else rotary.cos,
            sin=None if rotary is None else rotary.sin,
            interleaved=rotary is not None and rotary.interleaved,
            q_norm_weight=None if q_norm is None else q_norm.weight,
            k_norm_weight=None if k_norm is None else k_norm.weight,
            norm_eps=1e-6 if k_norm is None or k_norm.eps is None else k_norm.eps,
            norm_weight_offset=0.0 if k_norm is None else k_norm.weight_offset,
            **self.scales,
            **self._table(),
        )
        return q if new_q is None else new_q

    def _write(self, k: Tensor, v: Tensor) -> None:
        """A direct step's new keys and values, normalised and rotated."""
        raise NotImplementedError

    def attend(
        self,
        q: Tensor,
        *,
        softmax_scale: float | None,
        window: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        bias: Tensor | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """See :class:`pytransformer.nn.LayerCache`."""
        cache, seqlen = self._cache, q.shape[1]
        table = self._read_table()
        if cache.max_length == 0 and not self.scales and not table:
            # Prefill: the new tokens are all there is, so this is ordinary causal attention. Padding on the right is seen by padding only.
            result = attention(
                q,
                self.k_cache[:, :seqlen],
                self.v_cache[:, :seqlen],
                causal=True,
                window=window,
                softmax_scale=softmax_scale,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
                bias=bias,
                sinks=sinks,
            )
        else:
            result = decode_attention(
                q,
                self.k_cache,
                self.v_cache,
                cache.attended(seqlen),
                causal=True,
                window=window,
                softmax_scale=softmax_scale,
                softcap=softcap,
                alibi_slopes=alibi_slopes,
                bias=bias,
                sinks=sinks,
                **self.scales,
                **table,
            )
        assert isinstance(result, Tensor)
        return result


class DirectLayer(ContiguousLayer):
    """One layer of a :class:`KVCache`, which a bound step writes and reads by plain slices (:meth:`KVCache.choose_path`)."""

    _cache: KVCache

    def __init__(self, cache: KVCache, index: int, part: CachePart) -> None:
        super().__init__(cache, *part)
        self._index = index

    def _write(self, k: Tensor, v: Tensor) -> None:
        start = self._cache.max_length
        keys, values = self._cache.spans(start, start + k.shape[1])
        keys[self._index].copy_(k)
        values[self._index].copy_(v)

    def attend(self, q: Tensor, **options: Any) -> Tensor:
        """See :class:`pytransformer.nn.LayerCache`."""
        cache, seqlen = self._cache, q.shape[1]
        if not cache.is_direct or has_terms(options) or (cache.max_length == 0 and seqlen > 1):
            return super().attend(q, **options)
        end, left = cache.max_length + seqlen, options["window"][0]
        first = 0 if left < 0 else max(end - seqlen - left, 0)
        keys, values = cache.spans(first, end, by_head=True)
        k, v = keys[self._index], values[self._index]
        if seqlen == 1:
            return _attend_alone(q, k, v, options["softmax_scale"])
        return _attend_causally(q, k, v, cache.causal_mask(seqlen, first, left, q.dtype), options["softmax_scale"])


def has_terms(options: dict[str, Any]) -> bool:
    """Whether anything is done to the scores beside the window."""
    return options["softcap"] != 0.0 or any(options[name] is not None for name in ("alibi_slopes", "bias", "sinks"))


def _attend_alone(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> Tensor:
    """One query (batch, 1, heads, head_dim) per sequence, which sees all keys (batch, kv heads, keys, head_dim).

    The queries that share a key head are rows of one matrix.
    """
    batch, _, num_heads, head_dim = q.shape
    grouped = q.reshape(batch, k.shape[1], num_heads // k.shape[1], head_dim)
    return F.scaled_dot_product_attention(grouped, k, v, scale=softmax_scale).view(q.shape)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax_scale: float | None) -> Tensor:
    """Several queries per sequence, under a mask (queries, keys)."""
    batch, seqlen, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    if group == 1:
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=softmax_scale)
        return attended.transpose(1, 2)
    grouped = q.transpose(1, 2).reshape(batch, k.shape[1], group * seqlen, head_dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask.repeat(group, 1), scale=softmax_scale)
    return out.reshape(batch, num_heads, seqlen, head_dim).transpose(1, 2)
