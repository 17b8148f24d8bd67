"""What goes into an engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pytransformer.generation.edits import Constraint
from pytransformer.generation.results import Generation

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt to be continued; its options are those of :func:`pytransformer.generation.generate`.

    Attributes:
        prompt: int64 or int32 ids (seqlen), or a list of ints, at least one and fewer than the model's context.
        max_new_tokens: at least 1.
        temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, logit_bias, constraint: see
            :class:`pytransformer.generation.Sampler`; the default is greedy. ``constraint`` is called with row 0.
        seed: one int, or ``None``: drawn from torch's default generator. With a seed the result does not depend on other requests.
        eos_token_id, stop: what ends it; see :func:`pytransformer.generation.generate`. Strings need the engine's tokenizer.
        return_log_probabilities: events and result have those of the chosen tokens.
        priority: higher is served first; of equals, who came first.
    """

    prompt: Tensor | Sequence[int] | npt.NDArray[Any]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    constraint: Constraint | None = None
    seed: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    stop: str | int | Sequence[str | int] | None = None
    return_log_probabilities: bool = False
    priority: float = 0.0

    def options(self) -> dict[str, Any]:
        """The arguments of ``generate`` beside the prompt and ``max_new_tokens``."""
        own = ("prompt", "max_new_tokens", "priority")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in own}


@dataclass(frozen=True)
class Event:
    """What has become of a request in a step: a new token, its end, or both.

    Attributes:
        id: of the request, as ``Engine.add`` gave it.
        token: the new token; ``None`` where it ended without one.
        text: the characters that are known since this token, perhaps none; ``None`` without a tokenizer.
        log_probability: of the token, if asked for.
        stop_reason: ``None`` while it goes on; "eos", "stop", "length" or "context" as of :class:`Generation`, "cancelled" or "error".
        error: what was raised, with the reason "error".
        result: with the stop reason: all that was generated. ``token_ids`` has shape (seqlen).
    """

    id: int
    token: int | None = None
    text: str | None = None
    log_probability: float | None = None
    stop_reason: str | None = None
    error: Exception | None = None
    result: Generation | None = None


@dataclass(frozen=True)
class Statistics:
    """An engine's state and what it has done since it was made.

    Attributes:
        waiting, running: requests, now. Those that were preempted wait.
        finished, cancelled, failed: requests that ended, by their stop reasons ("error" = failed).
        pages_used, pages_shared, pages_free, pages_idle: now, of all groups of layers. Free ones include the idle ones, which still hold
            what a sequence to come may begin with.
        tokens_prefilled: tokens of prompts that were computed.
        tokens_decoded: new tokens that were chosen.
        tokens_reused: tokens that were found in the cache instead of being computed.
        tokens_recomputed: tokens that were computed once more after a preemption.
        preemptions: requests that were sent back to wait.
        steps: passes through the model.
        occupancy: sequences in a step, on average, as a fraction of ``max_batch``.
    """

    waiting: int
    running: int
    finished: int
    cancelled: int
    failed: int
    pages_used: int
    pages_shared: int
    pages_free: int
    pages_idle: int
    tokens_prefilled: int
    tokens_decoded: int
    tokens_reused: int
    tokens_recomputed: int
    preemptions: int
    steps: int
    occupancy: float
