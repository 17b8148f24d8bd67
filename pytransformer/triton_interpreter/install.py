"""Puts the hardened behaviour into Triton's interpreter, and takes it out again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from . import arithmetic, assembly, casts, economy, language, reductions, replay
from .errors import KernelFault, UnsupportedTritonError
from .memory import Access, LaunchMemory, named_tensors, strip

_SEMANTICS = interpreter._ir.MEM_SEMANTIC

# CUDA's limits on a grid.
_MAX_GRID = (2**31 - 1, 65535, 65535)

# What is replaced or relied upon, with the first parameters it must have. Triton 3.6 and 3.9 agree on these.
_EXPECTED: dict[str, tuple[str, ...]] = {
    "InterpreterBuilder.binary_op": ("self", "lhs", "rhs", "op"),
    "InterpreterBuilder.unary_op": ("self", "arg", "op"),
    "InterpreterBuilder.ternary_op": ("self", "lhs", "rhs", "other", "op"),
    "InterpreterBuilder.cast_impl": ("self", "src", "dst_type"),
    "InterpreterBuilder.create_fp_to_fp": ("self", "src", "dst_type", "rounding_mode"),
    "InterpreterBuilder.create_inline_asm": ("self", "inlineAsm", "constraints", "values", "type", "isPure", "pack"),
    "InterpreterBuilder.create_dot": ("self", "a", "b", "d", "input_precision"),
    "InterpreterBuilder.create_fma": ("self", "x", "y", "z"),
    "InterpreterBuilder.create_idiv": ("self", "lhs", "rhs"),
    "InterpreterBuilder.create_srem": ("self", "lhs", "rhs"),
    "InterpreterBuilder.create_urem": ("self", "lhs", "rhs"),
    "InterpreterBuilder.create_frem": ("self", "lhs", "rhs"),
    "InterpreterBuilder.create_clampf": ("self", "arg", "lo", "hi", "propagate_nans"),
    **{f"InterpreterBuilder.{name}": ("self", "arg") for name in arithmetic.FUNCTIONS},
    "InterpreterBuilder.create_print": ("self", "prefix", "hex", "values"),
    "InterpreterBuilder.create_masked_load": ("self", "ptrs", "mask", "other"),
    "InterpreterBuilder.create_masked_store": ("self", "ptrs", "value", "mask"),
    "InterpreterBuilder.create_descriptor_load": ("self", "desc", "indices"),
    "InterpreterBuilder.create_atomic_rmw": ("self", "rmwOp", "ptr", "val", "mask"),
    "InterpreterBuilder.create_atomic_cas": ("self", "ptr", "cmp", "val"),
    "InterpreterBuilder.set_grid_dim": ("self", "nx", "ny", "nz"),
    "InterpreterBuilder.set_grid_idx": ("self", "x", "y", "z"),
    "ReduceOps.apply_impl": ("self", "input"),
    "ReduceOps.generic_reduce": ("self", "input"),
    "ScanOps.apply_impl": ("self", "input"),
    "GridExecutor._init_args_hst": ("self", "args_dev", "kwargs"),
    "GridExecutor.__call__": ("self", "args_dev", "kwargs"),
    "InterpretedFunction.__call__": ("self", "args", "kwargs"),
    "InterpretedFunction.rewrite": ("self",),
    "_patch_attr": ("obj", "name", "member", "builder", "scope"),
    "_patch_builtin": ("pkg", "builder", "scope"),
    "_patch_lang": ("fn",),
    "_patch_lang_tensor": ("tensor", "scope"),
    "_implicit_cvt": ("arg",),
    "_get_np_dtype": ("tt_dtype",),
}


@dataclasses.dataclass
class _Options:
    bounds: bool
    races: bool
    poison: bool
    tf32: bool
    debug: bool


@dataclasses.dataclass
class _Launch:
    """What is known of the launch that runs now."""

    memory: LaunchMemory | None = None
    # Linear program numbers in the order in which they run; None for the natural order.
    order: list[int] | None = None
    # Language modules that a module of functions names, by the id of its names.
    modules: dict[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    # Sets of language modules that have been pointed at the interpreter already, and how each becomes itself again.
    patched: dict[frozenset[int], Any] = dataclasses.field(default_factory=dict)

    def restore(self) -> None:
        """Gives the language back as it was before the launch, the last change first."""
        while self.patched:
            self.patched.popitem()[1].restore()


class _Interpreter:
    """The hardened interpreter while it is installed: its options, the launch in progress and the way back."""

    def __init__(self, options: _Options) -> None:
        self.options = options
        self.launch = _Launch()
        self._replaced: list[tuple[Any, str, bool, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute, remembering whether the owner itself had one, and which."""
        self._replaced.append((owner, name, name in vars(owner), vars(owner).get(name)))
        setattr(owner, name, value)

    def restore(self) -> None:
        """Undoes every :meth:`replace`, the last one first."""
        while self._replaced:
            owner, name, had, value = self._replaced.pop()
            if had:
                setattr(owner, name, value)
            else:
                delattr(owner, name)


