"""Launches that are made again: a kernel's launch, prepared once, costs the host 2 µs instead of the 10 to 30 µs of Triton's own way.

Triton looks at each argument of each launch to find the kernel compiled for it. A launch with the same numbers, dtypes and constants, and
with pointers as aligned as Triton assumes, needs the same kernel, so that it is kept. This file can go, and launchers call
``kernel[grid](...)``, when Triton's own launch costs as little (benchmarks: host_cost; looked at for every release that is supported).
"""

from __future__ import annotations

import abc
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from .launch import interpreting, on_device


@dataclass(frozen=True)
class Varying:
    """An int argument of a :class:`PreparedLaunch` that is given anew with each call; its parameter must be ``do_not_specialize``."""

    number: int


class Derived(abc.ABC):
    """An argument of a :class:`PreparedLaunch` that is made of a pointer which each call gives: a tensor's descriptor, for one."""

    @abc.abstractmethod
    def on(self, tensor: torch.Tensor) -> Any:
        """What Triton is given in its place; raises ValueError for a tensor that it cannot be made of."""

    @abc.abstractmethod
    def expanded(self, metadata: Any) -> tuple[Mapping[int, Any], list[tuple[str, int]]]:
        """(what Triton's launcher in C is given, by the pointer's address; (type, value) of the numbers that it is given behind that).

        Args:
            metadata: what the compiler says of this argument.
        """


