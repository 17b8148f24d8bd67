"""One layer: attention, in a decoder with a memory cross-attention, and a feed-forward or a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.nn import (
    AlibiSlopes,
    Attention,
    FeedForward,
    LayerCache,
    LayerNorm,
    MixtureOfExperts,
    RelativeKeys,
    RMSNorm,
    RotaryEmbedding,
)

from .config import TransformerConfig


@dataclass
class Trace:
    """What a pass leaves behind for inspection and for losses, layer by layer; a list that is ``None`` is not kept.

    Attributes:
        hidden_states: the residual stream before each layer, and after the last: (batch, seqlen, hidden) each.
        attentions, cross_attentions: probabilities (batch, num_heads, query, key), computed plainly.
        router_logits: of each layer with experts: (tokens, num_experts).
    """

    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None
    router_logits: list[Tensor] | None = None


@dataclass
class Shared:
    """What all layers of one pass have in common.

    Attributes:
        masks: ``mask`` or ``key_padding_mask`` of the self-attention; ``memory_masks`` of the cross-attention.
        trace: see there.
        bias: added to the scores of the self-attention.
        positions, local_positions: rows of the tables of RoPE, for layers without and with a window.
        memory: (batch, memory_seqlen, hidden); or of each layer ``memory_kv``, made before.
    """

    masks: dict[str, Tensor]
    memory_masks: dict[str, Tensor]
    trace: Trace
    bias: Tensor | None = None
    positions: Tensor | None = None
    local_positions: Tensor | None = None
    memory: Tensor | None = None
    memory_kv: list[tuple[Tensor, Tensor]] | None = None


class Block(nn.Module):
    """The sublayers of one layer, each with its norm and residual addition.

    The addition is done inside the norm that follows it (one pass over memory instead of two), so a block passes on two tensors: the
    residual stream, and ``delta``, what is still to be added to it.

    Args:
        config: the model's.
        index: of the layer, from 0.
        rotary, local_rotary: tables of RoPE for layers without and with a window of their own frequencies, or ``None``.
        alibi: slopes, or ``None``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        index: int,
        rotary: RotaryEmbedding | None,
        alibi: AlibiSlopes | None,
        *,
        is_local: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.index = index
        self.is_local = is_local
        self.placement = config.norm_placement
        self.parallel = config.parallel
        self.residual_from_norm = config.residual_from_norm
        self.residual_dropout = config.residual_dropout
        before = self.placement != "output"
        behind = self.placement in ("both", "output")
        self.attention_norm = make_norm(config, **place) if before else None
        self.attention = make_attention(config, index, rotary, alibi, **place)
        self.attention_output_norm = make_norm(config, **place) if behind else None
        self.cross_attention: Attention | None = None
        self.cross_attention_norm: nn.Module | None = None
        self.cross_attention_output_norm: nn.Module | None = None
        if config.is_encoder_decoder:
            self.cross_attention_norm = make_norm(config, **place) if before else None
            self.cross_attention = make_cross_attention(config, index, **place)
            self.cross_attention_output_norm = make_norm(config, **place) if behind else None
        one_norm = self.parallel and config.parallel_norms == 1
        self.feed_forward_norm = make_norm(config, **place) if before and not one_norm else None
        self.is_sparse = config.is_sparse(index)
        self.feed_forward = make_feed_forward(config, index, **place)
        self.feed_forward_output_norm = make_norm(config, **place) if behind else None

    def forward(
        self, delta: Tensor, residual: Tensor | None, shared: Shared, *, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The next (delta, residual), each (batch, seqlen, hidden). Without a residual delta is the whole stream.

        Args:
            shared: see there.
            cache: this layer's part of a cache, or ``None``.
        """
        if self.parallel:
            assert self.attention_norm is not None
            normalised, stream = add_and_norm(self.attention_norm, delta, residual)
            attended = self._attend(normalised, shared, cache)
            read = normalised if self.feed_forward_norm is None else self.feed_forward_norm(stream)
            return self._drop(attended) + self._drop(self._feed(read, shared)), stream
        read, stream = self._before(self.attention_norm, delta, residual)
        delta = self._attend(read, shared, cache)
        delta, residual = self._after(self.attention_norm, self.attention_output_norm, delta, stream)
        if self.cross_attention is not None:
            read, stream = self._before(self.cross_attention_norm, delta, residual)
            delta = self._attend_memory(read, shared)
            delta, residual = self._after(self.cross_attention_norm, self.cross_attention_output_norm, delta, stream)
        read, stream = self._before(self.feed_forward_norm, delta, residual)
        delta = self._feed(read, shared)
        return self._after(self.feed_forward_norm, self.feed_forward_output_norm, delta, stream)

    def _before(self, norm: nn.Module | None, delta: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What a sublayer reads, and the stream that its output is added to."""
        if self.placement in ("pre", "both"):
            assert norm is not None
            normalised, stream = add_and_norm(norm, delta, residual)
            return normalised, normalised if self.residual_from_norm else stream
        stream = delta if residual is None else residual + delta
        return stream, stream

    def _after(
        self, norm: nn.Module | None, output_norm: nn.Module | None, delta: Tensor, stream: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """A sublayer's output and the stream as the next (delta, residual)."""
        if output_norm is not None:
            delta = output_norm(delta)
        delta = self._drop(delta)
        if self.placement == "post":
            assert norm is not None
            return add_and_norm(norm, delta, stream)[0], None
        return delta, stream

    def _attend(self, x: Tensor, shared: Shared, cache: LayerCache | None) -> Tensor:
        positions = shared.local_positions if self.is_local else shared.positions
        if shared.trace.attentions is not None:
            weights = self.attention.weights(x, bias=shared.bias, positions=positions, **shared.masks)
            shared.trace.attentions.append(weights)
        if cache is not None:
            return self.attention(x, positions=positions, bias=shared.bias, cache=cache)  # type: ignore[no-any-return]
        return self.attention(x, positions=positions, bias=shared.bias, **shared.masks)  # type: ignore[no-any-return]

    def _attend_memory(self, x: Tensor, shared: Shared) -> Tensor:
        assert self.cross_attention is not None
        if shared.trace.cross_attentions is not None:
            weights = self.cross_attention.weights(x, shared.memory, **shared.memory_masks)
            shared.trace.cross_attentions.append(weights)
        if shared.memory_kv is not None:
            kv = shared.memory_kv[self.index]
            # Sequences that share a source are further queries to it: nobody sees the others, so nothing else changes.
            queries = x.reshape(kv[0].shape[0], -1, x.shape[-1])
            return self.cross_attention(queries, keys_and_values=kv, **shared.memory_masks).reshape(x.shape)  # type: ignore[no-any-return]
        return self.cross_attention(x, shared.memory, **shared.memory_masks)  # type: ignore[no-any-return]

    def _feed(self, x: Tensor, shared: Shared) -> Tensor:
        if self.is_sparse:
            return self.feed_forward(x, router_logits=shared.trace.router_logits)  # type: ignore[no-any-return]
        return self.feed_forward(x)  # type: ignore[no-any-return]

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.residual_dropout) if self.training and self.residual_dropout > 0.0 else x


def make_attention(
    config: TransformerConfig, index: int, rotary: RotaryEmbedding | None, alibi: AlibiSlopes | None, **place: Any
) -> Attention:
    """The self-attention of a layer."""
    scale = config.softmax_scale
    if config.scale_by_layer:
        scale = (config.head_dim**-0.5 if scale is None else scale) / (index + 1)
    relative_keys = None
    if config.positions in ("relative_key", "relative_key_query"):
        rows, with_keys = config.max_seqlen + config.position_offset, config.positions == "relative_key_query"
        relative_keys = RelativeKeys(rows, config.head_dim, with_keys=with_keys, **place)
    return Attention(
        config.hidden_size,
        config.num_heads,
        causal=config.causal,
        window=config.window(index),
        softmax_scale=scale,
        rotary=rotary,
        alibi=alibi,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
        qk_norm_weight_offset=config.norm_weight_offset,
        qk_norm_whole=config.qk_norm_whole,
        sinks=config.sinks,
        relative_keys=relative_keys,
        **heads_of(config),
        **place,
    )


def make_cross_attention(config: TransformerConfig, index: int, **place: Any) -> Attention:
    """The attention of a decoder's layer to the memory."""
    return Attention(
        config.hidden_size,
        config.num_heads,
        causal=False,
        softmax_scale=config.softmax_scale,
        memory_size=config.hidden_size,
        **heads_of(config),
        **place,
    )


def heads_of(config: TransformerConfig) -> dict[str, Any]:
    """What every attention of a model has in common."""
    return {
        "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim, "bias": config.attention_bias,
        "output_bias": config.attention_output_bias, "softcap": config.attention_softcap, "dropout": config.attention_dropout,
    }  # fmt: skip


def make_feed_forward(config: TransformerConfig, index: int, **place: Any) -> nn.Module:
    """The feed-forward of a layer, or its experts."""
    common: dict[str, Any] = {
        "activation": config.activation, "bias": config.mlp_bias, "dropout": config.feed_forward_dropout, **place,
    }  # fmt: skip
    if config.activation == "swiglu_clamped":
        common |= {"activation_limit": config.activation_limit, "activation_alpha": config.activation_alpha}
    if not config.is_sparse(index):
        return FeedForward(config.hidden_size, config.intermediate_size, **common)
    return MixtureOfExperts(
        config.hidden_size,
        config.expert_size,
        config.num_experts,
        config.experts_per_token,
        router_bias=config.router_bias,
        norm_topk_prob=config.norm_topk_prob,
        shared_expert_size=config.shared_expert_size,
        shared_expert_gate=config.shared_expert_gate,
        **common,
    )


def make_norm(
    config: TransformerConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LayerNorm | RMSNorm:
    """The configuration's norm over the hidden dimension."""
    if config.norm == "layer_norm":
        return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias, device=device, dtype=dtype)
    return RMSNorm(
        config.hidden_size, config.norm_eps, weight_offset=config.norm_weight_offset, device=device, dtype=dtype
    )


def add_and_norm(norm: nn.Module, delta: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm(stream), stream) with stream = delta + residual, or delta where there is no residual."""
    if residual is None:
        return norm(delta), delta
    return norm(delta, residual)  # type: ignore[no-any-return]
