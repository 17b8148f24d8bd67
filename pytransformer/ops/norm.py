"""LayerNorm and RMSNorm over the last dimension, optionally of the sum with a residual. Float32 arithmetic, one rounding at the end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from pytransformer import extension, reference
from pytransformer.ops.autograd import records_backward, refuse_double_backward, requires_grad, vmap_by_loop
from pytransformer.ops.backend import (
    BackendChoice,
    Candidate,
    goes_straight,
    is_plain,
    serves_all,
)
from pytransformer.ops.launches import Launches
from pytransformer.ops.norm_checks import NormCall, NormResult, check_norm, tensors_of
from pytransformer.ops.norm_torch import torch_norm


def _kernels_can_serve(call: NormCall) -> str | None:
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors_of(call)):
        return "float64 is served by torch and reference only"
    return None


_CANDIDATES = (
    Candidate("cuda", _kernels_can_serve, limits="float64"),
    Candidate("triton", _kernels_can_serve, limits="float64"),
    Candidate("torch", serves_all),
    Candidate("reference", serves_all),
)
LAYER_NORM_CHOICE = BackendChoice("layer_norm", _CANDIDATES)
RMS_NORM_CHOICE = BackendChoice("rms_norm", _CANDIDATES)


@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., residual: None = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., residual: Tensor, backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def layer_norm(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *,
    eps: float = ..., residual: Tensor | None, backend: str | None = ...,
) -> NormResult: ...  # fmt: skip
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> NormResult:
    """``(s - mean(s)) / sqrt(var(s) + eps) · weight + bias`` over the last dimension, of s = x or x + residual (Ba et al. 2016).

    The sum s is rounded to residual's dtype before it is normalised, so that the next block adds to exactly what this one has normalised.
    The variance divides by the width, not width - 1, and is taken from centred values. Differentiable once with the backends "cuda"
    and "triton"; keeps its dtype under autocast.

    Args:
        x: (..., width), float32, float16 or bfloat16 (or float64), any strides, at least one dimension. With width 0 or no rows the result
            is empty and the gradients of weight and bias are 0.
        weight, bias: (width), each of any of these dtypes; None = 1 and 0. Float32 weights with a 16-bit x are usual.
        eps: at least 0, added to the variance.
        residual: shape of x, any of these dtypes.
        backend: "cuda", "triton", "torch" or "reference"; None = the first of them that can serve, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        y in x's shape and dtype; with a residual (y, s), s in residual's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, eps negative or not finite.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    alike = None
    straight = _goes_straight(backend, x, weight, bias, residual)
    if straight is not None:
        try:
            if straight == "cuda":
                if residual is None:
                    return _cuda_layer_norm()(x, weight, bias, eps)  # type: ignore[no-any-return]
                return _cuda_add_layer_norm()(x, residual, weight, bias, eps)  # type: ignore[no-any-return]
            alike = (x, weight, bias, residual, eps, 0.0, False)
            launch = _CHECKED.find(alike)
            if launch is not None:
                return _result(launch(x, weight, bias, residual))
        except (RuntimeError, TypeError):  # the checks below say in clearer words what is wrong
            pass
    call = check_norm(x, weight, bias, eps=eps, weight_offset=0.0, residual=residual, is_rms=False)
    return _norm(call, LAYER_NORM_CHOICE.select(call, x.device.type, backend), alike)


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., *,
    eps: float = ..., weight_offset: float = ..., residual: None = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., *,
    eps: float = ..., weight_offset: float = ..., residual: Tensor, backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None = ..., *,
    eps: float = ..., weight_offset: float = ..., residual: Tensor | None, backend: str | None = ...,
) -> NormResult: ...  # fmt: skip
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> NormResult:
    """``s / sqrt(mean(s²) + eps) · (weight + weight_offset)`` over the last dimension, of s = x or x + residual (Zhang, Sennrich 2019).

    The sum s is rounded to residual's dtype before it is normalised. The product with the weight is taken in float32, before the only
    rounding. Differentiable once with the backends "cuda" and "triton"; keeps its dtype under autocast.

    Args:
        x: (..., width), float32, float16 or bfloat16 (or float64), any strides, at least one dimension. For QK-norm
            (..., num_heads, head_dim). With width 0 or no rows the result is empty and the gradient of weight is 0.
        weight: (width), any of these dtypes; None = no multiplication (then ``weight_offset`` has no effect).
        eps: at least 0, added to the mean square.
        weight_offset: added to the weight in float32: 1.0 for Gemma, whose weights are stored as differences from 1.
        residual: shape of x, any of these dtypes.
        backend: "cuda", "triton", "torch" or "reference"; None = the first of them that can serve, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise.

    Returns:
        y in x's shape and dtype; with a residual (y, s), s in residual's dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, eps negative, eps or weight_offset not finite.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    alike = None
    straight = _goes_straight(backend, x, weight, residual)
    if straight is not None:
        try:
            if straight == "cuda":
                if residual is None:
                    return _cuda_rms_norm()(x, weight, eps, weight_offset)  # type: ignore[no-any-return]
                return _cuda_add_rms_norm()(x, residual, weight, eps, weight_offset)  # type: ignore[no-any-return]
            alike = (x, weight, None, residual, eps, weight_offset, True)
            launch = _CHECKED.find(alike)
            if launch is not None:
                return _result(launch(x, weight, None, residual))
        except (RuntimeError, TypeError):  # the checks below say in clearer words what is wrong
            pass
    call = check_norm(x, weight, None, eps=eps, weight_offset=weight_offset, residual=residual, is_rms=True)
    return _norm(call, RMS_NORM_CHOICE.select(call, x.device.type, backend), alike)


def _norm(call: NormCall, backend: str, alike: tuple[Any, ...] | None) -> NormResult:
    """The checked call; ``alike``: arguments of an eager call without a gradient, with which Triton may serve without the checks."""
    if alike is not None and backend == "triton":
        return _keep_and_launch(call, alike)
    if backend in ("cuda", "triton"):
        return _kernel_norm(call, backend)
    if torch.is_autocast_enabled(call.x.device.type):
        # It would turn the result of torch's norms to float32.
        with torch.autocast(call.x.device.type, enabled=False):
            return _plain_norm(call, backend)
    return _plain_norm(call, backend)


def _plain_norm(call: NormCall, backend: str) -> NormResult:
    if backend == "torch":
        return torch_norm(call)
    if call.is_rms:
        options = {"eps": call.eps, "weight_offset": call.weight_offset, "residual": call.residual}
        return reference.rms_norm(call.x, call.weight, **options)  # type: ignore[arg-type]
    return reference.layer_norm(call.x, call.weight, call.bias, eps=call.eps, residual=call.residual)


# --- Triton: registered functional ops under one autograd.Function ----------------------------------------------------------------------

torch.library.define(
    "pytransformer::norm_forward",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, float weight_offset, bool is_rms)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "pytransformer::norm_backward",
    "(Tensor dy, Tensor? ds, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, float weight_offset, bool is_rms, bool want_dweight, "
    "ScalarType? dbias_dtype) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


# Launches for inference, each kept after its first call has passed the checks: by (x, weight, bias, residual, eps, weight_offset, is_rms).
_CHECKED: Launches[Callable[..., tuple[Tensor | None, ...]]] = Launches()


def _keep_and_launch(call: NormCall, alike: tuple[Any, ...]) -> NormResult:
    from pytransformer.kernels.norm.forward import NormForward

    options = {"eps": call.eps, "weight_offset": call.weight_offset, "is_rms": call.is_rms}
    try:
        launch = NormForward(*tensors_of(call), **options, statistics=False)  # type: ignore[arg-type]
    except ValueError:  # a tensor must be copied first, each time anew
        return _kernel_norm(call, "triton")
    _CHECKED.add(alike, launch)
    return _result(launch(*tensors_of(call)))  # type: ignore[arg-type]


def _result(results: tuple[Tensor | None, ...]) -> NormResult:
    y, s = results[:2]
    assert y is not None
    return y if s is None else (y, s)


@functools.cache
def _launchers() -> tuple[Any, Any]:
    # Triton is imported when the first kernel is wanted, not with the package.
    from pytransformer.kernels.norm.backward import norm_backward
    from pytransformer.kernels.norm.forward import norm_forward

    return norm_forward, norm_backward


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    is_rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, mean, rstd); what there is none of is an empty tensor, as an op returns a fixed number of tensors."""
    y, s, mean, rstd = _launchers()[0](x, weight, bias, residual, eps=eps, weight_offset=weight_offset, is_rms=is_rms)
    return y, rstd.new_empty(0) if s is None else s, rstd.new_empty(0) if mean is None else mean, rstd


