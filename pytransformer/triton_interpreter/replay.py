"""Triton's front end is walked through once for each combination of types, and what it asked of the builder is replayed from then on.

A builtin decides by the types of its tensors and by its constants what it asks of the builder: which casts, which instruction, of which
shapes. It never looks at elements. In a kernel the same few combinations come in every trip of every program, so that the decisions are
kept as a plan, a function that calls the builder's methods in their order. All that depends on elements (checks of memory and of overflow,
asserts) is done by those methods, each time.
"""

from __future__ import annotations

import enum
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

Method = Callable[..., Any]
Plan = Callable[..., Any]

_Handle = interpreter.TensorHandle
_PLAIN = frozenset((int, bool, str, type(None)))
_WHOLE = slice(None)
# What these make of constants is one more constant.
_FOLDED = frozenset(
    ("create_make_range", "create_splat", "create_expand_dims", "create_broadcast", "create_reshape", "create_int_cast")
)
# Plans that are kept; a loop whose counter is a number of Python makes one for each of its values.
_MOST = 1 << 15


@functools.cache
def _factory(source: str) -> Callable[..., Plan]:
    """What makes a plan of this text; most plans differ in their constants alone."""
    names: dict[str, Any] = {}
    exec(source, names)
    made: Callable[..., Plan] = names["make"]
    return made


class _Recorder:
    """The builder, noting what is asked of it.

    Args:
        builder: which does it.
        tensors: that are passed to the builtin, each with a handle of its own.
    """

    def __init__(self, builder: Any, tensors: list[Any]) -> None:
        self._builder = builder
        self._tensors = tensors
        self._names = {id(tensor.handle): f"h{place}" for place, tensor in enumerate(tensors)}
        self._constants: list[Any] = []
        self._steps: list[str] = []
        self._results: list[Any] = []  # kept, so that no other handle gets one's id
        self.replayable = True

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._builder, name)
        if not name.startswith("create_"):  # types, and constants of Python's numbers
            return member

        def noted(*args: Any, **kwargs: Any) -> Any:
            result = member(*args, **kwargs)
            self._note(name, args, kwargs, result)
            return result

        return noted

    def _constant(self, value: Any) -> str:
        self._constants.append(value)
        return f"k{len(self._constants) - 1}"

    def _name(self, value: Any) -> str:
        if isinstance(value, (list, tuple)) and any(isinstance(item, _Handle) for item in value):
            self.replayable = False
        known = self._names.get(id(value)) if isinstance(value, _Handle) else None
        return known or self._constant(value)

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if (
            name in _FOLDED
            and isinstance(result, _Handle)
            and not kwargs
            and not any(id(arg) in self._names for arg in args)
        ):
            result.data.flags.writeable = False  # it is shared from now on
            return
        results = result if isinstance(result, tuple) else (result,)
        if not all(isinstance(item, _Handle) or item is None for item in results):
            self.replayable = False
        given = [*map(self._name, args), *(f"{key}={self._name(value)}" for key, value in kwargs.items())]
        targets = [f"r{len(self._results) + place}" for place in range(len(results))]
        self._results += results
        self._names |= {id(item): target for item, target in zip(results, targets) if item is not None}
        target = f"({', '.join(targets)},)" if isinstance(result, tuple) else targets[0]
        self._steps.append(f"{target} = builder.{name}({', '.join(given)})")

    def plan(self, result: Any, kind: type) -> Plan | None:
        """What was noted as a function of the builder and of the tensors that are passed, or None if it cannot be replayed.

        Args:
            result: of the builtin.
            kind: the class of its tensors.
        """
        made = () if result is None else result if isinstance(result, tuple) else (result,)
        if not self.replayable or not all(type(tensor) is kind for tensor in made):
            return None
        tensors = [f"t{place}" for place in range(len(self._tensors))]
        lines = [f"h{place} = t{place}.handle" for place in range(len(tensors))] + self._steps
        outputs = [self._output(tensor, f"o{number}", lines) for number, tensor in enumerate(made)]
        returned = f"({', '.join(outputs)},)" if isinstance(result, tuple) else "".join(outputs)
        body = "\n        ".join([*lines, f"return {returned}"])
        names = ", ".join(["new", "tensor", *(f"k{place}" for place in range(len(self._constants)))])
        source = (
            f"def make({names}):\n    def plan({', '.join(['builder', *tensors])}):\n        {body}\n    return plan\n"
        )
        return _factory(source)(object.__new__, kind, *self._constants)

    def _output(self, tensor: Any, name: str, lines: list[str]) -> str:
        for passed, number in zip(self._tensors, itertools.count()):
            if tensor is passed:
                return f"t{number}"
        lines.append(f"{name} = new(tensor)")
        for key, value in vars(tensor).items():
            lines.append(f"{name}.{key} = {self._name(value)}")
        return name


