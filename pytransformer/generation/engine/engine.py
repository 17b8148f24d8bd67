"""Continuous batching: requests join and leave a running batch at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytransformer.generation.bound import bind
from pytransformer.generation.caches.prefix import fingerprint, lengths_that_change_rope
from pytransformer.generation.caches.sizes import PAGE_SIZE, in_words, predict, split_kind
from pytransformer.generation.edits import number
from pytransformer.generation.generate import start
from pytransformer.generation.modes import evaluation
from pytransformer.generation.prepare import WORTHWHILE_TOKENS, prepare
from pytransformer.generation.prompts import check_generates, is_int
from pytransformer.generation.run import Run
from pytransformer.model.config import TransformerConfig
from pytransformer.model.transformer import Transformer

from .cache import EngineCache
from .choose import Choice, choose
from .pages import RowPages
from .request import Event, Request, Statistics
from .scheduler import Job, Piece, Scheduler

if TYPE_CHECKING:
    from pytransformer.text import Tokenizer

# Those of which a sequence's tokens need not know where they lie in the step.
_POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")


@dataclass(eq=False)
class _Entry:
    """A request on its way: its place in the schedule, and what it has generated."""

    job: Job
    run: Run


class Engine:
    """Continues many prompts at once, each with its own options, as they come: an engine inside one process, not a server.

    Every :meth:`step` runs the model once, over one token of each sequence that decodes and up to ``prefill_chunk`` tokens of prompts.
    A request gets the tokens that :func:`pytransformer.generation.generate` gives it alone, whatever runs beside it. Sequences that begin
    alike share pages. When pages run out, the request that came last (or has the lowest priority) gives its own back and is computed
    again later. Not for use from several threads at a time.

    Between steps the model may be used for other things; its parameters may be changed while no request is on its way (a few values not
    through ``.data``, which torch does not count: what sequences share would be kept).

    Args:
        model: a causal decoder, without an encoder.
        tokenizer: the model's, for texts and stop strings.
        max_batch: requests that run at a time, at most.
        num_pages: pages of the cache, for each group of layers with one window; ``None`` = as many as ``memory`` holds.
        memory: bytes for the cache, instead of ``num_pages``; both ``None`` = enough for ``max_batch`` sequences of the whole context.
        page_size: tokens of a page.
        prefill_chunk: tokens of prompts in one step, at most. More make prompts faster, and the others wait longer for their next token.
        cache: "paged", or quantised: "paged-int8", "paged-fp8".
        share_prefixes: whether what sequences have in common at their beginning is computed once and kept as long as there is room.
        pack_weights: as of :func:`pytransformer.generation.generate`; ``None`` = yes, on a CPU.
        poison: overwrites freed pages with NaN, so that whoever reads one is found out; for tests.

    Raises:
        TypeError, ValueError: options out of range, or a model that the engine does not serve.
        NotEnoughMemory: the cache does not fit.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        max_batch: int = 8,
        num_pages: int | None = None,
        memory: int | None = None,
        page_size: int = PAGE_SIZE,
        prefill_chunk: int = 256,
        cache: str = "paged",
        share_prefixes: bool = True,
        pack_weights: bool | None = None,
        poison: bool = False,
    ) -> None:
        _check_model(model)
        sizes = {"max_batch": max_batch, "page_size": page_size, "prefill_chunk": prefill_chunk}
        _check_sizes({**sizes, "num_pages": num_pages, "memory": memory})
        layout, quantised = split_kind(cache)
        if layout != "paged":
            raise ValueError(f"cache must be 'paged', 'paged-int8' or 'paged-fp8' for an engine, got {cache!r}")
        self.model = model
        self.tokenizer = tokenizer
        self.max_batch = max_batch
        weight = model.model.embed_tokens.weight
        capacity = model.config.max_seqlen
        chunk = min(prefill_chunk, capacity)
        if memory is not None:
            if num_pages is not None:
                raise ValueError(f"give num_pages or memory, got both: {num_pages} and {memory}")
            num_pages = _pages_in(memory, cache, model.config, max_batch, weight.dtype, page_size)
        self._cache = EngineCache(
            model.config, max_batch, capacity, device=weight.device, dtype=weight.dtype, quantised=quantised,
            page_size=page_size, num_pages=num_pages, longest_step=chunk, poison=poison,
        )  # fmt: skip
        self._pages = RowPages(self._cache.groups, chunk)
        self._scheduler = Scheduler(max_batch, prefill_chunk, self._pages, share=share_prefixes)
        self._share = share_prefixes
        self._pack_weights = pack_weights
        self._entries: dict[int, _Entry] = {}
        self._events: list[Event] = []  # of the next step
        self._next_id = 0
        # While it is not idle: what computes a step.
        self._bound: tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]] | None = None
        self._modules: list[torch.nn.Module] = []
        self._made_by: tuple[object, ...] | None = None  # the parameters that filled the pages
        self._is_stepping = False
        self._ended: Counter[str] = Counter()
        self._decoded = self._steps = self._pieces = 0

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended and every event has been given out."""
        return not self._entries and not self._events

    def add(self, request: Request) -> int:
        """Takes a request, which waits until there is room for it.

        Returns:
            Its id, by which events name it.

        Raises:
            TypeError, ValueError: as of :func:`pytransformer.generation.generate`; no room for a new token; more pages than there are.
                The engine and its other requests stay as they are.
        """
        self._refuse_reentry("add")
        if not isinstance(request, Request):
            raise TypeError(f"request must be a Request, got {type(request).__name__}")
        run = start(self.model, request.prompt, request.max_new_tokens, tokenizer=self.tokenizer, **request.options())
        if run.form != "one":
            raise ValueError(f"prompt must be one prompt, ids of shape (seqlen), got {len(run.rows)} in a {run.form}")
        priority = number("priority", request.priority)
        if priority != priority:
            raise ValueError("priority must be a number that can be compared, got nan")
        self._check_length(run)
        tokens = run.rows[0].tolist()
        job = Job(self._next_id, tokens, len(tokens), priority)
        self._next_id += 1
        self._entries[job.id] = _Entry(job, run)
        self._scheduler.add(job)
        return job.id

    def cancel(self, id: int) -> bool:
        """Ends a request; the next step tells so, with what it has generated. False if it has ended already.

        Raises:
            KeyError: there was no such request.
        """
        self._refuse_reentry("cancel")
        if not is_int(id) or not 0 <= id < self._next_id:
            raise KeyError(f"there is no request {id!r}")
        entry = self._entries.get(int(id))
        if entry is None:
            return False
        text = None if entry.run.texts is None else entry.run.texts[0].finish()
        self._events.append(self._end(entry, "cancelled", Choice(None), text))
        return True

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Runs the model once, if there is something to do: what has become of the requests, in no particular order.

        Raises:
            Whatever the model raises. Nothing is lost then: another call does the same step again.
        """
        self._refuse_reentry("step")
        self._is_stepping = True
        try:
            if self._entries:
                if self._bound is None:
                    self._modules = list(self.model.modules())
                with evaluation(self._modules):
                    self._events += self._advance()
        finally:
            self._is_stepping = False
        events, self._events = self._events, []
        return events

    def run(self) -> Iterator[Event]:
        """Steps until nothing is left to do; requests may be added and cancelled meanwhile."""
        while not self.is_idle:
            yield from self.step()

    def statistics(self) -> Statistics:
        """See :class:`Statistics`."""
        scheduler, pools = self._scheduler, [group.pool for group in self._cache.groups]
        failed, cancelled = self._ended["error"], self._ended["cancelled"]
        return Statistics(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            finished=self._ended.total() - failed - cancelled,
            cancelled=cancelled,
            failed=failed,
            pages_used=sum(pool.used_pages for pool in pools),
            pages_shared=sum(pool.shared_pages for pool in pools),
            pages_free=sum(pool.free_pages for pool in pools),
            pages_idle=sum(pool.idle_pages for pool in pools),
            tokens_prefilled=scheduler.prefilled,
            tokens_decoded=self._decoded,
            tokens_reused=scheduler.reused,
            tokens_recomputed=scheduler.recomputed,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            occupancy=self._pieces / (self._steps * self.max_batch) if self._steps else 0.0,
        )

    def _advance(self) -> list[Event]:
        """A step, in evaluation mode."""
        decoder, head = self._prepared()
        pieces = self._scheduler.plan()
        chosen = [place for place, piece in enumerate(pieces) if piece.completes]
        self._cache.choose_path(bound=decoder is not self.model.model)
        ids, last = self._cache.begin(
            [piece.job.row for piece in pieces],  # type: ignore[misc]
            [piece.job.cached for piece in pieces],
            [piece.job.tokens[piece.job.cached : piece.job.cached + piece.size] for piece in pieces],
            chosen,
        )
        hidden = decoder(ids, cache=self._cache)[:, 0]
        entries = [self._entries[pieces[place].job.id] for place in chosen]
        taken: list[tuple[_Entry, Choice, Tensor]] = []
        if entries:
            logits = head(hidden.index_select(0, last))
            choices = choose([entry.run for entry in entries], logits)
            taken = list(zip(entries, choices, logits[:, None]))
        # The model is through: nothing has been counted before, so that a step in which it raises can be done again.
        self._count(pieces)
        return [self._take(*one) for one in taken]

    def _prepared(self) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
        """The model's decoder and head, made ready when the engine was idle before."""
        if self._bound is None:
            if self._share and (found := _parameters_now(self.model)) != self._made_by:
                self._pages.forget_all()  # the parameters have changed
                self._made_by = found
            prepare(self.model, self.max_batch, WORTHWHILE_TOKENS, self._pack_weights)
            self._bound = bind(self.model)
        return self._bound

    def _count(self, pieces: list[Piece]) -> None:
        """What the step computed is in the cache now."""
        self._steps += 1
        self._pieces += len(pieces)
        for job, size in pieces:
            assert job.row is not None
            names = job.name_pages(self._pages.page_size) if self._share else []
            self._pages.written(job.row, job.cached, job.cached + size, names)
        self._scheduler.done(pieces)

    def _take(self, entry: _Entry, choice: Choice, logits: Tensor) -> Event:
        """What has become of a request whose next token was chosen, from logits (1, vocab_size)."""
        run, id = entry.run, entry.job.id
        if choice.error is not None:
            return self._end(entry, "error", choice)
        try:
            step = run.record([choice.token], logits, [choice.log_probability])
            run.sampler.edits.take(step.tokens, [run.finished])
        except Exception as error:  # of the tokenizer
            return self._end(entry, "error", Choice(None, error=error))
        self._decoded += 1
        text = None if step.texts is None else step.texts[0]
        if run.finished:
            return self._end(entry, run.stop_reasons[0], choice, text)
        entry.job.tokens.append(choice.token)  # type: ignore[arg-type]
        return Event(id, choice.token, text, choice.log_probability)

    def _end(self, entry: _Entry, reason: str | None, choice: Choice, text: str | None = None) -> Event:
        """Takes a request out, with what its last step gave."""
        job, run = entry.job, entry.run
        assert reason is not None
        run.stop_reasons[0] = reason
        if choice.error is not None and job.row is not None:
            self._pages.forget(job.row)  # what others would begin with may be broken
        self._scheduler.remove(job)
        del self._entries[job.id]
        if not self._entries:
            self._bound = None  # parameters may change before the next request
        self._ended[reason] += 1
        return Event(job.id, choice.token, text, choice.log_probability, reason, choice.error, run.result())

    def _check_length(self, run: Run) -> None:
        """ValueError unless there is room for a prompt and its new tokens."""
        length, limit = run.prompt_lengths[0], run.limits[0][0]
        if run.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1 for an engine, got {run.max_new_tokens}")
        if limit < 1:
            raise ValueError(
                f"prompt has {length} tokens, all of the model's context of {self.model.config.max_seqlen}: there is no room for a new one"
            )
        total = length + limit - 1  # the last one is not fed
        if total > (longest := min(lengths_that_change_rope(self.model), default=total)):
            raise ValueError(
                f"prompt and new tokens are {length} + {limit}: beyond {longest} RoPE's frequencies depend on the length, and keys of "
                "tokens before would have to be computed again; use generate, or fewer new tokens"
            )
        for group in self._cache.groups:
            if (needed := self._pages.most(group, total)) > group.pool.num_pages:
                raise ValueError(
                    f"a prompt of {length} tokens with {limit} new ones needs up to {needed} pages of {self._pages.page_size} "
                    f"tokens, and the engine has {group.pool.num_pages}: take fewer new tokens, or an engine with a larger num_pages"
                )

    def _refuse_reentry(self, name: str) -> None:
        """A constraint runs within a step, where nothing may change."""
        if self._is_stepping:
            raise RuntimeError(f"{name} was called within a step, by a constraint or a hook: call it between two steps")


