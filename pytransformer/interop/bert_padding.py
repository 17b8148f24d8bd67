"""The helpers of ``flash_attn.bert_padding`` (2.8): from padded batches to packed sequences and back, for the ``varlen`` functions.

All are differentiable with respect to the hidden states, any number of times. The number of tokens is known only from the values of the
mask, so the two that unpad read it back from the device, as in flash_attn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer.ops.checks import describe


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of ``input``.

    Args:
        input: (rows, ...), at least two dimensions.
        indices: integer (selected).

    Returns:
        (selected, ...), a copy. An index that occurs twice collects both gradients.

    Raises:
        AssertionError: ``input`` has fewer than two dimensions.
        IndexError: an index out of range (on a GPU: a device-side assertion).
    """
    if input.ndim < 2:
        raise AssertionError(f"input must have at least 2 dimensions, (rows, ...), got shape {tuple(input.shape)}")
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The opposite of :func:`index_first_axis`: zeros with ``values`` in the given rows.

    Args:
        values: (selected, ...), at least two dimensions.
        indices: integer (selected), each at most once.
        first_axis_dim: number of rows of the result.

    Returns:
        (first_axis_dim, ...).

    Raises:
        AssertionError: ``values`` has fewer than two dimensions, or ``indices`` not exactly one.
        IndexError: an index out of range (on a GPU: a device-side assertion).
    """
    if indices.ndim != 1:
        raise AssertionError(f"indices must have 1 dimension, got shape {tuple(indices.shape)}")
    if values.ndim < 2:
        raise AssertionError(
            f"values must have at least 2 dimensions, (selected, ...), got shape {tuple(values.shape)}"
        )
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Takes the tokens that a mask selects out of a padded batch, in order.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), boolean or integer, 1 = a token.
        unused_mask: (batch, seqlen), boolean or integer, 1 = a place that is kept (allocated) although nothing is in it.

    Returns:
        hidden_states (total, ...) with the tokens of either mask; their ``indices`` int64 (total) among the batch · seqlen places;
        ``cu_seqlens`` int32 (batch + 1); the length of the longest sequence, an int; ``seqused`` int32 (batch), the tokens of
        ``attention_mask`` alone.

    Raises:
        RuntimeError: a mask of another shape than hidden_states' (batch, seqlen).
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    kept = attention_mask
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        kept = attention_mask + unused_mask
    seqlens = kept.sum(dim=-1, dtype=torch.int32)
    seqused = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten()).flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _starts(seqlens), int(seqlens.max()), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Like :func:`unpad_input` for rows that hold several short sequences one after another, which become sequences of their own.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: integer (batch, seqlen), each row the lengths of its sequences, then zeros: ``[2, 3, 0, 0, 0, 0]`` is a
            sequence of two tokens, one of three, and one place of padding.

    Returns:
        hidden_states (total, ...); ``indices`` int64 (total) among the batch · seqlen places; ``cu_seqlens`` int32 (sequences + 1); the
        length of the longest sequence, an int.

    Raises:
        RuntimeError: a mask of another shape than hidden_states' (batch, seqlen).
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    lengths = attention_mask_in_length
    places = torch.arange(lengths.shape[1], device=lengths.device)
    indices = torch.nonzero((places < lengths.sum(dim=-1, keepdim=True)).flatten()).flatten()
    seqlens = lengths[lengths != 0]
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _starts(seqlens), int(seqlens.max())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed tokens back into a padded batch, zeros elsewhere.

    Args:
        hidden_states: (total, ...).
        indices: integer (total), as :func:`unpad_input` returns them.
        batch: rows of the padded batch.
        seqlen: length of its rows.

    Returns:
        (batch, seqlen, ...).

    Raises:
        AssertionError, IndexError: as :func:`index_put_first_axis`.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if mask.ndim != 2 or mask.shape != hidden_states.shape[:2]:
        raise RuntimeError(
            f"{name} must have shape (batch, seqlen) = {tuple(hidden_states.shape[:2])}, got {describe(mask)}"
        )


def _starts(seqlens: Tensor) -> Tensor:
    """cu_seqlens: 0, then the running sum."""
    return torch.nn.functional.pad(seqlens.cumsum(dim=0, dtype=torch.int32), (1, 0))