def _fake_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_offset: float,
    is_rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    s = rstd.new_empty(0) if residual is None else torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    mean = rstd.new_empty(0) if is_rms else torch.empty_like(rstd)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), s, mean, rstd


def _backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    is_rms: bool,
    want_dweight: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(gradient of s, dweight, dbias), the last two empty where not wanted."""
    dx, dweight, dbias = _launchers()[1](
        *(dy, ds, s, weight, None if is_rms else mean, rstd),
        weight_offset=weight_offset,
        need_dweight=want_dweight,
        dbias_dtype=dbias_dtype,
    )
    return dx, rstd.new_empty(0) if dweight is None else dweight, rstd.new_empty(0) if dbias is None else dbias


def _fake_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_offset: float,
    is_rms: bool,
    want_dweight: bool,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    width = s.shape[-1]
    none = rstd.new_empty(0)
    dweight = none if weight is None or not want_dweight else rstd.new_empty(width, dtype=weight.dtype)
    dbias = rstd.new_empty(0) if dbias_dtype is None else rstd.new_empty(width, dtype=dbias_dtype)
    return torch.empty(s.shape, dtype=s.dtype, device=s.device), dweight, dbias


for _name, _implementation, _fake in (
    ("norm_forward", _forward, _fake_forward),
    ("norm_backward", _backward, _fake_backward),
):
    torch.library.impl(f"pytransformer::{_name}", "CompositeExplicitAutograd", _implementation)
    torch.library.register_fake(f"pytransformer::{_name}", _fake)


# --- CUDA: the extension's ops, two of them the same as Triton's, and lean ones for inference --------------------------------------------

# The ops themselves, kept so that an eager call does not look them up, and without the Python frame around each, which only passes its
# arguments on.
_cuda_layer_norm = functools.cache(lambda: extension.op("layer_norm")._op)
_cuda_rms_norm = functools.cache(lambda: extension.op("rms_norm")._op)
_cuda_add_layer_norm = functools.cache(lambda: extension.op("add_layer_norm")._op)
_cuda_add_rms_norm = functools.cache(lambda: extension.op("add_rms_norm")._op)


def _fake_norm(x: Tensor, *others: Any) -> Tensor:
    for other in others:
        if isinstance(other, Tensor) and other.device != x.device:
            # A tensor on the meta device among real ones brings the call here.
            raise RuntimeError("all tensors must be on the device of the first")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_add_norm(x: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _fake_norm(x, residual, *others), torch.empty(x.shape, dtype=residual.dtype, device=x.device)


_CUDA_FAKES: dict[str, Any] = {
    "layer_norm": _fake_norm,
    "rms_norm": _fake_norm,
    "add_layer_norm": _fake_add_norm,
    "add_rms_norm": _fake_add_norm,
    "norm_forward": _fake_forward,
    "norm_backward": _fake_backward,
}
for _cuda_name, _cuda_fake in _CUDA_FAKES.items():
    extension.register_fake(_cuda_name, _cuda_fake)


def _goes_straight(backend: str | None, x: Tensor, *others: Tensor | None) -> str | None:
    """The backend whose launch for inference may be made at once, or ``None``."""
    straight = goes_straight(backend, x, *others)
    if straight is not None and torch.is_grad_enabled() and requires_grad(x, *others):
        return None
    return straight


def _cuda_inference(call: NormCall) -> NormResult:
    ops, options = torch.ops.pytransformer_cuda, (call.eps, call.weight_offset)
    result: NormResult
    if call.is_rms and call.residual is None:
        result = ops.rms_norm(call.x, call.weight, *options)
    elif call.is_rms:
        result = ops.add_rms_norm(call.x, call.residual, call.weight, *options)
    elif call.residual is None:
        result = ops.layer_norm(call.x, call.weight, call.bias, call.eps)
    else:
        result = ops.add_layer_norm(call.x, call.residual, call.weight, call.bias, call.eps)
    return result


# --- autograd, of both ------------------------------------------------------------------------------------------------------------------


def _run_forward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...]
    if backend == "cuda":
        results = torch.ops.pytransformer_cuda.norm_forward(*args)
    elif is_plain(*args[:4]):
        results = _forward(*args)
    else:
        results = torch.ops.pytransformer.norm_forward(*args)
    return results


def _run_backward(backend: str, *args: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...]
    if backend == "cuda":
        results = torch.ops.pytransformer_cuda.norm_backward(*args)
    elif is_plain(*args[:6]):
        results = _backward(*args)
    else:
        results = torch.ops.pytransformer.norm_backward(*args)
    return results


def _kernel_norm(call: NormCall, backend: str) -> NormResult:
    needs_grad = torch.is_grad_enabled() and requires_grad(*tensors_of(call))
    # Inside functorch a tensor does not always know that it is differentiated: only plain ones are asked. The tracer of torch.compile
    # knows, and cannot inline a Function none of whose inputs need a gradient.
    if needs_grad or not (torch.compiler.is_compiling() or is_plain(*tensors_of(call))):
        y, s, *_ = _KernelNorm.apply(backend, *call)  # type: ignore[no-untyped-call]
    elif backend == "cuda":
        return _cuda_inference(call)
    elif torch.compiler.is_compiling():
        y, s, *_ = torch.ops.pytransformer.norm_forward(*call)
    else:
        y, s, *_ = _forward(*call)
    return y if call.residual is None else (y, s)


class _KernelNorm(torch.autograd.Function):
    """(y, s, mean, rstd) with the gradient of y and s."""

    @staticmethod
    def forward(backend: str, *args: Any) -> tuple[Tensor, ...]:
        return _run_forward(backend, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, x, weight, bias, residual, _, ctx.weight_offset, ctx.is_rms = inputs
        _, s, mean, rstd = output
        ctx.set_materialize_grads(False)  # an output that was not used costs no tensor of zeros
        if residual is None:
            ctx.mark_non_differentiable(s, mean, rstd)
        else:
            ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)
        ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        s, weight, mean, rstd = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(s, dtype=ctx.x_dtype)
        if not ctx.has_residual:  # torch.compile brings zeros all the same, of an output that is empty then
            ds = None
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[1:5]
        args = (
            *(ctx.backend, dy, ds, s, weight, mean, rstd, ctx.weight_offset, ctx.is_rms),
            *(wants_weight, ctx.bias_dtype if wants_bias else None),
        )
        results = _KernelNormBackward.apply(*args) if records_backward() else _run_backward(*args)  # type: ignore[no-untyped-call]
        dtotal, dweight, dbias = results
        return (
            None,
            dtotal.to(ctx.x_dtype) if wants_x else None,
            dweight if wants_weight else None,
            dbias if wants_bias else None,
            dtotal if wants_residual else None,
            *(None, None, None),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_KernelNorm, info, in_dims, *args)


class _KernelNormBackward(torch.autograd.Function):
    """The backward pass where it is itself recorded: a second derivative is refused rather than wrong."""

    @staticmethod
    def forward(backend: str, *args: Any) -> tuple[Tensor, ...]:
        return _run_backward(backend, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        refuse_double_backward("layer_norm and rms_norm")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_KernelNormBackward, info, in_dims, *args)
