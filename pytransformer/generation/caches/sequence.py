"""What all KV caches share: the lengths of the sequences."""

from __future__ import annotations

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
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        # Of an encoder–decoder: what each layer's cross-attention made of the memory, once for all steps.
        self.memory_kv: list[tuple[Tensor, Tensor]] | None = None
        # Whether a step may write and read by plain slices: see KVCache.choose_path.
        self.is_direct = False
        self._attended: tuple[int, Tensor] | None = None  # the same for every layer of a step
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

    def attended(self, seqlen: int) -> Tensor:
        """Lengths with ``seqlen`` tokens of this step appended: int32 (batch)."""
        if self._attended is None or self._attended[0] != seqlen:
            self._attended = (seqlen, self.lengths + seqlen)
        return self._attended[1]

    def _set_lengths(self, lengths: Tensor) -> None:
        # In place: a recorded step (graphs.py) reads them there.
        self.lengths.copy_(lengths)
        self._attended = None

    def reset(self) -> None:
        """Forgets every token; the memory is kept."""
        self._set_lengths(torch.zeros_like(self.lengths))
        self.max_length = 0


def check_rows(name: str, rows: Tensor, batch: int) -> None:
    """ValueError unless ``batch`` integers, each the index of a sequence."""
    if rows.shape != (batch,) or rows.is_floating_point():
        raise ValueError(f"{name} must be integers of shape ({batch},), got {rows.dtype} of shape {tuple(rows.shape)}")
    check_values(name, rows, 0, batch - 1, "sequences")
