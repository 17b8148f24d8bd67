"""Embeddings, a pile of blocks, and a last norm: an encoder, or a decoder with or without a memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.nn import AlibiBias, AlibiSlopes, LayerCache, RelativeBias, RotaryEmbedding, SinusoidalPositions
from pytransformer.ops.checks import check_values

from .block import Block, Shared, Trace, add_and_norm, make_norm
from .config import TransformerConfig
from .heads import padding_mask


class ModelCache(Protocol):
    """What a :class:`Stack` asks of a cache: the layers' parts of it, and where each sequence stands.

    Of an encoder–decoder ``memory_kv`` may be of fewer sources than there are sequences: each serves equally many that follow each other.
    """

    memory_kv: list[tuple[Tensor, Tensor]] | None

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        ...

    def layer(self, index: int) -> LayerCache:
        """The part that layer ``index`` appends to and attends to."""
        ...

    def positions(self, seqlen: int) -> Tensor:
        """Positions of the next ``seqlen`` tokens of each sequence: int64 (batch, seqlen), all below the model's max_seqlen."""
        ...


class Names(NamedTuple):
    """What the caller calls a stack's arguments, for error messages."""

    ids: str = "input_ids"
    mask: str = "attention_mask"
    embeds: str = "inputs_embeds"
    memory_mask: str = "memory_mask"