_active: _Interpreter | None = None
_order_seed: int | None = None


def installed() -> bool:
    """Whether the hardened interpreter is in place."""
    return _active is not None


def install(
    *,
    bounds: bool = True,
    races: bool = True,
    poison: bool = True,
    tf32: bool = True,
    debug: bool = True,
    program_order: int | None = None,
) -> None:
    """Hardens Triton's interpreter for all launches of this process; called again, it only changes the options.

    Args:
        bounds: raise :class:`OutOfBoundsError` and :class:`MisalignedAccessError` where a load, store or atomic
            leaves the tensor that its pointer was derived from.
        races: raise :class:`RaceError` where programs, or the lanes of one store, get in each other's way.
        poison: masked-off lanes of a load without ``other`` are NaN (integers: all bits set), not 0: on a GPU they
            are undefined.
        tf32: ``tl.dot`` of float32 with ``input_precision="tf32"`` (Triton's default) does not read the low 13 bits of its
            operands, and with "tf32x3" it multiplies parts of them. False: both are exact products.
        debug: ``tl.device_assert`` and the overflow checks of integer arithmetic are on.
        program_order: seed that shuffles the order in which programs run; None runs them in the natural order.

    bfloat16 is right in any case, and a grid that CUDA would refuse is refused.

    Raises:
        RuntimeError: ``TRITON_INTERPRET=1`` was not set before Triton was first imported.
        UnsupportedTritonError: the installed Triton's interpreter differs from the ones this was written for (3.6 to
            3.9).
    """
    global _active, _order_seed
    _check_interpreting()
    if _active is None:
        _check_triton()
    uninstall()
    language.restore()  # what a launch of the stock interpreter has left would be recorded
    active = _Interpreter(_Options(bounds, races, poison, tf32, debug))
    try:
        _install_arithmetic(active)
        _install_memory(active)
        _install_launch(active)
        _install_grid(active)
        _install_language(active)
    except BaseException:
        active.restore()
        raise
    _active = active
    _order_seed = program_order


def uninstall() -> None:
    """Puts the stock interpreter back, exactly as it was. Does nothing if it is there already."""
    global _active, _order_seed
    if _active is not None:
        _active.restore()
    _active = None
    _order_seed = None


@contextlib.contextmanager
def program_order(seed: int | None) -> Iterator[None]:
    """Launches inside run their programs in an order drawn from ``seed`` (never the natural one), or with None in the
    natural order.
    """
    global _order_seed
    if _active is None:
        raise RuntimeError("program_order() needs the hardened interpreter: call install() first")
    before, _order_seed = _order_seed, seed
    try:
        yield
    finally:
        _order_seed = before


@contextlib.contextmanager
def launched(arguments: Iterable[tuple[str, Any]]) -> Iterator[LaunchMemory]:
    """A launch that something else than Triton's interpreter runs: what loads, stores and atomics inside touch is checked all the same.

    Args:
        arguments: names and values; the tensors among them, also in tuples and descriptors, are what may be touched.
    """
    if _active is None:
        install()
    active = _active
    assert active is not None
    tensors = [item for name, value in arguments for item in named_tensors(name, value)]
    language.restore()
    outer, active.launch = active.launch, _Launch()
    memory = LaunchMemory(tensors, bounds=active.options.bounds, races=active.options.races)
    active.launch.memory = memory
    try:
        yield memory
    finally:
        active.launch.restore()
        active.launch = outer


