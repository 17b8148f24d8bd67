"""The decoder-only transformer. GPT-2, Llama and their relatives are configurations of it, not classes.

Reading order: :class:`Transformer` (token ids to logits), :class:`Decoder` (token ids to hidden states), :class:`Block`.
Its twin for reading, without any fused op, is ``pytransformer.reference.Transformer``; both take the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.nn import (
    AlibiSlopes,
    Attention,
    FeedForward,
    LayerCache,
    LayerNorm,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    SinusoidalPositions,
)
from pytransformer.ops.checks import check_values

from . import generator
from .config import TransformerConfig


class ModelCache(Protocol):
    """What :class:`Decoder` asks of a cache: the layers' parts of it, and where each sequence stands."""

    def layer(self, index: int) -> LayerCache:
        """The part that layer ``index`` appends to and attends to."""
        ...

    def positions(self, seqlen: int) -> Tensor:
        """Positions of the next ``seqlen`` tokens of each sequence: int64 (batch, seqlen), all below the model's max_seqlen."""
        ...


class Block(nn.Module):
    """Attention, then feed-forward, each with its norm and residual addition.

    The addition is done inside the norm that follows it (one pass over memory instead of two), so a block passes on two tensors: the
    residual stream, and ``delta``, what is still to be added to it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        rotary: RotaryEmbedding | None,
        alibi: AlibiSlopes | None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.post_norm = config.norm_placement == "post"
        self.residual_dropout = config.residual_dropout
        self.attention_norm = make_norm(config, device=device, dtype=dtype)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            bias=config.attention_bias,
            window=config.window,
            softmax_scale=config.softmax_scale,
            softcap=config.attention_softcap,
            rotary=rotary,
            alibi=alibi,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            qk_norm_weight_offset=config.norm_weight_offset,
            dropout=config.attention_dropout,
            device=device,
            dtype=dtype,
        )
        self.feed_forward_norm = make_norm(config, device=device, dtype=dtype)
        self.feed_forward = FeedForward(
            config.hidden_size,
            config.intermediate_size,
            activation=config.activation,
            bias=config.mlp_bias,
            dropout=config.feed_forward_dropout,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        delta: Tensor,
        residual: Tensor | None,
        *,
        cache: LayerCache | None = None,
        weights: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The next (delta, residual), each (batch, seqlen, hidden). The first block's residual is ``None``: delta is the whole stream.

        Pre-norm adds ``delta`` to the residual in the first norm. Post-norm leaves nothing to be added: its residual is always ``None``.
        Args:
            cache: this layer's part of a cache, or ``None``.
            weights: a list to which the attention probabilities are appended, or ``None``.
        """
        if self.post_norm:
            normalised = stream = delta
        else:
            normalised, stream = _add_and_norm(self.attention_norm, delta, residual)
        if weights is not None:
            weights.append(self.attention.weights(normalised))
        attended = self._drop(self.attention(normalised, cache=cache))
        if self.post_norm:
            normalised, _ = _add_and_norm(self.attention_norm, attended, stream)
            fed = self._drop(self.feed_forward(normalised))
            return _add_and_norm(self.feed_forward_norm, fed, normalised)[0], None
        normalised, stream = _add_and_norm(self.feed_forward_norm, attended, stream)
        return self._drop(self.feed_forward(normalised)), stream

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.residual_dropout) if self.training and self.residual_dropout > 0.0 else x


class Decoder(nn.Module):
    """Embeddings, blocks, and for pre-norm a final norm: token ids to hidden states."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.embed_positions: nn.Module | None = None
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_seqlen, config.hidden_size, device=device, dtype=dtype)
        elif config.positions == "sinusoidal":
            self.embed_positions = SinusoidalPositions(config.max_seqlen, config.hidden_size, device=device)
        self.rotary: RotaryEmbedding | None = None
        if config.positions == "rope":
            self.rotary = RotaryEmbedding(
                config.rotary_dim,
                config.max_seqlen,
                base=config.rope_base,
                scaling=config.rope_scaling,
                interleaved=config.rope_interleaved,
                device=device,
            )
        alibi = AlibiSlopes(config.num_heads, device=device) if config.positions == "alibi" else None
        self.layers = nn.ModuleList(
            Block(config, self.rotary, alibi, device=device, dtype=dtype) for _ in range(config.num_layers)
        )
        self.norm = make_norm(config, device=device, dtype=dtype) if config.norm_placement == "pre" else None

    def forward(
        self, input_ids: Tensor, *, cache: ModelCache | None = None, weights: list[Tensor] | None = None
    ) -> Tensor:
        """(batch, seqlen) integers -> (batch, seqlen, hidden).

        Args:
            input_ids: token ids, the whole sequences, or with a cache those that follow what it holds.
            cache: keys and values of the tokens before, appended to; ``None`` = none before.
            weights: a list to which each layer's attention probabilities are appended, or ``None``.

        Raises:
            TypeError, ValueError: ids of a wrong dtype or shape, ids outside the vocabulary (checked on a CPU), or more tokens
                than max_seqlen.
        """
        check_input_ids(input_ids, self.config)
        delta = self._embed(input_ids, cache)
        residual: Tensor | None = None
        for index, block in enumerate(self.layers):
            delta, residual = block(
                delta, residual, cache=None if cache is None else cache.layer(index), weights=weights
            )
        return delta if self.norm is None else _add_and_norm(self.norm, delta, residual)[0]

    def _embed(self, input_ids: Tensor, cache: ModelCache | None) -> Tensor:
        hidden: Tensor = self.embed_tokens(input_ids)
        if self.config.scale_embeddings:
            hidden = hidden * math.sqrt(self.config.hidden_size)
        if self.embed_positions is not None:
            seqlen = input_ids.shape[1]
            if cache is None:
                positions = torch.arange(seqlen, device=input_ids.device)
            else:
                positions = cache.positions(seqlen)
            hidden = hidden + self.embed_positions(positions).to(hidden.dtype)
        if self.training and self.config.embedding_dropout > 0.0:
            hidden = F.dropout(hidden, self.config.embedding_dropout)
        return hidden


class LMHead(Linear):
    """Hidden states to logits (…, vocab_size), with the configuration's softcap."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)
        self.softcap = config.logit_softcap

    def forward(self, input: Tensor) -> Tensor:
        logits = super().forward(input)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap > 0.0 else logits


