"""What the layers of a bound step on a CPU share: where its tokens are written, and which pages its rows read.

The ops find both out anew in every layer, since nothing is kept between their calls. Here it is found out once, in the step's lists of
pages: a layer writes with one copy for keys and one for values, gathers whole pages back to back into memory that all layers use in turn
(what was just written there is still in a hardware cache), and attends to slices of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer.ops.attention import attention

# Keys gathered at once, in elements: 4 MB of float32, and as many values. One row may have more.
_MOST_GATHERED = 2**20


class Row(NamedTuple):
    """A row's part in a step: its pages, the tokens in the cache before, and the new ones."""

    pages: Sequence[int]
    length: int
    new: int


class Scratch:
    """Memory for the keys and values that a layer gathers; it grows to what the largest step wants."""

    def __init__(self) -> None:
        self._both: Tensor | None = None

    def take(self, pages: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(pages, …) for keys and for values, of the other sizes and the dtype of a layer's cache."""
        if self._both is None or self._both.shape[1] < pages:
            self._both = like.new_empty((2, pages + pages // 2, *like.shape[1:]))
        k, v = self._both[:, :pages].unbind()
        return k, v


class _Span(NamedTuple):
    """A row's new tokens ``start .. stop - 1`` of the step, and the keys and values that they see: (1, keys, num_kv_heads, head_dim)."""

    start: int
    stop: int
    k: Tensor
    v: Tensor


class _Part(NamedTuple):
    """Rows whose pages are gathered together: the pages' indices, the memory for them, and each row's slices of that."""

    pages: Tensor
    k: Tensor
    v: Tensor
    spans: list[_Span]


class DirectStep:
    """A step as the layers of one window see it.

    Args:
        rows: in the order of their tokens in the step.
        left: keys before itself that a token sees, -1 = all.
        cache: the keys of one of the layers, (pages, page_size, num_kv_heads, head_dim).
        scratch: see there.
    """

    def __init__(self, rows: Sequence[Row], left: int, cache: Tensor, scratch: Scratch) -> None:
        self._left = left
        page_size = cache.shape[1]
        slots = [
            pages[place // page_size] * page_size + place % page_size
            for pages, length, count in rows
            for place in range(length, length + count)
        ]
        self._slots = torch.tensor(slots)
        first_keys = [0 if left < 0 else max(length - left, 0) for _, length, _ in rows]
        seen = [
            pages[first // page_size : -(-(length + count) // page_size)]
            for first, (pages, length, count) in zip(first_keys, rows)
        ]
        self._parts: list[_Part] = []
        start = 0
        for some in _together(seen, _MOST_GATHERED // cache[0].numel()):
            pages = [page for row in some for page in seen[row]]
            k, v = scratch.take(len(pages), cache)
            part = _Part(torch.tensor(pages), k, v, [])
            begin = 0
            for row in some:
                _, length, count = rows[row]
                first = begin + first_keys[row] % page_size
                keys = slice(first, first + length + count - first_keys[row])
                mine = (memory.flatten(0, 1)[None, keys] for memory in (k, v))
                part.spans.append(_Span(start, start + count, *mine))
                begin += len(seen[row]) * page_size
                start += count
            self._parts.append(part)

    def write(self, cache: Tensor, new: Tensor) -> None:
        """Writes new keys or values (total, 1, num_kv_heads, head_dim) to their places."""
        cache.flatten(0, 1).index_copy_(0, self._slots, new[:, 0])

    def attend(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, softmax_scale: float | None) -> Tensor:
        """q (total, 1, num_heads, head_dim), each token over the keys of its row up to its own."""
        num_heads, head_dim = q.shape[2:]
        num_kv_heads = k_cache.shape[2]
        heads = (num_kv_heads, num_heads // num_kv_heads, head_dim)
        queries = q.reshape(-1, 1, *heads).unbind()
        outs = []
        for pages, k, v, spans in self._parts:
            torch.index_select(k_cache, 0, pages, out=k)
            torch.index_select(v_cache, 0, pages, out=v)
            for start, stop, keys, values in spans:
                if stop - start == 1:
                    # The queries that share a key head are rows of one matrix.
                    out = F.scaled_dot_product_attention(
                        queries[start], keys.transpose(1, 2), values.transpose(1, 2), scale=softmax_scale
                    )
                else:
                    piece = q[start:stop].transpose(0, 1)
                    window = (self._left, 0)
                    packed = attention(piece, keys, values, causal=True, window=window, softmax_scale=softmax_scale)
                    assert isinstance(packed, Tensor)
                    out = packed.reshape(-1, *heads)
                outs.append(out)
        return torch.cat(outs).view(q.shape)


def _together(seen: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Rows in their order, as many at a time as see up to ``most`` pages together."""
    some: list[int] = []
    count = 0
    for row, pages in enumerate(seen):
        if some and count + len(pages) > most:
            yield some
            some, count = [], 0
        some.append(row)
        count += len(pages)
    yield some
