"""Savings of time in Triton's front end and around it, beside those of :mod:`.replay`.

They change no value: types and shapes that were made once are used again, operands of one shape are not broadcast, and a launch
repeats the changes to the language that another one made.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from . import replay

Method = Callable[..., Any]


def tensor_init(original: Method) -> Method:
    """``tl.tensor.__init__`` that makes the constants of a shape once.

    What the original sets is compared the first time, so that a Triton that sets more is left alone.
    """
    shapes: dict[tuple[int, ...], tuple[Any, Any] | None] = {}

    @functools.wraps(original)
    def __init__(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        known = shapes.get(key)
        if known is not None:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known
            return
        original(self, handle, type)
        if vars(self).keys() == {"handle", "type", "dtype", "shape", "numel"}:
            shapes.setdefault(key, (self.shape, self.numel))

    return __init__


def block_type_init(original: Method) -> Method:
    """``tl.block_type.__init__`` that checks and names a shape of an element type once."""
    made: dict[tuple[str, tuple[Any, ...]], dict[str, Any]] = {}

    @functools.wraps(original)
    def __init__(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, tuple(shape))
        known = made.get(key)
        if known is not None:
            vars(self).update(known)
            self.element_ty = element_ty
            return
        original(self, element_ty, shape)
        made[key] = {name: value for name, value in vars(self).items() if name in ("shape", "numel", "name")}

    return __init__


def broadcast_impl_value(original: Method) -> Method:
    """``TritonSemantic.broadcast_impl_value`` that asks once what two shapes of one rank become.

    Operands of one shape are returned as they are.
    """
    shapes: dict[tuple[Any, Any], list[int]] = {}

    def widened(self: Any, value: Any, shape: list[int]) -> Any:
        if tuple(value.type.shape) == tuple(shape):
            return value
        return self.tensor(
            self.builder.create_broadcast(value.handle, shape), type(value.type)(value.type.scalar, shape)
        )

    @functools.wraps(original)
    def method(self: Any, lhs: Any, rhs: Any) -> Any:
        if type(self) is not TritonSemantic:  # Gluon's shapes come with layouts
            return original(self, lhs, rhs)
        left, right = lhs.type, rhs.type
        if not left.is_block() and not right.is_block():
            return lhs, rhs
        if not left.is_block() or not right.is_block() or len(left.shape) != len(right.shape):
            return original(self, lhs, rhs)
        if left.shape is right.shape:
            return lhs, rhs
        key = (tuple(left.shape), tuple(right.shape))
        shape = shapes.get(key)
        if shape is not None:
            return widened(self, lhs, shape), widened(self, rhs, shape)
        lhs, rhs = original(self, lhs, rhs)
        shapes[key] = list(lhs.type.shape)
        return lhs, rhs

    return method


def binary_op_type_checking_impl(original: Method) -> Method:
    """``TritonSemantic.binary_op_type_checking_impl`` that leaves broadcasting to NumPy, where there is nothing to convert.

    What asks for it is an operation of single elements: it gets an operand's few elements under the type of the result.
    """
    float32, int32, int64 = tl.float32, tl.int32, tl.int64
    shapes: dict[tuple[Any, Any], list[int]] = {}

    @functools.lru_cache(4096)
    def constant(semantic: Any, value: Any, is_float: bool, dtype: Any) -> Any:
        return semantic.scalar_constant(value, dtype=dtype)

    def number(semantic: Any, value: Any, dtype: Any) -> Any:
        """A Python number as an operand beside a tensor of ``dtype``, or None where Triton has to decide."""
        kind = type(value)
        if (kind is float and dtype is float32 and value != 0.0) or (  # 0.0 and -0.0 are one key
            kind is int and (dtype is float32 or dtype is int32 or dtype is int64) and -(2**31) <= value < 2**31
        ):
            return constant(semantic, value, kind is float, dtype)
        return None

    def operands(semantic: Any, lhs: Any, rhs: Any) -> tuple[Any, Any] | None:
        """Both as tensors, or None where one is neither a tensor nor such a number."""
        if type(lhs) is tl.tensor:
            if type(rhs) is not tl.tensor:
                rhs = number(semantic, rhs, lhs.dtype)
        else:
            lhs = number(semantic, lhs, rhs.dtype) if type(rhs) is tl.tensor else None
        return None if lhs is None or rhs is None else (lhs, rhs)

    def fit(dtype: Any, other: Any, allow_lhs_ptr: bool) -> bool:
        """Whether there is nothing to convert: one plain type, or a pointer and an offset."""
        if dtype is other:
            return dtype is float32 or dtype is int32 or dtype is int64
        return allow_lhs_ptr and type(dtype) is tl.pointer_type and (other is int32 or other is int64)

    def common_shape(left: Any, right: Any) -> list[int] | None:
        """Of the result, by the shapes of two operands of which a number's is empty; None where they do not go together."""
        key = (tuple(left), tuple(right))
        if key not in shapes:
            if left and right and (len(left) != len(right) or any(a != b and 1 not in (a, b) for a, b in zip(*key))):
                return None
            shapes[key] = [max(a, b) for a, b in zip(*key)] if left and right else [*left, *right]
        return shapes[key]

    @functools.wraps(original)
    def method(self: Any, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, *args: Any, **kwargs: Any) -> Any:
        # Gluon's shapes come with layouts.
        found = operands(self, lhs, rhs) if type(self) is TritonSemantic else None
        if found is None or not fit(found[0].dtype, found[1].dtype, allow_lhs_ptr):
            return original(self, lhs, rhs, allow_lhs_ptr, *args, **kwargs)
        left, right = (operand.type.shape if operand.type.is_block() else [] for operand in found)
        if left == right:
            return found
        shape = common_shape(left, right)
        if shape is None:
            return original(self, lhs, rhs, allow_lhs_ptr, *args, **kwargs)
        return tuple(self.tensor(operand.handle, tl.block_type(operand.dtype, shape)) for operand in found)

    return method


