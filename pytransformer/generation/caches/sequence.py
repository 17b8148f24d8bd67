"""What all KV caches share: the lengths of the sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pytransformer.model.config import TransformerConfig
from pytransformer.nn import LayerCache
from pytransformer.ops.checks import check_values

from .part import CachePart


class SequenceCache:
    """What every KV cache is to the generation loop: the lengths of ``batch`` sequences. Where keys and values lie is for the subclass.

    One step is: the model runs over new tokens with ``cache=cache`` (each layer appends and attends), then :meth:`advance` counts them.
    Sequences may have different lengths; new tokens come as a rectangle, right-padded, and ``advance`` says how many of them are real.
    What the padding wrote is overwritten by the tokens that follow and is seen by nobody before.

    Args:
        config: the model's.
        batch: number of sequences.
        capacity: tokens per sequence, at most the model's max_seqlen.
        device: of the model.

    Raises:
        ValueError: sizes out of range.
    """

    def __init__(
        self, config: TransformerConfig, batch: int, capacity: int, *, device: torch.device | str | None = None
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if not 1 <= capacity <= config.max_seqlen:
            raise ValueError(f"capacity must be from 1 to the model's max_seqlen ({config.max_seqlen}), got {capacity}")
        self.config = config
        self.batch = batch
        # Sequences that there is memory for; between two calls of reorder there may be fewer.
        self.most = batch
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        # Of an encoder–decoder: what each layer's cross-attention made of the memory, once for all steps.
        self.memory_kv: list[tuple[Tensor, Tensor]] | None = None
        # Whether a step may write and read by plain slices: see KVCache.choose_path.
        self.is_direct = False
        self._attended: tuple[int, Tensor] | None = None  # the same for every layer of a step
        self._masks: dict[tuple[int, int, int], Tensor] = {}  # likewise, of layers with one window
        # The longest length, known without asking the device.
        self.max_length = 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        raise NotImplementedError

    def read_kind(self) -> tuple[torch.dtype, str | None]:
        """The dtype of what it holds, and "int8", "fp8" or ``None``."""
        raise NotImplementedError

    def layer(self, index: int) -> LayerCache:
        """The part of layer ``index``."""
        raise NotImplementedError

    def write_prefix(self, part: CachePart, length: int) -> None:
        """Fills an empty cache with the same first ``length`` tokens in every sequence."""
        raise NotImplementedError

    def read_prefix(self, row: int, length: int) -> CachePart:
        """The first ``length`` tokens of a sequence, copied."""
        raise NotImplementedError

    def reorder(self, rows: Tensor, shared: int = 0) -> None:
        """Sequence b becomes what ``rows[b]`` was, as beams need it. The memory's keys and values stay as they are.

        Args:
            rows: integers, one for each sequence that there will be: any number up to what the cache was made for.
            shared: the first tokens that are the same in sequence b and in ``rows[b]``, for every b: they need not be copied.

        Raises:
            ValueError: no such sequences, or more than there is memory for.
        """
        raise NotImplementedError

    def expect(self, new_tokens: Sequence[int]) -> None:
        """Says before a step how many of each sequence's new tokens are real; without it all may be, until ``advance`` says."""

    def reserve(self, seqlen: int) -> None:
        """Before a step: room for ``seqlen`` more tokens of each sequence; what raises does so before anything is written."""
        self.require(seqlen)

    def forget_step(self) -> None:
        """Forgets what the layers of a step share, so that the next step makes it anew from the lengths."""
        self._attended = None

    def choose_path(self, bound: bool) -> None:
        """Before each step: whether the step is bound (see bound.py)."""

    def positions(self, seqlen: int) -> Tensor:
        """Positions of the next ``seqlen`` tokens: int64 (batch, seqlen).

        Raises:
            ValueError: they would not fit.
        """
        self.require(seqlen)
        return self.lengths[:, None] + torch.arange(seqlen, device=self.lengths.device)

    def require(self, seqlen: int) -> None:
        """ValueError unless ``seqlen`` more tokens fit behind the longest sequence."""
        if self.max_length + seqlen > self.capacity:
            raise ValueError(
                f"the KV cache holds {self.capacity} tokens per sequence: {seqlen} more do not fit behind {self.max_length}"
            )

    def advance(self, new_tokens: Tensor | int, longest: int | None = None) -> None:
        """Counts the tokens that were appended in this step.

        Args:
            new_tokens: how many of them are real: integers (batch), or one number for all.
            longest: the largest resulting length, where the host knows it; by default read off the lengths.
        """
        self._set_lengths((self.lengths + new_tokens).int())
        if longest is None:
            longest = self.max_length + new_tokens if isinstance(new_tokens, int) else int(self.lengths.max())
        self.max_length = longest

    def drop(self, ended: Tensor, longest: int | None = None) -> None:
        """Forgets the sequences where ``ended`` (batch, boolean): in later steps they are there, but cost next to nothing.

        ``longest``: the largest remaining length, as of :meth:`advance`.
        """
        self._set_lengths(self.lengths.masked_fill(ended, 0))
        self.max_length = int(self.lengths.max()) if longest is None else longest

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Takes back the newest tokens, so that each sequence has as many as ``lengths`` (batch) says; between two steps.

        What was taken back is seen by nobody, and is overwritten by the tokens that follow.

        Raises:
            TypeError, ValueError: not one integer for each sequence, from 0 to the tokens that it has. Of a paged cache also: tokens that a
                window passed would be seen again, and their pages are gone. Nothing has changed then.
        """
        self._truncate(_checked_lengths(lengths, self.lengths.tolist()))

    def _truncate(self, lengths: list[int]) -> None:
        self._set_lengths(torch.tensor(lengths, dtype=torch.int32, device=self.lengths.device))
        self.max_length = max(lengths)

    def attended(self, seqlen: int) -> Tensor:
        """Lengths with ``seqlen`` tokens of this step appended: int32 (batch)."""
        if self._attended is None or self._attended[0] != seqlen:
            self._attended = (seqlen, self.lengths + seqlen)
        return self._attended[1]

    def causal_mask(self, seqlen: int, first: int, left: int, dtype: torch.dtype) -> Tensor:
        """What is added to the scores of a step's queries, where all sequences have one length: (seqlen, keys from ``first`` on).

        ``left``: keys before itself that a token sees, -1 = all.
        """
        key = (seqlen, first, left)
        if key not in self._masks:
            places = torch.arange(first, self.max_length + seqlen, device=self.lengths.device)
            before = places[-seqlen:, None] - places
            hidden = before < 0 if left < 0 else (before < 0) | (before > left)
            self._masks[key] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -math.inf
            )
        return self._masks[key]

    def _set_lengths(self, lengths: Tensor) -> None:
        if lengths.shape == self.lengths.shape:
            self.lengths.copy_(lengths)  # in place: a recorded step (graphs.py) reads them there
        else:
            self.lengths = lengths  # sequences have become fewer or more
        self._attended = None
        self._masks = {}

    def reset(self) -> None:
        """Forgets every token; the memory is kept."""
        self._set_lengths(torch.zeros_like(self.lengths))
        self.max_length = 0


def _checked_lengths(lengths: Tensor | Sequence[int], before: list[int]) -> list[int]:
    given = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if not isinstance(given, list) or not all(isinstance(length, int) for length in given):
        raise TypeError(f"lengths must be integers of shape ({len(before)},), got {given}")
    if len(given) != len(before):
        raise ValueError(f"lengths must be one for each of the {len(before)} sequences, got {len(given)}")
    for row, (length, limit) in enumerate(zip(given, before)):
        if not 0 <= length <= limit:
            raise ValueError(
                f"lengths must be from 0 to the tokens of each sequence, got {length} for sequence {row}, which has {limit}"
            )
    return given


def check_rows(name: str, rows: Tensor, batch: int, most: int) -> None:
    """ValueError unless 1 to ``most`` integers, each the index of one of ``batch`` sequences."""
    if rows.ndim != 1 or not 1 <= len(rows) <= most or rows.is_floating_point():
        raise ValueError(
            f"{name} must be integers of shape (n,), n from 1 to {most}, got {rows.dtype} of shape {tuple(rows.shape)}"
        )
    check_values(name, rows, 0, batch - 1, "sequences")
