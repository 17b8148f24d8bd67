"""A whole decoder-only transformer, naive and complete, for reading. It is the twin of ``pytransformer.Transformer``.

Read it from the bottom up: :class:`Transformer` is embeddings, a stack of blocks and a linear head; a :class:`Block` is
attention and a feed-forward network, each with a norm and a residual connection; the mathematics of attention, RoPE and
the norms is in the neighbouring files. Nothing is fused, cached or packed: ``generate`` computes everything again for every token.

``config`` is any object with the attributes of ``TransformerConfig``. Parameters have the names and shapes of the fused model's,
so ``twin.load_state_dict(model.state_dict())`` works, and ``twin.double()`` is then the golden model. Names of dimensions::

    hidden = hidden_size,  intermediate = intermediate_size,  q rows = num_heads · head_dim,  kv rows = num_kv_heads · head_dim

Tied head: a model with ``tie_embeddings`` has no parameter ``lm_head.weight``; its head multiplies by the embedding's. A state
dict that nevertheless contains the key loads if it holds the same values as ``model.embed_tokens.weight``, and is refused otherwise.

Sources: Vaswani et al. 2017 (the architecture, sinusoidal positions, post-norm), Radford et al. 2019 (GPT-2: pre-norm,
learned positions, GELU), Touvron et al. 2023 (Llama: RMSNorm, RoPE, SwiGLU).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attention, standard_alibi_slopes
from .norm import layer_norm, rms_norm
from .rope import rope, rope_tables


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
    """Causal self-attention with grouped queries: num_heads queries share num_kv_heads keys and values.

    Parameters: qkv_proj (q rows + 2 · kv rows, hidden), its rows in the order [q; k; v]; out_proj (hidden, q rows);
    with qk_norm q_norm and k_norm (head_dim), an RMSNorm of every head before RoPE.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, q_rows + 2 * kv_rows, bias=config.attention_bias)
        self.out_proj = nn.Linear(q_rows, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            offset = config.norm_weight_offset
            self.q_norm = Norm("rms_norm", config.head_dim, eps=config.norm_eps, weight_offset=offset)
            self.k_norm = Norm("rms_norm", config.head_dim, eps=config.norm_eps, weight_offset=offset)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, seqlen, hidden) -> (batch, seqlen, hidden)."""
        config = self.config
        q, k, v = self.project(x)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.positions == "rope":
            q, k = self.rotate(q, k)
        output = attention(
            q,
            k,
            v,
            causal=True,
            window=(-1, -1) if config.sliding_window is None else (config.sliding_window - 1, -1),
            softmax_scale=config.softmax_scale,
            softcap=config.attention_softcap or 0.0,
            alibi_slopes=standard_alibi_slopes(config.num_heads).to(x.device) if config.positions == "alibi" else None,
            dropout_p=config.attention_dropout if self.training else 0.0,
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

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE. The tables are those of the longest sequence the model takes: some scaling methods depend on it."""
        config = self.config
        cos, sin = rope_tables(
            config.rotary_dim, config.max_seqlen, base=config.rope_base, scaling=config.rope_scaling, device=q.device
        )
        rotated_q, rotated_k = rope(q, k, cos, sin, interleaved=config.rope_interleaved)
        assert rotated_k is not None
        return rotated_q, rotated_k


def activate(name: str, x: Tensor) -> Tensor:
    """The nonlinearity of a feed-forward network. A gated one takes [gate; up] and gives activation(gate) · up."""
    if name == "relu":
        return x.clamp(min=0)
    if name == "gelu":  # x · Φ(x), Φ the normal distribution function
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":  # GPT-2's approximation of it
        return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    gate, up = x.chunk(2, dim=-1)
    if name == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if name == "geglu":
        return activate("gelu", gate) * up
    if name == "geglu_tanh":
        return activate("gelu_tanh", gate) * up
    raise ValueError(f"activation must be relu, gelu, gelu_tanh, swiglu, geglu or geglu_tanh, got {name!r}")


