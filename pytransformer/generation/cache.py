"""The contiguous KV cache: one preallocated tensor each for keys and values, filled per sequence from the left.

Size: 2 · num_layers · batch · capacity · num_kv_heads · head_dim elements. A cell is written before it is read, so the memory is not
cleared; what lies behind a sequence's length is never attended to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.model.config import TransformerConfig
from pytransformer.nn import RMSNorm, RotaryEmbedding
from pytransformer.ops.attention import attention
from pytransformer.ops.decode_attention import decode_attention
from pytransformer.ops.kv_append import kv_append


class KVCache:
    """Keys and values of every layer for ``batch`` sequences of up to ``capacity`` tokens.

    One step is: the model runs over new tokens with ``cache=cache`` (each layer appends and attends), then :meth:`advance` counts them.
    Sequences may have different lengths; new tokens come as a rectangle, right-padded, and ``advance`` says how many of them are real.
    What the padding wrote is overwritten by the tokens that follow and is seen by nobody before.

    Args:
        config: the model's.
        batch: number of sequences.
        capacity: tokens per sequence, at most the model's max_seqlen.
        device, dtype: of the model.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 1 <= capacity <= config.max_seqlen:
            raise ValueError(f"capacity must be from 1 to the model's max_seqlen ({config.max_seqlen}), got {capacity}")
        self.batch = batch
        self.capacity = capacity
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        self.k_cache = torch.empty(shape, device=device, dtype=dtype)
        self.v_cache = torch.empty(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.k_cache.device)
        # Of an encoder–decoder: what each layer's cross-attention made of the memory, once for all steps.
        self.memory_kv: list[tuple[Tensor, Tensor]] | None = None
        # Whether a step may write and read by plain slices: see choose_path.
        self.is_direct = False
        self._attended: tuple[int, Tensor] | None = None  # the same for every layer of a step
        # The longest length, known without asking the device.
        self.max_length = 0
        self._layers = [
            _LayerCache(self, self.k_cache[index], self.v_cache[index]) for index in range(config.num_layers)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes held by keys and values."""
        return self.k_cache.nbytes + self.v_cache.nbytes

    def layer(self, index: int) -> _LayerCache:
        """The part of layer ``index``."""
        return self._layers[index]

    def positions(self, seqlen: int) -> Tensor:
        """Positions of the next ``seqlen`` tokens: int64 (batch, seqlen).

        Raises:
            ValueError: they would not fit.
        """
        self.require(seqlen)
        return self.lengths[:, None] + torch.arange(seqlen, device=self.lengths.device)

    def require(self, seqlen: int) -> None:
        """ValueError unless ``seqlen`` more tokens fit behind the longest sequence."""
        if self.max_length + seqlen > self.capacity:
            raise ValueError(
                f"the KV cache holds {self.capacity} tokens per sequence: {seqlen} more do not fit behind {self.max_length}"
            )

    def advance(self, new_tokens: Tensor | int, longest: int | None = None) -> None:
        """Counts the tokens that were appended in this step.

        Args:
            new_tokens: how many of them are real: integers (batch), or one number for all.
            longest: the largest resulting length, where the host knows it; by default read off the lengths.
        """
        self._set_lengths((self.lengths + new_tokens).int())
        if longest is None:
            longest = self.max_length + new_tokens if isinstance(new_tokens, int) else int(self.lengths.max())
        self.max_length = longest

    def drop(self, ended: Tensor, longest: int | None = None) -> None:
        """Forgets the sequences where ``ended`` (batch, boolean): in later steps they are there, but cost next to nothing.

        ``longest``: the largest remaining length, as of :meth:`advance`.
        """
        self._set_lengths(self.lengths.masked_fill(ended, 0))
        self.max_length = int(self.lengths.max()) if longest is None else longest

    def choose_path(self, bound: bool) -> None:
        """Decides for the next step whether the layers write and read by plain slices, without the ops' checks and choices.

        They may where the step is ``bound`` (see bound.py) and all sequences have one length, known to the host.
        """
        self.is_direct = bound and self.lengths.tolist().count(self.max_length) == self.batch

    def attended(self, seqlen: int) -> Tensor:
        """Lengths with ``seqlen`` tokens of this step appended: int32 (batch)."""
        if self._attended is None or self._attended[0] != seqlen:
            self._attended = (seqlen, self.lengths + seqlen)
        return self._attended[1]

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self._attended = None

    def reset(self) -> None:
        """Forgets every token; the memory is kept."""
        self._set_lengths(torch.zeros_like(self.lengths))
        self.max_length = 0


class _LayerCache:
    """One layer's keys and values: (batch, capacity, num_kv_heads, head_dim) each."""

    def __init__(self, cache: KVCache, k_cache: Tensor, v_cache: Tensor) -> None:
        self._cache = cache
        self.k_cache = k_cache
        self.v_cache = v_cache

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
        cache.require(k.shape[1])
        if cache.is_direct:
            if q_norm is not None and k_norm is not None:
                q, k = q_norm(q), k_norm(k)
            if rotary is not None:
                offsets = cache.max_length if positions is None else 0
                q, k = rotary(q, k, positions=positions, offsets=offsets)
            places = slice(cache.max_length, cache.max_length + k.shape[1])
            self.k_cache[:, places] = k
            self.v_cache[:, places] = v
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
        )
        return q if new_q is None else new_q

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
        plain = alibi_slopes is None and bias is None and sinks is None and softcap == 0.0
        if cache.is_direct and seqlen == 1 and plain:
            end = cache.max_length + 1
            return self._attend_to(q, slice(0 if window[0] < 0 else max(end - 1 - window[0], 0), end), softmax_scale)
        if cache.max_length == 0:
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
            )
        assert isinstance(result, Tensor)
        return result

    def _attend_to(self, q: Tensor, keys: slice, softmax_scale: float | None) -> Tensor:
        """One query per sequence, which sees all of these keys; the queries that share a key head are rows of one matrix."""
        batch, _, num_heads, head_dim = q.shape
        k, v = self.k_cache[:, keys].transpose(1, 2), self.v_cache[:, keys].transpose(1, 2)
        grouped = q.reshape(batch, k.shape[1], num_heads // k.shape[1], head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, scale=softmax_scale).view(q.shape)
