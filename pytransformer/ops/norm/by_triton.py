"""The norms by the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytransformer.ops.backend import Backend, Limit
from pytransformer.ops.launches import kept
from pytransformer.ops.norm.call import NormCall, NormGradientCall, NormResult, no_float64_at_all


def _prepare(call: NormCall, *, statistics: bool = True) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.norm.forward import NormForward

    return NormForward(call, statistics=statistics)


def _prepare_gradients(call: NormGradientCall) -> Any:
    from pytransformer.kernels.norm.backward import NormBackward

    return NormBackward(call)


def _plan(call: NormCall) -> Callable[[NormCall], NormResult]:
    launch = _prepare(call, statistics=False)
    if call.residual is None:
        return lambda given: launch(given)[0]
    return lambda given: launch(given)[:2]


_LIMITS = (Limit("float64", no_float64_at_all),)
BACKEND = Backend("triton", kept(_prepare), _LIMITS, plan=_plan)
GRADIENTS = Backend("triton", kept(_prepare_gradients))
