"""The generation loop: the prompts in parallel (prefill), then one token per step and sequence (decode).

Prompts of different lengths run side by side, right-padded: each sequence has its own length in the cache and sees its own tokens only,
so every prompt gets the continuation it gets alone. An encoder–decoder reads the prompts with its encoder, once, and what is continued is
the target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytransformer.model.config import TransformerConfig
from pytransformer.model.transformer import EncoderDecoder, Transformer

from .bound import bind
from .caches import Prefix, SequenceCache, make_cache
from .caches.sizes import split_kind
from .prepare import prepare
from .prompts import end_tokens, is_int, prompt_rows, start_tokens
from .sampling import Sampler

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Step:
    """One new token of each sequence, as the callback sees it.

    Attributes:
        index: 0 for the first new token.
        tokens: per sequence, or ``None`` for one that had ended before.
        logits: (batch, vocab_size) that the tokens were chosen from; rows of ended sequences mean nothing.
        stop_reasons: per sequence, ``None`` while it goes on; set in the step of its last token.
    """

    index: int
    tokens: list[int | None]
    logits: Tensor
    stop_reasons: list[str | None]


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        token_ids: prompts and new tokens, in the form of the prompts: a tensor (seqlen), or (batch, seqlen) filled up with the padding
            token where a sequence ended early; for a list of prompts a list of 1-D tensors. An end token that was produced is included.
            Of an encoder–decoder: the targets, from their first token on.
        stop_reasons: per sequence "eos" (an end token was produced), "length" (max_new_tokens) or "context" (the model's max_seqlen).
        prompt_lengths, new_tokens: per sequence, in tokens; of an encoder–decoder those of the target.
    """

    token_ids: Tensor | list[Tensor]
    stop_reasons: list[str]
    prompt_lengths: list[int]
    new_tokens: list[int]


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Any] | npt.NDArray[Any],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
    cache: str = "contiguous",
    prefix: Prefix | None = None,
    pack_weights: bool | None = None,
    decoder_start_token_id: int | Sequence[int] | None = None,
    callback: Callable[[Step], object] | None = None,
) -> Generation:
    """Continues each prompt until an end token, ``max_new_tokens``, or the model's context limit.

    The model runs in evaluation mode and is put back afterwards. Its parameters must not be changed meanwhile (by the callback).

    Args:
        prompts: int64 or int32 ids (batch, seqlen) or (seqlen), or a list with one prompt each, of any lengths of at least 1: 1-D tensors,
            numpy arrays or lists of ints. One list of ints is one prompt, as a tensor (seqlen) is; numpy arrays are as tensors are.
        max_new_tokens: at least 0.
        temperature, top_k, top_p, seed: see :class:`Sampler`; the default is greedy.
        eos_token_id: one or several end tokens; ``None`` = the configuration's, an empty sequence = none.
        pad_token_id: fills up sequences that ended early in a tensor of results; ``None`` = the configuration's, else the end token.
        use_cache: ``False`` computes the whole sequence again for every token: slow, for comparison.
        cache: kind of the cache: "contiguous", "paged", or quantised: "int8", "fp8", "paged-int8", "paged-fp8"; see docs/caches.md.
        prefix: what the prompts begin with and was computed before, see :class:`Prefix`; only what follows is computed. Prompts that begin
            otherwise are computed from where they do.
        pack_weights: on a CPU, decode from packed copies of the linear layers' weights (see :func:`prepare_for_decoding`), which are kept
            for later calls; ``False`` frees them; ``None`` = if they are there already, or so many tokens are asked for that it pays.
        decoder_start_token_id: of an encoder–decoder: the token that each target starts with, or several; ``None`` = the configuration's.
        callback: called after each step; what it raises ends the generation.

    Raises:
        ValueError: a model that does not predict the next token.
        TypeError, ValueError: prompts that are empty, longer than the context, or not token ids; options out of range.
        ValueError: the logits of a sequence that goes on hold NaN, or nothing but -inf; the message names row and step.
    """
    if not is_int(max_new_tokens):
        raise TypeError(f"max_new_tokens must be an int, got {max_new_tokens!r}")
    max_new_tokens = int(max_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if pad_token_id is not None and not is_int(pad_token_id):
        raise TypeError(f"pad_token_id must be an int or None, got {pad_token_id!r}")
    check_generates(model.config)
    source: Source | None = None
    if isinstance(model, EncoderDecoder):
        sources, form = prompt_rows(prompts, model.config.encoder)
        source = Source(model, sources)
        rows = [start_tokens(decoder_start_token_id, model.config)] * len(sources)
    elif decoder_start_token_id is not None:
        raise ValueError("decoder_start_token_id is for an encoder-decoder, this model has no encoder")
    else:
        rows, form = prompt_rows(prompts, model.config)
    eos_token_ids = end_tokens(eos_token_id, model.config)
    sampler = Sampler(len(rows), temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    run = _Run(model, rows, source, max_new_tokens, eos_token_ids, callback)
    split_kind(cache)
    if prefix is not None and (source is not None or not use_cache):
        raise ValueError("prefix is for models without an encoder, and for use_cache=True")
    run.cache_kind, run.prefix = cache, prefix
    training = model.training
    model.eval()
    try:
        if source is not None:
            source.encode()
        if use_cache and not run.finished:
            prepare(model, len(rows), max_new_tokens, pack_weights)
        (run.with_cache if use_cache else run.without_cache)(sampler)
    finally:
        model.train(training)
    padding = model.config.pad_token_id if pad_token_id is None else int(pad_token_id)
    return run.result(form, padding if padding is not None else (eos_token_ids or (0,))[0])


def check_generates(config: TransformerConfig) -> None:
    """ValueError unless a model of this configuration predicts the next token."""
    if config.head != "lm" or not config.causal:
        raise ValueError(
            "generation needs a model that predicts the next token (head='lm', causal=True), "
            f"got head={config.head!r}, causal={config.causal}"
        )


class Source:
    """What an encoder–decoder reads, padded on the right, and what its encoder made of it."""

    def __init__(self, model: EncoderDecoder, rows: list[Tensor]) -> None:
        self.model = model
        device = model.model.embed_tokens.weight.device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        self.ids = torch.nn.utils.rnn.pad_sequence([row.to(device) for row in rows], batch_first=True)
        self.mask = torch.arange(self.ids.shape[1], device=device) < lengths[:, None]
        self.is_ragged = len(set(map(len, rows))) > 1
        self.memory: Tensor | None = None

    def encode(self) -> None:
        self.memory = self.model.encode(self.ids, self.mask if self.is_ragged else None)

    def options(self, cache: SequenceCache | None) -> dict[str, Tensor | None]:
        """For the decoder: the memory, or with a cache its keys and values, which are made once and lie there."""
        assert self.memory is not None
        mask = self.mask if self.is_ragged else None
        if cache is None:
            return {"memory": self.memory, "memory_mask": mask}
        if cache.memory_kv is None:
            cache.memory_kv = self.model.model.keys_and_values(self.memory)
        return {"memory_mask": mask}


class _Run:
    """The state of one call: each sequence's new tokens and why it stopped, on the host."""

    def __init__(
        self,
        model: Transformer,
        rows: list[Tensor],
        source: Source | None,
        max_new_tokens: int,
        eos_token_ids: tuple[int, ...],
        callback: Callable[[Step], object] | None,
    ) -> None:
        self.model = model
        self.device = model.model.embed_tokens.weight.device
        self.rows = [row.to(self.device) for row in rows]
        self.source = source
        self.prompt_lengths = [len(row) for row in rows]
        self.eos_token_ids = frozenset(eos_token_ids)
        self.callback = callback
        self.cache_kind = "contiguous"
        self.prefix: Prefix | None = None
        self.new_tokens: list[list[int]] = [[] for _ in rows]
        self.stop_reasons: list[str | None] = [None] * len(rows)
        # The most tokens each sequence may get, and what it will have run into then.
        self.limits = []
        for length in self.prompt_lengths:
            room = model.config.max_seqlen - length
            self.limits.append((max_new_tokens, "length") if max_new_tokens <= room else (room, "context"))
        for index, (limit, reason) in enumerate(self.limits):
            if limit == 0:
                self.stop_reasons[index] = reason

    @property
    def finished(self) -> bool:
        return all(reason is not None for reason in self.stop_reasons)

    def with_cache(self, sampler: Sampler) -> None:
        if self.finished:
            return
        model, batch = self.model, len(self.rows)
        capacity = max(length + limit for length, (limit, _) in zip(self.prompt_lengths, self.limits))
        # The last token that is chosen is not fed again; a prompt alone must fit nevertheless.
        capacity = max(capacity - 1, *self.prompt_lengths)
        cache = self._make_cache(capacity)
        options = {} if self.source is None else self.source.options(cache)
        known = 0 if self.prefix is None else self.prefix.fill(cache, model, self.rows)
        logits = self._prefill(cache, options, known)
        changes = self._changes_of_rope()
        dropped = [False] * batch
        decoder, head = bind(model)
        while True:
            tokens = self._choose(sampler, logits)
            if self.finished:
                return
            ended = [reason is not None for reason in self.stop_reasons]
            if ended != dropped:
                cache.drop(torch.tensor(ended, device=self.device), self._longest() - 1)  # the newest is not in yet
                dropped = ended
            if any(self._crosses(length) for length in changes):
                # Other frequencies from here on, for the tokens before too.
                cache.reset()
                logits = self._prefill(cache, options)
                continue
            cache.choose_path(bound=decoder is not model.model)
            hidden = decoder(tokens[:, None], cache=cache, **options)
            cache.advance(1, self._longest())
            logits = head(hidden[:, 0])

    def _make_cache(self, capacity: int) -> SequenceCache:
        weight = self.model.model.embed_tokens.weight
        options = {"memory_seqlen": 0 if self.source is None else self.source.ids.shape[1]}
        if self.cache_kind.startswith("paged"):
            # The longest step is the prefill; where RoPE changes there is another one, of any length.
            options["longest_step"] = capacity if self._changes_of_rope() else max(self.prompt_lengths)
        return make_cache(
            self.cache_kind, self.model.config, len(self.rows), capacity, self.device, weight.dtype, **options
        )

    def _prefill(self, cache: SequenceCache, options: dict[str, Any], known: int = 0) -> Tensor:
        """Logits after everything that there is so far, which fills the cache; rows of ended sequences mean nothing.

        ``known``: tokens of each sequence that the cache has already.
        """
        rows = [row.tolist() + new for row, new in zip(self.rows, self.new_tokens)]
        rows = [row[known:] if reason is None else row[:1] for row, reason in zip(rows, self.stop_reasons)]
        ids, lengths = self._padded(rows)
        real = None
        if self._changes_of_rope():
            real = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        cache.expect([len(row) for row in rows])
        hidden = self.model.model(ids, real, cache=cache, **options)
        cache.advance(lengths, known + max(map(len, rows)))
        # Logits of the last position of each prompt only: the head is the largest layer of a small model.
        return self.model.lm_head(hidden[torch.arange(len(rows), device=self.device), lengths - 1])  # type: ignore[no-any-return]

    def _changes_of_rope(self) -> set[int]:
        """Lengths behind which RoPE has other frequencies."""
        rotaries = (self.model.model.rotary, self.model.model.local_rotary)
        return {rotary.original_length for rotary in rotaries if rotary is not None and rotary.depends_on_length}

    def _crosses(self, length: int) -> bool:
        """Whether some sequence that goes on has its newest token, not fed yet, as the first one behind ``length``."""
        totals = (len(row) + len(new) for row, new in zip(self.rows, self.new_tokens))
        return any(total == length + 1 for total, reason in zip(totals, self.stop_reasons) if reason is None)

    def without_cache(self, sampler: Sampler) -> None:
        while not self.finished:
            ids, lengths = self._padded([row.tolist() + new for row, new in zip(self.rows, self.new_tokens)])
            options: dict[str, Any] = {} if self.source is None else self.source.options(None)
            real = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
            hidden = self.model.model(ids, real, **options)
            logits = self.model.lm_head(hidden[torch.arange(len(lengths), device=self.device), lengths - 1])
            self._choose(sampler, logits)

    def _longest(self) -> int:
        """Tokens in the cache of the longest sequence that goes on (its newest token has just been fed)."""
        going_on = (index for index, reason in enumerate(self.stop_reasons) if reason is None)
        return max(self.prompt_lengths[index] + len(self.new_tokens[index]) for index in going_on)

    def _choose(self, sampler: Sampler, logits: Tensor) -> Tensor:
        """A step's tokens (batch), taken in."""
        tokens, faults = sampler.draw(logits)
        chosen, found = torch.stack((tokens, faults)).tolist()  # the host waits for the device once
        # The logits of a sequence that has ended mean nothing, so they may hold anything.
        sampler.refuse([0 if reason else fault for fault, reason in zip(found, self.stop_reasons)])
        self._record(chosen, logits)
        return tokens

    def _record(self, chosen: list[int | None], logits: Tensor) -> None:
        """Takes in a step's tokens and finds which sequences end with them."""
        before = list(self.stop_reasons)
        for index, token in enumerate(chosen):
            if before[index] is not None:
                chosen[index] = None
                continue
            assert token is not None
            new = self.new_tokens[index]
            new.append(token)
            limit, reason = self.limits[index]
            if token in self.eos_token_ids:
                self.stop_reasons[index] = "eos"
            elif len(new) == limit:
                self.stop_reasons[index] = reason
        if self.callback is not None:
            step = max(len(new) for new in self.new_tokens) - 1
            self.callback(Step(step, chosen, logits, list(self.stop_reasons)))

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids (batch, longest), padded on the right with token 0, which nothing sees, and lengths (batch)."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        return ids, torch.tensor([len(row) for row in rows], device=self.device)

    def result(self, form: str, padding: int) -> Generation:
        sequences = [
            torch.cat([row, torch.tensor(new, dtype=row.dtype, device=row.device)])
            for row, new in zip(self.rows, self.new_tokens)
        ]
        token_ids: Tensor | list[Tensor] = sequences
        if form != "list":
            token_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=padding)
            if form == "one":
                token_ids = token_ids[0]
        reasons = [reason for reason in self.stop_reasons if reason is not None]
        return Generation(token_ids, reasons, self.prompt_lengths, [len(new) for new in self.new_tokens])
