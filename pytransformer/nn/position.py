"""Position information without weights: RoPE tables, ALiBi slopes, the sinusoidal table.

All are float32 whatever the dtype of the model (a bfloat16 table of angles is wrong by whole degrees), and are computed again rather
than stored: they are buffers outside the state_dict.
"""

from __future__ import annotations

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
        self._install(device)

    def _compute(self, device: torch.device | str | None) -> dict[str, Tensor]:
        cos, sin = rope_tables(
            self.rotary_dim, self.max_seqlen, base=self.base, scaling=self.scaling, device=_resolved(device)
        )
        return {"cos": cos, "sin": sin}

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

    def __init__(self, num_heads: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self._install(device)

    def _compute(self, device: torch.device | str | None) -> dict[str, Tensor]:
        return {"slopes": standard_alibi_slopes(self.num_heads).to(_resolved(device))}


class SinusoidalPositions(_Tables):
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(…) (Vaswani et al. 2017): ``weight`` (max_seqlen, hidden_size).

    Called like an embedding, with positions of any shape.
    """

    weight: Tensor

    def __init__(self, max_seqlen: int, hidden_size: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.max_seqlen = max_seqlen
        self.hidden_size = hidden_size
        self._install(device)

    def _compute(self, device: torch.device | str | None) -> dict[str, Tensor]:
        return {"weight": sinusoidal_positions(self.max_seqlen, self.hidden_size, device=_resolved(device))}

    def forward(self, positions: Tensor) -> Tensor:
        return self.weight[positions]


def _resolved(device: torch.device | str | None) -> torch.device | str:
    """``None`` means torch's current default device, as for every torch constructor."""
    return torch.get_default_device() if device is None else device
