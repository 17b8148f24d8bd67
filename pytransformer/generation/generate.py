"""The generation loop: the prompts in parallel (prefill), then one token per step and sequence (decode).

Prompts of different lengths run side by side, right-padded: each sequence has its own length in the cache and sees its own tokens only,
so every prompt gets the continuation it gets alone. An encoder–decoder reads the prompts with its encoder, once, and what is continued is
the target.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pytransformer.model.transformer import EncoderDecoder, Transformer
from pytransformer.nn.position import RotaryEmbedding

from .bound import bind
from .caches import Prefix, SequenceCache, make_cache
from .caches.sizes import split_kind
from .edits import Constraint
from .prepare import prepare
from .prompts import check_generates, end_tokens, is_int, prompt_rows, start_tokens
from .record import Record
from .results import Generation, Step
from .sampling import Sampler, log_probabilities
from .stopping import NewText, stop_conditions

if TYPE_CHECKING:
    import numpy.typing as npt

    from pytransformer.text import Tokenizer


@torch.no_grad()
def generate(
    model: Transformer,
    prompts: Tensor | Sequence[Any] | npt.NDArray[Any],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    constraint: Constraint | None = None,
    seed: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop: str | int | Sequence[str | int] | None = None,
    tokenizer: Tokenizer | None = None,
    return_log_probabilities: bool = False,
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
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, constraint, seed: see
            :class:`Sampler`; the default is greedy. Of an encoder–decoder the target is what penalties and constraint see.
        eos_token_id: one or several end tokens; ``None`` = the configuration's, an empty sequence = none.
        pad_token_id: fills up sequences that ended early in a tensor of results; ``None`` = the configuration's, else the end token.
        stop: strings that end a sequence where its new text has them, across the borders of tokens too, and ids of tokens that end it
            beside the end tokens; one or several. Strings need ``tokenizer``; one that is a special token means that token.
        tokenizer: the model's. Results then have the new texts, and those end before a stop string.
        return_log_probabilities: results have those of the chosen tokens, see :class:`Generation`.
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
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": logit_bias,
        "constraint": constraint,
        "seed": seed,
    }
    run = _start(
        model,
        prompts,
        max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        stop=stop,
        tokenizer=tokenizer,
        return_log_probabilities=return_log_probabilities,
        use_cache=use_cache,
        cache=cache,
        prefix=prefix,
        pack_weights=pack_weights,
        decoder_start_token_id=decoder_start_token_id,
        **sampling,
    )
    with _evaluation(list(model.modules())):
        for step in run.steps():
            if callback is not None:
                callback(step)
    return run.result()


def generate_stream(
    model: Transformer, prompts: Tensor | Sequence[Any] | npt.NDArray[Any], max_new_tokens: int, **options: Any
) -> Generator[Step, None, Generation]:
    """The steps of :func:`generate` as they are computed, each when it is asked for.

    With one prompt and a tokenizer, ``step.texts[0]`` is what to show next. The iterator may be left or closed at any time; between two
    steps the model is in the mode it was in before, and may be used for other things, but its parameters must not be changed.

    Args:
        options: as of :func:`generate`, without ``callback``.

    Returns:
        An iterator; its value in the end (of ``yield from``) is the :class:`Generation`.

    Raises:
        TypeError, ValueError: as of :func:`generate`, at once.
    """
    return _stream(model, _start(model, prompts, max_new_tokens, **options))


def _stream(model: Transformer, run: _Run) -> Generator[Step, None, Generation]:
    steps, modules = run.steps(), list(model.modules())
    try:
        while True:
            with torch.no_grad(), _evaluation(modules):
                step = next(steps, None)
            if step is None:
                return run.result()
            yield step
    finally:
        steps.close()


@contextmanager
def _evaluation(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules in evaluation mode, and afterwards each as it was."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _start(
    model: Transformer,
    prompts: Any,
    max_new_tokens: Any,
    *,
    eos_token_id: Any = None,
    pad_token_id: Any = None,
    stop: Any = None,
    tokenizer: Tokenizer | None = None,
    return_log_probabilities: bool = False,
    use_cache: bool = True,
    cache: str = "contiguous",
    prefix: Prefix | None = None,
    pack_weights: bool | None = None,
    decoder_start_token_id: Any = None,
    **sampling: Any,
) -> _Run:
    """Checks everything; nothing is computed yet."""
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
    split_kind(cache)
    if prefix is not None and (source is not None or not use_cache):
        raise ValueError("prefix is for models without an encoder, and for use_cache=True")
    eos_token_ids = end_tokens(eos_token_id, model.config)
    padding = model.config.pad_token_id if pad_token_id is None else int(pad_token_id)
    stop_tokens, stop_strings = stop_conditions(stop, tokenizer, model.config)
    sampler = Sampler(len(rows), prompts=rows, **sampling)
    run = _Run(model, rows, source, max_new_tokens, sampler)
    run.form = form
    run.padding = padding if padding is not None else (eos_token_ids or (0,))[0]
    run.use_cache, run.pack_weights = use_cache, pack_weights
    run.cache_kind, run.prefix = cache, prefix
    run.ends = {**dict.fromkeys(stop_tokens, "stop"), **dict.fromkeys(eos_token_ids, "eos")}
    if tokenizer is not None:
        contexts = [row.tolist() if source is None else [] for row in rows]
        run.texts = [NewText(tokenizer, context, stop_strings) for context in contexts]
    if return_log_probabilities:
        run.log_probabilities = [[] for _ in rows]
    return run


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


class _Run(Record):
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
        self.cache_kind = "contiguous"
        self.prefix: Prefix | None = None

    def steps(self) -> Generator[Step, None, None]:
        """All of it, one step at a time; for a model in evaluation mode, without gradients."""
        if self.source is not None:
            self.source.encode()
        if self.finished:
            return
        if self.use_cache:
            prepare(self.model, len(self.rows), self.max_new_tokens, self.pack_weights)
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
        decoder, head = bind(model)
        while True:
            tokens, step = self._choose(logits)
            yield step
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
            cache.choose_path(bound=decoder is not model.model)
            hidden = decoder(tokens[:, None], cache=cache, **options)
            cache.advance(1, self._longest())
            logits = head(hidden[:, 0])

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
        hidden = self.model.model(ids, real, cache=cache, **options)
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
