"""Which implementation serves an operation: an ordered list per op, printable, overridable.

Each op holds one :class:`BackendChoice`: a :class:`Backend` for each way to compute it, in order of preference, with what it does not
serve. A backend that was named (argument, :class:`use_backend`, ``PYTRANSFORMER_BACKEND``) and cannot serve raises with its
reason; the automatic choice takes the first that can.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer import extension

BACKENDS = ("cuda", "triton", "torch", "reference")


class _Override(threading.local):
    """What :class:`use_backend` has set; a thread-local rather than a ContextVar: torch.compile can trace (and guard on) it."""

    name: str | None = None


_override = _Override()
_environment = os.environ.get("PYTRANSFORMER_BACKEND") or None


def check_backend_name(name: str, argument: str = "backend") -> str:
    """Returns ``name`` if it is one of :data:`BACKENDS`; else ValueError naming ``argument``."""
    if name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


class use_backend:
    """Context manager: every op called inside, in this thread, is served by backend ``name`` or raises.

    Args:
        name: "reference", "torch", "triton" or "cuda"; ``None`` restores the automatic choice.

    Raises:
        ValueError: unknown name.
    """

    def __init__(self, name: str | None) -> None:
        self.name = None if name is None else check_backend_name(name, "use_backend(name)")
        self._before: list[str | None] = []

    def __enter__(self) -> None:
        self._before.append(_override.name)
        _override.name = self.name

    def __exit__(
        self, exception_type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _override.name = self._before.pop()


def requested_backend(argument: str | None) -> str | None:
    """The backend that was named: the ``backend=`` argument, else the context, else the environment; ``None`` = choose."""
    if argument is not None:
        return check_backend_name(argument)
    context: str | None = _override.name
    if context is not None:
        return context
    if _environment is not None:
        return check_backend_name(_environment, "environment variable PYTRANSFORMER_BACKEND")
    return None


def constant_under_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile runs ``function`` while tracing and keeps its result: what torch.compiler.assume_constant_result does, without
    importing the compiler for it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_is_triton_installed = functools.cache(lambda: importlib.util.find_spec("triton") is not None)


@constant_under_compile
def _triton_installed() -> bool:
    return _is_triton_installed()


@constant_under_compile
def _cuda_why_not(device_type: str) -> str | None:
    return extension.why_not(device_type)


def _interpreting() -> bool:
    # Triton reads the variable when it is imported; the kernels are imported on first use, so the variable decides until then.
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@constant_under_compile
def _triton_compiles() -> bool:
    # Its own device functions were made for the compiler or for the interpreter when it was imported.
    library = sys.modules.get("triton.language.standard")
    return library is not None and type(library.cdiv).__name__ != "InterpretedFunction"


def unavailable(backend: str, device_type: str) -> str | None:
    """Why ``backend`` can serve nothing on this kind of device ("cuda", "cpu", …) here, or ``None``.

    What a backend does not serve of one op are its limits there.
    """
    if backend == "cuda":
        reason: str | None = _cuda_why_not(device_type)
        return reason
    if backend == "triton":
        if not _triton_installed():
            return "triton is not installed (pip install 'triton>=3.6')"
        if device_type == "cpu" and not (_interpreting() or _compiles_for_cpu_tensors):
            return "Triton needs a GPU; on a CPU its interpreter serves when TRITON_INTERPRET=1 is set before triton is imported"
        if device_type == "cpu" and not _compiles_for_cpu_tensors and _triton_compiles():
            return (
                "TRITON_INTERPRET=1 was set after triton had been imported, too late: set it before the program starts"
            )
        if device_type == "cuda" and _interpreting():
            return "TRITON_INTERPRET=1 is set, which interprets on the CPU; unset it to run on the GPU"
        if device_type not in ("cuda", "cpu"):
            return f"Triton kernels run on device type 'cuda', not {device_type!r}"
    return None


# Inside pytransformer/precompile.py Triton takes tensors of the CPU, as kernels are only compiled.
_compiles_for_cpu_tensors = False


def never(call: Any) -> bool:
    """An ``is_transparent`` of kernels."""
    return False


def always(call: Any) -> bool:
    """An ``is_transparent`` of torch's own functions."""
    return True


def no_float64(call: Any) -> str | None:
    """An ``exceeds`` of the kernels, by the dtype of a call's first tensor."""
    if call[0].dtype != torch.float64:
        return None
    return "float64 is served by torch and the reference; the kernels compute in float32"


Outputs = tuple[Tensor | None, ...]


class Limit(NamedTuple):
    """Something that a backend does not serve.

    Attributes:
        name: for the table of :func:`pytransformer.backends`, e.g. "float64".
        exceeds: the reason why not if a call is beyond it, else ``None``.
    """

    name: str
    exceeds: Callable[[Any], str | None]


# Tiles of wider rows do not fit into what a thread block has of registers and shared memory.
WIDEST_HEAD = 256


def head_dim_limit(*names: str, multiple: int = 1) -> Limit:
    """Of kernels: the tensors of these names, of a call, have a head_dim of at most 256 that is a multiple of ``multiple``."""
    allowed = f"at most {WIDEST_HEAD}" + (f" that is a multiple of {multiple}" if multiple > 1 else "")

    def exceeds(call: Any) -> str | None:
        for name in names:
            head_dim = getattr(call, name).shape[-1]
            if head_dim > WIDEST_HEAD or head_dim % multiple:
                return f"the kernels take a head_dim of {allowed}, got {head_dim} of {name}"
        return None

    title = f"head_dim above {WIDEST_HEAD}" + (f" or no multiple of {multiple}" if multiple > 1 else "")
    return Limit(title, exceeds)


