"""The encoder–decoder of common teaching code, naive: what people bring from a course, for comparison and for conversion.

It is the transformer of 2017 with habits of its own: the norm stands before the sublayer, one more stands behind each stack, and
LayerNorm divides by std + eps with the *unbiased* standard deviation, instead of sqrt(variance + eps). teaching_weights.py turns its
weights into ours.

A mask is 1 where a key may be seen: source (batch, 1, 1, src_seqlen), target (batch, 1, tgt_seqlen, tgt_seqlen), the latter with the causal
triangle in it. Hidden scores become -1e9.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .positions import sinusoidal_positions


class TeachingLayerNorm(nn.Module):
    """alpha · (x - mean) / (std + eps) + bias over the last dimension, std with Bessel's correction (divided by width - 1).

    As torch's LayerNorm it would be, with d = width and std = sqrt(d / (d - 1)) · sqrt(variance)::

        alpha · sqrt((d - 1) / d) · (x - mean) / (sqrt(variance) + sqrt((d - 1) / d) · eps) + bias

    See :func:`torch_norm_of` for its weight and eps.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.alpha = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        std = x.std(dim=-1, keepdim=True)  # torch's default is the unbiased one
        return self.alpha * (x - mean) / (std + self.eps) + self.bias


def torch_norm_of(alpha: Tensor, eps: float) -> tuple[Tensor, float]:
    """Weight and eps of the usual LayerNorm, weight · (x - mean) / sqrt(variance + eps) + bias, that does what a teaching one does.

    The weight is alpha · c with c = sqrt((d - 1) / d), which is exact. Below the root eps cannot do the same as outside:
    sqrt(variance) + c·eps is replaced by sqrt(variance + (c·eps)²), which agrees where one of the two terms vanishes. Elsewhere the
    results differ by less than eps / std of themselves: 4e-6 for an eps of 1e-6 and a row whose std is 1/4, less for a larger one.

    Args:
        alpha: (width).
        eps: the teaching norm's.
    """
    correction = math.sqrt((len(alpha) - 1) / len(alpha))
    return alpha * correction, (correction * eps) ** 2


