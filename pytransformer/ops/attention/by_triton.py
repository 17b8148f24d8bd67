"""Attention by the Triton kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pytransformer.kernels.hopper import serves
from pytransformer.ops.attention.call import AttentionCall, unless_empty
from pytransformer.ops.attention.padding import is_padded, padded
from pytransformer.ops.backend import Backend, Limit, Outputs, head_dim_limit, no_float64, warn_once
from pytransformer.ops.launches import kept
from pytransformer.ops.op import forget_launches
from pytransformer.ops.precision import allows_tf32

_as_call = functools.partial(tuple.__new__, AttentionCall)


def _prepare(call: AttentionCall, allow_tf32: bool = False) -> Any:
    if serves.is_on():
        from pytransformer.kernels.launch import device_limits

        if serves.refusal(call, device_limits(call.q.device).arch) is None:
            return _prepare_hopper(call)
    return _prepare_portable(call, allow_tf32)


def _prepare_portable(call: AttentionCall, allow_tf32: bool = False) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.attention.forward import ForwardLaunch

    return ForwardLaunch(call, allow_tf32=allow_tf32)


class _Hopper:
    """A launch of Hopper's kernels, and of the portable ones for tensors at odd addresses or when one of those turns out not to compile.

    Args:
        launch: of calls like the first.
        prepare_portable: makes the other launch of a call, when one needs it.
    """

    def __init__(self, launch: Callable[[Any], Outputs], prepare_portable: Callable[[Any], Any]) -> None:
        self._launch, self._prepare_portable = launch, prepare_portable
        self._portable: Any = None

    def __call__(self, given: Any) -> Outputs:
        if serves.is_on() and serves.is_aligned(given):
            results = _unless_it_does_not_compile(lambda: self._launch(given))
            if results is not None:
                return results
        if self._portable is None:
            self._portable = self._prepare_portable(given)
        return self._portable(given)  # type: ignore[no-any-return]


def _prepare_hopper(call: AttentionCall) -> _Hopper:
    from pytransformer.kernels.hopper.launch import HopperForward

    # The calls to come are as the user gave them, where this one is checked. Its tensors are not kept.
    options = {name: value for name, value in call._asdict().items() if not isinstance(value, torch.Tensor)}
    return _Hopper(HopperForward(call), lambda call: _prepare_portable(call._replace(**options)))


def _prepare_hopper_backward(given: Any) -> _Hopper:
    from pytransformer.kernels.hopper.backward_launch import HopperBackward

    launch = HopperBackward(given, *_gradients(given))
    return _Hopper(lambda given: launch(given, *_gradients(given)), _prepare_portable_backward)


def _unless_it_does_not_compile(launch: Callable[[], Outputs]) -> Outputs | None:
    """What a launch of Hopper's kernels returns; ``None`` if one turns out not to compile, after which no call goes to them."""
    try:
        return launch()
    except Exception as error:
        if not _is_of_the_compiler(error):
            raise
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        serves.switch_off(f"a kernel does not compile: {reason}")
        warn_once(f"attention: Hopper's kernels are off, the portable ones serve, as one does not compile: {reason}")
        return None


def _is_of_the_compiler(error: Exception) -> bool:
    """Whether an error comes from Triton's compiler or loader, or from ptxas, and not from the call or the GPU's work."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return isinstance(error, (CompilationError, OutOfResources, PTXASError)) or "PassManager::run failed" in str(error)


@contextlib.contextmanager
def hopper(on: bool) -> Iterator[None]:
    """Inside, Hopper's kernels serve what they can, or nothing; else the environment's PYTRANSFORMER_HOPPER=1 decides. For one thread."""
    forget_launches()
    try:
        with serves.switched(on):
            yield
    finally:
        forget_launches()


def _prepare_backward(given: Any, allow_tf32: bool = False) -> Any:
    if serves.is_on():
        from pytransformer.kernels.launch import device_limits

        if serves.refusal_backward(given, device_limits(given.q.device).arch) is None:
            return _prepare_hopper_backward(given)
    return _prepare_portable_backward(given, allow_tf32)


def _prepare_portable_backward(given: Any, allow_tf32: bool = False) -> Any:
    from pytransformer.kernels.attention.backward import BackwardLaunch

    wanted = {"want_dbias": given.wants_bias, "want_dslopes": given.wants_slopes}
    launch = BackwardLaunch(given, *_gradients(given), **wanted, allow_tf32=allow_tf32)
    return lambda given: launch(given, *_gradients(given))


def _gradients(given: Any) -> tuple[Any, ...]:
    return given.dout, given.out, given.lse, given.dlse


# By whether float32 products may be rounded to tf32.
_launch = tuple(kept(functools.partial(_prepare, allow_tf32=allowed)) for allowed in (False, True))
_launch_backward = tuple(kept(functools.partial(_prepare_backward, allow_tf32=allowed)) for allowed in (False, True))


def _plan(call: AttentionCall) -> Callable[[AttentionCall], Any] | None:
    if call.q.dtype == torch.float32 or call.q.numel() == 0 or call.k.numel() == 0 or is_padded(call):
        # The precision of float32 products may be set anew between two calls.
        return None
    launch = _prepare(call)
    if call.return_lse:
        return lambda given: launch(_as_call(given))
    return lambda given: launch(_as_call(given))[0]


def backward(given: Any, call: AttentionCall) -> Outputs:
    """(dq, dk, dv, dbias, dsinks, dslopes)."""
    return _launch_backward[allows_tf32(call.q.dtype)](given)  # type: ignore[no-any-return]


BACKEND = Backend(
    "triton",
    unless_empty(padded(lambda call: _launch[allows_tf32(call.q.dtype)](call))),
    (Limit("float64", no_float64), head_dim_limit("q", "v")),
    plan=_plan,
)