@dataclass(frozen=True)
class Backend:
    """One way to compute an op.

    Attributes:
        name: out of :data:`BACKENDS`.
        run: the outputs of a checked call, ``None`` for those that it has not.
        limits: what it does not serve.
        plan: of a checked call, a function of calls like it, as tuples, that launches and returns the public result; ``None`` = nothing
            to keep. Of an op that writes into its arguments, it refuses those that share memory: addresses differ from call to call.
        direct: the public result of arguments as given, by an op that checks them itself; it raises ValueError for what it refuses, before
            anything is written.
        is_transparent: whether a call is made of torch's own functions, which autograd, torch.func and torch.compile see through.
    """

    name: str
    run: Callable[[Any], Outputs]
    limits: tuple[Limit, ...] = ()
    plan: Callable[[Any], Callable[[Any], Any] | None] | None = None
    direct: Callable[..., Any] | None = None
    is_transparent: Callable[[Any], bool] = never

    def why_not(self, call: Any) -> str | None:
        """Why it cannot serve a checked call, or ``None``."""
        for limit in self.limits:
            reason = limit.exceeds(call)
            if reason is not None:
                return reason
        return None


@dataclass(frozen=True)
class BackendChoice:
    """The backends of op ``op``, best first."""

    op: str
    candidates: tuple[Backend, ...]

    def select(self, call: Any, device_type: str, requested: str | None = None) -> str:
        """Name of the backend that serves ``call``.

        Raises:
            NotImplementedError: the named backend, or every backend, cannot serve; the message gives each reason.
            ValueError: unknown backend name.
        """
        named = requested_backend(requested)
        if named is not None:
            reason = self.why_not(named, call, device_type)
            if reason is None:
                return named
            raise NotImplementedError(f"{self.op}: backend {named!r} cannot serve this call: {reason}")
        for candidate in self.candidates:
            if _serves_unasked(candidate.name, device_type) and candidate.why_not(call) is None:
                return candidate.name
        reasons = "; ".join(f"{c.name}: {self.why_not(c.name, call, device_type)}" for c in self.candidates)
        raise NotImplementedError(f"{self.op}: no backend serves this call: {reasons}")

    def why_not(self, backend: str, call: Any, device_type: str) -> str | None:
        """Why ``backend`` cannot serve ``call``, or ``None`` if it can."""
        for candidate in self.candidates:
            if candidate.name == backend:
                return unavailable(backend, device_type) or candidate.why_not(call)
        return unavailable(backend, device_type) or f"there is no {backend} implementation of {self.op} yet"

    def first(self, device_type: str, named: str | None) -> str | None:
        """The backend that a call meets first: the named one, or the best that is there."""
        for candidate in self.candidates:
            if candidate.name == named or (named is None and _serves_unasked(candidate.name, device_type)):
                return candidate.name
        return None

    def report(self, device_type: str) -> dict[str, str]:
        """For each backend, best first: "serves", what it leaves out, or why it serves nothing here."""
        found = {candidate.name: candidate for candidate in self.candidates}
        report = {}
        for name in (*found, *(name for name in BACKENDS if name not in found)):
            report[name] = unavailable(name, device_type) or f"there is no {name} implementation of {self.op} yet"
            if name in found and unavailable(name, device_type) is None:
                left_out = ", ".join(limit.name for limit in found[name].limits)
                report[name] = f"serves, except {left_out}" if left_out else "serves"
        return report


def _serves_unasked(backend: str, device_type: str) -> bool:
    # Interpreted and emulated kernels are for proofs, a thousand times slower than torch: only on request.
    if backend in ("triton", "cuda") and device_type == "cpu":
        return False
    return unavailable(backend, device_type) is None


_given_warnings: set[str] = set()


@constant_under_compile
def warn_once(message: str) -> None:
    """Warns (RuntimeWarning) the first time a message is given in this process; under torch.compile, while tracing."""
    if message not in _given_warnings:
        _given_warnings.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


# Bound once: each look-up through torch's modules takes as long as the question itself.
PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
functorch_level = torch._C._functorch.peek_interpreter_stack
dispatch_modes = torch._C._len_torch_dispatch_stack
is_function_mode_enabled = torch._C._is_torch_function_mode_enabled
forward_ad = torch.autograd.forward_ad
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
is_traced = torch.compiler.is_dynamo_compiling  # what traces in other ways has a dispatch mode


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether eager code may skip the dispatcher for these tensors and launch directly.

    False under torch.compile, functorch transforms, dispatch or function modes, and for tensor subclasses: all of these must see a
    registered op. (Autocast need not: an op that casts does so before it gets here.)
    """
    if is_traced() or functorch_level() is not None:
        return False
    if dispatch_modes() > 0 or is_function_mode_enabled():
        return False
    if forward_ad._current_level >= 0:  # a dual tensor is plain by its type, and would lose its tangent
        return False
    return PLAIN_TYPES.issuperset(map(type, tensors))


_increment_version = torch._C._increment_version


def mark_changed(tensors: tuple[Tensor | None, ...]) -> None:
    """A kernel writes behind autograd's back; a tensor saved for some backward pass must be seen to have changed."""
    try:
        _increment_version(tensors)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        # One is None, or was made under inference mode and has no version; asking each beforehand takes longer than all else here.
        _increment_version([tensor for tensor in tensors if tensor is not None and not tensor.is_inference()])