def _parameters_now(model: Transformer) -> tuple[object, ...]:
    """What is another when parameters have changed: torch's counts of writes, which see a single value, and samples of all values."""
    writes = [
        (parameter.data_ptr(), None if parameter.is_inference() else parameter._version)
        for parameter in model.parameters()
    ]
    return writes, fingerprint(model)


def _check_model(model: Transformer) -> None:
    if not isinstance(model, Transformer):
        raise TypeError(f"model must be a Transformer, got {type(model).__name__}")
    check_generates(model.config)
    if model.config.is_encoder_decoder:
        raise ValueError("an engine serves models without an encoder: use generate for an encoder-decoder")
    if model.config.positions not in _POSITIONS or model.config.positions_skip_padding:
        raise ValueError(
            f"an engine serves positions {', '.join(map(repr, _POSITIONS))} that count every token, got {model.config.positions!r}"
        )


def _check_sizes(sizes: dict[str, int | None]) -> None:
    for name, value in sizes.items():
        if value is None and name in ("num_pages", "memory"):
            continue
        if not is_int(value):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:  # type: ignore[operator]
            raise ValueError(f"{name} must be at least 1, got {value}")


def _pages_in(memory: int, kind: str, config: TransformerConfig, batch: int, dtype: torch.dtype, page_size: int) -> int:
    """How many pages a cache of so many bytes has; ValueError if none."""
    one, two = (
        predict(kind, config, batch, config.max_seqlen, dtype, page_size=page_size, num_pages=count).total
        for count in (1, 2)
    )
    if memory < one:
        raise ValueError(
            f"memory must hold at least one page and the tables, {one} bytes ({in_words(one)}), got {memory} bytes"
        )
    return 1 + (memory - one) // (two - one)