def cast(original: Method) -> Method:
    """``TritonSemantic.cast`` that returns what has the type already as it is."""

    @functools.wraps(original)
    def method(self: Any, input: Any, dst_ty: Any, *args: Any, **kwargs: Any) -> Any:
        if input.dtype is dst_ty.scalar:
            return input
        return original(self, input, dst_ty, *args, **kwargs)

    return method


def computation_type_impl(original: Method) -> Method:
    """``TritonSemantic.computation_type_impl``, a function of the types' names, asked once for each."""
    found: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(original)
    def method(self: Any, a_ty: Any, a_is_scalar: bool, b_ty: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
        if key not in found:
            found[key] = original(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return found[key]

    return method


def handle_init(original: Method) -> Method:
    """``TensorHandle.__init__`` without the calls that its default and its check cost."""

    @functools.wraps(original)
    def __init__(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data = data
        self.dtype = dtype
        self.attr = {} if attr is None else attr
        size = data.itemsize
        if size != 1 and size * 8 > getattr(dtype, "primitive_bitwidth", 64):
            self.__post_init__()

    return __init__


def create_expand_dims(builder: Any, arg: Any, axis: int) -> Any:
    """A dimension of length 1, by an index."""
    data = arg.data
    if not 0 <= axis <= data.ndim:
        return interpreter.TensorHandle(np.expand_dims(data, axis), arg.dtype.scalar)
    return interpreter.TensorHandle(data[(*(slice(None),) * axis, None)], arg.dtype.scalar)


def create_addptr(original: Method) -> Method:
    """``InterpreterBuilder.create_addptr`` that asks once how large a type's elements are, and scales offsets in one step."""
    sizes: dict[str, int] = {}

    @functools.wraps(original)
    def method(builder: Any, ptr: Any, offset: Any) -> Any:
        dtype = ptr.dtype
        size = sizes.get(dtype.name)
        if size is None:
            size = sizes[dtype.name] = max(1, ptr.get_element_ty().primitive_bitwidth // 8)
        scaled = np.multiply(offset.data, size, dtype=np.uint64, casting="unsafe")
        return interpreter.TensorHandle(ptr.data + scaled, dtype)

    return method


_CHECKED = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def binary_op_sanitize_overflow_impl(original: Method) -> Method:
    """The check for overflow as a step of the builder's (:func:`create_overflow_check`), so that it is replayed with the others."""

    @functools.wraps(original)
    def method(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
        if binary_op.__name__ not in _CHECKED:
            original(self, lhs, rhs, binary_op)
        elif lhs.dtype.int_bitwidth < 64 and self.builder.options.sanitize_overflow:

            def complain(left: Any, right: Any, name: str, dtype: Any) -> None:
                original(self, tl.tensor(left, lhs_type), tl.tensor(right, rhs_type), binary_op)

            lhs_type, rhs_type = lhs.type, rhs.type
            self.builder.create_overflow_check(lhs.handle, rhs.handle, binary_op.__name__, lhs.dtype, complain)

    return method


def create_overflow_check(
    builder: Any, lhs: Any, rhs: Any, name: str, dtype: Any, complain: Callable[[Any, Any, str, Any], None]
) -> None:
    """The check for overflow in one step of NumPy; where it finds one, the original says so in its words."""
    exact = _CHECKED[name](lhs.data, rhs.data, dtype=np.int64)
    if exact.size and (
        np.minimum.reduce(exact, axis=None) < dtype.get_int_min_value()
        or np.maximum.reduce(exact, axis=None) > dtype.get_int_max_value()
    ):
        complain(lhs, rhs, name, dtype)


def patch_attr() -> Method:
    """``_patch_attr`` whose builtins are replayed (:mod:`.replay`), and made once and not in every launch."""
    asks_for_semantic = tl.core.builtin(lambda: None).__code__
    made: dict[Method, Method] = {}

    def _patch_attr(owner: Any, name: str, member: Method, builder: Any, scope: Any) -> None:
        if member not in made:
            # Without the question whether there is a _semantic.
            asks = getattr(member, "__code__", None) is asks_for_semantic
            made[member] = replay.REPLAY.replayed(vars(member)["__wrapped__"] if asks else member)
        scope.set_attr(owner, name, made[member])

    return _patch_attr


def patch_builtin(is_builtin: Callable[[Any], bool], patch_attr: Method) -> Method:
    """``_patch_builtin`` that goes through the members of a module or class once, before any is replaced, and not in every launch."""
    names: dict[int, list[str]] = {}

    def _patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
        if id(pkg) not in names:  # modules and classes, which are never freed
            names[id(pkg)] = [name for name, member in inspect.getmembers(pkg) if is_builtin(member)]
        for name in names[id(pkg)]:
            member = getattr(pkg, name)
            if is_builtin(member):  # not replaced by a launch around this one
                patch_attr(pkg, name, member, builder, scope)

    return _patch_builtin


class _Changes:
    """What a launch has changed of the language, so that another can do it again.

    Args:
        made: (owner, name, value before), in their order; a name may have been changed more than once.
    """

    def __init__(self, made: Iterable[tuple[Any, str, Any]]) -> None:
        first: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for owner, name, before in made:
            first.setdefault((id(owner), name), (owner, name, before))
        self._changes = [(owner, name, before, getattr(owner, name)) for owner, name, before in first.values()]

    def fit(self) -> bool:
        """Whether all is as it was before."""
        absent = interpreter._MISSING
        return all(getattr(owner, name, absent) is before for owner, name, before, _ in self._changes)

    def make(self) -> None:
        """Changes it again."""
        for owner, name, _, after in self._changes:
            setattr(owner, name, after)

    def restore(self) -> None:
        """Undoes it."""
        for owner, name, before, _ in self._changes:
            if before is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def patch_lang(original: Method) -> Callable[[Any, Any], Any]:
    """``_patch_lang``, of a function and of what decides about the changes, that remembers them: there are two hundred in each launch."""
    known: dict[Any, _Changes] = {}

    def _patch_lang(fn: Any, key: Any) -> Any:
        changes = known.get(key)
        if changes is not None and changes.fit():  # no launch around this one
            changes.make()
            return changes
        scope = original(fn)
        known[key] = _Changes(scope._changes)
        return scope

    return _patch_lang


def get_np_dtype(original: Method) -> Method:
    """``_get_np_dtype``, which builds its table of all types in every call, several times in every operation."""
    found: dict[str, Any] = {}

    @functools.wraps(original)
    def _get_np_dtype(tt_dtype: Any) -> Any:
        dtype = found.get(tt_dtype.name)
        if dtype is None:
            dtype = found[tt_dtype.name] = original(tt_dtype)
        return dtype

    return _get_np_dtype


def install(replace: Callable[[Any, str, Any], None]) -> None:
    """Puts all of them in place by ``replace(owner, name, value)``."""
    for owner, name, wrapper in (
        (interpreter.TensorHandle, "__init__", handle_init),
        (interpreter.InterpreterBuilder, "create_addptr", create_addptr),
        (tl.core.tensor, "__init__", tensor_init),
        (tl.core.block_type, "__init__", block_type_init),
        (TritonSemantic, "broadcast_impl_value", broadcast_impl_value),
        (TritonSemantic, "binary_op_type_checking_impl", binary_op_type_checking_impl),
        (TritonSemantic, "cast", cast),
        (TritonSemantic, "computation_type_impl", computation_type_impl),
        (TritonSemantic, "binary_op_sanitize_overflow_impl", binary_op_sanitize_overflow_impl),
    ):
        replace(owner, name, wrapper(getattr(owner, name)))
    attr = patch_attr()
    replace(interpreter.InterpreterBuilder, "create_expand_dims", create_expand_dims)
    replace(interpreter.InterpreterBuilder, "create_overflow_check", create_overflow_check)
    replace(interpreter, "_get_np_dtype", get_np_dtype(interpreter._get_np_dtype))
    replace(interpreter, "_patch_attr", attr)
    replace(interpreter, "_patch_builtin", patch_builtin(tl.core.is_builtin, attr))
