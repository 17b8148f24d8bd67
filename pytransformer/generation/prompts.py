"""Token ids as people have them (tensors, arrays, lists) -> one checked row per prompt."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pytransformer.model.config import TransformerConfig

_PROMPTS = "a tensor or array of ids (batch, seqlen) or (seqlen), a list of ints, or a list with a tensor, array or list of ints per prompt"


def is_int(value: Any) -> bool:
    """Whether it is an integer, numpy's too; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_generates(config: TransformerConfig) -> None:
    """ValueError unless a model of this configuration predicts the next token."""
    if config.head != "lm" or not config.causal:
        raise ValueError(
            "generation needs a model that predicts the next token (head='lm', causal=True), "
            f"got head={config.head!r}, causal={config.causal}"
        )


def prompt_rows(prompts: Any, config: TransformerConfig) -> tuple[list[Tensor], str]:
    """One 1-D tensor of ids per prompt, and the form of the result: "batch" or "one" (a tensor), or "list".

    Raises:
        TypeError, ValueError: as :func:`pytransformer.generation.generate` says.
    """
    if _is_array(prompts):
        if prompts.ndim not in (1, 2):
            raise ValueError(f"prompts must have shape (seqlen) or (batch, seqlen), got {tuple(prompts.shape)}")
        form = "batch" if prompts.ndim == 2 else "one"
        given = list(prompts) if form == "batch" else [prompts]
    elif _is_list(prompts):
        # One list of ints is one prompt. A list with anything else has a prompt in each place.
        form = "one" if len(prompts) > 0 and all(is_int(value) for value in prompts) else "list"
        given = [prompts] if form == "one" else list(prompts)
    else:
        raise TypeError(f"prompts must be {_PROMPTS}, got {_described(prompts)}")
    if not given:
        raise ValueError("prompts must hold at least one prompt, got none")
    return [_row(row, index, config) for index, row in enumerate(given)], form


def end_tokens(eos_token_id: Any, config: TransformerConfig) -> tuple[int, ...]:
    """The end tokens that were given, or the configuration's for ``None``."""
    if eos_token_id is None:
        return config.eos_token_ids
    given = eos_token_id.tolist() if _is_array(eos_token_id) else eos_token_id
    tokens: list[Any] = [given] if is_int(given) else list(given) if isinstance(given, Iterable) else [None]
    for token in tokens:
        if not is_int(token):
            raise TypeError(f"eos_token_id must be an int or a sequence of ints, got {eos_token_id!r}")
        if not 0 <= token < config.vocab_size:
            raise ValueError(f"eos_token_id must be from 0 to {config.vocab_size - 1}, got {token}")
    return tuple(int(token) for token in tokens)


def start_tokens(decoder_start_token_id: Any, config: TransformerConfig) -> Tensor:
    """What the targets of an encoder–decoder start with, given or the configuration's: int64 (seqlen).

    Raises:
        TypeError, ValueError: there is none, or it is no token of the model.
    """
    given = config.decoder_start_token_id if decoder_start_token_id is None else decoder_start_token_id
    if given is None:
        given = config.bos_token_id
    if given is None:
        raise ValueError("decoder_start_token_id must be given: the configuration has none, and no bos_token_id")
    row, _ = prompt_rows([given] if is_int(given) else given, config)
    if len(row) != 1:
        raise ValueError("decoder_start_token_id must be one token or one list of tokens")
    return row[0]


def _row(row: Any, index: int, config: TransformerConfig) -> Tensor:
    if not _is_array(row) and not _is_list(row):
        raise TypeError(f"prompts must be {_PROMPTS}, got {_described(row)} as prompt {index}")
    if _is_array(row) and row.ndim != 1:
        raise ValueError(f"a prompt in a list must have shape (seqlen), got {tuple(row.shape)} as prompt {index}")
    if isinstance(row, Tensor) and row.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"prompts must hold int64 or int32 ids, got {row.dtype} in prompt {index}")
    if len(row) == 0:
        raise ValueError(f"prompt {index} is empty; give it at least one token, such as the model's bos token")
    if len(row) > config.max_seqlen:
        raise ValueError(f"prompt {index} has {len(row)} tokens, more than the model's context of {config.max_seqlen}")
    if isinstance(row, Tensor):
        low, high = int(row.min()), int(row.max())
    else:
        # As Python's ints, which have no bounds: an id that int64 cannot hold is named as it is.
        row = row.tolist() if _is_array(row) else list(row)
        for value in row:
            if not is_int(value):
                raise TypeError(f"prompts must hold ints, got {_described(value)} in prompt {index}")
        low, high = int(min(row)), int(max(row))
    if low < 0 or high >= config.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"prompt {index} holds token id {bad}, allowed are 0 to {config.vocab_size - 1}")
    return row if isinstance(row, Tensor) else torch.tensor([int(value) for value in row], device="cpu")


def _is_array(value: Any) -> bool:
    """A tensor, or what has the interface of a numpy array: numpy itself is not needed here."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "tolist") and value.ndim > 0)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _described(value: Any) -> str:
    if isinstance(value, (str, bytes)):
        return f"the text {value[:40]!r}; encode it with the model's tokenizer"
    return f"{value!r}" if isinstance(value, numbers.Number) else type(value).__name__
