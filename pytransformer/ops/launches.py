"""The one cache of launches: what was worked out for a call, kept for the calls that are like it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Launch = TypeVar("Launch")
_MOST_SHAPES = 1024
_MOST_ALIKE = 8


class Launches(Generic[Launch]):
    """Launches by the arguments of a call: tensors of the same type, shape, strides, dtype and device, the rest of the same type and equal.

    A call's arguments are a tuple of which the first is a tensor. Nothing is kept of the tensors but what they are like.

    Args:
        varying: place of an argument, from the first or (negative) from the last, of which only the type counts.
    """

    __slots__ = ("_by_shape", "_varying")

    def __init__(self, varying: int | None = None) -> None:
        self._by_shape: dict[Hashable, list[_Entry]] = {}
        self._varying = varying

    def find(self, arguments: tuple[Any, ...]) -> Launch | None:
        """The launch of a call with such arguments, or ``None``."""
        entries = self._by_shape.get(arguments[0].shape)
        if entries is not None:
            # Of None there is one type as well. True and 1 are equal to 1.0, but not of its type.
            types = tuple(map(type, arguments))
            for entry_types, others, values, tensors, are_alike, launch in entries:
                if types == entry_types and others(arguments) == values and are_alike(*tensors(arguments)):
                    found: Launch = launch
                    return found
        return None

    def clear(self) -> None:
        """Forgets all."""
        self._by_shape.clear()

    def add(self, arguments: tuple[Any, ...], launch: Launch) -> Launch:
        """Keeps a launch and returns it. Where there are too many, as with ever new lengths, old ones go."""
        if len(self._by_shape) >= _MOST_SHAPES:
            self._by_shape.clear()
        entries = self._by_shape.setdefault(arguments[0].shape, [])
        del entries[_MOST_ALIKE - 1 :]
        entries.insert(0, _entry(arguments, launch, self._varying))
        return launch


class _Entry(NamedTuple):
    types: tuple[type, ...]
    others: Callable[[tuple[Any, ...]], Any]
    values: Any
    tensors: Callable[[tuple[Any, ...]], Sequence[Tensor]]
    are_alike: Callable[..., bool]
    launch: Any


def _entry(arguments: tuple[Any, ...], launch: object, varying: int | None) -> _Entry:
    places = [place for place, value in enumerate(arguments) if isinstance(value, Tensor)]
    tensors = _getter(places)
    varying = len(arguments) + varying if varying is not None and varying < 0 else varying
    others = _getter(
        [
            place
            for place, value in enumerate(arguments)
            if value is not None and not isinstance(value, Tensor) and place != varying
        ]
    )
    types = tuple(map(type, arguments))
    return _Entry(types, others, others(arguments), tensors, _likeness(tensors(arguments)), launch)


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes the elements at these places, as a tuple however many there are."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    first, last = (places[0], places[0] + 1) if places else (0, 0)
    return operator.itemgetter(slice(first, last))


def _likeness(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that says whether other tensors are like these in all but their values and addresses."""
    # Torch's guards never accept one tensor in two places.
    if len({id(tensor) for tensor in tensors}) == len(tensors) and _torch_guards_work():
        return _torch_guard(tensors)
    expected = [properties(tensor) for tensor in tensors]
    return lambda *others: [properties(tensor) for tensor in others] == expected


def properties(tensor: Tensor) -> tuple[Any, ...]:
    """All that a launch, and the checks before it, may ask of a tensor beside its values and its address."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad and torch.is_grad_enabled()


def _torch_guard(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What torch.compile asks of tensors before it runs what was compiled for others: in C++, a fifth of the time of Python."""
    make: Any = torch._C._dynamo.guards.TensorGuards
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    check: Callable[..., bool] = make(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check


@functools.cache
def _torch_guards_work() -> bool:
    """Whether this torch has them, and they tell apart what must be told apart: they are not public."""
    try:
        first = torch.zeros(2, 4)
        check = _torch_guard([first, torch.zeros(2, 4)])
        unlike = (torch.zeros(2, 5), torch.zeros(4, 2).t(), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(8))
        elsewhere = torch.zeros(2, 4, device="meta")
        return check(first, torch.ones(2, 4)) and not any(check(first, other) for other in (*unlike, elsewhere))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False


_KEPT: list[Launches[Any]] = []


def kept(prepare: Callable[[Any], Callable[[Any], Any]], *, varying: int | None = None) -> Callable[[Any], Any]:
    """A function of a call that prepares its launch, or finds that of a call like it, and launches."""
    launches: Launches[Callable[[Any], Any]] = Launches(varying)
    _KEPT.append(launches)

    def launch(call: Any) -> Any:
        found = launches.find(call)
        return found(call) if found is not None else launches.add(call, prepare(call))(call)

    return launch


def forget_kept() -> None:
    """Forgets what :func:`kept` has prepared."""
    for launches in _KEPT:
        launches.clear()
