"""The model: token ids to logits, for every configuration.

Two stacks of the same blocks at most: ``model``, which is a decoder or an encoder alone, and for an encoder–decoder ``encoder``. On top of
them a head. What the layers do: block.py; embeddings and positions: stack.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer.nn import RowBlocks
from pytransformer.nn.experts import load_balancing_loss, router_z_loss

from . import generator
from .block import Block, Trace
from .config import TransformerConfig
from .heads import Classifier, LMHead, QuantizedLMHead, pool
from .quantized import codes_not_counted, replace_layers
from .stack import ModelCache, Names, Stack


@dataclass(frozen=True)
class Output:
    """What a model returns where more than its result is asked for.

    Attributes:
        logits: the result: (batch, seqlen, vocab_size), scores (batch, num_labels), or without a head the hidden states.
        hidden_states: the residual stream before each layer, and after the last (num_layers + 1).
        attentions, cross_attentions: of each layer, (batch, num_heads, query, key).
        router_logits: of each layer with experts, (tokens, num_experts).
        encoder_hidden_states, encoder_attentions: of the encoder of an encoder–decoder.
    """

    logits: Tensor
    hidden_states: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    cross_attentions: list[Tensor] | None = None
    router_logits: list[Tensor] | None = None
    encoder_hidden_states: list[Tensor] | None = None
    encoder_attentions: list[Tensor] | None = None


class Transformer(nn.Module):
    """A transformer; with ``architecture="encoder-decoder"`` an :class:`EncoderDecoder`.

    Args:
        config: its shape and choices.
        device, dtype: where and as what the parameters are made; tables of positions stay float32.

    Attributes:
        model: :class:`Stack`, token ids to hidden states.
        lm_head: :class:`LMHead`, hidden states to logits, where the configuration's head is one. With ``tie_embeddings`` its weight *is*
            ``model.embed_tokens.weight``.
        pooler, classifier: for ``head="classification"`` and pooled embeddings.
        generation_config: what the checkpoint says of generation, or ``None``.

    Example::

        model = Transformer(TransformerConfig.llama(vocab_size=512, hidden_size=128, num_layers=2, num_heads=4, num_kv_heads=2))
        logits = model(ids)                                     # (batch, seqlen, vocab_size)
        next_token = model.lm_head(model.model(ids))[0, -1].argmax(-1)
        text = model.generate(ids, max_new_tokens=20)           # prompt included
    """

    def __new__(cls, config: TransformerConfig | None = None, **place: Any) -> Transformer:
        is_pair = cls is Transformer and isinstance(config, TransformerConfig) and config.is_encoder_decoder
        return super().__new__(EncoderDecoder if is_pair else cls)

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
        self.generation_config: dict[str, Any] | None = None
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self._make_stacks(**place)
        self.lm_head: LMHead | QuantizedLMHead = None  # type: ignore[assignment]  # where nothing predicts tokens
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size, **place) if config.pooler else None
        self.classifier: Classifier | None = None
        if config.head in ("lm", "masked_lm"):
            self.lm_head = LMHead(config, **place, weight_device="meta" if config.tie_embeddings else None)
        elif config.head == "classification":
            self.classifier = Classifier(config, **place)
        replace_layers(self, config)
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_after_load)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def _make_stacks(self, **place: Any) -> None:
        self.model = Stack(self.config, **place)

    def tie_weights(self) -> None:
        """Makes the head's weight the embedding's, if the configuration says so. Moving and loading do it by themselves."""
        if self.has_tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def has_tied_head(self) -> bool:
        """Whether the head's weight is the embedding's; codes of it are a weight of their own."""
        return self.config.tie_embeddings and isinstance(self.lm_head, LMHead)

    def make_tables(self, device: torch.device) -> None:
        """Computes the tables of positions that are on the meta device; they are in no state_dict."""
        for module in self.modules():
            if any(table is not None and table.is_meta for table in module._buffers.values()):
                # Not to_empty(): empty_like of a tensor on the meta device imports sympy, which takes seconds.
                module._apply(  # type: ignore[no-untyped-call]
                    lambda old: torch.empty(old.shape, dtype=old.dtype, device=device), recurse=False
                )

    def tied_names(self) -> dict[str, str]:
        """Names of the state_dict that are second names, and what for."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if self.has_tied_head else {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.tie_weights()  # where parameters cannot be moved in place (from the meta device) they have become two
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initial values: normal weights, those of projections into the residual stream smaller by sqrt(2 · layers), no biases.

        Embeddings that are multiplied by sqrt(hidden_size) start with hidden_size^-½: beside larger ones positions drown.
        """
        if self.model.embed_tokens.weight.is_meta:  # nothing to fill, and on the meta device torch takes seconds for it
            return
        spread = self.config.initializer_range
        into_residual = spread / math.sqrt(2 * self.config.num_layers)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=spread)
            elif isinstance(module, nn.Linear):
                if not (module is self.lm_head and self.has_tied_head):
                    nn.init.normal_(module.weight, std=spread)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RowBlocks):
                for block in module.blocks:
                    nn.init.normal_(block, std=spread)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 3:  # experts
                    nn.init.normal_(parameter, std=spread)
        for module in self.modules():
            if isinstance(module, Block):
                for name, parameter in module.named_parameters():
                    if "out_proj.weight" in name or name.endswith(("down_proj", "down_proj.weight")):
                        nn.init.normal_(parameter, std=into_residual)
            elif isinstance(module, Stack) and self.config.scale_embeddings:
                nn.init.normal_(module.embed_tokens.weight, std=self.config.hidden_size**-0.5)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        return_attention: bool = False,
        return_hidden_states: bool = False,
        return_router_logits: bool = False,
        **options: Any,
    ) -> Any:
        """(batch, seqlen) token ids -> (batch, seqlen, vocab_size) logits, or what the configuration's head makes of the sequence.

        Args:
            input_ids, attention_mask, options: as of :meth:`Stack.forward`.
            return_attention, return_hidden_states, return_router_logits: return an :class:`Output` that has them.

        Raises:
            TypeError, ValueError: as of :meth:`Stack.forward`.
        """
        trace = new_trace(return_attention, return_hidden_states, return_router_logits)
        hidden = self.model(input_ids, attention_mask, trace=trace, **options)
        result = self._result(hidden, attention_mask)
        if not (return_attention or return_hidden_states or return_router_logits):
            return result
        return Output(result, trace.hidden_states, trace.attentions, router_logits=trace.router_logits)

    def _result(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.lm_head is not None:
            return self.lm_head(hidden)  # type: ignore[no-any-return]
        if self.config.pooling is None:
            return hidden
        pooled = pool(hidden, attention_mask, self.config.pooling)
        if self.pooler is not None:
            pooled = torch.tanh(self.pooler(pooled))
        return pooled if self.classifier is None else self.classifier(pooled)

    def generator(self, hidden: Tensor) -> Tensor:
        """Hidden states to log-probabilities (…, vocab_size), float32."""
        if self.lm_head is None:
            raise ValueError(f"generator is for heads that predict tokens, this model has head={self.config.head!r}")
        return torch.log_softmax(self.lm_head(hidden), dim=-1, dtype=torch.float32)

    @torch.no_grad()
    def predict(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Probabilities of the labels (batch, num_labels), of a regression its numbers; for ``head="classification"``."""
        if self.classifier is None:
            raise ValueError(f"predict is for head='classification', this model has head={self.config.head!r}")
        return self.classifier.probabilities(self(input_ids, attention_mask, **options))

    @torch.no_grad()
    def attention_weights(self, *inputs: Any, **options: Any) -> list[Tensor]:
        """For each layer the attention probabilities (batch, num_heads, query, key), computed plainly, for inspection.

        Arguments as of :meth:`forward`. Of an encoder–decoder the target's; the others are in :class:`Output`.
        """
        return self(*inputs, return_attention=True, **options).attentions  # type: ignore[no-any-return]

    @torch.no_grad()
    def logit_lens(self, *inputs: Any, **options: Any) -> list[Tensor]:
        """What each layer would predict: final norm and head over the residual stream before each layer and after the last.

        Arguments as of :meth:`forward`; num_layers + 1 tensors (batch, seqlen, vocab_size), the last one the model's logits (nostalgebraist
        2020).
        """
        if self.lm_head is None:
            raise ValueError(
                f"a logit lens needs a head that predicts tokens, this model has head={self.config.head!r}"
            )
        streams = self(*inputs, return_hidden_states=True, **options).hidden_states
        norm = self.model.norm
        return [self.lm_head(stream if norm is None else norm(stream)) for stream in streams]

    def router_loss(self, router_logits: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """What training adds for balanced experts: router_aux_coef · balancing loss + router_z_coef · z-loss, means over the layers.

        Args:
            router_logits: of :class:`Output`.
            mask: (batch, seqlen), nonzero = a token that counts; ``None`` = all.
        """
        config = self.config
        loss: Tensor = config.router_aux_coef * load_balancing_loss(router_logits, config.experts_per_token, mask)
        return loss + config.router_z_coef * router_z_loss(router_logits, mask)

    def generate(self, input_ids: Tensor | Sequence[Any], max_new_tokens: int, **options: Any) -> Any:
        """Continues the prompts: :func:`pytransformer.generation.generate`, of which this returns the token ids alone.

        Args:
            input_ids: ids (batch, seqlen) or (seqlen) in a tensor or numpy array, or one list of ints; or a list of prompts of any lengths.
                Of an encoder–decoder: the sources.
            max_new_tokens: at most so many tokens are added to each prompt.
            options: temperature, top_k, top_p, min_p, seed, eos_token_id, stop, use_cache, callback, … as of that function.

        Returns:
            Prompt and new tokens (of an encoder–decoder the target, its start token included): a tensor of the prompts' rank (sequences
            that ended early are filled up), or a list for several.
        """
        generate = generator.find_generate()
        return generate(self, input_ids, max_new_tokens, **options).token_ids

    def num_parameters(self) -> int:
        """Number of weights, those that are tied counted once; a weight of which there are codes counts as one."""
        return sum(parameter.numel() for parameter in self.parameters()) + codes_not_counted(self)

    def num_active_parameters(self) -> int:
        """Number of weights that one token meets: of the experts those that it goes to."""
        config = self.config
        experts = sum(
            parameter.numel() for name, parameter in self.named_parameters() if ".feed_forward.experts." in name
        )
        idle = 0 if not config.num_experts else experts * (config.num_experts - config.experts_per_token)
        return self.num_parameters() - (idle // config.num_experts if idle else 0)


class EncoderDecoder(Transformer):
    """An encoder and a decoder that attends to its output: ``Transformer(config)`` with ``architecture="encoder-decoder"`` is one.

    Attributes:
        encoder: :class:`Stack`; its embedding is the decoder's with ``share_embeddings``.
        model: :class:`Stack`, the decoder.
        lm_head: as of :class:`Transformer`.

    Example::

        memory = model.encode(src, src_mask)                    # (batch, src_len, hidden)
        hidden = model.decode(memory, src_mask, tgt, tgt_mask)  # (batch, tgt_len, hidden)
        log_probabilities = model.generator(hidden)
    """

    def _make_stacks(self, **place: Any) -> None:
        config = self.config
        if not config.is_encoder_decoder:
            raise ValueError(f"config must have architecture 'encoder-decoder', got {config.architecture!r}")
        self.encoder = Stack(config.encoder, names=Names("src", "src_mask", "src_embeds"), **place)
        shared = self.encoder.embed_tokens if config.share_embeddings else None
        names = Names("tgt", "tgt_mask", "tgt_embeds", "src_mask")
        self.model = Stack(config, embed_tokens=shared, names=names, **place)

    def tied_names(self) -> dict[str, str]:
        shared = {"encoder.embed_tokens.weight": "model.embed_tokens.weight"} if self.config.share_embeddings else {}
        return {**shared, **super().tied_names()}

    def encode(self, src: Tensor | None, src_mask: Tensor | None = None, **options: Any) -> Tensor:
        """(batch, src_len) token ids -> memory (batch, src_len, hidden); arguments as of :meth:`Stack.forward`."""
        return self.encoder(src, src_mask, **options)  # type: ignore[no-any-return]

    def decode(
        self,
        memory: Tensor | None,
        src_mask: Tensor | None,
        tgt: Tensor | None,
        tgt_mask: Tensor | None = None,
        *,
        cache: ModelCache | None = None,
        **options: Any,
    ) -> Tensor:
        """(batch, tgt_len) token ids -> hidden states (batch, tgt_len, hidden).

        Args:
            memory: what :meth:`encode` gave; ``None`` with a cache that holds its keys and values.
            src_mask, tgt_mask: True (or nonzero) = attend, as ``attention_mask`` of :meth:`Stack.forward`; (batch, 1, 1, src_len) and
                (batch, 1, tgt_len, tgt_len) as in the textbook will do. That a token does not see those after it need not be said.
            tgt, cache, options: as of :meth:`Stack.forward`.
        """
        return self.model(tgt, tgt_mask, memory=memory, memory_mask=src_mask, cache=cache, **options)  # type: ignore[no-any-return]

    def forward(  # type: ignore[override]
        self,
        src: Tensor | None = None,
        tgt: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        *,
        return_attention: bool = False,
        return_hidden_states: bool = False,
        return_router_logits: bool = False,
        **options: Any,
    ) -> Any:
        """(batch, src_len) and (batch, tgt_len) token ids -> (batch, tgt_len, vocab_size) logits.

        Args:
            src, src_mask, tgt, tgt_mask: as of :meth:`encode` and :meth:`decode`; ``src_embeds=``, ``tgt_embeds=`` stand for the ids.
            return_attention, return_hidden_states, return_router_logits: return an :class:`Output` that has them.
        """
        wanted = return_attention, return_hidden_states, return_router_logits
        encoder_trace, trace = new_trace(*wanted), new_trace(*wanted)
        src_embeds, tgt_embeds = options.pop("src_embeds", None), options.pop("tgt_embeds", None)
        memory = self.encode(src, src_mask, inputs_embeds=src_embeds, trace=encoder_trace)
        hidden = self.decode(memory, src_mask, tgt, tgt_mask, inputs_embeds=tgt_embeds, trace=trace, **options)
        result = hidden if self.lm_head is None else self.lm_head(hidden)
        if not any(wanted):
            return result
        routed = None
        if trace.router_logits is not None and encoder_trace.router_logits is not None:
            routed = encoder_trace.router_logits + trace.router_logits
        return Output(
            result,
            trace.hidden_states,
            trace.attentions,
            trace.cross_attentions,
            routed,
            encoder_trace.hidden_states,
            encoder_trace.attentions,
        )

    def router_loss(
        self, router_logits: Sequence[Tensor], mask: Tensor | None = None, src_mask: Tensor | None = None
    ) -> Tensor:
        """As of :class:`Transformer`, with a mask for each side.

        Args:
            router_logits: of :class:`Output`, the encoder's layers first.
            mask, src_mask: (batch, tgt_len) and (batch, src_len), nonzero = a token that counts; ``None`` = all.
        """
        count = sum(map(self.config.encoder.is_sparse, range(self.config.num_encoder_layers)))
        sides = (router_logits[:count], src_mask), (router_logits[count:], mask)
        losses = [
            len(logits) * super(EncoderDecoder, self).router_loss(logits, of_side)
            for logits, of_side in sides
            if logits
        ]
        return torch.stack(losses).sum() / len(router_logits)


def new_trace(attention: bool, hidden_states: bool, router_logits: bool) -> Trace:
    """A trace that keeps what is asked for."""
    return Trace(
        [] if hidden_states else None,
        [] if attention else None,
        [] if attention else None,
        [] if router_logits else None,
    )


def _tie_after_load(model: Transformer, incompatible_keys: object) -> None:
    model.tie_weights()
    weight = model.model.embed_tokens.weight
    if not weight.is_meta:  # assign=True fills a model on the meta device, all but its tables
        model.make_tables(weight.device)
