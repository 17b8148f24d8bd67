"""Cross-entropy of a linear head without its logits: checks, choice of the backend, autograd.

A sum or mean computes the gradients along with the losses: 6·T·H·V FLOP for T tokens, H features and V words, and of memory one chunk's
logits and the weight's gradient in float32. How: linear_cross_entropy_chunks.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops import checks
from pytransformer.ops.attention.call import autocast_to_lower, is_autocasting
from pytransformer.ops.autograd import is_recorded, records_backward, refuse_double_backward, vmap_by_loop
from pytransformer.ops.backend import BackendChoice, Candidate, is_plain, requested_backend, serves_all
from pytransformer.ops.linear_cross_entropy_chunks import Options, Wanted, gradient_buffers, losses_and_gradients

REDUCTIONS = ("mean", "sum", "none")
SCALED_AT_ONCE = 2**26  # elements of a gradient


def _triton_serves(dtype: torch.dtype) -> str | None:
    return "float64 is not served; it is for checking the others" if dtype == torch.float64 else None


CHOICE = BackendChoice(
    "linear_cross_entropy",
    (
        Candidate("triton", _triton_serves, "float64"),
        Candidate("torch", serves_all),
        Candidate("reference", serves_all),
    ),
)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the logits ``softcap(x Wᵀ + bias)`` against ``targets``, the logits never materialised as a whole.

    With lse = log Σ exp(logits), the loss of one token is
    ``(1 - label_smoothing) · (lse - logits[target]) + label_smoothing · mean(lse - logits) + z_loss · lse²``.
    Differentiable once with respect to x, weight and bias; the gradient of the weight is accumulated in float32.

    Args:
        x: (..., hidden_size), float32, float16 or bfloat16 (or float64); last dimension contiguous. Under autocast x, weight and bias are
            cast to its dtype, as for a linear layer.
        weight: (vocab_size, hidden_size), dtype of x; last dimension contiguous.
        targets: int64 or int32 (...), token ids below vocab_size, or ``ignore_index``.
        bias: (vocab_size), dtype of x.
        ignore_index: targets of this value have loss 0 and gradient 0 and do not count in the mean.
        label_smoothing: 0 to 1, probability spread evenly over the vocabulary (Szegedy et al. 2016), as in ``F.cross_entropy``.
        softcap: c > 0 replaces a logit s by c · tanh(s / c) (Gemma 2).
        z_loss: weight, at least 0, of lse², which keeps the logits from drifting (Chowdhery et al. 2022).
        reduction: "mean" over the tokens that are not ignored; "sum"; "none". If all are ignored or there are none, the mean is NaN, as in
            ``F.cross_entropy``, and the gradients are 0.
        backend: "triton", "torch" or "reference"; None = Triton on a GPU and torch elsewhere, unless ``use_backend`` or
            PYTRANSFORMER_BACKEND says otherwise. Where targets out of range are not looked for (on a GPU), Triton gives NaN for them.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or with reduction "none" the shape of targets.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes, devices or strides that do not fit, targets out of range (on a CPU, or with PYTRANSFORMER_DEBUG=1), options out
            of range, an unknown reduction.
        NotImplementedError: the named backend cannot serve this call; the message says why.
    """
    x, weight, bias = _check_tensors(x, weight, targets, bias)
    options = _check_options(targets, weight.shape[0], ignore_index, label_smoothing, softcap, z_loss, reduction)
    chosen = CHOICE.select(x.dtype, x.device.type, requested_backend(backend))
    if is_autocasting(x.device.type):
        # x, weight and bias have been cast; the float32 parts must stay float32.
        with torch.autocast(x.device.type, enabled=False):
            return _run(x, weight, targets, bias, options, reduction, chosen)
    return _run(x, weight, targets, bias, options, reduction, chosen)


def _check_tensors(x: Any, weight: Any, targets: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    dtypes = checks.FLOAT_DTYPES_AND_DOUBLE
    x = checks.check_tensor("x", x, dtypes=dtypes)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., hidden_size) with hidden_size of at least 1, got {tuple(x.shape)}")
    weight = checks.check_tensor(
        "weight", weight, ndim=2, dtypes=dtypes, device=x.device, layout="(vocab_size, hidden_size)"
    )
    checks.check_shape("weight", weight, (None, x.shape[-1]), "(vocab_size, hidden_size of x)")
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row (vocab_size), got shape {tuple(weight.shape)}")
    targets = checks.check_tensor("targets", targets, dtypes=(torch.int64, torch.int32), device=x.device)
    checks.check_shape("targets", targets, x.shape[:-1], "x.shape[:-1]")
    x, weight = autocast_to_lower(x), autocast_to_lower(weight)
    checks.check_same_dtype("weight", weight, "x", x)
    checks.check_last_dim_contiguous("x", x)
    checks.check_last_dim_contiguous("weight", weight)
    if bias is not None:
        bias = checks.check_tensor("bias", bias, ndim=1, dtypes=dtypes, device=x.device, layout="(vocab_size)")
        checks.check_shape("bias", bias, (weight.shape[0],), "(vocab_size)")
        bias = autocast_to_lower(bias)
        checks.check_same_dtype("bias", bias, "x", x)
    return x, weight, bias