class PreparedLaunch:
    """A kernel with its grid and all its arguments but the pointers, to be launched many times.

    The first two calls go through Triton, which specialises, compiles and says which kernel it took; the next ones hand the addresses to
    that kernel's launcher. A call that Triton could treat differently goes through Triton again: a pointer that is not a multiple of 16
    bytes, another current device, a profiler's hooks, debugging options, a number beyond 32 bits. So do all calls in the interpreter,
    while launches are recorded, and with a Triton whose launcher takes other arguments than those known here. On its way through Triton a
    launch that is captured into a CUDA graph is refused if its kernel was not compiled and loaded before (:func:`check_capture`).

    An option that Triton reads from the environment when it compiles must be set before the first launch, as with Triton itself.

    Args:
        kernel: the ``@triton.jit`` function.
        grid: one to three sizes.
        arguments: the positional arguments. A tensor or None is a pointer, which each call gives anew, and None stays None; a
            :class:`Derived` is made of one; a :class:`Varying` is given anew too; all else stays as it is, tuples of numbers and
            constexprs too.
        constants: constexprs and options by name.
        order: for each of the kernel's pointers the index in ``pointers`` where calls give it, or None where there is never one; by
            default they are given in the kernel's order.
        refuse: is shown the pointers of a call, once for each set of addresses, and raises if they must not be launched with.
        start: launches through Triton: takes kernel, grid, arguments and constants, and returns what was compiled, or None where kernels
            are interpreted. By default ``kernel[grid](...)``, which knows no interpreter of Gluon.
    """

    __slots__ = (
        "_accepted",
        "_arguments",
        "_constants",
        "_derived",
        "_grid",
        "_handles",
        "_kernel",
        "_number_places",
        "_order",
        "_pointer_places",
        "_refuse",
        "_start",
    )

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        order: Sequence[int | None] | None = None,
        refuse: Callable[[Sequence[Any]], None] | None = None,
        start: Callable[[Any, Sequence[int], Sequence[Any], Mapping[str, Any]], Any] | None = None,
    ) -> None:
        self._kernel, self._refuse, self._start = kernel, refuse, start
        self._accepted: set[tuple[int, ...]] = set()
        self._grid = (*grid, 1, 1)[:3]
        self._pointer_places, self._number_places = [], []
        self._derived: dict[int, Derived] = {}
        # The constexprs follow the arguments in the order in which the kernel declares them; its launcher skips them.
        self._arguments = list(arguments)
        for place, value in enumerate(arguments):
            kind = type(value)
            if kind is int or kind is float:  # most are
                continue
            if kind is Varying:
                self._number_places.append(place)
            elif isinstance(value, Derived):
                self._pointer_places.append(place)
                self._derived[place] = value
            elif value is None or isinstance(value, torch.Tensor):
                self._pointer_places.append(place)
                self._arguments[place] = None
        self._order = order
        self._constants = constants
        self._handles: dict[int, _Handle | None] = {}  # by device; None after the first launch

    def __call__(self, pointers: Sequence[Any], numbers: Sequence[int] = ()) -> None:
        """Launches on the current stream of the first pointer's device.

        Args:
            pointers: tensors or None, in the ``order`` given; of the dtypes with which this was prepared, and None where it was None
                then. Whatever ``order`` does not name is ignored.
            numbers: values of the arguments that were :class:`Varying`.
        """
        device = pointers[0].get_device()
        handle = self._handles.get(device)
        if handle is None or device != _current_device() or _is_watched(self._kernel):
            self._launch_by_triton(pointers, numbers, device)
            return
        (call, fixed, spread, _), arguments, places, number_places, present, derive = handle
        # Loops of C functions: this is most of what a launch costs the host.
        addresses = list(map(_data_ptr, present(pointers)))
        # Allocators hand out the same addresses again and again: to know them costs a tenth of looking for what they share.
        if self._refuse is not None and ((found := tuple(addresses)) not in self._accepted or derive is not None):
            self._accept(pointers, found)
        arguments = arguments.copy()
        if derive is not None:
            derive(pointers, arguments)
        bits = 0
        for place, address in zip(places, addresses):
            arguments[place] = address
            bits |= address
        for place, number in zip(number_places, numbers):
            arguments[place] = number
            if not -(2**31) <= number < 2**31:
                bits |= 1
        if bits & 15:
            self._launch_by_triton(pointers, numbers, device)
        elif spread:
            call(*self._grid, current_stream(device), *fixed, *arguments)
        else:
            call(*self._grid, current_stream(device), *fixed, arguments)

    def _accept(self, pointers: Sequence[Any], addresses: tuple[int, ...]) -> None:
        assert self._refuse is not None
        self._refuse(pointers)
        if len(self._accepted) >= _MOST_ADDRESSES:
            self._accepted.clear()
        self._accepted.add(addresses)

    def _launch_by_triton(self, given: Sequence[Any], numbers: Sequence[int], device: int) -> None:
        if self._refuse is not None:
            self._refuse(given)
        arguments = self._arguments.copy()
        order = range(len(self._pointer_places)) if self._order is None else self._order
        pointers: list[torch.Tensor | None] = [None if index is None else given[index] for index in order]
        for place, pointer in zip(self._pointer_places, pointers):
            derived = self._derived.get(place)
            arguments[place] = pointer if derived is None or pointer is None else derived.on(pointer)
        for place, number in zip(self._number_places, numbers):
            arguments[place] = number
        with on_device(given[0]):
            check_capture(self._kernel, self._grid, arguments, self._constants, device)
            if self._start is None:
                compiled = self._kernel[self._grid](*arguments, **self._constants)
            else:
                compiled = self._start(self._kernel, self._grid, arguments, self._constants)
        if self._handles.get(device) is not None or compiled is None or not _can_launch_directly(device):
            return
        if device not in self._handles:  # many launches are never made again
            self._handles[device] = None
            return
        aligned = all(pointer is None or pointer.data_ptr() % 16 == 0 for pointer in pointers)
        small = all(-(2**31) <= number < 2**31 for number in numbers)
        launcher = _launcher(compiled, derived=bool(self._derived))
        if aligned and small and launcher is not None and not _is_watched(self._kernel):
            self._handles[device] = self._handle(launcher, compiled, given, order)

    def _handle(self, launcher: _Launcher, compiled: Any, given: Sequence[Any], order: Iterable[int | None]) -> _Handle:
        names = self._kernel.arg_names[len(self._arguments) :]
        every = [*self._arguments, *(self._constants[name] for name in names)]
        kinds = list(compiled.src.signature.values())
        expanded = _expanded(every, kinds, self._derived, compiled.metadata)
        if launcher.flat:
            values, flat = _flattened(expanded.values, expanded.kinds)
        else:
            values = [_plain(value) for value in expanded.values]
            flat = {place: place for place in range(len(values))}
        moved = {place: flat[now] for place, now in enumerate(expanded.places) if now in flat}
        present = [
            (moved[place], index, self._derived.get(place))
            for place, index in zip(self._pointer_places, order)
            if index is not None and given[index] is not None
        ]
        plain = [(place, index) for place, index, derived in present if derived is None]
        derive = [(place, index, expanded.kept[derived]) for place, index, derived in present if derived is not None]
        return _Handle(
            launcher,
            values,
            [place for place, _ in plain],
            [moved[place] for place in self._number_places],
            _getter([index for _, index in plain]),
            _deriver(derive) if derive else None,
        )