class Stack(nn.Module):
    """Token ids (or vectors in their place) to hidden states.

    Args:
        config: of this side of the model alone (see :attr:`TransformerConfig.encoder`).
        embed_tokens: an embedding to share, or ``None`` for one of its own.
        names: of its arguments; ``None`` = as they stand in :meth:`forward`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        embed_tokens: nn.Embedding | None = None,
        names: Names | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.names = Names() if names is None else names
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width, **place) if embed_tokens is None else embed_tokens
        self.embed_positions = make_positions(config, **place)
        self.embed_types = nn.Embedding(config.type_vocab_size, width, **place) if config.type_vocab_size else None
        self.embed_norm = make_norm(config, **place) if config.embedding_norm else None
        self.rotary, self.local_rotary = make_rotaries(config, device=device)
        self.alibi_bias: AlibiBias | None = None
        self.relative_bias: RelativeBias | None = None
        alibi: AlibiSlopes | None = None
        if config.positions == "alibi" and config.alibi_bfloat16:
            self.alibi_bias = AlibiBias(config.num_heads, scale=config.alibi_scale, device=device)
        elif config.positions == "alibi":
            alibi = AlibiSlopes(config.num_heads, scale=config.alibi_scale, device=device)
        elif config.positions == "t5":
            buckets, distance = config.relative_buckets, config.relative_max_distance
            self.relative_bias = RelativeBias(
                buckets, config.num_heads, max_distance=distance, bidirectional=not config.causal, **place
            )
        layers = []
        for index in range(config.num_layers):
            is_local = self.local_rotary is not None and config.layer_types[index] == "sliding"
            rotary = self.local_rotary if is_local else self.rotary
            layers.append(Block(config, index, rotary, alibi, is_local=is_local, **place))
        self.layers = nn.ModuleList(layers)
        self.norm = make_norm(config, **place) if config.final_norm else None

    @property
    def rotaries(self) -> list[RotaryEmbedding]:
        """RoPE's tables: one, two where layers with a window have their own, or none."""
        return [rotary for rotary in (self.rotary, self.local_rotary) if rotary is not None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        positions: Tensor | None = None,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: ModelCache | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """(batch, seqlen) integers -> (batch, seqlen, hidden).

        Args:
            input_ids: token ids, the whole sequences, or with a cache those that follow what it holds.
            attention_mask: True (or nonzero) = attend: (batch, seqlen), which tokens are real; or of three or four dimensions, broadcast to
                (batch, num_heads, seqlen, seqlen), who sees whom, besides what the configuration hides. With a cache (batch, seqlen): which
                of the new tokens are real, padding last.
            inputs_embeds: (batch, seqlen, hidden) instead of ``input_ids``: what stands in the place of the token embeddings.
            token_type_ids: (batch, seqlen) integers, 0 by default; for models with token types.
            positions: (batch, seqlen) or (seqlen) integers, where they do not simply count from 0 (left padding): rows of a table, or of
                RoPE's. ALiBi and relative positions count the places in the row itself, whatever these say.
            memory, memory_mask: of an encoder: (batch, memory_seqlen, hidden), and which of it is real, as ``attention_mask``.
            cache: keys and values of the tokens before, appended to; ``None`` = none before.
            trace: takes what is to be kept.

        Raises:
            TypeError, ValueError: ids of a wrong dtype or shape, ids outside the vocabulary (checked on a CPU), more tokens than
                max_seqlen, or arguments that do not go together.
        """
        self._check(input_ids, inputs_embeds, cache)
        trace = Trace() if trace is None else trace
        if cache is not None and trace.attentions is not None:
            raise ValueError("return_attention is for whole sequences: leave the cache out")
        if positions is not None and positions.ndim == 1:
            positions = positions[None]
        delta = self._embed(input_ids, inputs_embeds, token_type_ids, positions, cache)
        batch, seqlen = delta.shape[:2]
        self._check_memory(memory, memory_mask, cache, batch)
        shape = batch, self.config.num_heads, seqlen
        shared = Shared({}, {}, trace, memory=memory)
        own = masks_of(self.names.mask, attention_mask, *shape, seqlen)
        if cache is None:
            shared.masks = own
        elif "mask" in own:
            raise ValueError(
                f"with a cache {self.names.mask} must be (batch, seqlen), got shape {tuple(own['mask'].shape)}"
            )
        else:
            shared.memory_kv = cache.memory_kv
        if memory_mask is not None:
            keys = shared.memory_kv[0][0] if memory is None and shared.memory_kv is not None else memory
            assert keys is not None
            sources = keys.shape[0]
            shape = sources, self.config.num_heads, batch * seqlen // sources
            shared.memory_masks = masks_of(self.names.memory_mask, memory_mask, *shape, keys.shape[1])
        self._place(shared, delta, own.get("key_padding_mask"), positions, cache)
        residual: Tensor | None = None
        for index, block in enumerate(self.layers):
            if trace.hidden_states is not None:
                trace.hidden_states.append(delta if residual is None else residual + delta)
            delta, residual = block(delta, residual, shared, cache=None if cache is None else cache.layer(index))
        if trace.hidden_states is not None:
            trace.hidden_states.append(delta if residual is None else residual + delta)
        if self.norm is not None:
            return add_and_norm(self.norm, delta, residual)[0]
        return delta if residual is None else residual + delta

    def keys_and_values(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each layer's cross-attention, for a memory that many passes attend to."""
        return [block.cross_attention.keys_and_values(memory) for block in self.layers]  # type: ignore[union-attr, operator]

    def _check(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, cache: ModelCache | None) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            given = "neither" if input_ids is None else "both"
            raise ValueError(f"give either {self.names.ids} or {self.names.embeds}, got {given}")
        if cache is not None and not self.config.causal:
            raise ValueError("a cache is for causal models: with causal=False every token sees those that follow")
        if input_ids is not None:
            check_input_ids(input_ids, self.config, self.names.ids)
            return
        assert inputs_embeds is not None
        width, limit = self.config.hidden_size, self.config.max_seqlen
        if not isinstance(inputs_embeds, Tensor) or not inputs_embeds.is_floating_point():
            raise TypeError(f"{self.names.embeds} must be a floating tensor, got {_kind(inputs_embeds)}")
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != width or inputs_embeds.shape[1] > limit:
            raise ValueError(
                f"{self.names.embeds} must have shape (batch, seqlen of at most {limit}, hidden_size = {width}), "
                f"got {tuple(inputs_embeds.shape)}"
            )

    def _check_memory(
        self, memory: Tensor | None, memory_mask: Tensor | None, cache: ModelCache | None, batch: int
    ) -> None:
        if not self.config.is_encoder_decoder:
            if memory is not None or memory_mask is not None:
                raise ValueError(
                    "memory and memory_mask are for the decoder of an encoder-decoder, and this stack has no cross-attention"
                )
            return
        if memory is None:
            if cache is None or cache.memory_kv is None:
                raise ValueError("memory must be given: what encode() made of the source, got None")
            return
        if not isinstance(memory, Tensor) or not memory.is_floating_point():
            raise TypeError(f"memory must be a floating tensor, what encode() made of the source, got {_kind(memory)}")
        width = self.config.hidden_size
        if memory.ndim != 3 or memory.shape[0] != batch or memory.shape[2] != width:
            raise ValueError(
                f"memory must have shape (batch, src_len, hidden_size) = ({batch}, any, {width}), got {tuple(memory.shape)}"
            )

    def _embed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        positions: Tensor | None,
        cache: ModelCache | None,
    ) -> Tensor:
        config = self.config
        hidden: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if config.scale_embeddings:
            # Rounded as the embeddings are: so Gemma was trained.
            hidden = hidden * float(torch.tensor(math.sqrt(config.hidden_size), dtype=hidden.dtype, device="cpu"))
        if self.embed_positions is not None:
            rows = self._positions(input_ids, hidden, positions, cache) + config.position_offset
            hidden = hidden + self.embed_positions(rows).to(hidden.dtype)
        if self.embed_types is not None:
            if token_type_ids is None:
                hidden = hidden + self.embed_types.weight[0]
            else:
                check_values("token_type_ids", token_type_ids, 0, config.type_vocab_size - 1, "token types")
                if not _broadcasts(token_type_ids, hidden.shape[:2]):
                    raise ValueError(
                        f"token_type_ids must have shape (batch, seqlen) = {tuple(hidden.shape[:2])}, got {tuple(token_type_ids.shape)}"
                    )
                hidden = hidden + self.embed_types(token_type_ids)
        elif token_type_ids is not None:
            raise ValueError(
                "token_type_ids are for models with token types: this configuration has type_vocab_size = 0"
            )
        if self.embed_norm is not None:
            hidden = self.embed_norm(hidden)
        if self.training and config.embedding_dropout > 0.0:
            hidden = F.dropout(hidden, config.embedding_dropout)
        return hidden

    def _positions(
        self, input_ids: Tensor | None, hidden: Tensor, positions: Tensor | None, cache: ModelCache | None
    ) -> Tensor:
        if positions is not None:
            check_values("positions", positions, 0, self.config.max_seqlen - 1, "positions")
            return positions
        seqlen = hidden.shape[1]
        if self.config.positions_skip_padding and input_ids is not None:
            if cache is not None:
                raise ValueError("positions that skip padding are not served with a cache")
            real: Tensor = input_ids.ne(self.config.pad_token_id or 0)
            return (real.cumsum(dim=1) - 1).masked_fill(~real, -1)
        return torch.arange(seqlen, device=hidden.device) if cache is None else cache.positions(seqlen)

    def _place(
        self,
        shared: Shared,
        hidden: Tensor,
        real: Tensor | None,
        positions: Tensor | None,
        cache: ModelCache | None,
    ) -> None:
        """Fills in what the attention of every layer knows of positions."""
        seqlen = hidden.shape[1]
        before = 0 if cache is None else cache.max_length
        if self.alibi_bias is not None:
            places = torch.arange(before + seqlen, device=hidden.device)[None]
            if cache is None and real is not None:
                # Padding in front moves nothing: the rounding depends on the place.
                places = (real.cumsum(dim=1) - 1) * real
            shared.bias = self.alibi_bias(places)
        if self.relative_bias is not None:
            keys = torch.arange(before + seqlen, device=hidden.device)
            queries = keys[None] if cache is None else cache.positions(seqlen)
            shared.bias = self.relative_bias(keys - queries[..., None])
        if self.rotary is not None:
            shared.positions = self._rows(self.rotary, hidden, real, positions, cache)
            if self.local_rotary is not None:
                shared.local_positions = self._rows(self.local_rotary, hidden, real, positions, cache)

    def _rows(
        self,
        rotary: RotaryEmbedding,
        hidden: Tensor,
        real: Tensor | None,
        positions: Tensor | None,
        cache: ModelCache | None,
    ) -> Tensor | None:
        """Rows of the tables for each token, or ``None`` where they count from 0, or from the cache's lengths."""
        if not rotary.depends_on_length:
            return positions
        batch, seqlen = hidden.shape[:2]
        if cache is None and positions is None and real is None:
            if seqlen <= rotary.original_length:
                return None
            lengths = [seqlen] * batch
            return rotary.rows(torch.arange(seqlen, device=hidden.device).expand(batch, seqlen), lengths)
        places = positions
        if places is None:
            places = torch.arange(seqlen, device=hidden.device) if cache is None else cache.positions(seqlen)
        places = places.expand(batch, seqlen)
        if real is not None:
            if positions is None and cache is None:
                # Padding in front makes a sequence no longer. It moves all its tokens alike, and only their distances matter.
                places = places - real.int().argmax(dim=1, keepdim=True)
            places = places.masked_fill(~real, 0)  # which there may be no row for
        return rotary.rows(places, (places.amax(dim=1) + 1).tolist())


def make_positions(config: TransformerConfig, **place: Any) -> nn.Module | None:
    """The table of positions that is added to the embeddings, if there is one."""
    rows = config.max_seqlen + config.position_offset
    if config.positions == "learned":
        return nn.Embedding(rows, config.hidden_size, **place)
    if config.positions == "sinusoidal":
        return SinusoidalPositions(rows, config.hidden_size, halves=config.sinusoidal_halves, device=place["device"])
    return None


def make_rotaries(
    config: TransformerConfig, *, device: torch.device | str | None
) -> tuple[RotaryEmbedding | None, RotaryEmbedding | None]:
    """RoPE's tables for layers without a window of their own, and for those with one; ``None`` = none, or the same."""
    if config.positions != "rope":
        return None, None

    def make(base: float, scaling: Any) -> RotaryEmbedding:
        return RotaryEmbedding(
            config.rotary_dim,
            config.max_seqlen,
            base=base,
            scaling=scaling,
            interleaved=config.rope_interleaved,
            device=device,
        )

    local = None if config.local_rope_base is None else make(config.local_rope_base, config.local_rope_scaling)
    return make(config.rope_base, config.rope_scaling), local


def masks_of(name: str, mask: Tensor | None, batch: int, num_heads: int, queries: int, keys: int) -> dict[str, Tensor]:
    """A mask as people give it, as arguments of the attention.

    Raises:
        TypeError: not a tensor, or a floating one.
        ValueError: another shape than (batch, keys) (which tokens are real), or of three or four dimensions one that broadcasts to (batch,
            num_heads, queries, keys) (who sees whom).
    """
    if mask is None:
        return {}
    if not isinstance(mask, Tensor) or mask.is_floating_point():
        raise TypeError(f"{name} must be a boolean or integer tensor, True or nonzero = attend, got {_kind(mask)}")
    if mask.ndim not in (2, 3, 4):
        raise ValueError(f"{name} must have 2, 3 or 4 dimensions, got shape {tuple(mask.shape)}")
    if mask.ndim == 2 and tuple(mask.shape) != (batch, keys):
        raise ValueError(f"{name} must have shape (batch, seqlen) = {(batch, keys)}, got {tuple(mask.shape)}")
    four = mask[:, None] if mask.ndim == 3 else mask
    if mask.ndim > 2 and not _broadcasts(four, (batch, num_heads, queries, keys)):
        raise ValueError(
            f"{name} must broadcast to (batch, num_heads, queries, keys) = {(batch, num_heads, queries, keys)}, "
            f"or without the heads, got shape {tuple(mask.shape)}"
        )
    flat = padding_mask(mask)
    if flat is not None and flat.ndim == 2:
        return {"key_padding_mask": (flat if flat.dtype == torch.bool else flat != 0).expand(batch, keys)}
    return {"mask": four}


def _broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.ndim <= len(shape) and all(
        size in (1, wanted) for size, wanted in zip(reversed(tensor.shape), reversed(shape))
    )


def _kind(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def check_input_ids(input_ids: object, config: TransformerConfig, name: str = "input_ids") -> None:
    """TypeError or ValueError unless (batch, seqlen) integer ids of at most max_seqlen tokens, on a CPU within the vocabulary."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (batch, seqlen), got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {input_ids.dtype}")
    if input_ids.ndim != 2:
        raise ValueError(f"{name} must have shape (batch, seqlen), got {tuple(input_ids.shape)}")
    if input_ids.shape[1] > config.max_seqlen:
        raise ValueError(f"{name} must have at most max_seqlen = {config.max_seqlen} tokens, got {input_ids.shape[1]}")
    check_values(name, input_ids, 0, config.vocab_size - 1, "token ids")
