"""Values of a Gluon kernel: tensors backed by NumPy arrays, and Triton's own rules for their types, shapes and layouts.

Triton's ``GluonSemantic`` decides what an operation means, as when it compiles: which types are promoted, that
layouts must match. Below it stands the builder of the hardened interpreter, which computes at once.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import triton.experimental.gluon.language as gl
from triton.experimental.gluon.language import _core as core
from triton.experimental.gluon.language._semantic import GluonSemantic
from triton.runtime import interpreter

from pytransformer.triton_interpreter.replay import Replay

from .faults import MissingWaitError
from .machine import machine
from .source import MARK, line

if TYPE_CHECKING:
    from .products import Product

Handle = interpreter.TensorHandle


class Builder(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """The hardened interpreter's builder for types that have a layout, which says nothing about the elements."""

    def __init__(self) -> None:
        super().__init__()
        # With debug device_assert is checked.
        self.options: Any = dataclasses.replace(interpreter.InterpreterOptions(), debug=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("get_") and name.endswith("_layout"):
            return lambda *args: None
        if name.startswith(("create_", "get_")):
            raise NotImplementedError(f"the Gluon interpreter does not know {name}")
        raise AttributeError(name)

    def get_distributed_ty(self, element: Any, shape: list[int], layout: Any) -> Any:
        """The type without its layout."""
        return gl.block_type(element, list(shape))

    def create_splat(self, ret_ty: Any, arg: Any) -> Any:
        """A scalar as a block; takes no memory."""
        return Handle(np.broadcast_to(arg.data, ret_ty.shape), arg.dtype.scalar)

    def create_broadcast(self, arg: Any, ret_ty: Any) -> Any:
        """A block with dimensions of length 1 stretched."""
        return Handle(np.broadcast_to(arg.data, ret_ty.shape), arg.dtype.scalar)

    def create_exp(self, arg: Any) -> Any:
        """The hardened interpreter's, noted: in an attention kernel they are what the threads' time goes into."""
        machine().note("exponentials", size=arg.data.size)
        return super().create_exp(arg)

    def create_exp2(self, arg: Any) -> Any:
        """Likewise."""
        machine().note("exponentials", size=arg.data.size)
        return super().create_exp2(arg)

    def create_convert_layout(self, ret_ty: Any, arg: Any) -> Any:
        """The same elements."""
        return Handle(arg.data, arg.dtype)

    def create_of_kind(self, arg: Any, kind: Any) -> Any:
        """The elements as integers that know whether they have a sign."""
        return Handle(arg.data.astype(interpreter._get_np_dtype(kind)), kind)

    def create_set_auto_layout(self, layout: Any, arg: Any) -> Any:
        """The same elements."""
        return Handle(arg.data, arg.dtype)


def as_tensor(value: Any) -> Any:
    """A result of one of Triton's functions, some of which make tensors of Triton's own class."""
    if isinstance(value, tuple):
        return tuple(as_tensor(item) for item in value)
    if isinstance(value, gl.tensor) and not isinstance(value, Tensor):
        return Tensor(value.handle, value.type)
    return value


class Tensor(gl.tensor):  # type: ignore[misc]
    """A tensor whose operators work outside of the compiler.

    With a product in place of elements it is an accumulator that came out of no wait which let that product be through: the registers may
    have been copied since. Only another product or another wait can take it.
    """

    __hash__ = object.__hash__

    def __init__(self, handle: Any, type: Any, product: Product | None = None) -> None:
        self._handle = handle
        self.type = type
        self.dtype = type.scalar
        self.shape = list(type.shape) if type.is_block() else []
        self.numel = math.prod(self.shape)
        self.product = product

    @property
    def handle(self) -> Any:
        """The elements.

        Raises:
            MissingWaitError: it is an accumulator that may not be there.
        """
        if self.product is not None:
            raise MissingWaitError(
                f"the accumulator of the product at {self.product.where} is read at {line()}, and has come out of no wait that lets that "
                "product be through"
            )
        return self._handle

    def __bool__(self) -> bool:
        # Triton's own code asks in this way whether there is a tensor; only a kernel means its value.
        if MARK not in sys._getframe(1).f_globals:
            return True
        if self.shape:
            raise ValueError(f"a tensor of shape {self.shape} is no condition, at {line()}")
        return self.truth()

    def truth(self) -> bool:
        """The value of a scalar as a condition."""
        return bool(self.handle.data.item())

    def __index__(self) -> int:
        if self.shape or not self.dtype.is_int():
            raise ValueError(f"a tensor {self.type} is no index, at {line()}")
        return int(self.handle.data.item())

    def __repr__(self) -> str:
        return f"Tensor({self.type}, {self._handle and self._handle.data})"

    __str__ = __repr__


class Semantic(GluonSemantic):  # type: ignore[misc]
    """``GluonSemantic`` over arrays; what it reads from the compiler's values, mostly layouts that MLIR infers, is found here."""

    tensor = Tensor

    def splat(self, value: Any, shape: list[int], layout: Any) -> Any:
        """A scalar as a block."""
        return as_tensor(super().splat(value, shape, layout))

    def convert_layout(self, value: Any, layout: Any, assert_trivial: bool = False) -> Any:
        """The same elements in another layout."""
        return as_tensor(super().convert_layout(value, layout, False))

    def cast(self, input: Any, dst_ty: Any, fp_downcast_rounding: str | None = None) -> Any:
        """A conversion. The compiler's integers have no sign, which its instructions know; here the elements must know it."""
        result = as_tensor(super().cast(input, dst_ty, fp_downcast_rounding))
        kind = dst_ty.scalar
        if not kind.is_int() or kind.is_int_signed() or kind.is_bool():
            return result
        return Tensor(self.builder.create_of_kind(result.handle, kind), result.type)

    def expand_dims(self, input: Any, axis: int) -> Any:
        """A dimension of length 1; the layout must be a slice of the result's."""
        layout = input.type.layout if input.shape else None
        shape = list(input.shape)
        axis += (len(shape) + 1) * (axis < 0)
        shape.insert(axis, 1)
        if isinstance(layout, (gl.AutoLayout, gl.CoalescedLayout)):
            parent = layout
        elif isinstance(layout, gl.SliceLayout) and layout.dim == axis:
            parent = layout.parent
        else:
            raise ValueError(
                f"expand_dims at axis {axis} needs a SliceLayout of that dimension, got {layout}, at {line()}"
            )
        return self._block(self.builder.create_expand_dims(input.handle, axis), input.dtype, shape, parent)

    def permute(self, input: Any, dims: Any) -> Any:
        """The dimensions in another order."""
        order = [core._unwrap_if_constexpr(dim) for dim in dims]
        layout = _permuted(input.type.layout, order)
        return self._block(
            self.builder.create_trans(input.handle, order), input.dtype, [input.shape[dim] for dim in order], layout
        )

    def binary_op_sanitize_overflow_impl(self, lhs: Any, rhs: Any, binary_op: Any) -> None:
        """Whether integers overflow; as the hardened interpreter does, in one step."""
        kind = lhs.type.scalar
        if kind.int_bitwidth < 64:
            self.builder.create_overflow_check(lhs.handle, rhs.handle, binary_op.__name__, kind, _overflows)

    def reduce(self, input: Any, axis: int | None, combine: Any, keep_dims: bool, generic: Callable[..., Any]) -> Any:
        """A reduction along an axis, or of all elements; ``generic`` makes its data."""
        inputs = input if isinstance(input, tuple) else (input,)
        self._check_same_layout(inputs)
        rank = len(inputs[0].shape)
        if axis is not None and not -rank <= axis < rank:
            raise ValueError(f"axis {axis} is none of a tensor of rank {rank}, at {line()}")
        axis = None if axis is None else axis % rank
        layout = inputs[0].type.layout
        outcomes = generic(inputs, axis, combine)
        if axis is None:
            kept = [0] * rank
            results = [
                self._block(Handle(np.asarray(data).reshape(1), x.dtype), x.dtype, [], None) for data, x in outcomes
            ]
            if keep_dims:
                results = [self.splat(result, [1 for _ in kept], layout) for result in results]
        else:
            shape = [length for dim, length in enumerate(inputs[0].shape) if dim != axis]
            sliced = layout if isinstance(layout, (gl.AutoLayout, gl.CoalescedLayout)) else gl.SliceLayout(axis, layout)
            results = [
                self._block(Handle(np.asarray(data).reshape(shape or (1,)), x.dtype), x.dtype, shape, sliced)
                for data, x in outcomes
            ]
            if keep_dims:
                results = [self.expand_dims(result, axis) for result in results]
        return tuple(results) if isinstance(input, tuple) else results[0]

    def _block(self, handle: Any, kind: Any, shape: list[int], layout: Any) -> Any:
        return Tensor(handle, gl.distributed_type(kind, shape, layout) if shape else kind)

    def _wrap_handle_infer_layout(self, handle: Any, scalar_ty: Any, shape: list[int]) -> Any:
        raise NotImplementedError(f"the Gluon interpreter does not infer the layout of this operation, at {line()}")


def _overflows(lhs: Any, rhs: Any, name: str, kind: Any) -> None:
    raise OverflowError(f"{kind} overflows in {name} at {line()}")


def _permuted(layout: Any, order: list[int]) -> Any:
    """The layout of a tensor whose dimensions are put in another order."""
    if isinstance(layout, (gl.AutoLayout, gl.CoalescedLayout)):
        return layout
    if isinstance(layout, gl.BlockedLayout):  # of one block: clusters are not run here
        of_dimensions = ("size_per_thread", "threads_per_warp", "warps_per_cta")
        lengths = {name: [getattr(layout, name)[dim] for dim in order] for name in of_dimensions}
        return dataclasses.replace(layout, **lengths, order=[order.index(dim) for dim in layout.order])
    raise NotImplementedError(f"the Gluon interpreter permutes no tensor of layout {layout}, at {line()}")


SEMANTIC = Semantic(Builder())
REPLAY = Replay(SEMANTIC, Tensor, as_tensor)


def _operators() -> None:
    for name in dir(gl.tensor):
        member = getattr(gl.tensor, name)
        if getattr(member, core.GLUON_BUILTIN, False):
            setattr(Tensor, name, REPLAY.replayed(member))
    Tensor.__index__ = REPLAY.of_elements(Tensor.__index__)  # type: ignore[method-assign]


_operators()


def scalar(value: int | float | bool, kind: Any) -> Tensor:
    """A scalar of one of Triton's types."""
    return Tensor(Handle(np.array([value], interpreter._get_np_dtype(kind)), kind), kind)
