"""Continuing prompts: in parallel (prefill), then one token per step and sequence (decode).

Prompts of different lengths run side by side, right-padded: each sequence has its own length in the cache and sees its own tokens only,
so every prompt gets the continuation it gets alone. An encoder–decoder reads the prompts with its encoder, once, and what is continued is
the target.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytransformer.model.transformer import EncoderDecoder, Transformer

from .beams import BeamOptions, BeamRun
from .caches import Prefix
from .caches.sizes import split_kind
from .drafts import DraftModel, PromptLookup, check_draft
from .edits import Constraint
from .graphs import check_option
from .kept import KeptCache
from .modes import evaluation
from .prompts import check_generates, end_tokens, is_int, prompt_rows, start_tokens
from .results import Generation, Step
from .run import Run, Source
from .sampling import Sampler
from .speculative import SpeculativeRun
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
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_return_sequences: int = 1,
    stop: str | int | Sequence[str | int] | None = None,
    tokenizer: Tokenizer | None = None,
    return_log_probabilities: bool = False,
    use_cache: bool = True,
    cache: str | KeptCache = "contiguous",
    prefix: Prefix | None = None,
    pack_weights: bool | None = None,
    cuda_graph: bool | None = None,
    decoder_start_token_id: int | Sequence[int] | None = None,
    draft: DraftModel | PromptLookup | Transformer | None = None,
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
        num_beams, length_penalty, early_stopping, num_return_sequences: beam search with ``num_beams`` above 1, see :class:`BeamOptions`;
            with temperature 0 and without ``callback``.
        stop: strings that end a sequence where its new text has them, across the borders of tokens too, and ids of tokens that end it
            beside the end tokens; one or several. Strings need ``tokenizer``; one that is a special token means that token.
        tokenizer: the model's. Results then have the new texts, and those end before a stop string.
        return_log_probabilities: results have those of the chosen tokens, see :class:`Generation`.
        use_cache: ``False`` computes the whole sequence again for every token: slow, for comparison.
        cache: kind of the cache: "contiguous", "paged", or quantised: "int8", "fp8", "paged-int8", "paged-fp8"; see docs/caches.md.
            Or a :class:`KeptCache`, which stays for later calls that go on with the same text.
        prefix: what the prompts begin with and was computed before, see :class:`Prefix`; only what follows is computed. Prompts that begin
            otherwise are computed from where they do.
        pack_weights: on a CPU, decode from packed copies of the linear layers' weights (see :func:`prepare_for_decoding`), which are kept
            for later calls; ``False`` frees them; ``None`` = if they are there already, or so many tokens are asked for that it pays.
        cuda_graph: on a GPU, record the decode step once and replay it for every token (see graphs.py); ``None`` = where it can be and
            enough tokens are asked for.
        decoder_start_token_id: of an encoder–decoder: the token that each target starts with, or several; ``None`` = the configuration's.
        draft: speculative decoding, see docs/speculative.md: who proposes tokens, several of which the model then checks in one pass. The
            distribution of what is generated is the same; greedy, and with :class:`PromptLookup`, the tokens are, up to rounding. A
            Transformer is a :class:`DraftModel` with its defaults.
        callback: called after each step; what it raises ends the generation.

    Raises:
        ValueError: a model that does not predict the next token.
        TypeError, ValueError: prompts that are empty, longer than the context, or not token ids; options out of range.
        ValueError: the logits of a sequence that goes on hold NaN, or nothing but -inf; the message names row and step.
        ValueError: of a prompt there are not ``num_return_sequences`` different continuations.
    """
    if callback is not None and num_beams != 1:
        raise ValueError(
            f"callback is told tokens as they are chosen, a beam search (num_beams={num_beams}) chooses at the end"
        )
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
    run = start(
        model,
        prompts,
        max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        num_return_sequences=num_return_sequences,
        stop=stop,
        tokenizer=tokenizer,
        return_log_probabilities=return_log_probabilities,
        use_cache=use_cache,
        cache=cache,
        prefix=prefix,
        pack_weights=pack_weights,
        cuda_graph=cuda_graph,
        decoder_start_token_id=decoder_start_token_id,
        draft=draft,
        **sampling,
    )
    with evaluation(run.modules()):
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
        prompts, max_new_tokens: as of :func:`generate`.
        options: the others of :func:`generate`, without ``callback`` and beams.

    Returns:
        An iterator; its value in the end (of ``yield from``) is the :class:`Generation`.

    Raises:
        TypeError, ValueError: as of :func:`generate`, at once.
    """
    run = start(model, prompts, max_new_tokens, **options)
    if isinstance(run, BeamRun):
        raise ValueError(
            f"generate_stream gives tokens as they are chosen, a beam search (num_beams={run.options.num_beams}) chooses at the end: "
            "use generate"
        )
    return _stream(run)


def _stream(run: Run) -> Generator[Step, None, Generation]:
    steps, modules = run.steps(), run.modules()
    try:
        while True:
            with torch.no_grad(), evaluation(modules):
                step = next(steps, None)
            if step is None:
                return run.result()
            yield step
    finally:
        steps.close()


def start(
    model: Transformer,
    prompts: Any,
    max_new_tokens: Any,
    *,
    eos_token_id: Any = None,
    pad_token_id: Any = None,
    num_beams: Any = 1,
    length_penalty: Any = 1.0,
    early_stopping: Any = False,
    num_return_sequences: Any = 1,
    stop: Any = None,
    tokenizer: Tokenizer | None = None,
    return_log_probabilities: bool = False,
    use_cache: bool = True,
    cache: str | KeptCache = "contiguous",
    prefix: Prefix | None = None,
    pack_weights: bool | None = None,
    cuda_graph: bool | None = None,
    decoder_start_token_id: Any = None,
    draft: Any = None,
    **sampling: Any,
) -> Run:
    """A call of :func:`generate` with everything checked and nothing computed yet."""
    if not is_int(max_new_tokens):
        raise TypeError(f"max_new_tokens must be an int, got {max_new_tokens!r}")
    max_new_tokens = int(max_new_tokens)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    if pad_token_id is not None and not is_int(pad_token_id):
        raise TypeError(f"pad_token_id must be an int or None, got {pad_token_id!r}")
    beams = BeamOptions(num_beams, length_penalty, early_stopping, num_return_sequences)
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
    if not isinstance(cache, KeptCache):
        split_kind(cache)
    elif not use_cache:
        raise ValueError("cache is a KeptCache, which needs use_cache=True")
    elif beams.num_beams > 1:
        raise ValueError(f"cache is a KeptCache, which is of one sequence, but num_beams is {beams.num_beams}")
    else:
        cache.check_model(model, len(rows))
    if prefix is not None and not isinstance(prefix, Prefix):
        raise TypeError(f"prefix must be a Prefix or None, got {type(prefix).__name__}")
    if pack_weights is not None and not isinstance(pack_weights, bool):
        raise TypeError(f"pack_weights must be True, False or None (where it pays), got {pack_weights!r}")
    if prefix is not None and (source is not None or not use_cache):
        raise ValueError("prefix is for models without an encoder, and for use_cache=True")
    eos_token_ids = end_tokens(eos_token_id, model.config)
    padding = model.config.pad_token_id if pad_token_id is None else int(pad_token_id)
    stop_tokens, stop_strings = stop_conditions(stop, tokenizer, model.config)
    sampler = Sampler(len(rows), prompts=rows, **sampling)
    run: Run
    if beams.num_beams > 1:
        if draft is not None:
            raise ValueError(
                f"draft is for plain decoding, a beam search (num_beams={beams.num_beams}) has its own candidates"
            )
        run = BeamRun(model, rows, source, max_new_tokens, sampler, beams)
    elif draft is None:
        run = Run(model, rows, source, max_new_tokens, sampler)
    elif not use_cache:
        raise ValueError("draft is for use_cache=True: without a cache every pass is over the whole sequence anyway")
    else:
        run = SpeculativeRun(model, rows, source, max_new_tokens, sampler, check_draft(draft, model))
    run.form = form
    run.padding = padding if padding is not None else (eos_token_ids or (0,))[0]
    run.use_cache, run.pack_weights = use_cache, pack_weights
    run.cuda_graph = check_option(cuda_graph, model, use_cache)
    if run.cuda_graph and (reason := run.why_not_recorded()) is not None:
        raise ValueError(f"cuda_graph=True asks for a CUDA graph of the decode step, but {reason}")
    run.prefix = prefix
    if isinstance(cache, KeptCache):
        run.kept = cache
    else:
        run.cache_kind = cache
    run.ends = {**dict.fromkeys(stop_tokens, "stop"), **dict.fromkeys(eos_token_ids, "eos")}
    if tokenizer is not None:
        contexts = [row.tolist() if source is None else [] for row in rows]
        run.texts = [NewText(tokenizer, context, stop_strings) for context in contexts]
    if return_log_probabilities:
        run.log_probabilities = [[] for _ in rows]
    return run
