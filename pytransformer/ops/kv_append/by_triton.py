"""KV append by the Triton kernel."""

from __future__ import annotations

from typing import Any

from pytransformer.ops.backend import Backend, Limit, Outputs, no_float64
from pytransformer.ops.kv_append.call import AppendCall, refusal, unless_empty
from pytransformer.ops.launches import kept


def _prepare(call: AppendCall) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.kv_append import AppendLaunch

    return AppendLaunch(call, refuse=refusal(call))


_launch = kept(_prepare)


def _append(call: AppendCall) -> Outputs:
    return (_launch(call),)


BACKEND = Backend("triton", unless_empty(_append), (Limit("float64", no_float64),), plan=_prepare)