def check_capture(
    kernel: Any, grid: Sequence[int], arguments: Sequence[Any], constants: Mapping[str, Any], device: int
) -> None:
    """Refuses a launch that Triton would have to compile or load a kernel for while the current stream is being captured.

    To be asked before a launch by Triton; ``device`` is the index of the tensors' device.

    Raises:
        RuntimeError: names the op, and what to do before capturing.
    """
    if not is_capturing(device):
        return
    before, _runtime.jit_cache_hook = (
        _runtime.jit_cache_hook,
        lambda **details: True,
    )  # what is not there is not compiled
    try:
        compiled = kernel.run(*arguments, grid=grid, warmup=True, **constants)
    finally:
        _runtime.jit_cache_hook = before
    if compiled is not None and getattr(compiled, "module", compiled) is not None:
        return
    op = kernel.fn.__module__.rpartition(".kernels.")[2].partition(".")[0]
    raise RuntimeError(
        f"{op}: a CUDA graph is being captured, and {kernel.fn.__name__} is not {'compiled' if compiled is None else 'loaded'} yet for "
        "this call: before capturing, run it once, or call pytransformer.warmup(..., load=True) for the model"
    )


def _plain(value: Any) -> Any:
    """Tuples without names: Triton's C functions copy those of any other type."""
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _flattened(values: Iterable[Any], kinds: Iterable[Any]) -> tuple[list[Any], dict[int, int]]:
    """(what the machine code is given, where each argument that is no tuple has gone): the elements of tuples, and no constants.

    Args:
        values: all arguments of a kernel.
        kinds: Triton's types for them: a text, "constexpr" for what was compiled in, or a tuple of types.
    """
    flat: list[Any] = []
    moved: dict[int, int] = {}
    for place, (value, kind) in enumerate(zip(values, kinds)):
        if isinstance(kind, tuple):
            flat += _flattened(value, kind)[0]
        elif kind != "constexpr":
            moved[place] = len(flat)
            flat.append(value)
    return flat, moved


class _Expanded(NamedTuple):
    """The arguments with what each :class:`Derived` is for the launcher in C: a value made of the address, and numbers behind it.

    Attributes:
        values: of the arguments; None where calls put in something.
        kinds: Triton's types for them.
        places: where each argument has gone.
        kept: what calls put in, by address, for each that is derived.
    """

    values: list[Any]
    kinds: list[Any]
    places: list[int]
    kept: dict[Derived, Mapping[int, Any]]


def _expanded(values: Sequence[Any], kinds: Sequence[Any], derived: Mapping[int, Derived], metadata: Any) -> _Expanded:
    result = _Expanded([], [], [], {})
    # The compiler describes them in the order of the arguments.
    descriptions = iter(metadata.tensordesc_meta if derived else ())
    for place, (value, kind) in enumerate(zip(values, kinds)):
        result.places.append(len(result.values))
        if place not in derived:
            result.values.append(value)
            result.kinds.append(kind)
            continue
        result.kept[derived[place]], numbers = derived[place].expanded(next(descriptions))
        result.values.extend((None, *(number for _, number in numbers)))
        result.kinds.extend((kind, *(of_number for of_number, _ in numbers)))
    return result


def _deriver(
    places: Sequence[tuple[int, int, Mapping[int, Any]]],
) -> Callable[[Sequence[torch.Tensor], list[Any]], None]:
    """Puts what is kept for the pointers' addresses into the arguments: (its place, the pointer's index, what is kept) each."""

    def derive(pointers: Sequence[torch.Tensor], arguments: list[Any]) -> None:
        for place, index, kept in places:
            arguments[place] = kept[_data_ptr(pointers[index])]

    return derive


def by_name(
    kernel: Any, values: Mapping[str, Any], given: Sequence[str], options: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any], list[int | None]]:
    """``arguments``, ``constants`` and ``order`` of a :class:`PreparedLaunch`, in the order of the kernel's signature.

    Args:
        kernel: calls its pointers ``<name>_ptr``, and writes its constexprs in capitals.
        values: by name, what it takes beside the pointers, and maybe more; a pointer that is here as None is never given.
        given: the names of the pointers that calls give, in their order.
        options: constants that are no parameter of the kernel, such as num_warps.
    """
    numbers = [name for name in kernel.arg_names if not name.isupper()]
    pointers = [name for name in numbers if name.endswith("_ptr")]
    arguments = [None if name in pointers else values[name] for name in numbers]
    constants = {name: values[name] for name in kernel.arg_names if name.isupper()} | dict(options)
    order = [None if name in values else given.index(name.removesuffix("_ptr")) for name in pointers]
    return arguments, constants, order