class Transformer(nn.Module):
    """A decoder-only language model.

    Args:
        config: its shape and choices.
        device, dtype: where and as what the parameters are made; tables of positions stay float32.

    Attributes:
        model: :class:`Decoder`, token ids to hidden states.
        lm_head: :class:`LMHead`, hidden states to logits. With ``tie_embeddings`` its weight *is* ``model.embed_tokens.weight``.

    Example::

        model = Transformer(TransformerConfig.llama(vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2))
        logits = model(ids)                                     # (batch, seqlen, vocab_size)
        next_token = model.lm_head(model.model(ids))[0, -1].argmax(-1)
        text = model.generate(ids, max_new_tokens=20)           # prompt included
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, TransformerConfig):
            raise TypeError(f"config must be a TransformerConfig, got {type(config).__name__}")
        self.config = config
        self.model = Decoder(config, device=device, dtype=dtype)
        self.lm_head = LMHead(config, device="meta" if config.tie_embeddings else device, dtype=dtype)
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_after_load)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's, if the configuration says so. Moving and loading do it by themselves."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie_weights()  # where parameters cannot be moved in place (from the meta device) they have become two
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initial values: normal weights, those of projections into the residual stream smaller by sqrt(2 · layers), no biases."""
        spread = self.config.initializer_range
        into_residual = spread / math.sqrt(2 * self.config.num_layers)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=spread)
            elif isinstance(module, nn.Linear) and not (module is self.lm_head and self.config.tie_embeddings):
                nn.init.normal_(module.weight, std=spread)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        for block in self.model.layers:
            assert isinstance(block, Block)
            nn.init.normal_(block.attention.out_proj.weight, std=into_residual)
            nn.init.normal_(block.feed_forward.down_proj.weight, std=into_residual)

    def forward(self, input_ids: Tensor, *, cache: ModelCache | None = None) -> Tensor:
        """(batch, seqlen) token ids -> (batch, seqlen, vocab_size) logits; arguments and errors as of :meth:`Decoder.forward`."""
        return self.lm_head(self.model(input_ids, cache=cache))  # type: ignore[no-any-return]

    @torch.no_grad()
    def attention_weights(self, input_ids: Tensor) -> list[Tensor]:
        """For each layer the attention probabilities (batch, num_heads, query, key), computed plainly, for inspection."""
        weights: list[Tensor] = []
        self.model(input_ids, weights=weights)
        return weights

    def generate(self, input_ids: Tensor | Sequence[Any], max_new_tokens: int, **options: Any) -> Any:
        """Continues the prompts: :func:`pytransformer.generation.generate`, of which this returns the token ids alone.

        Args:
            input_ids: ids (batch, seqlen) or (seqlen) in a tensor or numpy array, or one list of ints; or a list of prompts of any lengths.
            max_new_tokens: at most so many tokens are added to each prompt.
            options: temperature, top_k, top_p, seed, eos_token_id, use_cache, callback, … as of that function.

        Returns:
            Prompt and new tokens: a tensor of the prompts' rank (sequences that ended early are filled up), or a list for several.
        """
        generate = generator.find_generate()
        return generate(self, input_ids, max_new_tokens, **options).token_ids

    def num_parameters(self) -> int:
        """Number of weights, those that are tied counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def _tie_after_load(model: Transformer, incompatible_keys: object) -> None:
    model.tie_weights()


def make_norm(
    config: TransformerConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LayerNorm | RMSNorm:
    """The configuration's norm over the hidden dimension."""
    if config.norm == "layer_norm":
        return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias, device=device, dtype=dtype)
    return RMSNorm(
        config.hidden_size, config.norm_eps, weight_offset=config.norm_weight_offset, device=device, dtype=dtype
    )


def _add_and_norm(norm: nn.Module, delta: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(norm(stream), stream) with stream = delta + residual, or delta where there is no residual."""
    if residual is None:
        return norm(delta), delta
    return norm(delta, residual)  # type: ignore[no-any-return]


def check_input_ids(input_ids: object, config: TransformerConfig) -> None:
    """TypeError or ValueError unless (batch, seqlen) integer ids of at most max_seqlen tokens, on a CPU within the vocabulary."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a torch.Tensor of shape (batch, seqlen), got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, seqlen), got {tuple(input_ids.shape)}")
    if input_ids.shape[1] > config.max_seqlen:
        raise ValueError(
            f"input_ids must have at most max_seqlen = {config.max_seqlen} tokens, got {input_ids.shape[1]}"
        )
    check_values("input_ids", input_ids, 0, config.vocab_size - 1, "token ids")
