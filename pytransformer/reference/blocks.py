"""What a transformer is a stack of, naive: norms, self-attention, cross-attention, and the block that adds them to the residual stream.

Sources: Vaswani et al. 2017 (attention, post-norm), Radford et al. 2019 (pre-norm), Ainslie et al. 2023 (grouped queries), Gemma 2 (norms
before and behind a sublayer), OLMo 2 (norms behind it), Chowdhery et al. 2022 (attention and feed-forward in parallel).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attention, standard_alibi_slopes
from .experts import Experts
from .feed_forward import FeedForward
from .norm import layer_norm, rms_norm
from .positions import alibi_bias_of_keys
from .rope import rope, rope_frequencies


@dataclass
class Inputs:
    """What all layers of one forward pass share.

    Attributes:
        positions: int64 (batch, seqlen), where each token stands.
        places: int64 (batch, seqlen), how many real tokens stand before each, and 0 for padding: of Falcon's ALiBi; None = positions.
        mask: which keys may be seen: (batch, seqlen), or who sees whom, (broadcastable to) (batch, seqlen, seqlen) or (batch, num_heads,
            seqlen, seqlen); True or 1 = may.
        lengths: of each sequence, its last real token's position + 1; RoPE's frequencies may depend on it.
        relative_bias: (1, num_heads, seqlen, seqlen), T5's.
        memory: (batch, src_seqlen, hidden), what cross-attention reads, with ``memory_mask`` like ``mask``.
        router_logits: each mixture of experts appends its own.
    """

    positions: Tensor
    lengths: list[int]
    places: Tensor | None = None
    mask: Tensor | None = None
    relative_bias: Tensor | None = None
    memory: Tensor | None = None
    memory_mask: Tensor | None = None
    router_logits: list[Tensor] = field(default_factory=list)


class Norm(nn.Module):
    """LayerNorm or RMSNorm with its weights, over the last dimension."""

    def __init__(self, kind: str, width: int, *, eps: float, bias: bool = False, weight_offset: float = 0.0) -> None:
        super().__init__()
        if kind not in ("layer_norm", "rms_norm"):
            raise ValueError(f'norm must be "layer_norm" or "rms_norm", got {kind!r}')
        self.kind = kind
        self.eps = eps
        self.weight_offset = weight_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - weight_offset))
        self.bias = nn.Parameter(torch.zeros(width)) if bias and kind == "layer_norm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer_norm":
            y = layer_norm(x, self.weight, self.bias, eps=self.eps)
        else:
            y = rms_norm(x, self.weight, eps=self.eps, weight_offset=self.weight_offset)
        assert isinstance(y, Tensor)
        return y


def block_norm(config: Any) -> Norm:
    """The norm of a whole hidden state, as the configuration chooses it."""
    return Norm(
        config.norm,
        config.hidden_size,
        eps=config.norm_eps,
        bias=config.norm_bias,
        weight_offset=config.norm_weight_offset if config.norm == "rms_norm" else 0.0,
    )


class Attention(nn.Module):
    """Self-attention with grouped queries: num_heads queries share num_kv_heads keys and values.

    Parameters: qkv_proj (q rows + 2 · kv rows, hidden), its rows in the order [q; k; v]; out_proj (hidden, q rows);
    with qk_norm q_norm and k_norm, an RMSNorm before RoPE of every head (head_dim), or of all heads together (q rows, kv rows);
    relative_keys (2 · rows of positions - 1, head_dim); sinks (num_heads).
    """

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, q_rows + 2 * kv_rows, bias=config.attention_bias)
        self.out_proj = nn.Linear(q_rows, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm:
            widths = (q_rows, kv_rows) if config.qk_norm_whole else (config.head_dim, config.head_dim)
            offset = config.norm_weight_offset
            self.q_norm = Norm("rms_norm", widths[0], eps=config.norm_eps, weight_offset=offset)
            self.k_norm = Norm("rms_norm", widths[1], eps=config.norm_eps, weight_offset=offset)
        if config.positions in ("relative_key", "relative_key_query"):
            self.relative_keys = nn.Embedding(2 * (config.max_seqlen + config.position_offset) - 1, config.head_dim)
        if config.sinks:
            self.sinks = nn.Parameter(torch.zeros(config.num_heads))

    @property
    def slides(self) -> bool:
        """Whether this layer has a sliding window."""
        return self.config.sliding_window is not None and self.config.layer_types[self.layer] == "sliding"

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """(batch, seqlen, hidden) -> (batch, seqlen, hidden)."""
        config = self.config
        q, k, v = self.project(x)
        if config.qk_norm:
            q, k = self.normalise(q, self.q_norm), self.normalise(k, self.k_norm)
        if config.positions == "rope":
            q, k = self.rotate(q, k, inputs)
        output = attention(
            q,
            k,
            v,
            causal=config.causal,
            window=self.window(),
            softmax_scale=self.scale(),
            softcap=config.attention_softcap,
            bias=self.bias(q, k, inputs),
            alibi_slopes=self.slopes() if config.positions == "alibi" and not config.alibi_bfloat16 else None,
            sinks=self.sinks if config.sinks else None,
            dropout_p=config.attention_dropout if self.training else 0.0,
            **masks(inputs.mask),
        )
        assert isinstance(output, Tensor)
        return self.out_proj(output.flatten(-2))  # type: ignore[no-any-return]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (batch, seqlen, num_heads, head_dim), and k and v with num_kv_heads."""
        config = self.config
        num_heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = self.qkv_proj(x).unflatten(-1, (sum(num_heads), config.head_dim))
        q, k, v = qkv.split(num_heads, dim=-2)
        return q, k, v

    def normalise(self, heads: Tensor, norm: Norm) -> Tensor:
        """Each head by itself, or all heads of a token as one vector."""
        if self.config.qk_norm_whole:
            return norm(heads.flatten(-2)).view_as(heads)  # type: ignore[no-any-return]
        return norm(heads)  # type: ignore[no-any-return]

    def rotate(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """RoPE, sequence by sequence: some scaling methods choose their frequencies by the length of the sequence."""
        rotated = [
            rope(
                q[[i]],
                k[[i]],
                *self.rope_tables(inputs.positions[i], length),
                positions=torch.arange(q.shape[1], device=q.device),  # row t of the tables is token t's
                interleaved=self.config.rope_interleaved,
            )
            for i, length in enumerate(inputs.lengths)
        ]
        return torch.cat([q for q, _ in rotated]), torch.cat([k for _, k in rotated if k is not None])

    def rope_tables(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin for each token of a sequence with ``length`` real tokens: float32 (seqlen, rotary_dim / 2)."""
        config = self.config
        base, scaling = config.rope_base, config.rope_scaling
        if self.slides and config.local_rope_base is not None:
            base, scaling = config.local_rope_base, config.local_rope_scaling
        if scaling is not None:
            scaling = {"max_position_embeddings": config.max_seqlen, **scaling}
        method = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
        length = length if method in ("dynamic", "longrope") else config.max_seqlen
        frequencies, factor = rope_frequencies(config.rotary_dim, length, base=base, scaling=scaling)
        angles = positions.cpu().double()[:, None] * frequencies
        cos, sin = angles.cos() * factor, angles.sin() * factor
        return cos.float().to(positions.device), sin.float().to(positions.device)

    def scale(self) -> float:
        """What q·k is multiplied by: 1 / sqrt(head_dim) or the configuration's, divided by the layer's number if it says so (GPT-2)."""
        config = self.config
        scale = config.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
        return scale / (self.layer + 1) if config.scale_by_layer else scale  # type: ignore[no-any-return]

    def window(self) -> tuple[int, int]:
        """A window of W keys, the token itself included, reaches W - 1 back; without a causal mask as far to both sides."""
        reach = self.config.sliding_window - 1 if self.slides else -1
        return reach, -1 if self.config.causal else reach

    def slopes(self) -> Tensor:
        """ALiBi's, (num_heads)."""
        scale: float = self.config.alibi_scale
        return standard_alibi_slopes(self.config.num_heads).to(self.qkv_proj.weight.device) * scale

    def bias(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor | None:
        """What is added to the scores: T5's relative bias, Falcon's form of ALiBi, or the products with vectors of the distances."""
        config = self.config
        if config.positions in ("relative_key", "relative_key_query"):
            return self.scale() * self.products_with_distances(q, k)
        if config.positions == "alibi" and config.alibi_bfloat16:
            places = inputs.positions if inputs.places is None else inputs.places
            slopes = standard_alibi_slopes(config.num_heads).to(places.device)
            return alibi_bias_of_keys(slopes, places, config.alibi_scale)
        return inputs.relative_bias

    def products_with_distances(self, q: Tensor, k: Tensor) -> Tensor:
        """q · a[i - j] for query i and key j, with "relative_key_query" also k · a[i - j]: (batch, num_heads, seqlen, seqlen).

        a holds a learned vector for each distance, the most negative one first (Shaw et al. 2018; Huang et al. 2020).
        """
        index = torch.arange(q.shape[1], device=q.device)
        vectors = self.relative_keys(
            index[:, None] - index + len(self.relative_keys.weight) // 2
        )  # (queries, keys, head_dim)
        products = torch.einsum("bihd,ijd->bhij", q, vectors)
        if self.config.positions == "relative_key_query":
            products = products + torch.einsum("bjhd,ijd->bhij", k, vectors)
        return products


class CrossAttention(nn.Module):
    """Attention from the decoder to the encoder's memory: q of the decoder's tokens, k and v of the memory; no positions.

    Parameters: q_proj (q rows, hidden), kv_proj (2 · kv rows, hidden) with rows [k; v], out_proj (hidden, q rows).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_rows, bias=config.attention_bias)
        self.kv_proj = nn.Linear(config.hidden_size, 2 * kv_rows, bias=config.attention_bias)
        self.out_proj = nn.Linear(q_rows, config.hidden_size, bias=config.attention_output_bias)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """(batch, seqlen, hidden) -> (batch, seqlen, hidden)."""
        config = self.config
        assert inputs.memory is not None
        q = self.q_proj(x).unflatten(-1, (config.num_heads, config.head_dim))
        kv = self.kv_proj(inputs.memory).unflatten(-1, (2 * config.num_kv_heads, config.head_dim))
        k, v = kv.chunk(2, dim=-2)
        output = attention(
            q,
            k,
            v,
            softmax_scale=config.softmax_scale,
            softcap=config.attention_softcap,
            dropout_p=config.attention_dropout if self.training else 0.0,
            **masks(inputs.memory_mask),
        )
        assert isinstance(output, Tensor)
        return self.out_proj(output.flatten(-2))  # type: ignore[no-any-return]


def masks(mask: Tensor | None) -> dict[str, Any]:
    """The argument of :func:`attention` that a mask is: of keys if it is (batch, seqlen_k), else of queries and keys."""
    if mask is None:
        return {}
    if mask.dim() == 2:
        return {"key_padding_mask": mask}
    if mask.dim() not in (3, 4):
        raise ValueError(f"a mask must have 2, 3 or 4 dimensions, got shape {tuple(mask.shape)}")
    return {"mask": mask[:, None] if mask.dim() == 3 else mask}


class Block(nn.Module):
    """Attention, then (in a decoder with an encoder) cross-attention, then a feed-forward network, each added to the residual stream.

    Where the norms stand (``norm_placement``), for a sublayer f::

        pre     x + f(norm(x))                       GPT-2, Llama; with residual_from_norm  norm(x) + f(norm(x))
        post    norm(x + f(x))                       2017, BERT
        both    x + output_norm(f(norm(x)))          Gemma 2
        output  x + output_norm(f(x))                OLMo 2

    In ``parallel`` both sublayers read the same stream: x + attention(norm(x)) + feed_forward(norm(x)), with one norm or one for each.
    """

    def __init__(self, config: Any, layer: int, *, cross: bool = False) -> None:
        super().__init__()
        self.config = config
        self.sparse = config.num_experts > 0 and layer not in config.dense_layers
        names = ["attention", "cross_attention", "feed_forward"] if cross else ["attention", "feed_forward"]
        for name in names:
            if config.norm_placement != "output" and not (
                name == "feed_forward" and config.parallel and config.parallel_norms == 1
            ):
                self.add_module(f"{name}_norm", block_norm(config))
            if config.norm_placement in ("both", "output"):
                self.add_module(f"{name}_output_norm", block_norm(config))
        self.attention = Attention(config, layer)
        if cross:
            self.cross_attention = CrossAttention(config)
        self.feed_forward: nn.Module = Experts(config) if self.sparse else FeedForward(config)

    def forward(self, x: Tensor, inputs: Inputs) -> Tensor:
        """(batch, seqlen, hidden) -> (batch, seqlen, hidden)."""
        if self.config.parallel:
            return self.both_at_once(x, inputs)
        x = self.residual(x, "attention", lambda h: self.attention(h, inputs))
        if inputs.memory is not None:
            x = self.residual(x, "cross_attention", lambda h: self.cross_attention(h, inputs))
        return self.residual(x, "feed_forward", lambda h: self.feed(h, inputs))

    def residual(self, x: Tensor, name: str, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """x + dropout(sublayer(x)), with norms where the configuration puts them."""
        placement = self.config.norm_placement
        normed = self.norm(name, x) if placement in ("pre", "both") else x
        y = sublayer(normed)
        if placement in ("both", "output"):
            y = self.norm(f"{name}_output", y)
        total = (normed if self.config.residual_from_norm else x) + self.drop(y)
        return self.norm(name, total) if placement == "post" else total

    def both_at_once(self, x: Tensor, inputs: Inputs) -> Tensor:
        """x + attention(norm(x)) + feed_forward(norm(x))."""
        normed = self.norm("attention", x)
        normed_too = normed if self.config.parallel_norms == 1 else self.norm("feed_forward", x)
        return x + self.drop(self.attention(normed, inputs)) + self.drop(self.feed(normed_too, inputs))

    def feed(self, x: Tensor, inputs: Inputs) -> Tensor:
        """The feed-forward network, or the mixture of experts in its place."""
        if not self.sparse:
            return self.feed_forward(x)  # type: ignore[no-any-return]
        y, router_logits = self.feed_forward(x)
        inputs.router_logits.append(router_logits)
        return y  # type: ignore[no-any-return]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.get_submodule(f"{name}_norm")(x)  # type: ignore[no-any-return]

    def drop(self, x: Tensor) -> Tensor:
        return torch.dropout(x, self.config.residual_dropout, self.training)
