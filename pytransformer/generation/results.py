"""What :func:`pytransformer.generation.generate` tells: step by step, and in the end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One new token of each sequence, as the callback sees it.

    Attributes:
        index: 0 for the first new token.
        tokens: per sequence, or ``None`` for one that had ended before.
        logits: (batch, vocab_size) as the model gave them, before penalties and limits; rows of ended sequences mean nothing.
        stop_reasons: per sequence, ``None`` while it goes on; set in the step of its last token.
        log_probabilities: per sequence that of its token, or ``None`` for one that had ended before; ``None`` unless asked for. See
            :class:`Generation`.
        texts: per sequence the characters that are known since this step, perhaps none; ``None`` without a tokenizer. What may be the
            beginning of a stop string, or of a character, comes when it is known not to be, at the latest with the last token.
    """

    index: int
    tokens: list[int | None]
    logits: Tensor
    stop_reasons: list[str | None]
    log_probabilities: list[float | None] | None = None
    texts: list[str] | None = None


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        token_ids: prompts and new tokens, in the form of the prompts: a tensor (seqlen), or (batch, seqlen) filled up with the padding
            token where a sequence ended early; for a list of prompts a list of 1-D tensors. An end token that was produced is included,
            and so are the tokens of a stop string. Of an encoder–decoder: the targets, from their first token on. With
            ``num_return_sequences`` = n above 1 there are n for each prompt, the best first, in the order of the prompts: a tensor
            (n · batch, seqlen), of one prompt (n, seqlen), or a list; and so in everything below.
        stop_reasons: per sequence "eos" (an end token was produced), "stop" (a stop string or stop token), "length" (max_new_tokens) or
            "context" (the model's max_seqlen).
        prompt_lengths, new_tokens: per sequence, in tokens; of an encoder–decoder those of the target.
        log_probabilities: per sequence those of its new tokens (natural logarithm), if they were asked for. They are of the distribution
            as the model gave it, the softmax of the step's logits at temperature 1: without penalties, bias, constraint and limits, so
            that they tell what the model thinks of the text, however it was chosen.
        texts: per sequence the new text, without special tokens and cut before a stop string, if there was a tokenizer.
        scores: of a beam search, per sequence: the sum of its new tokens' log-probabilities, as bias, penalties and constraint left them,
            divided by their number ** length_penalty; ``None`` otherwise.
        drafted, accepted: of speculative decoding, per sequence how many tokens were proposed, and how many of those stayed.
    """

    token_ids: Tensor | list[Tensor]
    stop_reasons: list[str]
    prompt_lengths: list[int]
    new_tokens: list[int]
    log_probabilities: list[list[float]] | None = None
    texts: list[str] | None = None
    scores: list[float] | None = None
    drafted: list[int] | None = None
    accepted: list[int] | None = None
