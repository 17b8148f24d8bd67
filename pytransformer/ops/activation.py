"""SwiGLU, GEGLU and GELU: what a feed-forward network does between its projections. Float32 arithmetic, one rounding at the end."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pytransformer import reference
from pytransformer.ops import checks
from pytransformer.ops.autograd import records_backward, refuse_double_backward, requires_grad, vmap_by_loop
from pytransformer.ops.backend import BackendChoice, Candidate, is_plain, serves_all


class ActivationCall(NamedTuple):
    """A checked call of one of the ops.

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


def _kernel_can_serve(call: ActivationCall) -> str | None:
    if call.gate.dtype == torch.float64:
        return "float64 is served by torch and reference only"
    return None


_CANDIDATES = (
    Candidate("triton", _kernel_can_serve, limits="float64"),
    Candidate("torch", serves_all),
    Candidate("reference", serves_all),
)
SWIGLU_CHOICE = BackendChoice("swiglu", _CANDIDATES)
GEGLU_CHOICE = BackendChoice("geglu", _CANDIDATES)
GELU_CHOICE = BackendChoice("gelu", _CANDIDATES)


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
    call = _check_gated(gate, up, "silu")
    return _activate(call, SWIGLU_CHOICE.select(call, gate.device.type, backend))


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
    call = _check_gated(gate, up, _check_approximate(approximate))
    return _activate(call, GEGLU_CHOICE.select(call, gate.device.type, backend))


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
    _check_first("x", x)
    call = ActivationCall(x, None, _check_approximate(approximate), False)
    return _activate(call, GELU_CHOICE.select(call, x.device.type, backend))


def _check_first(name: str, value: Any) -> None:
    checks.check_tensor(name, value, dtypes=checks.FLOAT_DTYPES_AND_DOUBLE)
    if value.ndim == 0:
        raise ValueError(f"{name} must have at least 1 dimension: (..., width), got shape ()")


def _check_gated(gate: Any, up: Any, activation: str) -> ActivationCall:
    _check_first("gate", gate)
    if up is not None:
        checks.check_tensor("up", up, device=gate.device)
        checks.check_same_dtype("up", up, "gate", gate)
        checks.check_shape("up", up, gate.shape, "of gate")
    elif gate.shape[-1] % 2:
        raise ValueError(
            f"gate must have an even last dimension, [gate; up], when up is not given, got shape {tuple(gate.shape)}"
        )
    return ActivationCall(gate, up, activation, True)


def _check_approximate(approximate: Any) -> str:
    if approximate == "none":
        return "gelu"
    if approximate == "tanh":
        return "gelu_tanh"
    raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")


def _activate(call: ActivationCall, backend: str) -> Tensor:
    if backend == "triton":
        return _kernel_activation(call)
    if backend == "torch":
        return _plain_activation(call)
    wide = torch.promote_types(call.gate.dtype, torch.float32)
    up = None if call.up is None else call.up.to(wide)
    return _reference_activation(call.gate.to(wide), up, call.activation, call.gated).to(call.gate.dtype)


def _reference_activation(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
    if activation == "silu":
        return reference.swiglu(gate, up)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return (
        reference.geglu(gate, up, approximate=approximate) if gated else reference.gelu(gate, approximate=approximate)
    )


# --- torch: its own functions, which the compiler fuses ---------------------------------------------------------------------------------


# 16-bit inputs are not widened: a single rounding would cost twice the time on a CPU, training included.
def _plain_activation(call: ActivationCall) -> Tensor:
    gate, up = call.gate, call.up
    if call.gated and up is None:
        gate, up = gate.chunk(2, dim=-1)
    if call.activation == "silu":
        activated = F.silu(gate)
    else:
        activated = F.gelu(gate, approximate="tanh" if call.activation == "gelu_tanh" else "none")
    return activated if up is None else activated * up


# --- Triton: registered functional ops under one autograd.Function ----------------------------------------------------------------------

torch.library.define(
    "pytransformer::activation_forward",
    "(Tensor gate, Tensor? up, str activation, bool gated) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pytransformer::activation_backward",
    "(Tensor dout, Tensor gate, Tensor? up, str activation, bool gated) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@functools.cache
def _launchers() -> tuple[Any, Any]:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.activation import activation_backward, activation_forward

    return activation_forward, activation_backward


def _forward(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
    out: Tensor = _launchers()[0](gate, up, activation=activation, gated=gated)
    return out


def _fake_forward(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
    width = gate.shape[-1] // 2 if gated and up is None else gate.shape[-1]
    return torch.empty((*gate.shape[:-1], width), dtype=gate.dtype, device=gate.device)


def _backward(dout: Tensor, gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> tuple[Tensor, Tensor]:
    """(gradient of gate, of up); the last is an empty tensor where there is no up, as an op returns a fixed number of tensors."""
    dgate, dup = _launchers()[1](dout, gate, up, activation=activation, gated=gated)
    return dgate, dgate.new_empty(0) if dup is None else dup


def _fake_backward(
    dout: Tensor, gate: Tensor, up: Tensor | None, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    return dgate, dgate.new_empty(0) if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)


for _name, _implementation, _fake in (
    ("activation_forward", _forward, _fake_forward),
    ("activation_backward", _backward, _fake_backward),
):
    torch.library.impl(f"pytransformer::{_name}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"pytransformer::{_name}", _fake)


def _run_forward(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
    if is_plain(gate, up):
        return _forward(gate, up, activation, gated)
    out: Tensor = torch.ops.pytransformer.activation_forward(gate, up, activation, gated)
    return out


def _run_backward(dout: Tensor, gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> tuple[Tensor, Tensor]:
    if is_plain(dout, gate, up):
        return _backward(dout, gate, up, activation, gated)
    gradients: tuple[Tensor, Tensor] = torch.ops.pytransformer.activation_backward(dout, gate, up, activation, gated)
    return gradients


def _kernel_activation(call: ActivationCall) -> Tensor:
    gate, up = call.gate, call.up
    needs_grad = torch.is_grad_enabled() and requires_grad(gate, up)
    # Inside functorch a tensor does not always know that it is differentiated: only plain ones are asked. The tracer of torch.compile
    # knows, and cannot inline a Function none of whose inputs need a gradient.
    if needs_grad or not (torch.compiler.is_compiling() or is_plain(gate, up)):
        out: Tensor = _KernelActivation.apply(*call)  # type: ignore[no-untyped-call]
        return out
    return _run_forward(*call)


class _KernelActivation(torch.autograd.Function):
    """Keeps the inputs alone; f(gate) is computed a second time, which costs no reading of memory."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor | None, activation: str, gated: bool) -> Tensor:
        return _run_forward(gate, up, activation, gated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.activation, ctx.gated = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        args = (dout, *ctx.saved_tensors, ctx.activation, ctx.gated)
        dgate, dup = _KernelActivationBackward.apply(*args) if records_backward() else _run_backward(*args)  # type: ignore[no-untyped-call]
        wants_gate, wants_up = ctx.needs_input_grad[:2]
        return dgate if wants_gate else None, dup if wants_up else None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_KernelActivation, info, in_dims, *args)


class _KernelActivationBackward(torch.autograd.Function):
    """The backward pass where it is itself recorded: a second derivative is refused rather than wrong."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _run_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        refuse_double_backward("swiglu, geglu and gelu")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_KernelActivationBackward, info, in_dims, *args)