# torch's own functions, bound once; a torch built without CUDA has none of them.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -2)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
_data_ptr = torch.Tensor.data_ptr


def is_capturing(device: int) -> bool:
    """Whether the current stream is being captured into a CUDA graph; never where tensors are on a CPU (index -1)."""
    return device >= 0 and torch.cuda.is_current_stream_capturing()


# More than the layers of a model times the buffers that each step takes turns with.
_MOST_ADDRESSES = 4096
_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation


def _can_launch_directly(device: int) -> bool:
    # Triton's run returns what it launched, but for the interpreter, which returns None.
    return device == _current_device() and not interpreting()


def _is_watched(kernel: Any) -> bool:
    """Whether each launch must go through Triton: for a profiler, a debugging option, or what runs before the kernel."""
    try:
        if _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls:
            return True
    except AttributeError:  # None, or a function, has taken the place of the chain of hooks
        return True
    return bool(_runtime.debug or _compilation.instrumentation_mode or kernel.pre_run_hooks)


class _Handle(NamedTuple):
    """A compiled kernel.

    Attributes:
        launcher: how to launch it.
        arguments: all that its launcher takes, without the pointers.
        places: of the pointers that are not None among the arguments.
        number_places: of the numbers that are given with each call.
        present: takes these out of what a call is given.
        derive: puts what is derived from the others among the arguments.
    """

    launcher: _Launcher
    arguments: list[Any]
    places: list[int]
    number_places: list[int]
    present: Callable[[Sequence[torch.Tensor | None]], tuple[torch.Tensor, ...]]
    derive: Callable[[Sequence[Any], list[Any]], None] | None


class _Launcher(NamedTuple):
    """``call(*grid, stream, *fixed, *arguments)``, or with one list of arguments if not ``spread``.

    If ``flat``, the arguments are what the machine code is given: the elements of tuples, and no constants.
    """

    call: Callable[..., object]
    fixed: tuple[Any, ...]
    spread: bool
    flat: bool = False


def _launcher(compiled: Any, *, derived: bool) -> _Launcher | None:
    """How to launch a compiled kernel; ``None`` with a Triton that is not known to do it in one of these ways."""
    try:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        if not _takes_known_arguments(type(run)):
            return None
        if derived:  # what is kept of them is taken by the C function alone
            return _c_launcher(run, function, metadata) if compiled.metadata.tensordesc_meta else None
        # A wrapper that encodes tensor descriptors: those of a launch that does not know of them stay its business.
        direct = _c_launcher(run, function, metadata) if isinstance(run.launch, types.BuiltinFunctionType) else None
        return direct or _Launcher(run, (function, metadata, None, None, None), True)
    except AttributeError:
        return None


def _takes_known_arguments(launcher: Any) -> bool:
    """Whether a compiled kernel is called with what is passed here: so in Triton 3.6 to 3.9."""
    code = launcher.__call__.__code__
    first = ("gridX", "gridY", "gridZ", "stream", "function")
    rest = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")
    named = code.co_varnames[1 : code.co_argcount]
    return named in (first, first + rest) and bool(code.co_flags & inspect.CO_VARARGS)


def _c_launcher(run: Any, function: Any, metadata: Any) -> _Launcher | None:
    """The C function below Triton's launcher, where that would only pass its arguments on: it takes the host a microsecond less."""
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    launch = run.launch
    if isinstance(launch, types.FunctionType):  # a wrapper that encodes tensor descriptors
        launch = inspect.getclosurevars(launch).nonlocals.get("launcher")
    if not isinstance(launch, types.BuiltinFunctionType):
        return None
    release = triton.__version__.split(".")[:2]
    fixed = (function, run.launch_cooperative_grid, run.launch_pdl)
    if release == ["3", "6"]:
        scratch, hooks = (None, None), (metadata, None, None, None)
        return _Launcher(launch, (*fixed, *scratch, *hooks), True)
    if release == ["3", "9"]:
        from triton.backends.nvidia import driver

        # It takes the arguments apart by these: a constant or a tuple costs it as much as an argument, so it is given neither.
        annotations = [driver.PyKernelArg(nested_tuple=None, type=driver.ARG_KERNEL)] * len(run.kernel_signature)
        hooks, scratch = (metadata, None, None, None), (None, None)
        return _Launcher(launch, (*fixed, *hooks, *scratch, annotations, run.kernel_signature), False, flat=True)
    return None


def _getter(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Takes the elements at these places, as a tuple however many there are."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return operator.itemgetter(slice(places[0], places[0] + 1) if places else slice(0))
