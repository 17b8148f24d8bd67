"""Cross-entropy of a linear head without its logits: the tokens go through in chunks, and each chunk's logits become its gradient in place.

For T tokens, H features and V words: 6·T·H·V FLOP for loss and gradients in one pass (as the unfused head), and
chunk·V + V·H float32 numbers of memory instead of T·V logits, their softmax and their gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops import checks
from pytransformer.ops.attention_checks import autocast_to_lower, is_autocasting
from pytransformer.ops.autograd import is_recorded, records_backward, refuse_double_backward, vmap_by_loop
from pytransformer.ops.backend import BackendChoice, Candidate, is_plain, requested_backend, serves_all

REDUCTIONS = ("mean", "sum", "none")
# Logits held at once. On a CPU 8 MB keeps most of the elementwise work in the caches, and its chunks of a few hundred tokens still make
# efficient matrix products; a GPU needs several thousand rows to fill its processors.
LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**27}
MIN_TOKENS_PER_CHUNK = 128

CHOICE = BackendChoice(
    "linear_cross_entropy",
    (Candidate("torch", serves_all), Candidate("reference", serves_all)),
)


class Options(NamedTuple):
    """What the loss of one token depends on beside its logits."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float


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
        backend: "torch" or "reference"; None = torch unless ``use_backend`` or PYTRANSFORMER_BACKEND says otherwise.

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
    chosen = CHOICE.select(None, x.device.type, requested_backend(backend))
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
        losses: Tensor = _losses_of_tokens(*args, *options)
        return losses.reshape(targets.shape)
    total = _total(*args, *_wanted(x, weight, bias), *options)
    if reduction == "sum":
        return total
    count: Tensor = (args[2] != options.ignore_index).sum()
    # Not total / count: of no tokens that is NaN as it should be, but so would be the gradients.
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _wanted(*tensors: Tensor | None) -> list[bool]:
    """Which gradients to compute along with the loss."""
    return [tensor is not None and is_recorded(tensor) for tensor in tensors]


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


# --- The work: all tokens chunk by chunk. ----------------------------------------------------------------------


def _chunked(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dlosses: Tensor | None, want_dx: bool, want_dweight: bool,
    want_dbias: bool, *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses (tokens) and the gradients of ``Σ dlosses · losses``, of their plain sum where ``dlosses`` is None.

    dweight and dbias are at least float32; a gradient that is not wanted is an empty tensor.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    losses = x.new_zeros(x.shape[0], dtype=wide)
    dx, dweight, dbias = _gradient_buffers(x, weight, want_dx, want_dweight, want_dbias)
    settings = Options(*options)
    step = tokens_per_chunk(weight.shape[0], x.device.type)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        logits = _product(x[rows], weight.t(), bias)
        chunk_dlosses = None if dlosses is None else dlosses[rows]
        wants = want_dx or want_dweight or want_dbias
        losses[rows], dlogits = _chunk(logits, targets[rows], chunk_dlosses, settings, wants)
        if dlogits is None:
            continue
        if want_dbias:
            dbias += dlogits.sum(dim=0)
        rounded = dlogits.to(x.dtype)
        if want_dx:
            torch.mm(rounded, weight, out=dx[rows])
        if want_dweight and x.dtype == dweight.dtype:
            dweight.addmm_(rounded.t(), x[rows])
        elif want_dweight:
            dweight += _product(rounded.t(), x[rows])
    return losses, dx, dweight, dbias


def _gradient_buffers(
    x: Tensor, weight: Tensor, want_dx: bool, want_dweight: bool, want_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty(x.shape if want_dx else 0, dtype=x.dtype, device=x.device),
        torch.zeros(weight.shape if want_dweight else 0, dtype=wide, device=x.device),
        torch.zeros(weight.shape[0] if want_dbias else 0, dtype=wide, device=x.device),
    )


def tokens_per_chunk(vocab_size: int, device_type: str) -> int:
    """Rows of logits computed at once: a multiple of 64, no fewer than efficient matrix products need."""
    limit = LOGITS_PER_CHUNK.get(device_type, LOGITS_PER_CHUNK["cpu"])
    return max(MIN_TOKENS_PER_CHUNK, limit // vocab_size // 64 * 64)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right + bias`` in at least float32; of 16-bit inputs it is rounded to 16 bits first where torch cannot avoid it."""
    if left.is_cuda and left.dtype in (torch.float16, torch.bfloat16):
        product = torch.mm(left, right, out_dtype=torch.float32)
        return product if bias is None else product.add_(bias)
    product = left @ right if bias is None else torch.addmm(bias, left, right)
    return product.to(torch.promote_types(product.dtype, torch.float32))


def _chunk(
    logits: Tensor, targets: Tensor, dlosses: Tensor | None, options: Options, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of one chunk and the gradient with respect to its logits before the softcap. Overwrites ``logits``.

    d loss / d logits = (1 + 2 · z_loss · lse) · softmax - (1 - label_smoothing) · onehot - label_smoothing / vocab_size
    """
    counted = targets != options.ignore_index
    index = targets.where(counted, 0).long()[:, None]
    slope = None
    if options.softcap > 0:
        ratio = logits.div_(options.softcap).tanh_()
        slope = 1 - ratio * ratio if wants_gradient else None
        logits = ratio.mul_(options.softcap)
    log_probs = logits.log_softmax(dim=-1)
    smoothing = options.label_smoothing
    losses = (smoothing - 1) * log_probs.gather(1, index).squeeze(1)
    if smoothing > 0:
        losses -= smoothing * log_probs.mean(dim=-1)
    lse = None
    if options.z_loss > 0:
        lse = logits.amax(dim=-1) - log_probs.amax(dim=-1)  # of the largest logit the difference loses least
        losses += options.z_loss * lse * lse
    losses = losses.where(counted, 0.0)
    if not wants_gradient:
        return losses, None
    gradient = log_probs.exp_()
    if lse is not None:
        gradient *= (1 + 2 * options.z_loss * lse)[:, None]
    if smoothing > 0:
        gradient -= smoothing / logits.shape[1]
    gradient.scatter_add_(1, index, torch.full_like(losses, smoothing - 1)[:, None])
    if slope is not None:
        gradient *= slope
    if dlosses is not None:
        gradient *= dlosses.where(counted, 0.0)[:, None]
    elif gradient.is_cuda or not bool(
        counted.all()
    ):  # a look at the values is free on a CPU, and spares a pass over the gradient
        gradient *= counted.to(gradient.dtype)[:, None]
    return losses, gradient


# --- The registered ops and their autograd rules. ----------------------------------------------------------------------

_TENSORS = "Tensor x, Tensor weight, Tensor targets, Tensor? bias"
_WANTS = "bool want_dx, bool want_dweight, bool want_dbias"
_OPTIONS = "int ignore_index, float label_smoothing, float softcap, float z_loss"
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
    losses, *gradients = _chunked(x, weight, targets, bias, None, *args)
    return (losses.sum(), *gradients)


def _losses_impl(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return _chunked(x, weight, targets, bias, None, False, False, False, *options)[0]


def _backward_impl(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    gradients = _chunked(x, weight, targets, bias, dlosses, *args)[1:]
    return tuple(gradient.to(x.dtype) for gradient in gradients)


def _total_fake(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    total = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    return (total, *_gradient_buffers(x, weight, *args[:3]))


def _losses_fake(x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _backward_fake(
    dlosses: Tensor, x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    return tuple(gradient.to(x.dtype) for gradient in _gradient_buffers(x, weight, *args[:3]))


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
    return tuple((gradient * dtotal).to(dtype) for gradient in gradients)


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
