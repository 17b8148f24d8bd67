"""Attention by the Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pytransformer.ops.attention.call import AttentionCall, unless_empty
from pytransformer.ops.attention.padding import is_padded, padded
from pytransformer.ops.backend import Backend, Limit, Outputs, head_dim_limit, no_float64
from pytransformer.ops.launches import kept
from pytransformer.ops.precision import allows_tf32

_as_call = functools.partial(tuple.__new__, AttentionCall)


def _prepare(call: AttentionCall, allow_tf32: bool = False) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.attention.forward import ForwardLaunch

    return ForwardLaunch(call, allow_tf32=allow_tf32)


def _prepare_backward(given: Any, allow_tf32: bool = False) -> Any:
    from pytransformer.kernels.attention.backward import BackwardLaunch

    gradients = (given.dout, given.out, given.lse, given.dlse)
    wanted = {"want_dbias": given.wants_bias, "want_dslopes": given.wants_slopes}
    launch = BackwardLaunch(given, *gradients, **wanted, allow_tf32=allow_tf32)
    return lambda given: launch(given, given.dout, given.out, given.lse, given.dlse)


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