class MultiHeadAttention(nn.Module):
    """w_o(concat over heads of softmax(q kᵀ / sqrt(d_k)) v), q = w_q(x), k = w_k(y), v = w_v(y)."""

    def __init__(self, d_model: int, num_heads: int, *, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.w_q = nn.Linear(d_model, d_model, bias=bias)
        self.w_k = nn.Linear(d_model, d_model, bias=bias)
        self.w_v = nn.Linear(d_model, d_model, bias=bias)
        self.w_o = nn.Linear(d_model, d_model, bias=bias)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, seqlen, d_model) of queries and (batch, seqlen_k, d_model) of keys and values -> like x."""
        q, k, v = self.heads(self.w_q(x)), self.heads(self.w_k(y)), self.heads(self.w_v(y))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(mask == 0, -1e9)
        attended = torch.softmax(scores, dim=-1) @ v
        return self.w_o(attended.transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]

    def heads(self, x: Tensor) -> Tensor:
        """(batch, num_heads, seqlen, d_k)."""
        batch, seqlen, d_model = x.shape
        return x.view(batch, seqlen, self.num_heads, d_model // self.num_heads).transpose(1, 2)


class PositionwiseFeedForward(nn.Module):
    """linear_2(relu(linear_1(x)))."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(d_model, d_ff)
        self.linear_2 = nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(torch.relu(self.linear_1(x)))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """x + dropout(f(norm(x))), or with ``pre_norm=False`` norm(x + dropout(f(x)))."""

    def __init__(self, d_model: int, *, pre_norm: bool, dropout: float) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.dropout = nn.Dropout(dropout)
        self.norm = TeachingLayerNorm(d_model)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return x + self.dropout(sublayer(self.norm(x)))  # type: ignore[no-any-return]
        return self.norm(x + self.dropout(sublayer(x)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Self-attention, in a decoder cross-attention, and a feed-forward network, each in a residual connection."""

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, *, cross: bool, pre_norm: bool, bias: bool, dropout: float
    ) -> None:
        super().__init__()
        self.self_attention = MultiHeadAttention(d_model, num_heads, bias=bias)
        if cross:
            self.cross_attention = MultiHeadAttention(d_model, num_heads, bias=bias)
        self.feed_forward = PositionwiseFeedForward(d_model, d_ff)
        self.residual_connections = nn.ModuleList(
            Residual(d_model, pre_norm=pre_norm, dropout=dropout) for _ in range(3 if cross else 2)
        )

    def forward(
        self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None, memory_mask: Tensor | None = None
    ) -> Tensor:
        x = self.residual_connections[0](x, lambda h: self.self_attention(h, h, mask))
        if memory is not None:
            x = self.residual_connections[1](x, lambda h: self.cross_attention(h, memory, memory_mask))
        return self.residual_connections[-1](x, self.feed_forward)  # type: ignore[no-any-return]


class Layers(nn.Module):
    """A stack of layers, with a norm behind it where the norms stand before the sublayers."""

    def __init__(self, layers: list[Layer], d_model: int, *, pre_norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        if pre_norm:
            self.norm = TeachingLayerNorm(d_model)
        self.pre_norm = pre_norm

    def forward(self, x: Tensor, *masks_and_memory: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, *masks_and_memory)
        return self.norm(x) if self.pre_norm else x


class InputEmbeddings(nn.Module):
    """embedding(ids) · sqrt(d_model)."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)  # type: ignore[no-any-return]


class PositionalEncoding(nn.Module):
    """x + pe, the sinusoidal table, a buffer (1, max_seqlen, d_model) that is part of the state_dict."""

    pe: Tensor

    def __init__(self, d_model: int, max_seqlen: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("pe", sinusoidal_positions(max_seqlen, d_model)[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x + self.pe[:, : x.shape[1]])  # type: ignore[no-any-return]


class ProjectionLayer(nn.Module):
    """log-softmax(proj(x))."""

    def __init__(self, d_model: int, vocab_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log_softmax(self.proj(x), dim=-1)


class TeachingTransformer(nn.Module):
    """An encoder–decoder as courses write it: ``project(decode(encode(src, src_mask), src_mask, tgt, tgt_mask))``.

    Args:
        src_vocab_size, tgt_vocab_size: entries of the two embeddings.
        d_model, num_heads, d_ff, num_layers: width, heads, width of the feed-forward network, layers of each stack.
        max_seqlen: rows of the table of positions.
        pre_norm: norms before the sublayers and behind each stack; else behind the residual additions.
        attention_bias: biases of w_q, w_k, w_v, w_o.
    """

    def __init__(
        self,
        src_vocab_size: int,
        tgt_vocab_size: int,
        *,
        d_model: int = 512,
        num_heads: int = 8,
        d_ff: int = 2048,
        num_layers: int = 6,
        max_seqlen: int = 512,
        pre_norm: bool = True,
        attention_bias: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()

        def layers(cross: bool) -> Layers:
            made = [
                Layer(d_model, num_heads, d_ff, cross=cross, pre_norm=pre_norm, bias=attention_bias, dropout=dropout)
                for _ in range(num_layers)
            ]
            return Layers(made, d_model, pre_norm=pre_norm)

        self.encoder = layers(cross=False)
        self.decoder = layers(cross=True)
        self.src_embed = InputEmbeddings(src_vocab_size, d_model)
        self.tgt_embed = InputEmbeddings(tgt_vocab_size, d_model)
        self.src_pos = PositionalEncoding(d_model, max_seqlen, dropout)
        self.tgt_pos = PositionalEncoding(d_model, max_seqlen, dropout)
        self.projection_layer = ProjectionLayer(d_model, tgt_vocab_size)

    def encode(self, src: Tensor, src_mask: Tensor | None) -> Tensor:
        """(batch, src_seqlen) ids -> (batch, src_seqlen, d_model)."""
        return self.encoder(self.src_pos(self.src_embed(src)), src_mask)  # type: ignore[no-any-return]

    def decode(self, memory: Tensor, src_mask: Tensor | None, tgt: Tensor, tgt_mask: Tensor | None) -> Tensor:
        """(batch, tgt_seqlen) ids -> (batch, tgt_seqlen, d_model)."""
        return self.decoder(self.tgt_pos(self.tgt_embed(tgt)), tgt_mask, memory, src_mask)  # type: ignore[no-any-return]

    def project(self, hidden: Tensor) -> Tensor:
        """Log-probabilities (batch, tgt_seqlen, tgt_vocab_size)."""
        return self.projection_layer(hidden)  # type: ignore[no-any-return]
