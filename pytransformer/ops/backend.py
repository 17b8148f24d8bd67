"""Which implementation serves an operation: an ordered list per op, printable, overridable.

Each op holds one :class:`BackendChoice`: candidates in order of preference, each with a ``can_serve(call)`` that returns ``None`` or the
reason why not. A backend that was named (argument, :class:`use_backend`, ``PYTRANSFORMER_BACKEND``) and cannot serve raises with its
reason; the automatic choice takes the first that can.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from pytransformer import extension

BACKENDS = ("cuda", "triton", "torch", "reference")

# A thread-local rather than a ContextVar: torch.compile can trace (and guard on) it.
_override = threading.local()
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
        self._before.append(getattr(_override, "name", None))
        _override.name = self.name

    def __exit__(
        self, exception_type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _override.name = self._before.pop()


def requested_backend(argument: str | None) -> str | None:
    """The backend that was named: the ``backend=`` argument, else the context, else the environment; ``None`` = choose."""
    if argument is not None:
        return check_backend_name(argument)
    context: str | None = getattr(_override, "name", None)
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


def unavailable(backend: str, device_type: str) -> str | None:
    """Why ``backend`` can serve nothing on this kind of device ("cuda", "cpu", …) here, or ``None``.

    Options that a backend lacks for one op are the op's own ``can_serve``.
    """
    if backend == "cuda":
        reason: str | None = _cuda_why_not(device_type)
        return reason
    if backend == "triton":
        if not _triton_installed():
            return "triton is not installed (pip install 'triton>=3.6')"
        if device_type == "cpu" and not (_interpreting() or _compiles_for_cpu_tensors):
            return "Triton needs a GPU; on a CPU its interpreter serves when TRITON_INTERPRET=1 is set before the first use"
        if device_type == "cuda" and _interpreting():
            return "TRITON_INTERPRET=1 is set, which interprets on the CPU; unset it to run on the GPU"
        if device_type not in ("cuda", "cpu"):
            return f"Triton kernels run on device type 'cuda', not {device_type!r}"
    return None


_compiles_for_cpu_tensors = False


@contextlib.contextmanager
def triton_compiles_for_cpu_tensors() -> Iterator[None]:
    """Inside, Triton takes tensors of the CPU, as kernels are only compiled (pytransformer/precompile.py)."""
    global _compiles_for_cpu_tensors
    _compiles_for_cpu_tensors = True
    _serves_straight.cache_clear()
    try:
        yield
    finally:
        _compiles_for_cpu_tensors = False
        _serves_straight.cache_clear()


@dataclass(frozen=True)
class Candidate:
    """One backend of one op.

    Attributes:
        backend: name out of :data:`BACKENDS`.
        can_serve: given the op's call (its arguments after the checks), ``None`` or the reason why not.
        limits: one line for people: what this backend does not serve ("" = everything).
    """

    backend: str
    can_serve: Callable[[Any], str | None]
    limits: str = ""


def serves_all(call: Any) -> str | None:
    """A ``can_serve`` for a backend without limits."""
    return None


@dataclass(frozen=True)
class BackendChoice:
    """The ordered candidates of op ``op``, best first."""

    op: str
    candidates: tuple[Candidate, ...]

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
            # Interpreted and emulated kernels are for proofs, a thousand times slower than torch: only on request.
            if candidate.backend in ("triton", "cuda") and device_type == "cpu":
                continue
            if unavailable(candidate.backend, device_type) is None and candidate.can_serve(call) is None:
                return candidate.backend
        reasons = "; ".join(f"{c.backend}: {self.why_not(c.backend, call, device_type)}" for c in self.candidates)
        raise NotImplementedError(f"{self.op}: no backend serves this call: {reasons}")

    def why_not(self, backend: str, call: Any, device_type: str) -> str | None:
        """Why ``backend`` cannot serve ``call``, or ``None`` if it can."""
        for candidate in self.candidates:
            if candidate.backend == backend:
                return unavailable(backend, device_type) or candidate.can_serve(call)
        return unavailable(backend, device_type) or f"there is no {backend} implementation of {self.op} yet"

    def report(self, device_type: str) -> dict[str, str]:
        """For each backend: "serves", what it leaves out, or why it serves nothing here."""
        report = {}
        for backend in BACKENDS:
            found = [candidate for candidate in self.candidates if candidate.backend == backend]
            if not found:
                report[backend] = (
                    unavailable(backend, device_type) or f"there is no {backend} implementation of {self.op} yet"
                )
                continue
            reason = unavailable(backend, device_type)
            report[backend] = reason or (f"serves, except {found[0].limits}" if found[0].limits else "serves")
        return report


_given_warnings: set[str] = set()


@constant_under_compile
def warn_once(message: str) -> None:
    """Warns (RuntimeWarning) the first time a message is given in this process; under torch.compile, while tracing."""
    if message not in _given_warnings:
        _given_warnings.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


# Bound once: each look-up through torch's modules takes as long as the question itself.
_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_function_mode_enabled = torch._C._is_torch_function_mode_enabled
_forward_ad = torch.autograd.forward_ad
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_is_traced = torch.compiler.is_dynamo_compiling  # what traces in other ways has a dispatch mode


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether eager code may skip the dispatcher for these tensors and launch directly.

    False under torch.compile, functorch transforms, dispatch or function modes, and for tensor subclasses: all of these must see a
    registered op. (Autocast need not: an op that casts does so before it gets here.)
    """
    if _is_traced() or _functorch_level() is not None:
        return False
    if _dispatch_modes() > 0 or _is_function_mode_enabled():
        return False
    if _forward_ad._current_level >= 0:  # a dual tensor is plain by its type, and would lose its tangent
        return False
    return _PLAIN_TYPES.issuperset(map(type, tensors))


def goes_straight(backend: str | None, first: torch.Tensor, *others: torch.Tensor | None) -> str | None:
    """The backend to which an eager call of an op whose first choices are "cuda" and "triton" may go straight, or ``None``.

    The extension's op checks all arguments itself: where it raises, the caller goes the long way, whose checks say in clearer words what
    is wrong. Triton's launchers do not: straight to them goes a call that is like one whose checks have passed (kernels/plans.py).
    Whether a gradient is wanted is the caller's to ask.

    Args:
        backend: the op's ``backend`` argument.
        first, others: the call's tensors, or whatever was given in their place.
    """
    named = backend or getattr(_override, "name", None) or _environment
    if named is None and not getattr(first, "is_cuda", False):
        return None
    if first is None or not is_plain(first, *others):
        return None
    return _serves_straight(named, first.is_cuda, first.is_cpu)


@functools.cache
def _serves_straight(named: str | None, is_cuda: bool, is_cpu: bool) -> str | None:
    # Kept for the process: the answer does not change, and its questions take longer than all others of a small call.
    if not (is_cuda or is_cpu):
        return None
    for backend in ("cuda", "triton"):
        if named in (backend, None) and unavailable(backend, "cuda" if is_cuda else "cpu") is None:
            return backend
    return None
