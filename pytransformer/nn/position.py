"""Position information without weights: RoPE tables, ALiBi slopes, the sinusoidal table.

All are float32 whatever the dtype of the model (a bfloat16 table of angles is wrong by whole degrees), and are computed again rather
than stored: they are buffers outside the state_dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer.ops.rope import rope, rope_tables
from pytransformer.reference import sinusoidal_positions, standard_alibi_slopes


class _Tables(nn.Module):
    """Float32 buffers that follow the module to a device but not to a dtype."""

    def _compute(self, device: torch.device | str | None) -> dict[str, Tensor]:
        raise NotImplementedError

    def _install(self, device: torch.device | str | None) -> None:
        for name, table in self._compute(device).items():
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Tables:
        before = {name: table for name, table in self._buffers.items() if table is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = next(iter(self._buffers.values()))
        assert moved is not None
        if moved.is_meta:
            return self
        if any(table.is_meta for table in before.values()):
            self._install(moved.device)
        else:
            for name, table in before.items():
                self._buffers[name] = table.to(moved.device)
        return self


class RotaryEmbedding(_Tables):
    """RoPE: cos and sin of every position, and the rotation of q and k by them.

    Args:
        rotary_dim: features that rotate, even; at most head_dim.
        max_seqlen: positions in the tables.
        base, scaling: see :func:`pytransformer.rope_tables`.
        interleaved: pairs of adjacent features instead of (i, i + rotary_dim / 2).

    With "longrope" and "dynamic" the frequencies depend on the length of a sequence. The tables of several lengths then lie one below the
    other, and :meth:`rows` says where the positions of each sequence are, so each rotates as it does alone, whatever it is batched with.
    """

    cos: Tensor
    sin: Tensor

    def __init__(
        self,
        rotary_dim: int,
        max_seqlen: int,
        *,
        base: float = 10000.0,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_dim
        self.max_seqlen = max_seqlen
        self.base = base
        self.scaling = scaling
        self.interleaved = interleaved
        method = None if scaling is None else scaling.get("rope_type", scaling.get("type"))
        self.depends_on_length = method in ("longrope", "dynamic")
        # Up to here one set of frequencies holds.
        self.original_length = (
            int(scaling["original_max_position_embeddings"])
            if scaling is not None and self.depends_on_length
            else max_seqlen
        )
        self.is_dynamic = method == "dynamic"
        # Of which lengths the tables are that follow the first ones.
        self._longer: tuple[int, ...] = () if self.is_dynamic else (max_seqlen,)
        self._install(device)

    def _compute(self, device: torch.device | str | None) -> dict[str, Tensor]:
        lengths: tuple[int, ...] = (self.max_seqlen,)
        if self.depends_on_length:
            lengths = (min(self.original_length, self.max_seqlen), *self._longer)
        scaling = self.scaling
        if scaling is not None and self.depends_on_length:
            # What longrope's attention factor falls back to is the whole context, for short sequences too.
            scaling = {"max_position_embeddings": self.max_seqlen, **scaling}
        tables = [self._table(length, scaling, _resolved(device)) for length in lengths]
        if len(tables) == 1:  # also because torch.cat on the meta device imports torch's compiler, which takes seconds
            return dict(zip(("cos", "sin"), tables[0]))
        return {name: torch.cat(parts) for name, parts in zip(("cos", "sin"), zip(*tables))}

    def _table(
        self, length: int, scaling: Mapping[str, Any] | None, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        return rope_tables(self.rotary_dim, length, base=self.base, scaling=scaling, device=device)

    def rows(self, positions: Tensor, lengths: list[int]) -> Tensor:
        """Rows of the tables for ``positions`` (batch, seqlen) in sequences of these lengths: int64 (batch, seqlen).

        For "dynamic" tables of lengths beyond the original one are made here; they stay until a call needs others.
        """
        longer = sorted({length for length in lengths if length > self.original_length})
        if self.is_dynamic and tuple(longer) != self._longer and longer:
            self._longer = tuple(longer)
            self._install(self.cos.device)
        starts, start = {}, min(self.original_length, self.max_seqlen)
        for length in self._longer:
            starts[length], start = start, start + length
        firsts = [
            0 if length <= self.original_length else starts[length if self.is_dynamic else self.max_seqlen]
            for length in lengths
        ]
        return positions + torch.tensor(firsts, device=positions.device)[:, None]

    def forward(
        self, q: Tensor, k: Tensor, *, positions: Tensor | None = None, offsets: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """q (batch, seqlen, num_heads, head_dim) and k (…, num_kv_heads, …), rotated by their positions."""
        rotated_q, rotated_k = rope(
            q, k, self.cos, self.sin, positions=positions, offsets=offsets, interleaved=self.interleaved
        )
        assert rotated_k is not None
        return rotated_q, rotated_k

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, max_seqlen={self.max_seqlen}, base={self.base}, interleaved={self.interleaved}"


class AlibiSlopes(_Tables):
    """ALiBi's slope of each head (Press et al. 2022): ``slopes`` (num_heads)."""

    slopes: Tensor

    def __init__(self, num_heads: int, *, scale: float = 1.0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self._install(device)

    def _compute(self, device: torch.device | str | None) -> dict[str, Tensor]:
        return {"slopes": standard_alibi_slopes(self.num_heads).to(_resolved(device)) * self.scale}


class AlibiBias(_Tables):
    """ALiBi as Falcon computes it: bfloat16(slope · position of the key), times ``scale``, added to the scores.

    Without the rounding it would differ from :class:`AlibiSlopes` by a number for each row, which a softmax does not see.
    """

    slopes: Tensor

    def __init__(self, num_heads: int, *, scale: float = 1.0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = scale
        self._install(device)

    def _compute(self, device: torch.device | str | None) -> dict[str, Tensor]:
        return {"slopes": standard_alibi_slopes(self.num_heads).to(_resolved(device))}

    def forward(self, places: Tensor) -> Tensor:
        """Positions of the keys, integers (batch, num_keys) -> float32 (batch, num_heads, 1, num_keys)."""
        rounded = self.slopes.bfloat16()[:, None] * places[:, None, :]
        return rounded.float()[:, :, None, :] * self.scale


class RelativeBias(nn.Embedding):
    """T5's learned bias of each head for each distance, far ones sharing a bucket: ``weight`` (num_buckets, num_heads).

    Args:
        num_buckets: half for each direction if ``bidirectional``; of those half for a distance each, the rest on a logarithmic scale.
        max_distance: from here on all share the last bucket.
        bidirectional: keys behind the query are told apart from those before; else they are not seen.

    Source: Raffel et al. 2020.
    """

    def __init__(
        self,
        num_buckets: int,
        num_heads: int,
        *,
        max_distance: int = 128,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_buckets, num_heads, device=device, dtype=dtype)
        self.max_distance = max_distance
        self.bidirectional = bidirectional

    def forward(self, input: Tensor) -> Tensor:
        """Key position - query position, integers (…, queries, keys) -> (…, num_heads, queries, keys)."""
        return super().forward(self.buckets(input)).movedim(-1, -3)

    def buckets(self, distance: Tensor) -> Tensor:
        """int64 of the same shape."""
        count = self.num_embeddings
        first = torch.zeros_like(distance)
        if self.bidirectional:
            count //= 2
            first = (distance > 0) * count
            distance = distance.abs()
        else:
            distance = (-distance).clamp(min=0)
        exact = count // 2
        # The base of the logarithm is such that max_distance is the last bucket; in float32, as the published weights were trained.
        scaled = (
            torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (count - exact)
        )
        far = (exact + scaled.long()).clamp(max=count - 1)
        return first + torch.where(distance < exact, distance, far)


class RelativeKeys(nn.Embedding):
    """A learned vector for each distance, whose products with q, or with q and k, join the scores (Shaw et al. 2018; Huang et al. 2020).

    Weight: (2 · max_seqlen - 1, head_dim), the distances query - key from the smallest on.

    Args:
        max_seqlen: distances go from 1 - max_seqlen to max_seqlen - 1.
        head_dim: of q and k.
        with_keys: k's products count too.
    """

    def __init__(
        self,
        max_seqlen: int,
        head_dim: int,
        *,
        with_keys: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(2 * max_seqlen - 1, head_dim, device=device, dtype=dtype)
        self.max_seqlen = max_seqlen
        self.with_keys = with_keys

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """q and k (batch, seqlen, num_heads, head_dim) -> (batch, num_heads, seqlen, seqlen), to be added to q·k before the scale."""
        seqlen = q.shape[1]
        # Row r of these stands for the distance (query - key) r - (seqlen - 1); products first, then each is put in its place.
        rows = self.weight[self.max_seqlen - seqlen : self.max_seqlen - 1 + seqlen]
        places = torch.arange(seqlen, device=q.device)
        distance = places[:, None] - places + seqlen - 1
        scores = torch.einsum("bqhd,rd->bhqr", q, rows).gather(3, distance.expand(*_heads_first(q), -1, -1))
        if self.with_keys:
            of_keys = torch.einsum("bkhd,rd->bhkr", k, rows)
            scores = scores + of_keys.gather(3, distance.t().expand(*_heads_first(k), -1, -1)).transpose(2, 3)
        return scores

    def extra_repr(self) -> str:
        return f"{self.max_seqlen}, {self.embedding_dim}, with_keys={self.with_keys}"


def _heads_first(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[2]


class SinusoidalPositions(_Tables):
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(…) (Vaswani et al. 2017): ``weight`` (max_seqlen, hidden_size).

    Called like an embedding, with positions of any shape. ``halves``: all sines, then all cosines (Marian), instead of pairs.
    """

    weight: Tensor

    def __init__(
        self, max_seqlen: int, hidden_size: int, *, halves: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.max_seqlen = max_seqlen
        self.hidden_size = hidden_size
        self.halves = halves
        self._install(device)

    def _compute(self, device: torch.device | str | None) -> dict[str, Tensor]:
        table = sinusoidal_positions(self.max_seqlen, self.hidden_size, device=_resolved(device))
        return {"weight": torch.cat([table[:, 0::2], table[:, 1::2]], dim=1) if self.halves else table}

    def forward(self, positions: Tensor) -> Tensor:
        return self.weight[positions]


def _resolved(device: torch.device | str | None) -> torch.device | str:
    """``None`` means torch's current default device, as for every torch constructor."""
    return torch.get_default_device() if device is None else device