def _constant_key(value: Any) -> tuple[Any, ...] | None:
    """What tells this constant from others, or None for a value that is none."""
    kind = type(value)
    if kind in _PLAIN:
        return kind, value
    if kind is float:
        return kind, value if value and value == value else repr(value)  # 0.0 equals -0.0, and NaN nothing
    if kind is tl.constexpr:
        inner = _constant_key(value.value)
        return None if inner is None else (kind, *inner)
    if kind is slice:
        if value == _WHOLE:
            return (kind,)
        return _sequence_key(kind, (value.start, value.stop, value.step))
    if kind is tuple or kind is list:
        return _sequence_key(kind, value)
    if isinstance(value, tl.dtype):
        return kind, value.name
    frozen = getattr(kind, "__dataclass_params__", None)  # Gluon's layouts
    return (kind, value) if isinstance(value, enum.Enum) or (frozen is not None and frozen.frozen) else None


def _sequence_key(kind: type, values: Iterable[Any]) -> tuple[Any, ...] | None:
    keys = tuple(map(_constant_key, values))
    return None if None in keys else (kind, keys)


class Replay:
    """Plans of the builtins of a semantic, under each of its builder's options, and the recorder while one is recorded.

    Args:
        semantic: of Triton; its builder does what it is asked for at once.
        tensor: the class of its tensors.
        finish: what becomes of a builtin's result.
    """

    def __init__(self, semantic: Any, tensor: type, finish: Callable[[Any], Any] = lambda result: result) -> None:
        self._semantic = semantic
        self._tensor = tensor
        self._finish = finish
        self.recorder: _Recorder | None = None
        # Options' hashes cost more than asking whether they are still the same.
        self._options: Any = None
        self._plans: dict[Any, Plan | None] = {}
        self._by_options: dict[Any, dict[Any, Plan | None]] = {}

    def replayed(self, member: Method) -> Method:
        """A builtin of Triton as one that a kernel calls."""
        semantic, tensor, finish = self._semantic, self._tensor, self._finish

        def builtin(*args: Any, **kwargs: Any) -> Any:
            if self.recorder is not None:  # a builtin that another one uses
                kwargs["_semantic"] = semantic
                return finish(member(*args, **kwargs))
            if kwargs:
                kwargs.pop("_semantic", None)
            builder = semantic.builder
            if builder.options is not self._options:
                self._options = builder.options
                self._plans = self._by_options.setdefault(builder.options, {})
            key: list[Any] = [member]
            tensors = []
            for arg in (*args, *kwargs, *kwargs.values()) if kwargs else args:
                kind = type(arg)
                if kind is tensor:
                    tensors.append(arg)
                    key.append(arg.type.name)
                elif kind in _PLAIN:
                    key += (kind, arg)
                else:
                    part = _constant_key(arg)
                    if part is None:
                        return finish(member(*args, **kwargs, _semantic=semantic))
                    key.append(part)
            found = tuple(key)
            try:
                plan = self._plans[found]
            except KeyError:
                return self._record(found, member, args, kwargs, tensors)
            if plan is None:
                return finish(member(*args, **kwargs, _semantic=semantic))
            return plan(builder, *tensors)

        return builtin

    def _record(self, key: Any, member: Method, args: Any, kwargs: dict[str, Any], tensors: list[Any]) -> Any:
        semantic, kind = self._semantic, self._tensor
        # Handles of their own, so that x * x and x * y have one plan.
        twins = [_twin(tensor) for tensor in tensors]
        left = iter(twins)
        given = [next(left) if type(arg) is kind else arg for arg in args]
        named = {name: next(left) if type(arg) is kind else arg for name, arg in kwargs.items()}
        builder = semantic.builder
        self.recorder = semantic.builder = recorder = _Recorder(builder, twins)
        try:
            result = self._finish(member(*given, **named, _semantic=semantic))
        finally:
            self.recorder, semantic.builder = None, builder
        if len(self._plans) >= _MOST:
            self._plans.clear()
        self._plans[key] = recorder.plan(result, kind)
        originals = {id(twin): tensor for twin, tensor in zip(twins, tensors)}
        if isinstance(result, tuple):
            return type(result)(originals.get(id(item), item) for item in result)
        return originals.get(id(result), result)

    def truth(self, member: Method) -> Method:
        """``tl.tensor.__bool__``: a kernel means the value; Triton's code, which is recorded, whether there is a tensor."""

        def method(tensor: Any) -> bool:
            return self.recorder is not None or bool(member(tensor))

        return method

    def of_elements(self, member: Method) -> Method:
        """A method of tensors that depends on their elements: what calls it while it is recorded is not replayed."""

        def method(tensor: Any) -> Any:
            if self.recorder is not None:
                self.recorder.replayable = False
            return member(tensor)

        return method


def _twin(tensor: Any) -> Any:
    """The tensor with a handle of its own."""
    handle = tensor.handle
    twin = object.__new__(type(tensor))
    own = _Handle(handle.data, handle.dtype, handle.attr)
    vars(twin).update({name: own if value is handle else value for name, value in vars(tensor).items()})
    return twin


REPLAY = Replay(interpreter.interpreter_semantic, tl.tensor)