def _check_interpreting() -> None:
    # Triton's own device functions (tl.max, tl.cdiv ...) are decorated when it is imported, kernels when theirs is:
    # both must interpret.
    if not isinstance(tl.standard.cdiv, interpreter.InterpretedFunction) or not triton.knobs.runtime.interpret:
        now = os.environ.get("TRITON_INTERPRET", "not set")
        late = ", which came too late" if triton.knobs.runtime.interpret else ""
        raise RuntimeError(
            "the hardened interpreter needs TRITON_INTERPRET=1 in the environment before triton is first imported; "
            f"it is {now!r} now{late}"
        )


def _check_triton() -> None:
    unknown = []
    for path, expected in _EXPECTED.items():
        try:
            member = functools.reduce(getattr, path.split("."), interpreter)
            parameters = tuple(inspect.signature(member).parameters)
        except AttributeError:
            unknown.append(f"{path} is missing")
            continue
        if parameters[: len(expected)] != expected:
            unknown.append(f"{path}{parameters} is not {expected}")
    if unknown:
        raise UnsupportedTritonError(
            f"Triton {triton.__version__} has an interpreter that cannot be hardened: {'; '.join(unknown)}"
        )


def _install_arithmetic(active: _Interpreter) -> None:
    builder = interpreter.InterpreterBuilder

    def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
        active.replace(owner, name, wrapper(getattr(owner, name)))

    wrap(builder, "binary_op", arithmetic.binary_op)
    for name in ("unary_op", "ternary_op"):
        wrap(builder, name, arithmetic.through_float32)
    for name, wrapper in arithmetic.FUNCTIONS.items():
        wrap(builder, name, wrapper)
    for name in ("create_idiv", "create_srem", "create_urem"):
        wrap(builder, name, arithmetic.integer_division)
    wrap(builder, "create_fma", arithmetic.create_fma)
    wrap(builder, "create_print", arithmetic.create_print)
    wrap(builder, "create_dot", functools.partial(arithmetic.create_dot, tf32=active.options.tf32))
    wrap(builder, "cast_impl", casts.cast_impl)
    wrap(builder, "create_fp_to_fp", casts.create_fp_to_fp)
    wrap(builder, "create_inline_asm", assembly.create_inline_asm)
    wrap(interpreter.ReduceOps, "apply_impl", reductions.reduce_apply_impl)
    wrap(interpreter.ScanOps, "apply_impl", reductions.scan_apply_impl)
    if hasattr(interpreter, "_mxfp_value_handle_to_float32"):  # from Triton 3.9 on
        wrap(interpreter, "_mxfp_value_handle_to_float32", arithmetic.scaled_operand)
    active.replace(builder, "get_bf16", arithmetic.get_bf16)
    active.replace(builder, "create_frem", arithmetic.create_frem)
    active.replace(builder, "create_clampf", arithmetic.create_clampf)
    for name, operation in (
        ("create_minnumf", arithmetic.minimum_number),
        ("create_maxnumf", arithmetic.maximum_number),
        ("create_minimumf", arithmetic.minimum),
        ("create_maximumf", arithmetic.maximum),
    ):
        active.replace(builder, name, _binary(operation))
    # Where nobody looks at the overflow checks they are not computed either: they are half of an integer-heavy kernel's time.
    debug = active.options.debug
    options = dataclasses.replace(interpreter.interpreter_builder.options, debug=debug, sanitize_overflow=debug)
    active.replace(interpreter.interpreter_builder, "options", options)


def _binary(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, operation)


def _element_size(pointers: Any) -> int:
    return int(interpreter._get_np_dtype(pointers.get_element_ty()).itemsize)