class FeedForward(nn.Module):
    """down_proj(activation(up_proj(x))): two linear layers applied to every position by itself.

    Parameters: up_proj (intermediate, hidden), or for gated activations gate_up_proj (2 · intermediate, hidden) with rows
    [gate; up]; down_proj (hidden, intermediate).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.gated = "glu" in config.activation
        if self.gated:
            self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        else:
            self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = activate(self.config.activation, self.gate_up_proj(x) if self.gated else self.up_proj(x))
        inner = torch.dropout(inner, self.config.feed_forward_dropout, self.training)
        return self.down_proj(inner)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention, then a feed-forward network, each added to the residual stream.

    Pre-norm (GPT-2 and later) normalises what goes into a sublayer, post-norm (2017) what comes out of the addition.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.attention_norm = block_norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = block_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual(x, self.attention, self.attention_norm)
        return self.residual(x, self.feed_forward, self.feed_forward_norm)

    def residual(self, x: Tensor, sublayer: nn.Module, norm: Norm) -> Tensor:
        """x + dropout(sublayer(x)), with the norm where the configuration puts it."""
        if self.config.norm_placement == "pre":
            return x + self.drop(sublayer(norm(x)))
        return norm(x + self.drop(sublayer(x)))  # type: ignore[no-any-return]

    def drop(self, x: Tensor) -> Tensor:
        return torch.dropout(x, self.config.residual_dropout, self.training)


def sinusoidal_positions(length: int, hidden_size: int, *, device: torch.device | str | None = None) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(pos / 10000^(2i/d)), d = hidden_size (Vaswani et al. 2017).

    PE(pos + k) is PE(pos) times a matrix that depends on k alone, a rotation of each pair: so relative positions are easy
    to learn. Computed in float64 on the host and rounded to float32: (length, hidden_size).
    """
    pairs = torch.arange(0, hidden_size + 1, 2, dtype=torch.float64)[: (hidden_size + 1) // 2]
    angles = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** (pairs / hidden_size)
    interleaved = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return interleaved[:, :hidden_size].to(torch.float32).to(device)


class Decoder(nn.Module):
    """Token ids to hidden states: embeddings and positions, the blocks, and for pre-norm a last norm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.positions not in ("learned", "sinusoidal", "rope", "alibi", "none"):
            raise NotImplementedError(f"positions {config.positions!r} are not served by a decoder-only model")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_seqlen, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if config.norm_placement == "pre":
            self.norm = block_norm(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, seqlen) ids -> (batch, seqlen, hidden)."""
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        return self.norm(x) if self.config.norm_placement == "pre" else x

    def embed(self, input_ids: Tensor) -> Tensor:
        config = self.config
        seqlen = input_ids.shape[-1]
        if seqlen > config.max_seqlen:
            raise ValueError(f"input_ids: {seqlen} tokens, but max_seqlen is {config.max_seqlen}")
        x = self.embed_tokens(input_ids)
        if config.scale_embeddings:
            x = x * math.sqrt(config.hidden_size)
        if config.positions == "learned":
            x = x + self.embed_positions.weight[:seqlen]
        if config.positions == "sinusoidal":
            x = x + sinusoidal_positions(seqlen, config.hidden_size, device=x.device).to(x.dtype)
        return torch.dropout(x, config.embedding_dropout, self.training)


class LanguageModelHead(nn.Module):
    """Hidden states to logits: hidden Wᵀ, with a weight of its own or, tied, the embedding's."""

    def __init__(self, config: Any, embedding: nn.Embedding) -> None:
        super().__init__()
        self.softcap = config.logit_softcap
        # In a tuple it is not registered as a submodule.
        self.tied_to: tuple[nn.Embedding, ...] = (embedding,) if config.tie_embeddings else ()
        if self.tied_to:
            self.register_load_state_dict_pre_hook(_check_tied_weight)  # type: ignore[no-untyped-call]
        else:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden) -> (..., vocab_size)."""
        weight = self.tied_to[0].weight if self.tied_to else self.weight
        logits = hidden @ weight.T
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def _check_tied_weight(
    head: LanguageModelHead,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """A weight for a tied head must be the embedding's, which has been loaded before; it is not loaded twice."""
    weight = state_dict.pop(f"{prefix}weight", None)
    embedding = head.tied_to[0].weight
    if weight is not None and not torch.equal(weight.to(embedding), embedding):
        error_msgs.append(f"{prefix}weight differs from the embedding, but tie_embeddings is set")


class Transformer(nn.Module):
    """A decoder-only language model: ``model(input_ids)`` -> logits (batch, seqlen, vocab_size).

    ``model.model(input_ids)`` gives hidden states and ``model.lm_head(hidden)`` their logits.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = LanguageModelHead(config, self.model.embed_tokens)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
            elif name.endswith("proj.bias"):
                nn.init.zeros_(parameter)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.model(input_ids))  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, eos_token_id: int | None = None) -> Tensor:
        """Greedy continuation: append the most probable next token, again and again, the whole forward pass each time.

        Args:
            input_ids: (batch, seqlen), prompts of one length.
            max_new_tokens: at most so many tokens are appended; fewer where every sequence has ended or max_seqlen is reached.
            eos_token_id: a sequence that has produced it has ended, and is filled up with pad_token_id (or with eos_token_id).

        Returns:
            (batch, seqlen + new tokens), the prompt included.
        """
        padding: Any = self.config.pad_token_id if self.config.pad_token_id is not None else eos_token_id
        ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for _ in range(min(max_new_tokens, self.config.max_seqlen - input_ids.shape[1])):
            next_ids = self(input_ids)[:, -1].argmax(dim=-1)
            if eos_token_id is not None:
                next_ids = next_ids.masked_fill(ended, padding)
                ended = ended | (next_ids == eos_token_id)
            input_ids = torch.cat([input_ids, next_ids[:, None]], dim=1)
            if bool(ended.all()):
                break
        return input_ids
