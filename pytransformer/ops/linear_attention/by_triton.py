"""Linear attention by the Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pytransformer.ops.backend import Backend, Limit, Outputs, head_dim_limit, no_float64
from pytransformer.ops.launches import kept
from pytransformer.ops.linear_attention.call import LinearAttentionCall
from pytransformer.ops.precision import allows_tf32


def _prepare(call: LinearAttentionCall, allow_tf32: bool = False) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.linear_attention.forward import LinearForward

    return LinearForward(call, allow_tf32=allow_tf32)


def _prepare_backward(given: Any, allow_tf32: bool = False) -> Any:
    from pytransformer.kernels.linear_attention.backward import LinearBackward

    return LinearBackward(given, allow_tf32=allow_tf32)


# By whether float32 products may be rounded to tf32.
_launch = tuple(kept(functools.partial(_prepare, allow_tf32=allowed)) for allowed in (False, True))
_launch_backward = tuple(kept(functools.partial(_prepare_backward, allow_tf32=allowed)) for allowed in (False, True))


def _forward(call: LinearAttentionCall) -> Outputs:
    return _launch[allows_tf32(call.q.dtype)](call)  # type: ignore[no-any-return]


def _plan(call: LinearAttentionCall) -> Callable[[Any], Any] | None:
    if call.q.dtype == torch.float32:
        # The precision of float32 products may be set anew between two calls.
        return None
    launch = _prepare(call)

    def with_state(given: Any) -> Any:
        out, state, normalizer, _ = launch(given)
        return out, (state, normalizer)

    return with_state if call.return_state else lambda given: launch(given)[0]


def _backward(given: Any) -> Outputs:
    return _launch_backward[allows_tf32(given.q.dtype)](given)  # type: ignore[no-any-return]


def _no_features(call: LinearAttentionCall) -> str | None:
    if call.q.shape[-1] > 0 and call.v.shape[-1] > 0:
        return None
    return f"the kernels take a head_dim and a value_dim of at least 1, got {call.q.shape[-1]} and {call.v.shape[-1]}"


_LIMITS = (Limit("float64", no_float64), head_dim_limit("q", "v"), Limit("head_dim 0", _no_features))
BACKEND = Backend("triton", _forward, _LIMITS, plan=_plan)
BACKWARD = Backend("triton", _backward)
