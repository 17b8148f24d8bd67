"""One call of generate: how each step's logits are computed, and its tokens chosen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from typing import Any

import torch
from torch import Tensor, nn

from pytransformer.model.transformer import EncoderDecoder, Transformer
from pytransformer.nn.packed_weight import MAX_PACKED_ROWS

from . import graphs
from .bound import bind
from .caches import Prefix, SequenceCache, make_cache
from .graphs import RecordedStep
from .kept import KeptCache
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

    def repeat(self, times: int) -> None:
        """Makes each source so many that follow each other, where there is no cache to share it in."""
        assert self.memory is not None
        self.memory, self.mask = self.memory.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0)

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
        self.width = len(rows)  # sequences side by side, at most
        super().__init__([row.to(self.device) for row in rows], max_new_tokens, model.config.max_seqlen)
        self.model = model
        self.source = source
        self.max_new_tokens = max_new_tokens
        self.sampler = sampler
        self.use_cache = True
        self.pack_weights: bool | None = None
        self.cuda_graph: bool | None = None
        self.cache_kind = "contiguous"
        self.kept: KeptCache | None = None  # in the place of a cache of its own
        self.prefix: Prefix | None = None
        self.longest_step = 1  # tokens of one sequence, after the prompt

    def steps(self) -> Generator[Step, None, None]:
        """All of it, one step at a time; for a model in evaluation mode, without gradients."""
        if self.source is not None:
            self.source.encode()
        if self.finished:
            return
        try:
            yield from self.with_cache() if self.use_cache else self.without_cache()
        except GeneratorExit:  # between two steps
            raise
        except BaseException:
            if self.kept is not None:
                self.kept.give_up(self)  # what an unfinished step left in it
            raise

    def prepared(self) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
        """(decoder, head) for the steps behind the prompts, with packed weights if that pays.

        Not for the prompts: the first token need not wait for weights to be packed, or looked through for changes.
        """
        # Products of up to MAX_PACKED_ROWS rows cost next to the same.
        rows = max(self.width, min(self.width * self.longest_step, MAX_PACKED_ROWS))
        prepare(self.model, rows, self.max_new_tokens, self.pack_weights)
        return bind(self.model)

    def modules(self) -> list[nn.Module]:
        """All that has to be in evaluation mode."""
        return list(self.model.modules())

    def with_cache(self) -> Generator[Step, None, None]:
        model = self.model
        cache, options, logits = self._begin()
        jumps = self._jumps_of_rope()
        dropped = [False] * self.width
        decoder: Any = None
        recorded: RecordedStep | None = None
        while True:
            tokens, step = self._choose(logits)
            yield step
            if decoder is None and not (self.finished and self.pack_weights is None):
                decoder, head = self.prepared()
                if self._records():
                    recorded = RecordedStep(decoder, head, cache, required=bool(self.cuda_graph))
            if self.finished:
                return
            if self.kept is not None:
                self.kept.check_turn(self)
            self._arrange(cache)
            ended = [reason is not None for reason in self.stop_reasons]
            if ended != dropped:
                cache.drop(torch.tensor(ended, device=self.device), self._longest() - 1)  # the newest is not in yet
                dropped = ended
            if any(self._crossing(length) for length in jumps):
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
            is_worthwhile = self.max_new_tokens >= graphs.WORTHWHILE_TOKENS
            return is_worthwhile and self.why_not_recorded() is None and graphs.why_not_recorded(self.model) is None
        return self.cuda_graph

    def why_not_recorded(self) -> str | None:
        """The reason why this kind of run cannot record its step as a CUDA graph, or ``None``."""
        return None

    def _begin(self) -> tuple[SequenceCache, dict[str, Any], Tensor]:
        """A cache with the prompts in it, the decoder's options for a source, and the logits (batch, vocab_size) behind the prompts."""
        capacity = max(length + limit for length, (limit, _) in zip(self.prompt_lengths, self.limits))
        # The last token that is chosen is not fed again; a prompt alone must fit nevertheless.
        capacity = max(capacity - 1, *self.prompt_lengths)
        cache = self._make_cache(capacity) if self.kept is None else self.kept.open(self, capacity)
        options = {} if self.source is None else self.source.options(cache)
        known = cache.max_length
        if known == 0 and self.prefix is not None:
            known = self.prefix.fill(cache, self.model, self.rows)
        return cache, options, self._prefill(cache, options, known)

    def _make_cache(self, capacity: int) -> SequenceCache:
        weight = self.model.model.embed_tokens.weight
        # Beams share their source's keys and values.
        source = 0 if self.source is None else -(-self.source.ids.numel() // self.width)
        options = {"memory_seqlen": source}
        if self.cache_kind.startswith("paged"):
            # The longest step is the prefill; where RoPE changes there is another one, of any length.
            options["longest_step"] = (
                capacity if self._jumps_of_rope() else max(self.longest_step, *self.prompt_lengths)
            )
        return make_cache(
            self.cache_kind, self.model.config, self.width, capacity, self.device, weight.dtype, **options
        )

    def _arrange(self, cache: SequenceCache) -> None:
        """Before the tokens that were chosen are fed: puts the cache's sequences where theirs are."""

    def _prefill(
        self, cache: SequenceCache, options: dict[str, Any], known: int = 0, without_newest: Collection[int] = ()
    ) -> Tensor:
        """Logits after everything that there is so far, which fills the cache; rows of ended sequences mean nothing.

        Args:
            known: tokens of each sequence that the cache has already.
            without_newest: sequences whose newest token stays out.
        """
        rows = [row.tolist() + new for row, new in zip(self.rows, self.new_tokens)]
        rows = [row[:-1] if index in without_newest else row for index, row in enumerate(rows)]
        rows = [row[known:] if reason is None else row[:1] for row, reason in zip(rows, self.stop_reasons)]
        ids, lengths, real = padded(self.model, rows)
        cache.expect([len(row) for row in rows])
        decoder, _ = bind(self.model, packed=False)
        cache.choose_path(bound=decoder is not self.model.model)
        hidden = decoder(ids, real, cache=cache, **options)
        cache.advance(lengths, known + max(map(len, rows)))
        return self._last_logits(hidden, lengths)

    def _jumps_of_rope(self) -> set[int]:
        """Lengths behind which RoPE has quite other frequencies.

        "dynamic" has slightly other ones with every token; keys in the cache keep those that they were rotated by, as in transformers.
        """
        return {
            rotary.original_length
            for rotary in self.model.model.rotaries
            if rotary.depends_on_length and not rotary.is_dynamic
        }

    def _crossing(self, length: int) -> list[int]:
        """Sequences that go on and have their newest token, not fed yet, as the first one behind ``length``."""
        totals = (len(row) + len(new) for row, new in zip(self.rows, self.new_tokens))
        reasons = enumerate(zip(totals, self.stop_reasons))
        return [index for index, (total, reason) in reasons if reason is None and total == length + 1]

    def without_cache(self) -> Generator[Step, None, None]:
        while not self.finished:
            ids, lengths, _ = padded(self.model, [row.tolist() + new for row, new in zip(self.rows, self.new_tokens)])
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


def padded(model: Transformer, rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids (batch, longest), padded on the right with token 0, which nothing sees; lengths (batch); and which tokens are real.

    The last (batch, longest) is the decoder's mask, and ``None`` where it need not know: RoPE's frequencies may depend on the real length.
    """
    device = model.model.embed_tokens.weight.device
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    if not any(rotary.depends_on_length for rotary in model.model.rotaries):
        return ids, lengths, None
    return ids, lengths, torch.arange(longest, device=device) < lengths[:, None]
