"""Self-attention as a module: one projection to q, k and v, the attention op, one projection back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pytransformer.ops.attention import attention
from pytransformer.reference import attention as reference_attention

from .linear import Linear
from .norm import RMSNorm
from .position import AlibiSlopes, RotaryEmbedding


class LayerCache(Protocol):
    """What :class:`Attention` asks of a cache: one layer's keys and values of the tokens so far. Made above and handed down."""

    def append(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        rotary: RotaryEmbedding | None,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
    ) -> Tensor:
        """Writes k and v behind what is there, k normalised and rotated; returns q normalised and rotated likewise."""
        ...

    def attend(
        self,
        q: Tensor,
        *,
        softmax_scale: float | None,
        window: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
    ) -> Tensor:
        """Causal attention of the appended tokens' q to everything in the cache: (batch, seqlen, num_heads, head_dim)."""
        ...


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention, causal unless told otherwise.

    Args:
        hidden_size: width of the input and output.
        num_heads, num_kv_heads, head_dim: ``num_kv_heads`` divides ``num_heads`` (``None`` = equal); ``head_dim`` ``None`` =
            ``hidden_size / num_heads``; a multiple of 8 up to 256.
        bias: on both projections.
        causal, window, softmax_scale, softcap: see :func:`pytransformer.attention`.
        rotary: tables shared by the layers, or ``None``.
        alibi: ALiBi slopes shared by the layers, or ``None``.
        qk_norm_eps: RMSNorm over each head of q and k before RoPE, with this epsilon; ``None`` = no norm.
        qk_norm_weight_offset: as of :class:`pytransformer.nn.RMSNorm`.
        dropout: rate on the attention probabilities, in training.

    Weights: ``qkv_proj`` ((num_heads + 2 · num_kv_heads) · head_dim, hidden) with rows [q; k; v]; ``out_proj`` (hidden,
    num_heads · head_dim); ``q_norm``, ``k_norm`` (head_dim).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        causal: bool = True,
        window: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        rotary: RotaryEmbedding | None = None,
        alibi: AlibiSlopes | None = None,
        qk_norm_eps: float | None = None,
        qk_norm_weight_offset: float = 0.0,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {self.num_kv_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads when head_dim is not given, got {hidden_size} and {num_heads}"
            )
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.causal = causal
        self.window = window
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.dropout = dropout
        width = self.head_dim * num_heads
        rows = width + 2 * self.head_dim * self.num_kv_heads
        self.qkv_proj = Linear(hidden_size, rows, bias=bias, device=device, dtype=dtype)
        self.out_proj = Linear(width, hidden_size, bias=bias, device=device, dtype=dtype)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if qk_norm_eps is not None:
            self.q_norm, self.k_norm = (
                RMSNorm(self.head_dim, qk_norm_eps, weight_offset=qk_norm_weight_offset, device=device, dtype=dtype)
                for _ in range(2)
            )
        self.rotary = rotary
        self.alibi = alibi

    @property
    def alibi_slopes(self) -> Tensor | None:
        """(num_heads), or ``None``."""
        return None if self.alibi is None else self.alibi.slopes

    def forward(self, x: Tensor, *, cache: LayerCache | None = None) -> Tensor:
        """(batch, seqlen, hidden) -> (batch, seqlen, hidden).

        Args:
            cache: the tokens before x, to which x is appended; not differentiable. ``None`` = x is the whole sequence.
        """
        q, k, v = self._project(x)
        if cache is not None:
            q = cache.append(q, k, v, rotary=self.rotary, q_norm=self.q_norm, k_norm=self.k_norm)
            attended = cache.attend(
                q,
                softmax_scale=self.softmax_scale,
                window=self.window,
                softcap=self.softcap,
                alibi_slopes=self.alibi_slopes,
            )
        else:
            q, k = self._normalise_and_rotate(q, k)
            result = attention(
                q,
                k,
                v,
                causal=self.causal,
                window=self.window,
                softmax_scale=self.softmax_scale,
                softcap=self.softcap,
                alibi_slopes=self.alibi_slopes,
                dropout_p=self.dropout if self.training else 0.0,
            )
            assert isinstance(result, Tensor)
            attended = result
        return self.out_proj(attended.flatten(-2))  # type: ignore[no-any-return]

    def weights(self, x: Tensor) -> Tensor:
        """The attention probabilities, for inspection: (batch, num_heads, seqlen, seqlen), computed plainly, rows summing to 1.

        They are read off the naive attention by giving it the identity matrix as values, so they obey every option.
        """
        q, k, _ = self._project(x)
        q, k = self._normalise_and_rotate(q, k)
        batch, seqlen = x.shape[:2]
        identity = torch.eye(seqlen, dtype=q.dtype, device=q.device)
        values = identity[None, :, None, :].expand(batch, seqlen, self.num_kv_heads, seqlen)
        probabilities = reference_attention(
            q,
            k,
            values,
            causal=self.causal,
            window=self.window,
            softmax_scale=self.softmax_scale,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
        )
        assert isinstance(probabilities, Tensor)
        return probabilities.transpose(1, 2)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=-2)
        return q, k, v

    def _normalise_and_rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, k)
        return q, k

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, window={self.window}"
