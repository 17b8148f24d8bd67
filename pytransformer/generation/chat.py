"""A conversation with a model that has a chat template: each turn computes only what is new in it.

Templates need not be append-only: they may trim an answer, leave out earlier thinking, or begin an answer that was given otherwise than one
that is asked for. So each turn writes the whole conversation by the template anew, and :class:`KeptCache` finds how much of it is there:
the answer is the one that ``generate`` gives for the whole conversation.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytransformer.model.transformer import Transformer

from .caches import Prefix
from .generate import generate_stream
from .kept import KeptCache
from .prompts import check_generates, end_tokens, is_int
from .results import Generation, Step
from .sampling import Sampler
from .stopping import stop_conditions

if TYPE_CHECKING:
    from pytransformer.text import Tokenizer

# Stand for an answer and for the message that follows it, to see what a template writes between the two. Letters, as templates may escape.
_ANSWER, _NEXT = "PYTRANSFORMERANSWER", "PYTRANSFORMERNEXT"


class ContextFull(ValueError):
    """The conversation leaves no room for an answer in the model's context; it is as it was before."""


@dataclass(frozen=True)
class Turn:
    """What the newest answer took.

    Attributes:
        prompt_tokens: of the whole conversation before the answer, as the template writes it.
        reused_tokens: of those, how many were in the cache; the model was given the others.
        new_tokens: of the answer, its end token included.
        stop_reason: as of :class:`Generation`; ``None`` while the answer goes on, and when it was broken off.
        seed: what ``generate`` would need to give this answer.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    stop_reason: str | None
    seed: int


class Chat:
    """A conversation, and the cache that holds it.

    ``for piece in chat.say("Hello"): print(piece, end="", flush=True)``

    An answer ends with an end token of the model's configuration (generation_config.json is part of it) or of the tokenizer, and with
    what the template writes behind an answer: its end-of-turn token, or where that is text, that text.

    Special tokens that stand in a message literally are read as those tokens; ``tokenizer.special_tokens_in`` finds them.

    Args:
        model: a causal decoder.
        tokenizer: the model's, with a chat template.
        system: the system message, if any.
        cache: kind of the cache: "contiguous", "paged", "int8", "fp8", "paged-int8", "paged-fp8"; see docs/caches.md. It grows with the
            conversation.
        max_new_tokens: the most tokens of an answer, at least 1.
        stop: further strings or tokens that end an answer, as of :func:`pytransformer.generation.generate`.
        prefix: of the beginning that conversations have in common, see :class:`Prefix`.
        variables: what the template asks for beside the messages, such as ``{"enable_thinking": False}``, ``{"tools": [...]}``, or
            ``{"chat_template": "…"}`` for another template.
        seed: of the conversation: each answer has a seed drawn by it, so that one which is asked for again is another; ``None`` = any.
        sampling: the other options of :class:`Sampler`, greedy without any.

    Attributes:
        messages: all of them, mappings with "role" and "content"; they may be changed between two turns.
        turn: the newest answer's :class:`Turn`, or ``None``.
        kept: the :class:`KeptCache`.
        end_tokens, stop: what ends an answer: tokens, and strings or further tokens.

    Raises:
        TypeError, ValueError: the model does not predict the next token or has an encoder; the tokenizer has no template, or one that
            refuses a plain conversation; an option is out of range.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        cache: str = "contiguous",
        max_new_tokens: int = 512,
        stop: str | int | Sequence[str | int] | None = None,
        prefix: Prefix | None = None,
        variables: Mapping[str, Any] | None = None,
        seed: int | None = None,
        **sampling: Any,
    ) -> None:
        check_generates(model.config)
        if model.config.is_encoder_decoder:
            raise ValueError(
                "a conversation needs a model without an encoder: an encoder-decoder answers a source, by generate"
            )
        if not is_int(max_new_tokens):
            raise TypeError(f"max_new_tokens must be an int, got {max_new_tokens!r}")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if seed is not None and not is_int(seed):
            raise TypeError(f"seed must be an int or None, got {seed!r}")
        Sampler(1, seed=0, **sampling)  # for its checks
        tokens, strings = stop_conditions(stop, tokenizer, model.config)
        self.model, self.tokenizer = model, tokenizer
        self.kept = KeptCache(model, cache)
        self.max_new_tokens = int(max_new_tokens)
        self.turn: Turn | None = None
        self._options = {**sampling, "prefix": prefix}
        self._seeds = random.Random(None if seed is None else int(seed))
        self._variables = dict(variables or {})
        self._steps: Generator[Step, None, Generation] | None = None
        self.messages: list[dict[str, Any]] = _system_message(system)
        turn_tokens, turn_strings = self._end_of_turn(self.messages)
        own = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
        ends = {*end_tokens(None, model.config), *own, *turn_tokens}
        self.end_tokens = tuple(sorted(token for token in ends if token < model.config.vocab_size))
        self.stop = (*strings, *turn_strings, *sorted(tokens))

    @property
    def system(self) -> str | None:
        """The system message's text. One that is set holds for what was said before, too."""
        first = self.messages[0] if self.messages else {}
        return first.get("content") if first.get("role") == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        first = _system_message(text)
        self._end_of_turn(first)  # the template may refuse it
        self._steps = None
        has_one = bool(self.messages) and self.messages[0].get("role") == "system"
        self.messages[: int(has_one)] = first

    def say(self, text: str) -> Iterator[str]:
        """The answer to a message, one piece of text for each token, perhaps an empty one; pieces come as they are computed.

        The message and what has come of the answer are in ``messages`` from the first piece with text on, or at the end; so whoever stops
        iterating breaks the answer off and keeps what was said, and if nothing was, the conversation is as it was before. Another
        :meth:`say`, :meth:`undo` or :meth:`reset` ends an answer that has not ended.

        Raises:
            TypeError, ValueError: at once, and the conversation is as before: ``text`` is empty or no text, the template refuses it
                (the message says why), or the context is full (:class:`ContextFull`).
            ValueError: while iterating, as of :func:`pytransformer.generation.generate`.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        if not text.strip():
            raise ValueError("text is empty: there is nothing to answer")
        message = {"role": "user", "content": text}
        ids = self.token_ids([*self.messages, message])
        limit = self.model.config.max_seqlen
        if len(ids) >= limit:
            raise ContextFull(
                f"the conversation has {len(ids)} tokens with this message, but the model's context is {limit}: "
                "take back messages (undo), begin anew (reset), or say less"
            )
        answer_seed = self._seeds.getrandbits(31)
        self._steps = generate_stream(
            self.model,
            ids,
            self.max_new_tokens,
            eos_token_id=self.end_tokens,
            stop=self.stop,
            tokenizer=self.tokenizer,
            cache=self.kept,
            seed=answer_seed,
            **self._options,
        )
        return self._answer(message, self._steps, Turn(len(ids), 0, 0, None, answer_seed))

    def token_ids(self, messages: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """What the model is given for an answer to ``messages``, by default those of the conversation."""
        chosen = self.messages if messages is None else messages
        ids: list[int] = self.tokenizer.apply_chat_template(
            chosen, add_generation_prompt=True, return_dict=False, **self._variables
        )
        return ids

    def undo(self) -> str:
        """Takes back the last message of the user and all that followed: that message's text.

        Raises:
            ValueError: there is none.
        """
        self._steps = None
        places = [index for index, message in enumerate(self.messages) if message.get("role") == "user"]
        if not places:
            raise ValueError("there is no message to take back")
        text: str = self.messages[places[-1]]["content"]
        del self.messages[places[-1] :]
        return text

    def reset(self) -> None:
        """Forgets all but the system message. The cache is kept, for the next conversation may begin alike."""
        self._steps = None
        self.messages[:] = _system_message(self.system)

    def _answer(self, message: dict[str, Any], steps: Generator[Step, None, Generation], turn: Turn) -> Iterator[str]:
        answer: dict[str, Any] = {"role": "assistant", "content": ""}
        while self._steps is steps:
            if (step := next(steps, None)) is None:
                return
            assert step.texts is not None  # there is a tokenizer
            (piece,), (reason,) = step.texts, step.stop_reasons
            if not answer["content"] and (piece or reason is not None):
                self.messages += [message, answer]
            answer["content"] += piece
            self.turn = replace(turn, reused_tokens=self.kept.reused, new_tokens=step.index + 1, stop_reason=reason)
            yield piece

    def _end_of_turn(self, system: list[dict[str, Any]]) -> tuple[set[int], tuple[str, ...]]:
        """The token, or else the string, that the template writes behind an answer."""
        talk = [
            *system,
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": _ANSWER},
            {"role": "user", "content": _NEXT},
        ]
        text: str = self.tokenizer.apply_chat_template(talk, tokenize=False, **self._variables)
        if _ANSWER not in text or _NEXT not in text:
            raise ValueError(
                "the chat template does not show messages as they are: it left one of user or assistant out"
            )
        between = text[text.rindex(_ANSWER) + len(_ANSWER) : text.rindex(_NEXT)]
        ids = self.tokenizer.encode(between.strip(), add_special_tokens=False, split_special_tokens=False)
        if ids and ids[0] in self.tokenizer.backend.get_added_tokens_decoder():
            return {ids[0]}, ()
        return set(), (between.rstrip(),) if between.strip() else ()


def _system_message(text: str | None) -> list[dict[str, Any]]:
    if text is not None and not isinstance(text, str):
        raise TypeError(f"system must be a str or None, got {type(text).__name__}")
    return [] if text is None else [{"role": "system", "content": text}]
