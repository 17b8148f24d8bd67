"""Whether tensors share memory: an op that writes into one while it reads, or writes, another that has an element of it races with itself.

Views of one buffer are fine as long as no element is in both, as q and k of one packed projection, or the two halves of a cache. Torch's
own question (``torch._C._overlaps``) calls all views that lie interleaved overlapping, so the answer here is exact: addresses i·strides
and j·strides of two views meet where a sum of bounded multiples of the strides is the distance of their first elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

# An int between two bounds, times the weight.
_Term = tuple[int, int, int]
# Strides that layouts have are settled in a few steps. What is not after these counts as overlapping.
_MOST_STEPS = 10_000
_MOST_DISTANCES = 4096


class Apart:
    """The check that the tensors an op writes share no element with any other of its tensors, for tensors of fixed shapes and strides.

    Args:
        names: of the tensors, in order.
        written: those that are written.
        tensors: each, or None.
    """

    __slots__ = ("_layouts", "_names", "_pairs", "_places")

    def __init__(self, names: Sequence[str], written: Sequence[str], tensors: Sequence[Any]) -> None:
        # Tensors of the device "meta" have no memory.
        present = [(place, x) for place, x in enumerate(tensors) if x is not None and x.device.type != "meta"]
        self._places = [place for place, _ in present]
        self._names = [names[place] for place in self._places]
        self._layouts = [(tuple(x.shape), x.stride(), x.element_size()) for _, x in present]
        lengths = [length_of(*layout) for layout in self._layouts]
        self._pairs = [
            (i, j, lengths[i], -lengths[j])
            for i, name in enumerate(self._names)
            for j, other in enumerate(self._names)
            if name in written and i != j and (i < j or other not in written) and lengths[i] and lengths[j]
        ]

    def __call__(self, tensors: Sequence[Any]) -> None:
        """Raises ValueError naming two tensors that share memory and must not; the tensors are laid out as those given at first."""
        addresses = [tensors[place].data_ptr() for place in self._places]
        for i, j, length, minus_length in self._pairs:
            distance = addresses[j] - addresses[i]
            if minus_length < distance < length and overlap(self._layouts[i], self._layouts[j], distance):
                self._refuse(i, j, distance)

    def _refuse(self, i: int, j: int, distance: int) -> None:
        shown = (f"shape {shape} with strides {strides}" for shape, strides, _ in (self._layouts[i], self._layouts[j]))
        raise ValueError(
            f"{self._names[i]} is written to, so it must not share memory with {self._names[j]}, got {' and '.join(shown)}, "
            f"{distance} bytes apart"
        )


_Layout = tuple[tuple[int, ...], tuple[int, ...], int]


def length_of(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from the first element to the end of the last; 0 without elements."""
    if 0 in shape:
        return 0
    return itemsize * (1 + sum((size - 1) * stride for size, stride in zip(shape, strides)))


@functools.lru_cache(maxsize=_MOST_DISTANCES)
def overlap(layout: _Layout, other: _Layout, distance: int) -> bool:
    """Whether two views share a byte; ``distance``, in bytes, is from the first element of the first to that of the second."""
    bounds: dict[int, tuple[int, int]] = {}
    for (shape, strides, itemsize), sign in ((layout, 1), (other, -1)):
        for size, stride in (*zip(shape, (stride * itemsize for stride in strides)), (itemsize, 1)):
            if stride > 0:
                low, high = bounds.get(stride, (0, 0))
                bounds[stride] = (low, high + size - 1) if sign > 0 else (low - size + 1, high)
    terms = _dense([(weight, *bounds[weight]) for weight in sorted(bounds)])
    return _has_solution(terms, distance)


@functools.lru_cache(maxsize=_MOST_DISTANCES)
def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two indices of a tensor have one address, as in an expanded tensor or one of sliding windows."""
    if 0 in shape:
        return False
    dims = sorted((stride, size) for size, stride in zip(shape, strides) if size > 1)
    reach = 0
    for place, (stride, size) in enumerate(dims):
        if stride <= reach or stride == 0:
            # A step in this dimension may lead where steps in the smaller ones lead, too.
            smaller = [(weight, 1 - count, count - 1) for weight, count in dims[:place]]
            steps = range(1, min(size - 1, reach // stride if stride else 1) + 1)
            if stride == 0 or len(steps) > _MOST_STEPS or any(_has_solution(smaller, step * stride) for step in steps):
                return True
        reach += (size - 1) * stride
    return False


def _dense(terms: list[_Term]) -> list[_Term]:
    """The same sums by fewer terms: multiples of a weight without a gap take in those of its multiples."""
    merged: list[_Term] = []
    for weight, low, high in terms:
        if merged:
            unit, unit_low, unit_high = merged[-1]
            times, rest = divmod(weight, unit)
            if rest == 0 and times <= unit_high - unit_low + 1:
                merged[-1] = (unit, unit_low + times * low, unit_high + times * high)
                continue
        merged.append((weight, low, high))
    return merged


def _has_solution(terms: list[_Term], total: int) -> bool:
    """Whether a sum of ints within their bounds, times their weights (ascending), is ``total``; True where that takes too long to say."""
    lows, highs, divisors = [0], [0], [0]
    for weight, low, high in terms:
        lows.append(lows[-1] + weight * low)
        highs.append(highs[-1] + weight * high)
        divisors.append(math.gcd(divisors[-1], weight))
    seen = {(len(terms), total)}
    waiting = [(len(terms), total)]
    while waiting:
        if len(seen) > _MOST_STEPS:
            return True
        count, rest = waiting.pop()
        if count == 0:
            if rest == 0:
                return True
            continue
        if not lows[count] <= rest <= highs[count] or rest % divisors[count]:
            continue
        weight, low, high = terms[count - 1]
        # What is left must be within reach of the smaller weights.
        first = max(low, -((highs[count - 1] - rest) // weight))
        last = min(high, (rest - lows[count - 1]) // weight)
        if last - first > _MOST_STEPS:
            return True
        for number in range(first, last + 1):
            state = (count - 1, rest - number * weight)
            if state not in seen:
                seen.add(state)
                waiting.append(state)
    return False
