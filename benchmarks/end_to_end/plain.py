"""A transformer of torch's own modules, as one would write it for torch.compile: the peer that is always at hand.

GPT-2's and Llama's shapes, by the same configuration and with the same parameter names as `pytransformer.Transformer`, so that both can
have the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer import TransformerConfig, rope_tables
from pytransformer.benchmarks.definitions.formulas import rotate


class PlainTransformer(nn.Module):
    """(batch, seqlen) token ids → (batch, seqlen, vocab_size) logits.

    Raises:
        NotImplementedError: a configuration that is neither GPT-2's nor Llama's kind.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        if (config.positions, config.norm) not in (("learned", "layer_norm"), ("rope", "rms_norm")):
            raise NotImplementedError(f"PlainTransformer has no {config.positions} positions with {config.norm}")
        self.model = PlainDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.model(input_ids))


class PlainDecoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_seqlen, config.hidden_size)
        else:
            cos, sin = rope_tables(config.head_dim, config.max_seqlen)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = _norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, seqlen = self.embed_tokens(input_ids), input_ids.shape[1]
        tables = None
        if self.embed_positions is not None:
            x = x + self.embed_positions(torch.arange(seqlen, device=input_ids.device))
        else:
            tables = self.cos[:seqlen], self.sin[:seqlen]
        for layer in self.layers:
            x = layer(x, tables)
        return self.norm(x)


class PlainBlock(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = PlainAttention(config)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = PlainFeedForward(config)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), tables)
        return x + self.feed_forward(self.feed_forward_norm(x))


class PlainAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        width, bias = (self.heads + 2 * self.kv_heads) * self.head_dim, config.attention_bias
        self.qkv_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.out_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        projected = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = projected.split((self.heads, self.kv_heads, self.kv_heads), dim=2)
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


class PlainFeedForward(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.activation == "swiglu":
            self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        else:
            self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.is_gated = config.activation == "swiglu"
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_gated:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


def _norm(config: TransformerConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer_norm" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)
