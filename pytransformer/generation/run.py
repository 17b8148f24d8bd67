"""One call of generate: how each step's logits are computed, and its tokens chosen."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from pytransformer.model.transformer import EncoderDecoder, Transformer
from pytransformer.nn.position import RotaryEmbedding

from . import graphs
from .bound import bind
from .caches import Prefix, SequenceCache, make_cache
from .graphs import RecordedStep
from .prepare import prepare
from .record import Record
from .results import Step
from .sampling import Sampler, log_probabilities


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


class Run(Record):
    """One call: how each step's logits are computed and its tokens chosen."""

    def __init__(
        self, model: Transformer, rows: list[Tensor], source: Source | None, max_new_tokens: int, sampler: Sampler
    ) -> None:
        self.device = model.model.embed_tokens.weight.device
        super().__init__([row.to(self.device) for row in rows], max_new_tokens, model.config.max_seqlen)
        self.model = model
        self.source = source
        self.max_new_tokens = max_new_tokens
        self.sampler = sampler
        self.use_cache = True
        self.pack_weights: bool | None = None
        self.cuda_graph: bool | None = None
        self.cache_kind = "contiguous"
        self.prefix: Prefix | None = None

    def steps(self) -> Generator[Step, None, None]:
        """All of it, one step at a time; for a model in evaluation mode, without gradients."""
        if self.source is not None:
            self.source.encode()
        if self.finished:
            return
        yield from self.with_cache() if self.use_cache else self.without_cache()

    def with_cache(self) -> Generator[Step, None, None]:
        model, batch = self.model, len(self.rows)
        capacity = max(length + limit for length, (limit, _) in zip(self.prompt_lengths, self.limits))
        # The last token that is chosen is not fed again; a prompt alone must fit nevertheless.
        capacity = max(capacity - 1, *self.prompt_lengths)
        cache = self._make_cache(capacity)
        options = {} if self.source is None else self.source.options(cache)
        known = 0 if self.prefix is None else self.prefix.fill(cache, model, self.rows)
        logits = self._prefill(cache, options, known)
        jumps = self._jumps_of_rope()
        dropped = [False] * batch
        decoder: Any = None
        recorded: RecordedStep | None = None
        while True:
            tokens, step = self._choose(logits)
            yield step
            if decoder is None and not (self.finished and self.pack_weights is None):
                # Not before: the first token need not wait for weights to be packed, or looked through for changes.
                prepare(model, batch, self.max_new_tokens, self.pack_weights)
                decoder, head = bind(model)
                if self._records():
                    recorded = RecordedStep(decoder, head, cache, required=bool(self.cuda_graph))
            if self.finished:
                return
            ended = [reason is not None for reason in self.stop_reasons]
            if ended != dropped:
                cache.drop(torch.tensor(ended, device=self.device), self._longest() - 1)  # the newest is not in yet
                dropped = ended
            if any(self._crosses(length) for length in jumps):
                # Other frequencies from here on, for the tokens before too.
                cache.reset()
                logits = self._prefill(cache, options)
                continue
            if recorded is not None:
                cache.choose_path(bound=False)
                logits = recorded(tokens)
            else:
                cache.choose_path(bound=decoder is not model.model)
                logits = head(decoder(tokens[:, None], cache=cache, **options)[:, 0])
            cache.advance(1, self._longest())

    def _records(self) -> bool:
        """Whether the decode step becomes a CUDA graph."""
        if self.cuda_graph is None:
            return self.max_new_tokens >= graphs.WORTHWHILE_TOKENS and graphs.why_not_recorded(self.model) is None
        return self.cuda_graph

    def _make_cache(self, capacity: int) -> SequenceCache:
        weight = self.model.model.embed_tokens.weight
        options = {"memory_seqlen": 0 if self.source is None else self.source.ids.shape[1]}
        if self.cache_kind.startswith("paged"):
            # The longest step is the prefill; where RoPE changes there is another one, of any length.
            options["longest_step"] = capacity if self._jumps_of_rope() else max(self.prompt_lengths)
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
        if any(rotary.depends_on_length for rotary in self._rotaries()):
            real = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
        cache.expect([len(row) for row in rows])
        decoder, _ = bind(self.model, packed=False)
        cache.choose_path(bound=decoder is not self.model.model)
        hidden = decoder(ids, real, cache=cache, **options)
        cache.advance(lengths, known + max(map(len, rows)))
        return self._last_logits(hidden, lengths)

    def _rotaries(self) -> list[RotaryEmbedding]:
        rotaries = (self.model.model.rotary, self.model.model.local_rotary)
        return [rotary for rotary in rotaries if rotary is not None]

    def _jumps_of_rope(self) -> set[int]:
        """Lengths behind which RoPE has quite other frequencies.

        "dynamic" has slightly other ones with every token; keys in the cache keep those that they were rotated by, as in transformers.
        """
        return {
            rotary.original_length for rotary in self._rotaries() if rotary.depends_on_length and not rotary.is_dynamic
        }

    def _crosses(self, length: int) -> bool:
        """Whether some sequence that goes on has its newest token, not fed yet, as the first one behind ``length``."""
        totals = (len(row) + len(new) for row, new in zip(self.rows, self.new_tokens))
        return any(total == length + 1 for total, reason in zip(totals, self.stop_reasons) if reason is None)

    def without_cache(self) -> Generator[Step, None, None]:
        while not self.finished:
            ids, lengths = self._padded([row.tolist() + new for row, new in zip(self.rows, self.new_tokens)])
            options: dict[str, Any] = {} if self.source is None else self.source.options(None)
            real = torch.arange(ids.shape[1], device=self.device) < lengths[:, None]
            hidden = self.model.model(ids, real, **options)
            yield self._choose(self._last_logits(hidden, lengths))[1]

    def _last_logits(self, hidden: Tensor, lengths: Tensor) -> Tensor:
        """Logits of the last position of each sequence only: the head is the largest layer of a small model."""
        last = hidden[torch.arange(len(lengths), device=self.device), lengths - 1]
        return self.model.lm_head(last)  # type: ignore[no-any-return]

    def _longest(self) -> int:
        """Tokens in the cache of the longest sequence that goes on (its newest token has just been fed)."""
        going_on = (index for index, reason in enumerate(self.stop_reasons) if reason is None)
        return max(self.prompt_lengths[index] + len(self.new_tokens[index]) for index in going_on)

    def _choose(self, logits: Tensor) -> tuple[Tensor, Step]:
        """A step's tokens (batch), taken in."""
        sampler = self.sampler
        tokens, faults = sampler.draw(logits)
        values = None
        if self.log_probabilities is None:
            chosen, found = torch.stack((tokens, faults)).tolist()  # the host waits for the device once
        else:
            bits = log_probabilities(logits, tokens).view(torch.int64)  # so that all goes over together
            host = torch.stack((tokens, faults, bits)).cpu()
            (chosen, found), values = host[:2].tolist(), host[2].view(torch.float64).tolist()
        # The logits of a sequence that has ended mean nothing, so they may hold anything.
        sampler.refuse([0 if reason else fault for fault, reason in zip(found, self.stop_reasons)])
        step = self.record(chosen, logits, values)
        sampler.edits.take(step.tokens, [reason is not None for reason in self.stop_reasons])
        return tokens, step

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids (batch, longest), padded on the right with token 0, which nothing sees, and lengths (batch)."""
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.device)
        return ids, torch.tensor([len(row) for row in rows], device=self.device)
