"""SwiGLU, GEGLU and GELU: what a feed-forward network does between its projections. Float32 arithmetic, one rounding at the end."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.ops import checks
from pytransformer.ops.backend import Backend, Limit, Outputs, always, no_float64
from pytransformer.ops.launches import kept
from pytransformer.ops.op import Op
from pytransformer.ops.registered import Differentiable, RegisteredOp, like


class ActivationCall(NamedTuple):
    """A call of one of the ops.

    Attributes:
        gate: (..., width), or [gate; up] (..., 2 · width) if gated and up is None.
        up: a second tensor, or None.
        activation: "silu", "gelu" or "gelu_tanh".
        gated: whether there is an up to multiply with.
    """

    gate: Tensor
    up: Tensor | None
    activation: str
    gated: bool


class ActivationGradientCall(NamedTuple):
    """A call of the backward pass: ``dout``, the gradient of the output with any strides, before what the forward pass was given."""

    dout: Tensor
    gate: Tensor
    up: Tensor | None
    activation: str
    gated: bool


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """``silu(gate) · up``, silu(x) = x / (1 + exp(-x)) (Shazeer 2020).

    16-bit inputs are computed in float32 and rounded once (backend "torch": silu(gate) is rounded too, as ``F.silu(gate) * up`` does). A
    gate of -inf or NaN gives NaN. Differentiable, once with the backend "triton", which keeps nothing but its inputs for the backward pass;
    keeps its dtype under autocast.

    Args:
        gate: (..., width), float32, float16 or bfloat16 (or float64), any strides, at least one dimension. Without ``up``
            (..., 2 · width), one projection's result whose last dimension holds [gate; up]: its gradient is then one tensor too.
        up: gate's shape and dtype.
        backend: "triton", "torch" or "reference"; None = the first of them that can serve, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        (..., width) in gate's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a last dimension that cannot be halved.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    return _SWIGLU((gate, up, "silu", True), backend)  # type: ignore[no-any-return]


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """``gelu(gate) · up`` (Shazeer 2020). In all but the activation as :func:`swiglu`.

    Args:
        gate, up, backend: as in :func:`swiglu`.
        approximate: which gelu, as in :func:`gelu`.

    Returns:
        (..., width) in gate's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, a last dimension that cannot be halved, an unknown ``approximate``.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    return _GEGLU((gate, up, _check_approximate(approximate), True), backend)  # type: ignore[no-any-return]


def gelu(x: Tensor, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """``x · Φ(x)``, Φ the normal distribution's cumulative function (Hendrycks and Gimpel 2016). Computes as :func:`swiglu` does.

    Args:
        x: (..., width), float32, float16 or bfloat16 (or float64), any strides, at least one dimension.
        approximate: "none": Φ(x) = (1 + erf(x / √2)) / 2; "tanh": Φ(x) ≈ (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2.
        backend: as in :func:`swiglu`.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: x has no dimension, an unknown ``approximate``.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    return _GELU((x, None, _check_approximate(approximate), False), backend)  # type: ignore[no-any-return]


# --- checks -----------------------------------------------------------------------------------------------------------------------------


def _check_first(name: str, value: Any) -> None:
    checks.check_tensor(name, value, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE)
    if value.ndim == 0:
        raise ValueError(f"{name} must have at least 1 dimension: (..., width), got shape ()")


def _check_gelu(call: ActivationCall) -> ActivationCall:
    _check_first("x", call.gate)
    return call


def _check_gated(call: ActivationCall) -> ActivationCall:
    gate, up = call.gate, call.up
    _check_first("gate", gate)
    if up is not None:
        checks.check_tensor("up", up, device=gate.device)
        checks.check_same_dtype("up", up, "gate", gate)
        checks.check_shape("up", up, gate.shape, "of gate")
    elif gate.shape[-1] % 2:
        raise ValueError(
            f"gate must have an even last dimension, [gate; up], when up is not given, got shape {tuple(gate.shape)}"
        )
    return call


def _check_approximate(approximate: Any) -> str:
    if approximate == "none":
        return "gelu"
    if approximate == "tanh":
        return "gelu_tanh"
    raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")


# --- torch: its own functions, which the compiler fuses; and the reference --------------------------------------------------------------


# 16-bit inputs are not widened: a single rounding would cost twice the time on a CPU, training included.
def _activate_by_torch(call: ActivationCall) -> Outputs:
    gate, up = call.gate, call.up
    if call.gated and up is None:
        gate, up = gate.chunk(2, dim=-1)
    if call.activation == "silu":
        activated = F.silu(gate)
    else:
        activated = F.gelu(gate, approximate="tanh" if call.activation == "gelu_tanh" else "none")
    return (activated if up is None else activated * up,)


def _activate_by_reference(call: ActivationCall) -> Outputs:
    wide = torch.promote_types(call.gate.dtype, torch.float32)
    gate, up = call.gate.to(wide), None if call.up is None else call.up.to(wide)
    approximate = "tanh" if call.activation == "gelu_tanh" else "none"
    if call.activation == "silu":
        out = reference.swiglu(gate, up)
    elif call.gated:
        out = reference.geglu(gate, up, approximate=approximate)
    else:
        out = reference.gelu(gate, approximate=approximate)
    return (out.to(call.gate.dtype),)


# --- Triton -----------------------------------------------------------------------------------------------------------------------------


def _prepare(call: ActivationCall) -> Any:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.activation import ActivationForward

    return ActivationForward(call)


def _prepare_gradients(call: ActivationGradientCall) -> Any:
    from pytransformer.kernels.activation import ActivationBackward

    return ActivationBackward(call)


_launch = kept(_prepare)


# --- The ops, of all three: they keep their inputs alone; f(gate) is computed a second time, which costs no reading of memory. ----------


def _outputs(call: ActivationCall, backend: str) -> tuple[Any, ...]:
    gate = call.gate
    width = gate.shape[-1] // 2 if call.gated and call.up is None else gate.shape[-1]
    return (((*gate.shape[:-1], width), gate.dtype),)


def _save(ctx: Any, call: ActivationCall, outputs: tuple[Tensor, ...]) -> None:
    gate, up, ctx.activation, ctx.gated = call
    ctx.save_for_backward(gate, up)


def _gradients(ctx: Any, run: Any, dout: Tensor) -> dict[str, Tensor | None]:
    dgate, dup = run(dout, *ctx.saved_tensors, ctx.activation, ctx.gated, ctx.backend)
    wants_gate, wants_up = ctx.needs_input_grad[:2]
    return {"gate": dgate if wants_gate else None, "up": dup if wants_up else None}


_BACKENDS = (
    Backend("triton", lambda call: (_launch(call),), (Limit("float64", no_float64),), plan=_prepare),
    Backend("torch", _activate_by_torch, is_transparent=always),
    Backend("reference", _activate_by_reference, is_transparent=always),
)
_FORWARD = RegisteredOp("activation_forward", ActivationCall, _BACKENDS, _outputs, 1)
_BACKWARD = RegisteredOp(
    "activation_backward",
    ActivationGradientCall,
    (Backend("triton", kept(_prepare_gradients)),),
    lambda call, backend: (like(call.gate), like(call.up)),
    2,
)
_RULE = Differentiable(_FORWARD, _save, _gradients, _BACKWARD, "swiglu, geglu and gelu")
_SWIGLU, _GEGLU, _GELU = (
    Op(name, _FORWARD, check, _BACKENDS, rule=_RULE, grads=("gate", "up"))
    for name, check in (("swiglu", _check_gated), ("geglu", _check_gated), ("gelu", _check_gelu))
)
SWIGLU_CHOICE, GEGLU_CHOICE, GELU_CHOICE = _SWIGLU.choice, _GEGLU.choice, _GELU.choice
