"""The transformer of the textbook: an encoder reads the source, a decoder writes the target and looks at what was read.

    memory = encoder(src);   hidden = decoder(tgt, memory);   generator(hidden) = log-softmax of the next token

With the choices of 2017 the embeddings are multiplied by √d and added to interleaved sinusoidal positions, and the norms stand behind the
residual additions; with others it is T5, BART or Marian. The twin of ``pytransformer.Transformer`` with architecture "encoder-decoder".

Source: Vaswani et al. 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .heads import LanguageModelHead
from .transformer import Stack, append_greedily, initialise, tie_when_loading, tied_head


class EncoderDecoder(nn.Module):
    """``model(src, tgt, src_mask, tgt_mask)`` -> logits (batch, tgt_seqlen, vocab_size), or hidden states with head "none".

    Parameters: encoder (:class:`Stack`), model (:class:`Stack`, the decoder, whose blocks have cross-attention), lm_head. With
    ``share_embeddings`` there is no ``encoder.embed_tokens.weight``: source and target use ``model.embed_tokens.weight``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.architecture != "encoder-decoder":
            raise ValueError(f"architecture must be 'encoder-decoder', got {config.architecture!r}")
        self.config = config
        self.encoder = Stack(config.encoder)
        self.model = Stack(config, cross=True)
        tied = tied_head(config)
        if config.share_embeddings:
            del self.encoder.embed_tokens
            tied["encoder.embed_tokens.weight"] = "model.embed_tokens.weight"
        if config.head == "lm":
            self.lm_head = LanguageModelHead(config, self.model.embed_tokens)
        initialise(self, config)
        tie_when_loading(self, tied)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        *,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Teacher forcing: all positions of the target at once, each sees those before it.

        Args:
            src: int64 (batch, src_seqlen).
            tgt: int64 (batch, tgt_seqlen), beginning with the start token.
            src_mask: (batch, src_seqlen), or broadcastable to (batch, queries, src_seqlen) or (batch, num_heads, queries, src_seqlen) for
                the queries of both the encoder and the decoder; True or 1 = may be seen.
            tgt_mask: (batch, tgt_seqlen), or broadcastable to (batch, tgt_seqlen, tgt_seqlen) or (batch, num_heads, tgt_seqlen,
                tgt_seqlen); the causal mask comes on top.
            router_logits: a list to which each mixture of experts appends its router's logits, the encoder's first.
        """
        memory = self.encode(src, src_mask, router_logits=router_logits)
        hidden = self.decode(memory, src_mask, tgt, tgt_mask, router_logits=router_logits)
        return hidden if self.config.head == "none" else self.lm_head(hidden)

    def encode(
        self, src: Tensor, src_mask: Tensor | None = None, *, router_logits: list[Tensor] | None = None
    ) -> Tensor:
        """The memory: (batch, src_seqlen, hidden)."""
        embeds = self.model.embed_tokens(src) if self.config.share_embeddings else None
        return self.encoder(src, src_mask, inputs_embeds=embeds, router_logits=router_logits)  # type: ignore[no-any-return]

    def decode(
        self,
        memory: Tensor,
        src_mask: Tensor | None,
        tgt: Tensor,
        tgt_mask: Tensor | None = None,
        *,
        router_logits: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of the target: (batch, tgt_seqlen, hidden)."""
        return self.model(  # type: ignore[no-any-return]
            tgt, tgt_mask, memory=memory, memory_mask=src_mask, router_logits=router_logits
        )

    def generator(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token: (..., hidden) -> (..., vocab_size)."""
        logits = self.lm_head(hidden)
        return logits - torch.logsumexp(logits, dim=-1, keepdim=True)  # type: ignore[no-any-return]

    @torch.no_grad()
    def generate(
        self,
        src: Tensor,
        *,
        max_new_tokens: int,
        src_mask: Tensor | None = None,
        decoder_start_token_id: int | None = None,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """Greedy translation: the source is read once, the target grows by its most probable token each time.

        Args:
            src: (batch, src_seqlen), with ``src_mask`` as in :meth:`forward`.
            max_new_tokens: at most so many tokens; fewer where every sequence has ended or max_seqlen is reached.
            decoder_start_token_id: the first token; the configuration's if None.
            eos_token_id: a sequence that has produced it has ended, and is filled up with pad_token_id (or with eos_token_id).

        Returns:
            (batch, 1 + new tokens), the start token included.
        """
        start = self.config.decoder_start_token_id if decoder_start_token_id is None else decoder_start_token_id
        if start is None:
            raise ValueError("decoder_start_token_id must be given: the configuration has none")
        memory = self.encode(src, src_mask)
        ids = torch.full((len(src), 1), start, dtype=torch.long, device=src.device)

        def logits(ids: Tensor) -> Tensor:
            return self.lm_head(self.decode(memory, src_mask, ids))  # type: ignore[no-any-return]

        return append_greedily(logits, ids, self.config, max_new_tokens, eos_token_id)
