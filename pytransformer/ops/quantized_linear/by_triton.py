"""quantized_linear by the Triton kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch

from pytransformer.ops.backend import Backend, Limit, Outputs, no_float64
from pytransformer.ops.launches import kept
from pytransformer.ops.precision import allows_tf32
from pytransformer.ops.quantized_linear.call import QuantizedLinearCall, QuantizedLinearGradientCall


def _prepare(call: QuantizedLinearCall, allow_tf32: bool = False) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.quantized_linear import QuantizedForward

    return QuantizedForward(call, allow_tf32=allow_tf32)


def _prepare_backward(call: QuantizedLinearGradientCall, allow_tf32: bool = False) -> Any:
    from pytransformer.kernels.quantized_linear import QuantizedBackward

    return QuantizedBackward(call, allow_tf32=allow_tf32)


# By whether float32 products may be rounded to tf32.
_launch = tuple(kept(functools.partial(_prepare, allow_tf32=allowed)) for allowed in (False, True))
_launch_backward = tuple(kept(functools.partial(_prepare_backward, allow_tf32=allowed)) for allowed in (False, True))


def _forward(call: QuantizedLinearCall) -> Outputs:
    return (_launch[allows_tf32(call.x.dtype)](call),)


def _backward(call: QuantizedLinearGradientCall) -> Outputs:
    return (_launch_backward[allows_tf32(call.dy.dtype)](call),)


def _plan(call: QuantizedLinearCall) -> Any:
    # The precision of float32 products may be set anew between two calls.
    return None if call.x.dtype == torch.float32 else _prepare(call)


BACKEND = Backend("triton", _forward, (Limit("float64", no_float64),), plan=_plan)
BACKWARD = Backend("triton", _backward)
