"""A whole transformer with one stack, naive and complete, for reading. It is the twin of ``pytransformer.Transformer``.

Read it from the bottom up: :class:`Transformer` is embeddings, a stack of blocks and a head; a block (blocks.py) is attention and a
feed-forward network, each with a norm and a residual connection; feed_forward.py, experts.py, heads.py and positions.py hold the parts; the
mathematics of attention, RoPE and the norms is in files of those names. encoder_decoder.py joins two stacks by cross-attention. Nothing is
fused, cached or packed: ``generate`` computes everything again for every token.

``config`` is any object with the attributes of ``TransformerConfig``. Parameters have the names and shapes of the fused model's,
so ``twin.load_state_dict(model.state_dict())`` works, and ``twin.double()`` is then the golden model. Names of dimensions::

    hidden = hidden_size,  intermediate = intermediate_size,  q rows = num_heads · head_dim,  kv rows = num_kv_heads · head_dim

Tied head: a model with ``tie_embeddings`` has no parameter ``lm_head.weight``; its head multiplies by the embedding's. A state
dict that nevertheless contains the key loads if it holds the same values as ``model.embed_tokens.weight``, and is refused otherwise.

Sources: Vaswani et al. 2017 (the architecture, sinusoidal positions, post-norm), Radford et al. 2019 (GPT-2: pre-norm,
learned positions, GELU), Devlin et al. 2019 (BERT: bidirectional, token types), Touvron et al. 2023 (Llama: RMSNorm, RoPE, SwiGLU).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Block, Inputs, block_norm
from .heads import Classifier, LanguageModelHead, padding_mask, pool
from .positions import positions_without_padding, relative_bucket, sinusoidal_positions


class Stack(nn.Module):
    """Token ids to hidden states: embeddings and positions, the blocks, and where the configuration has one a last norm.

    Parameters: embed_tokens (vocab, hidden), embed_positions (max_seqlen + position_offset, hidden), embed_types (types, hidden),
    embed_norm; relative_bias (buckets, num_heads), T5's, one table for all layers; layers; norm. ``cross`` gives every block
    cross-attention.
    """

    def __init__(self, config: Any, *, cross: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_seqlen + config.position_offset, config.hidden_size)
        if config.positions == "t5":
            self.relative_bias = nn.Embedding(config.relative_buckets, config.num_heads)
        if config.type_vocab_size:
            self.embed_types = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.embedding_norm:
            self.embed_norm = block_norm(config)
        self.layers = nn.ModuleList(Block(config, layer, cross=cross) for layer in range(config.num_layers))
        if config.final_norm:
            self.norm = block_norm(config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """(batch, seqlen) ids -> (batch, seqlen, hidden).

        Args:
            input_ids: int64 (batch, seqlen).
            attention_mask: (batch, seqlen), which tokens may be seen; or who sees whom, broadcastable to (batch, seqlen, seqlen) or
                (batch, num_heads, seqlen, seqlen). True or 1 = may be seen.
            token_type_ids: (batch, seqlen); all 0 if there are types and none are given.
            inputs_embeds: (batch, seqlen, hidden) in the place of the token embeddings.
            positions: (seqlen) or (batch, seqlen); 0, 1, 2, … if None.
            memory: (batch, src_seqlen, hidden), for the blocks' cross-attention; ``memory_mask`` is for it as attention_mask is here.
            router_logits: a list to which each mixture of experts appends its router's logits.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError("input_ids or inputs_embeds must be given, got neither")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        seqlen = x.shape[1]
        if seqlen > self.config.max_seqlen:
            raise ValueError(f"input_ids: {seqlen} tokens, but max_seqlen is {self.config.max_seqlen}")
        counted = positions is None
        positions = self.token_positions(x, input_ids, positions)
        attention_mask = padding_mask(attention_mask)
        inputs = Inputs(
            positions=positions,
            places=real_places(x, attention_mask),
            lengths=real_lengths(positions, attention_mask, skip_front=counted),
            mask=attention_mask,
            relative_bias=self.bias_of_distances(seqlen) if self.config.positions == "t5" else None,
            memory=memory,
            memory_mask=memory_mask,
            router_logits=[] if router_logits is None else router_logits,
        )
        x = self.embed(x, positions, token_type_ids)
        for block in self.layers:
            x = block(x, inputs)
        return self.norm(x) if self.config.final_norm else x

    def token_positions(self, x: Tensor, input_ids: Tensor | None, positions: Tensor | None) -> Tensor:
        """int64 (batch, seqlen)."""
        if positions is None and self.config.positions_skip_padding and input_ids is not None:
            return positions_without_padding(input_ids, self.config.pad_token_id)
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        return positions.long().expand(x.shape[:2])

    def embed(self, x: Tensor, positions: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Token embeddings + those of positions and types, the first times √hidden and the sum normalised where the model does so."""
        config = self.config
        if config.scale_embeddings:
            # The factor is rounded as the embeddings are: so Gemma was trained (55.5 and not 55.43 for 3072 in bfloat16).
            x = x * torch.tensor(math.sqrt(config.hidden_size), dtype=x.dtype, device=x.device)
        rows = positions + config.position_offset
        if config.positions == "learned":
            x = x + self.embed_positions(rows)
        if config.positions == "sinusoidal":
            table = sinusoidal_positions(
                config.max_seqlen + config.position_offset, config.hidden_size, halves=config.sinusoidal_halves
            )
            x = x + table.to(x)[rows]
        if config.type_vocab_size:
            x = x + self.embed_types(torch.zeros_like(positions) if token_type_ids is None else token_type_ids)
        if config.embedding_norm:
            x = self.embed_norm(x)
        return torch.dropout(x, config.embedding_dropout, self.training)

    def bias_of_distances(self, seqlen: int) -> Tensor:
        """T5's bias of every pair: (1, num_heads, seqlen, seqlen), a learned number for each head and bucket of distances."""
        index = torch.arange(seqlen, device=self.relative_bias.weight.device)
        buckets = relative_bucket(
            index[:, None] - index,
            num_buckets=self.config.relative_buckets,
            max_distance=self.config.relative_max_distance,
            bidirectional=not self.config.causal,
        )
        return self.relative_bias.weight[buckets].permute(2, 0, 1)[None]


def real_lengths(positions: Tensor, attention_mask: Tensor | None, *, skip_front: bool) -> list[int]:
    """For each sequence the position of its last real token + 1; ``skip_front``: less the padding before its first."""
    if attention_mask is None or attention_mask.dim() != 2:
        return (positions.amax(dim=-1) + 1).tolist()
    real = (attention_mask != 0).expand(positions.shape)
    lengths = torch.where(real, positions, -1).amax(dim=-1) + 1
    return (lengths - real.int().argmax(dim=-1) if skip_front else lengths).tolist()


def real_places(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """int64 (batch, seqlen): of each token, how many real ones stand before it; 0 for padding."""
    real = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    if attention_mask is not None and attention_mask.dim() == 2:
        real = (attention_mask != 0).long().expand(x.shape[:2])
    return (real.cumsum(dim=1) - 1) * real


class Transformer(nn.Module):
    """A transformer with one stack, causal (GPT-2, Llama) or not (BERT): ``model(input_ids)``.

    With head "lm" or "masked_lm" it gives logits (batch, seqlen, vocab_size): ``model.model(input_ids)`` gives hidden states and
    ``model.lm_head(hidden)`` their logits. With "classification" logits (batch, num_labels). With "none" hidden states, or with ``pooling``
    one vector for each sequence.

    Parameters: model (:class:`Stack`); lm_head; pooler (hidden, hidden); classifier.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.architecture == "encoder-decoder":
            raise ValueError(
                "architecture must be 'decoder' or 'encoder', got 'encoder-decoder': that is EncoderDecoder"
            )
        self.config = config
        self.model = Stack(config)
        if config.head in ("lm", "masked_lm"):
            self.lm_head = LanguageModelHead(config, self.model.embed_tokens)
        if config.pooler:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        if config.head == "classification":
            self.classifier = Classifier(config)
        initialise(self, config)
        tie_when_loading(self, tied_head(config))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """See :meth:`Stack.forward` for the arguments."""
        hidden = self.model(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            positions=positions,
            router_logits=router_logits,
        )
        if self.config.head in ("lm", "masked_lm"):
            return self.lm_head(hidden)  # type: ignore[no-any-return]
        if self.config.pooling is None:
            return hidden  # type: ignore[no-any-return]
        pooled = pool(hidden, attention_mask, self.config.pooling)
        if self.config.pooler:
            pooled = torch.tanh(self.pooler(pooled))
        return self.classifier(pooled) if self.config.head == "classification" else pooled

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
        return append_greedily(self, input_ids, self.config, max_new_tokens, eos_token_id)


def append_greedily(model: Any, ids: Tensor, config: Any, max_new_tokens: int, eos_token_id: int | None) -> Tensor:
    """ids (batch, seqlen) and behind them what ``model(ids)``, logits (batch, seqlen, vocab), finds most probable each time."""
    padding: Any = config.pad_token_id if config.pad_token_id is not None else eos_token_id
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(min(max_new_tokens, config.max_seqlen - ids.shape[1])):
        next_ids = model(ids)[:, -1].argmax(dim=-1)
        if eos_token_id is not None:
            next_ids = next_ids.masked_fill(ended, padding)
            ended = ended | (next_ids == eos_token_id)
        ids = torch.cat([ids, next_ids[:, None]], dim=1)
        if bool(ended.all()):
            break
    return ids


def initialise(model: nn.Module, config: Any) -> None:
    """Matrices: normal with the configuration's deviation, embeddings that are scaled with hidden^-½; biases of projections: 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            scaled = config.scale_embeddings and name.endswith("embed_tokens.weight")
            nn.init.normal_(parameter, std=config.hidden_size**-0.5 if scaled else config.initializer_range)
        elif name.endswith("bias") and "norm" not in name:
            nn.init.zeros_(parameter)


def tied_head(config: Any) -> dict[str, str]:
    """See :func:`tie_when_loading`."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}


def tie_when_loading(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Lets ``load_state_dict`` take a tensor that the model does not have because it is another one's, if it equals that."""

    def take_out(_: nn.Module, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        errors: list[str] = rest[-1]
        for name, same_as in tied.items():
            tensor, original = state_dict.pop(prefix + name, None), state_dict.get(prefix + same_as)
            if tensor is not None and original is not None and not torch.equal(tensor.to(original), original):
                errors.append(f"{prefix}{name} differs from {prefix}{same_as}, but the configuration makes them one")

    model.register_load_state_dict_pre_hook(take_out)  # type: ignore[no-untyped-call]