def _install_memory(active: _Interpreter) -> None:
    builder = interpreter.InterpreterBuilder
    # Inside an atomic load or store (Triton 3.9), which are made of plain ones.
    kinds: dict[Access, Access] = {}

    def check(pointers: Any, mask: Any, access: Access) -> Any:
        memory = active.launch.memory
        if memory is not None:
            (x, y, z), (grid_x, grid_y, grid_z) = (
                interpreter.interpreter_builder.grid_idx,
                interpreter.interpreter_builder.grid_dim,
            )
            memory.order.enter((x * grid_y + y) * grid_z + z, grid_x * grid_y * grid_z)
            memory.access(pointers.data, mask, _element_size(pointers), kinds.get(access, access), (x, y, z))
        return interpreter.TensorHandle(strip(pointers.data), pointers.dtype)

    load, store, descriptor_load = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_descriptor_load,
    )
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def create_masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        lanes = _lanes(mask)
        pointers = check(ptrs, lanes, Access.LOAD)
        if other is None and active.options.poison and not lanes.all():
            other = _poison(pointers)
        return load(self, pointers, mask, other, *args, **kwargs)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return store(self, check(ptrs, _lanes(mask), Access.STORE), value, mask, *args, **kwargs)

    def create_descriptor_load(self: Any, desc: Any, indices: Any, *args: Any) -> Any:
        element = desc.base.get_element_ty()
        if desc.padding != interpreter._ir.PADDING_OPTION.PAD_NAN or not (element == tl.bfloat16 or element.is_fp8()):
            return descriptor_load(self, desc, indices, *args)
        # The stock interpreter writes NaN into an array of bits, where it becomes a number.
        pointers, mask = desc.materialize_pointers(indices)
        return self.create_masked_load(pointers, mask, _poison(pointers), *args, is_volatile=False)

    def ordered(pointers: Any, lanes: Any, semantics: Sequence[Any]) -> Any:
        """The checked pointers of an atomic, which orders what programs do as its semantics (and scope) say."""
        checked = check(pointers, lanes, Access.ATOMIC)
        memory = active.launch.memory
        if memory is not None:
            addresses = checked.data[np.broadcast_to(lanes, checked.data.shape)]
            orders = semantics[0] if semantics else _SEMANTICS.ACQUIRE_RELEASE
            if orders in (_SEMANTICS.ACQUIRE, _SEMANTICS.ACQUIRE_RELEASE):
                memory.order.acquire(addresses)
            if orders in (_SEMANTICS.RELEASE, _SEMANTICS.ACQUIRE_RELEASE):
                memory.order.release(addresses)
        return checked

    def create_atomic_rmw(self: Any, rmwOp: Any, ptr: Any, val: Any, mask: Any, *args: Any) -> Any:
        _refuse_bfloat16(ptr)
        return rmw(self, rmwOp, ordered(ptr, _lanes(mask), args), val, mask, *args)

    def create_atomic_cas(self: Any, ptr: Any, cmp: Any, val: Any, *args: Any) -> Any:
        _refuse_bfloat16(ptr)
        return cas(self, ordered(ptr, np.ones(ptr.data.shape, np.bool_), args), cmp, val, *args)

    def atomically(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            kinds.update({Access.LOAD: Access.ATOMIC, Access.STORE: Access.ATOMIC})
            try:
                return original(*args, **kwargs)
            finally:
                kinds.clear()

        return method

    loads_and_stores = (create_masked_load, create_masked_store, create_descriptor_load)
    for method in (*loads_and_stores, create_atomic_rmw, create_atomic_cas):
        active.replace(builder, method.__name__, method)
    for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll"):
        if hasattr(builder, name):
            active.replace(builder, name, atomically(getattr(builder, name)))


def _lanes(mask: Any) -> Any:
    """The mask as an array; Triton 3.6 passes a bare array, whose ``data`` is a buffer, for tensor descriptors."""
    return np.asarray(mask.data)


def _poison(pointers: Any) -> Any:
    """What masked-off lanes hold: NaN in every floating format, -1 or the largest value of an integer type, true."""
    dtype = interpreter._get_np_dtype(pointers.get_element_ty())
    values = np.empty(pointers.data.shape, dtype)
    values.view(np.uint8).fill(1 if dtype == np.bool_ else 0xFF)
    return interpreter.TensorHandle(values, pointers.get_element_ty())


def _refuse_bfloat16(pointers: Any) -> None:
    if pointers.get_element_ty() == tl.bfloat16:
        raise NotImplementedError("the interpreter has no atomics on bfloat16: accumulate in float32")


def _install_launch(active: _Interpreter) -> None:
    executor = interpreter.GridExecutor
    init_args, call_grid, implicit_cvt = executor._init_args_hst, executor.__call__, interpreter._implicit_cvt

    def _init_args_hst(self: Any, args_dev: Any, kwargs: Any) -> Any:
        args, keywords = init_args(self, args_dev, kwargs)
        if active.options.bounds or active.options.races:
            tensors = [
                item
                for name, value in (*zip(self.arg_names, args, strict=False), *keywords.items())
                for item in named_tensors(name, value)
            ]
            active.launch.memory = LaunchMemory(tensors, bounds=active.options.bounds, races=active.options.races)
        return args, keywords

    def tagged_cvt(arg: Any) -> Any:
        converted = implicit_cvt(arg)
        if active.launch.memory is not None and hasattr(arg, "data_ptr"):
            converted.handle.data += np.uint64(active.launch.memory.tag(getattr(arg, "base", arg)))
        return converted

    def call(self: Any, *args_dev: Any, **kwargs: Any) -> None:
        outer, active.launch = active.launch, _Launch()
        try:
            # A GPU says nothing when a float overflows or is no number, and nor does this.
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                call_grid(self, *args_dev, **kwargs)
        except InterpreterError as error:
            fault = _fault_within(error)
            if fault is None:
                raise
            raise fault from None
        finally:
            active.launch = outer

    active.replace(executor, "_init_args_hst", _init_args_hst)
    active.replace(executor, "__call__", call)
    active.replace(interpreter, "_implicit_cvt", tagged_cvt)


def _install_grid(active: _Interpreter) -> None:
    builder = interpreter.InterpreterBuilder
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def limited_grid_dim(self: Any, nx: int, ny: int, nz: int) -> None:
        for axis, length, limit in zip("xyz", (nx, ny, nz), _MAX_GRID, strict=True):
            if length > limit:
                raise ValueError(f"the grid has {length} programs along {axis}, and a GPU allows {limit}")
        set_grid_dim(self, nx, ny, nz)
        active.launch.order = None if _order_seed is None else _shuffled(nx * ny * nz, _order_seed)

    def shuffled_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        if active.launch.order is not None:
            _, grid_y, grid_z = self.grid_dim
            number = active.launch.order[(x * grid_y + y) * grid_z + z]
            x, y, z = number // (grid_y * grid_z), number // grid_z % grid_y, number % grid_z
        set_grid_idx(self, x, y, z)

    active.replace(builder, "set_grid_dim", limited_grid_dim)
    active.replace(builder, "set_grid_idx", shuffled_grid_idx)


def _install_language(active: _Interpreter) -> None:
    """One repair (loaded integers as loop bounds), and savings of time, which together pay for all the checks."""
    patch_lang_tensor, patch_lang = interpreter._patch_lang_tensor, economy.patch_lang(interpreter._patch_lang)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch_lang_tensor(tensor, scope)
        # NumPy 2.4 makes no integer of an array that has a dimension, as 3.6 asks of it.
        scope.set_attr(tensor, "__index__", replay.REPLAY.of_elements(lambda self: int(self.handle.data.item())))
        scope.set_attr(tensor, "__bool__", replay.REPLAY.truth(tensor.__bool__))

    def patch_lang_once(fn: Any) -> Any:
        # The stock interpreter points the language at itself anew in every call of a device function, and leaves it so: tl.sum
        # is one, and its module is not the kernel's. Here all is undone with the launch, whose scope is the first.
        names = fn.__globals__
        modules = active.launch.modules.get(id(names))
        if modules is None:
            modules = frozenset(id(value) for value in names.values() if value is tl or value is tl.core)
            active.launch.modules[id(names)] = modules
        if modules not in active.launch.patched:
            active.launch.patched[modules] = patch_lang(fn, (modules, *active.launch.patched))
        return active.launch

    economy.install(active.replace)
    active.replace(interpreter, "_patch_lang_tensor", patch_tensor)
    active.replace(interpreter, "_patch_lang", patch_lang_once)


def _fault_within(error: BaseException | None) -> BaseException | None:
    """The fault that Triton has wrapped, once per call of a device function."""
    while error is not None and not isinstance(error, (KernelFault, UnsupportedTritonError)):
        error = error.__cause__
    return error


def _shuffled(count: int, seed: int) -> list[int]:
    order = random.Random(seed).sample(range(count), count)
    return order if order != list(range(count)) else order[::-1]
