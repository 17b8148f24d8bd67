"""KV append by the Triton kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pytransformer.ops.backend import Backend, Limit, no_float64
from pytransformer.ops.kv_append.call import AppendCall, unless_empty
from pytransformer.ops.launches import kept
from pytransformer.ops.registered import Outputs

_as_call = functools.partial(tuple.__new__, AppendCall)


def _prepare(call: AppendCall) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.kv_append import AppendLaunch

    return AppendLaunch(call)


_launch = kept(_prepare)


def _append(call: AppendCall) -> Outputs:
    return (_launch(call),)


def _plan(call: AppendCall) -> Callable[[AppendCall], Tensor | None] | None:
    launch = _prepare(call)
    return lambda given: launch(_as_call(given))


BACKEND = Backend("triton", unless_empty(_append), (Limit("float64", no_float64),), plan=_plan)
