"""linear_cross_entropy by the Triton kernel between the vendor's matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from pytransformer.ops.backend import Limit
from pytransformer.ops.linear_cross_entropy.call import LossesCall, Options, TotalCall, Wanted
from pytransformer.ops.linear_cross_entropy.chunks import Result, gradient_buffers, product_into, ways

# Bytes of the buffer. Each chunk reads and writes all of the weight's float32 gradient, so chunks should be few; 416 MiB and the
# matrix products' workspace stay below half a gigabyte.
BUFFER_BYTES = 416 * 2**20
ROWS_OF_A_TILE = 128  # of the matrix products: chunks are multiples of it


def losses_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, dlosses: Tensor | None, wanted: Wanted, options: Options
) -> Result:  # fmt: skip
    """Losses and gradients; see :data:`pytransformer.ops.linear_cross_entropy.chunks.Work`."""
    # Triton is imported when the first kernel is wanted, not with the package.
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


def _no_float64(call: LossesCall | TotalCall) -> str | None:
    return "float64 is not served; it is for checking the others" if call.x.dtype == torch.float64 else None


WAYS = ways("triton", losses_and_gradients, (Limit("float64", _no_float64),))
