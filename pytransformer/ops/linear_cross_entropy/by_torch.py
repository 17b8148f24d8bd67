"""linear_cross_entropy by plain torch, and by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.backend import Backend, Outputs, always
from pytransformer.ops.linear_cross_entropy.call import LossesCall, Options, TotalCall, Wanted
from pytransformer.ops.linear_cross_entropy.chunks import Result, gradient_buffers, product_into, ways

# Logits held at once. On a CPU 8 MB keeps most of the elementwise work in the caches, and its chunks of a few hundred tokens
# still make efficient matrix products; a GPU needs several thousand rows to fill its processors.
LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**27}
MIN_TOKENS_PER_CHUNK = 128


def losses_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dlosses: Tensor | None, wanted: Wanted, options: Options
) -> Result:  # fmt: skip
    """Losses and gradients; see :data:`pytransformer.ops.linear_cross_entropy.chunks.Work`."""
    losses = x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
    dx, dweight, dbias = gradient_buffers(x, weight, wanted)
    dweight.zero_()
    dbias.zero_()
    step = tokens_per_chunk(weight.shape[0], x.device.type)
    for start in range(0, x.shape[0], step):
        rows = slice(start, start + step)
        logits = _product(x[rows], weight.t(), bias)
        chunk_dlosses = None if dlosses is None else dlosses[rows]
        losses[rows], dlogits = _chunk(logits, targets[rows], chunk_dlosses, options, any(wanted))
        if dlogits is None:
            continue
        if wanted.dbias:
            dbias += dlogits.sum(dim=0)
        rounded = dlogits.to(x.dtype)
        if wanted.dx:
            torch.mm(rounded, weight, out=dx[rows])
        if wanted.dweight and (x.is_cuda or x.dtype == dweight.dtype):
            product_into(dweight, rounded.t(), x[rows], accumulate=True)
        elif wanted.dweight:
            dweight += _product(rounded.t(), x[rows])
    return losses, dx, dweight, dbias


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


def _by_reference(call: LossesCall | TotalCall, reduction: str) -> Tensor:
    wide = torch.promote_types(call.x.dtype, torch.float32)
    bias = None if call.bias is None else call.bias.to(wide)
    options = Options(call.ignore_index, call.label_smoothing, call.softcap, call.z_loss)
    return reference.linear_cross_entropy(
        call.x.to(wide), call.weight.to(wide), call.targets, bias=bias, reduction=reduction, **options._asdict()
    )


def _total_by_reference(call: TotalCall) -> Outputs:
    return _by_reference(call, "sum"), None, None, None


WAYS = ways("torch", losses_and_gradients)
REFERENCE_LOSSES = Backend("reference", lambda call: (_by_reference(call, "none"),), is_transparent=always)
REFERENCE_TOTAL = Backend("reference", _total_by_reference, is_transparent=always)
