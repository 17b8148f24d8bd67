"""Decode attention by the Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pytransformer.ops.backend import Backend, Limit, head_dim_limit, no_float64
from pytransformer.ops.decode_attention.call import DecodeCall
from pytransformer.ops.launches import kept
from pytransformer.ops.precision import allows_tf32


def _prepare(call: DecodeCall, allow_tf32: bool = False) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.decode_attention.launcher import DecodeLaunch

    return DecodeLaunch(call, allow_tf32=allow_tf32)


# By whether float32 products may be rounded to tf32.
_launch = tuple(kept(functools.partial(_prepare, allow_tf32=allowed)) for allowed in (False, True))


def _plan(call: DecodeCall) -> Callable[[DecodeCall], Any] | None:
    if call.q.dtype == torch.float32:
        # The precision of float32 products may be set anew between two calls.
        return None
    launch = _prepare(call)
    return launch if call.return_lse else lambda given: launch(given)[0]


BACKEND = Backend(
    "triton",
    lambda call: _launch[allows_tf32(call.q.dtype)](call),
    (Limit("float64", no_float64), head_dim_limit("q", "v_cache")),
    plan=_plan,
)
