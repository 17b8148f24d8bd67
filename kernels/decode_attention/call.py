"""A call of decode attention as its launcher sees it, and the sizes that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .policy import UNLIMITED


class DecodeCall(Protocol):
    """A checked call: a NamedTuple, its fields as in :func:`pytransformer.decode_attention`, q the first.

    ``softmax_scale`` is a number; ``mask`` is boolean or uint8, and ``bias`` floating, of four dimensions that broadcast to
    (batch, num_heads, seqlen_q, keys), where ``keys`` may be less than the capacity; packed: the longest sequence for seqlen_q.
    """

    @property
    def _fields(self) -> tuple[str, ...]: ...
    def __iter__(self) -> Iterator[Any]: ...
    @property
    def q(self) -> Tensor: ...
    @property
    def k_cache(self) -> Tensor: ...
    @property
    def v_cache(self) -> Tensor: ...
    @property
    def cache_seqlens(self) -> Tensor: ...
    @property
    def cu_seqlens_q(self) -> Tensor | None: ...
    @property
    def max_seqlen_q(self) -> int | None: ...
    @property
    def block_table(self) -> Tensor | None: ...
    @property
    def cache_batch_idx(self) -> Tensor | None: ...
    @property
    def cache_leftpad(self) -> Tensor | None: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def alibi_slopes(self) -> Tensor | None: ...
    @property
    def sinks(self) -> Tensor | None: ...
    @property
    def k_scale(self) -> Tensor | None: ...
    @property
    def v_scale(self) -> Tensor | None: ...
    @property
    def softmax_scale(self) -> float: ...
    @property
    def causal(self) -> bool: ...
    @property
    def window(self) -> tuple[int, int]: ...
    @property
    def softcap(self) -> float: ...
    @property
    def num_splits(self) -> int: ...


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call.

    Attributes:
        seqlen_q: the most queries of a sequence.
        group: query heads that share a key head.
        capacity: slots of a sequence in the cache, or less where nothing behind the ``keys`` can be read.
        keys: how many keys mask and bias have a column for.
    """

    packed: bool
    batch: int
    seqlen_q: int
    num_heads: int
    num_kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    page_size: int
    capacity: int
    keys: int


def sizes_of(call: DecodeCall) -> Sizes:
    """The sizes of a checked call."""
    packed = call.cu_seqlens_q is not None
    seqlen_q, num_heads, head_dim = call.q.shape[-3:]
    page_size, num_kv_heads, value_dim = call.v_cache.shape[1:]
    capacity = page_size if call.block_table is None else call.block_table.shape[1] * page_size
    # One column is that of every key.
    widths = [scores.shape[3] for scores in (call.mask, call.bias) if scores is not None and scores.shape[3] != 1]
    keys = min(widths, default=UNLIMITED)
    return Sizes(
        packed=packed,
        batch=call.cache_seqlens.shape[0],
        seqlen_q=min(seqlen_q, call.max_seqlen_q) if packed and call.max_seqlen_q is not None else seqlen_q,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        page_size=page_size,
        # Behind padding, slots and keys are counted from different places: there the width bounds the keys, the capacity the slots.
        capacity=min(capacity, keys) if call.cache_leftpad is None else capacity,
        keys=keys,
    )


def scale_strides(scale: Tensor | None) -> tuple[int, ...]:
    """Of per-head (heads) or per-token (pages, page_size, heads) scales."""
    return (0, 0, 0) if scale is None else (0,) * (3 - scale.dim()) + scale.stride()