def _check_options(
    targets: Tensor, vocab_size: int, ignore_index: Any, label_smoothing: Any, softcap: Any, z_loss: Any, reduction: Any
) -> Options:
    options = Options(
        checks.check_int("ignore_index", ignore_index),
        checks.check_float("label_smoothing", label_smoothing, minimum=0.0, maximum=1.0),
        checks.check_float("softcap", softcap, minimum=0.0),
        checks.check_float("z_loss", z_loss, minimum=0.0),
    )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
    if checks.readable(targets):
        inside = targets.masked_fill(targets == ignore_index, 0)
        meaning = f"token ids, or ignore_index ({ignore_index}),"
        checks.check_values("targets", inside, 0, vocab_size - 1, meaning)
    return options


def _run(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: Options, reduction: str, backend: str
) -> Tensor:
    if backend == "reference":
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_bias = None if bias is None else bias.to(wide)
        return reference.linear_cross_entropy(
            x.to(wide), weight.to(wide), targets, bias=wide_bias, reduction=reduction, **options._asdict()
        )
    args = (x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), bias)
    if reduction == "none":
        losses: Tensor = _losses_of_tokens(*args, *options, backend)
        return losses.reshape(targets.shape)
    total = _total(*args, *_wanted(x, weight, bias), *options, backend)
    if reduction == "sum":
        return total
    count: Tensor = (args[2] != options.ignore_index).sum()
    # Not total / count: of no tokens that is NaN as it should be, but so would be the gradients.
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _wanted(*tensors: Tensor | None) -> Wanted:
    """Which gradients to compute along with the loss."""
    return Wanted(*(tensor is not None and is_recorded(tensor) for tensor in tensors))


def _losses_of_tokens(*args: Any) -> Tensor:
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.pytransformer.linear_cross_entropy_losses(*args)
    elif is_recorded(args[0], args[1], args[3]):
        result = _Losses.apply(*args)  # type: ignore[no-untyped-call]
    else:
        result = _call_losses(*args)
    return result


def _total(*args: Any) -> Tensor:
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.pytransformer.linear_cross_entropy_total(*args)[0]
    elif is_recorded(args[0], args[1], args[3]):
        result = _Total.apply(*args)[0]  # type: ignore[no-untyped-call]
    else:
        result = _call_total(*args)[0]
    return result


# --- The registered ops and their autograd rules. ----------------------------------------------------------------------

_TENSORS = "Tensor x, Tensor weight, Tensor targets, Tensor? bias"
_WANTS = "bool want_dx, bool want_dweight, bool want_dbias"
_OPTIONS = "int ignore_index, float label_smoothing, float softcap, float z_loss, str backend"
_TAGS = (torch.Tag.pt2_compliant_tag,)


def _call_total(*args: Any) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...]
    result = _total_impl(*args) if _are_plain(args) else torch.ops.pytransformer.linear_cross_entropy_total(*args)
    return result


def _call_losses(*args: Any) -> Tensor:
    result: Tensor
    result = _losses_impl(*args) if _are_plain(args) else torch.ops.pytransformer.linear_cross_entropy_losses(*args)
    return result


def _call_backward(*args: Any) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...]
    result = _backward_impl(*args) if _are_plain(args) else torch.ops.pytransformer.linear_cross_entropy_backward(*args)
    return result


def _are_plain(args: tuple[Any, ...]) -> bool:
    return is_plain(*(arg for arg in args if isinstance(arg, Tensor)))


