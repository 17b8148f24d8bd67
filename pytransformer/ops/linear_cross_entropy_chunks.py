"""The work of linear_cross_entropy: the tokens go through in chunks, and each chunk's logits become its gradient in place.

For T tokens, H features and V words: 6·T·H·V FLOP for loss and gradients in one pass (as the unfused head), and one chunk's logits instead
of T·V logits, their softmax and their gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Plain torch: logits held at once. On a CPU 8 MB keeps most of the elementwise work in the caches, and its chunks of a few hundred tokens
# still make efficient matrix products; a GPU needs several thousand rows to fill its processors.
LOGITS_PER_CHUNK = {"cpu": 2**21, "cuda": 2**27}
MIN_TOKENS_PER_CHUNK = 128
# Triton: bytes of the buffer. Each chunk reads and writes all of the weight's float32 gradient, so chunks should be few; 416 MiB and the
# matrix products' workspace stay below half a gigabyte.
BUFFER_BYTES = 416 * 2**20
ROWS_OF_A_TILE = 128  # of the matrix products: chunks are multiples of it


class Options(NamedTuple):
    """What the loss of one token depends on beside its logits."""

    ignore_index: int
    label_smoothing: float
    softcap: float
    z_loss: float


class Wanted(NamedTuple):
    """Which gradients to compute."""

    dx: bool
    dweight: bool
    dbias: bool


Result = tuple[Tensor, Tensor, Tensor, Tensor]


def losses_and_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    dlosses: Tensor | None,
    wanted: Wanted,
    options: Options,
    backend: str,
) -> Result:
    """Losses of the tokens and the gradients of ``Σ dlosses · losses``, of their plain sum where ``dlosses`` is None.

    Args:
        x: (tokens, hidden_size); weight: (vocab_size, hidden_size); targets: (tokens); bias: (vocab_size); dlosses: (tokens).
        backend: "triton", or "torch".

    Returns:
        losses, dx, dweight, dbias. dweight and dbias are at least float32; a gradient that is not wanted is an empty tensor.
    """
    run = _in_triton if backend == "triton" else _in_torch
    return run(x, weight, targets, bias, dlosses, wanted, options)


def gradient_buffers(x: Tensor, weight: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and dweight and dbias in at least float32, uninitialised; without elements where they are not wanted."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        torch.empty(x.shape if wanted.dx else 0, dtype=x.dtype, device=x.device),
        torch.empty(weight.shape if wanted.dweight else 0, dtype=wide, device=x.device),
        torch.empty(weight.shape[0] if wanted.dbias else 0, dtype=wide, device=x.device),
    )


# --- Triton: the kernel between the vendor's matrix products. ----------------------------------------------------------


def _in_triton(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dlosses: Tensor | None, wanted: Wanted, options: Options
) -> Result:  # fmt: skip
    from pytransformer.kernels.linear_cross_entropy import cross_entropy, logits_buffer

    tokens, vocab_size = x.shape[0], weight.shape[0]
    targets = targets.contiguous()
    bias = None if bias is None else bias.contiguous()
    dlosses = None if dlosses is None else dlosses.to(torch.float32).contiguous()
    losses = torch.empty(tokens, dtype=torch.float32, device=x.device)
    dx, dweight, dbias = gradient_buffers(x, weight, wanted)
    dbias.zero_()
    if tokens == 0:
        dweight.zero_()
    step = tokens_per_buffer(tokens, weight, wanted.dweight)
    buffer = logits_buffer(min(step, tokens), vocab_size, x)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        padded = buffer[: rows.stop - start]
        logits = padded[:, :vocab_size]
        product_into(logits, x[rows], weight.t())
        chunk_dlosses = None if dlosses is None else dlosses[rows]
        cross_entropy(
            padded, vocab_size, targets[rows], bias, chunk_dlosses, losses[rows], **options._asdict(), wants_gradient=any(wanted)
        )  # fmt: skip
        if wanted.dbias:
            dbias += logits.sum(dim=0, dtype=torch.float32)
        if wanted.dx:
            product_into(dx[rows], logits, weight)
        if wanted.dweight:
            product_into(dweight, logits.t(), x[rows], accumulate=start > 0)
    return losses, dx, dweight, dbias


def tokens_per_buffer(tokens: int, weight: Tensor, wants_dweight: bool) -> int:
    """Rows of a chunk: as few chunks as the memory allows, of about equal size."""
    # The backward pass will hold the weight's gradient in its own dtype beside the float32 one; until then that memory is free.
    allowed = max(BUFFER_BYTES, weight.nbytes if wants_dweight else 0)
    tiles = -(-tokens // ROWS_OF_A_TILE)
    most = max(1, allowed // (weight.shape[0] * weight.element_size()) // ROWS_OF_A_TILE)
    chunks = max(1, -(-tiles // most))
    return max(1, -(-tiles // chunks)) * ROWS_OF_A_TILE


def product_into(out: Tensor, left: Tensor, right: Tensor, *, accumulate: bool = False) -> None:
    """``out = left @ right``, or with ``accumulate`` ``out += left @ right``, without a temporary.

    Added up in float32 and, where ``out`` is float32, not rounded before.
    """
    if out.dtype != left.dtype and not out.is_cuda:  # a CPU has no such product; interpreted kernels do not mind
        left, right = left.to(out.dtype), right.to(out.dtype)
    if not accumulate and out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif not accumulate:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    elif out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)


# --- Plain torch. ------------------------------------------------------------------------------------------------------


def _in_torch(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dlosses: Tensor | None, wanted: Wanted, options: Options
) -> Result:  # fmt: skip
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
