"""The sizes that follow from a call of decode attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .policy import UNLIMITED

if TYPE_CHECKING:
    from pytransformer.ops.decode_attention.call import DecodeCall


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