def _total_impl(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    losses, *gradients = losses_and_gradients(
        x, weight, targets, bias, None, Wanted(*args[:3]), Options(*args[3:7]), args[7]
    )
    return (losses.sum(), *gradients)


def _losses_impl(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    nothing = Wanted(False, False, False)
    return losses_and_gradients(x, weight, targets, bias, None, nothing, Options(*args[:4]), args[4])[0]


def _backward_impl(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    wanted, options = Wanted(*args[:3]), Options(*args[3:7])
    gradients = losses_and_gradients(x, weight, targets, bias, dlosses, wanted, options, args[7])[1:]
    return tuple(gradient.to(x.dtype) for gradient in gradients)


def _total_fake(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return (total, *gradient_buffers(x, weight, Wanted(*args[:3])))


def _losses_fake(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _backward_fake(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(gradient.to(x.dtype) for gradient in gradient_buffers(x, weight, Wanted(*args[:3])))


def _register(name: str, schema: str, implementation: Any, fake: Any) -> None:
    torch.library.define(f"pytransformer::{name}", schema, tags=_TAGS)
    torch.library.impl(f"pytransformer::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"pytransformer::{name}", fake)


_register(
    "linear_cross_entropy_total",
    f"({_TENSORS}, {_WANTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _total_impl,
    _total_fake,
)
_register("linear_cross_entropy_losses", f"({_TENSORS}, {_OPTIONS}) -> Tensor", _losses_impl, _losses_fake)
_register(
    "linear_cross_entropy_backward",
    f"(Tensor dlosses, {_TENSORS}, {_WANTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)


class _Total(torch.autograd.Function):
    """(sum of losses, dx, dweight, dbias): the gradients come in the same pass, unscaled so that float16 does not underflow."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _call_total(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, bias = inputs[:4]
        gradients = output[1:]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)  # or the gradients' gradients would come as zeros of their size
        ctx.save_for_backward(*gradients, x, weight, bias)  # the inputs only to see a second derivative coming
        ctx.wanted = inputs[4:7]
        ctx.dtype = inputs[0].dtype
        ctx.num_inputs = len(inputs)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if records_backward():
            scaled = _Scale.apply(dtotal, ctx.dtype, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        else:
            scaled = _scale(dtotal, ctx.dtype, *ctx.saved_tensors[:3])
        dx, dweight, dbias = (gradient if wanted else None for gradient, wanted in zip(scaled, ctx.wanted))
        return dx, dweight, None, dbias, *([None] * (ctx.num_inputs - 4))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_Total, info, in_dims, *args)


def _scale(dtotal: Tensor, dtype: torch.dtype, *gradients: Tensor) -> tuple[Tensor, ...]:
    return tuple(_scaled(gradient, dtotal, dtype) for gradient in gradients)


def _scaled(gradient: Tensor, dtotal: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient · dtotal`` in ``dtype``."""
    if gradient.dtype == dtype or gradient.numel() <= SCALED_AT_ONCE or torch.compiler.is_compiling():
        return (gradient * dtotal).to(dtype)
    # The product in float32 would be as large as the weight's float32 gradient, the largest tensor of a training step: in parts it isn't.
    result = torch.empty_like(gradient, dtype=dtype)
    rows = max(1, SCALED_AT_ONCE // gradient.shape[-1])
    for start in range(0, gradient.shape[0], rows):
        torch.mul(gradient[start : start + rows], dtotal, out=result[start : start + rows])
    return result


class _Losses(torch.autograd.Function):
    """The loss of each token; its gradient is not known before the backward pass, which computes the logits again."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _call_losses(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        args = (dlosses, *ctx.saved_tensors, *wanted, *ctx.options)
        gradients = _LossesBackward.apply(*args) if records_backward() else _call_backward(*args)  # type: ignore[no-untyped-call]
        dx, dweight, dbias = (gradient if want else None for gradient, want in zip(gradients, wanted))
        return dx, dweight, None, dbias, *([None] * len(ctx.options))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_Losses, info, in_dims, *args)


class _DifferentiatedOnce(torch.autograd.Function):
    """A backward pass where it is itself recorded: a second derivative is refused rather than wrong."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        refuse_double_backward("linear_cross_entropy")


class _Scale(_DifferentiatedOnce):
    @staticmethod
    def forward(
        dtotal: Tensor, dtype: torch.dtype, dx: Tensor, dweight: Tensor, dbias: Tensor, *inputs: Any
    ) -> tuple[Tensor, ...]:
        return _scale(dtotal, dtype, dx, dweight, dbias)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_Scale, info, in_dims, *args)


class _LossesBackward(_DifferentiatedOnce):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return _call_backward(*args)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return vmap_by_loop(_LossesBackward, info, in_dims, *args)


# What torch.compile sees are the ops, so they have the same rules.
torch.library.register_autograd(
    "pytransformer::linear_cross_entropy_total", _Total.backward, setup_context=_Total.setup_context
)
torch.library.register_autograd(
    "pytransformer::linear_cross_entropy_losses", _Losses.backward, setup_context=_Losses.setup_context
)
