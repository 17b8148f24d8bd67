"""The gradient of ALiBi slopes: the dq kernel leaves ``-sum_j ds_ij · |d_ij|`` of each row, float32; here they are summed for each slope.

Where the rows of a slope lie at fixed places, torch sums them. Where sequences are packed and each has slopes of its own, only the device
knows where they lie: a program per sequence and head then sums its rows, in a fixed order, and nothing is read back.
Cost: 4 bytes a row read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from ..launch import COMMON_OPTIONS
from ..prepared import PreparedLaunch
from .options import Geometry

if TYPE_CHECKING:
    from pytransformer.ops.attention.call import AttentionCall

# Rows summed at a time: two for each thread of a block of four warps fill its loads, and a short sequence wastes little.
BLOCK = 256


@triton.jit(do_not_specialize=("num_heads", "total"))
def attention_slope_gradient_kernel(
    rows_ptr, cu_seqlens_ptr, dslopes_ptr, num_heads, total, BLOCK: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0)
    sequence, head = pid // num_heads, pid % num_heads
    first = tl.load(cu_seqlens_ptr + sequence)
    end = tl.minimum(tl.load(cu_seqlens_ptr + sequence + 1), total)
    rows_ptr += head.to(tl.int64) * total
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(first, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        sums += tl.load(rows_ptr + row, mask=row < end, other=0.0)
    tl.store(dslopes_ptr + pid, tl.sum(sums, 0).to(dslopes_ptr.dtype.element_ty))


def prepare_slope_gradient(
    call: AttentionCall, shape: Geometry
) -> Callable[[AttentionCall, torch.Tensor], torch.Tensor]:
    """A function of a call like this one and its rows (shaped like lse): their sums, in the shape and dtype of alibi_slopes."""
    assert call.alibi_slopes is not None
    dtype = call.alibi_slopes.dtype
    if call.alibi_slopes.dim() == 1:
        axes = (1,) if shape.packed else (0, 2)
        return lambda call, rows: rows.sum(axes).to(dtype)
    if not shape.packed:
        return lambda call, rows: rows.sum(2).to(dtype)
    if shape.batch == 0:
        return lambda call, rows: torch.zeros_like(call.alibi_slopes)  # type: ignore[arg-type]
    arguments = (None, None, None, shape.num_heads, shape.seqlen_q)
    constants = {"BLOCK": BLOCK, "num_warps": 4, **COMMON_OPTIONS}
    launch = PreparedLaunch(
        attention_slope_gradient_kernel, (shape.batch * shape.num_heads,), arguments, constants, [0, 1, 2]
    )

    def sum_rows(call: AttentionCall, rows: torch.Tensor) -> torch.Tensor:
        dslopes = rows.new_empty((shape.batch, shape.num_heads), dtype=dtype)
        launch((rows, call.cu_seqlens_q, dslopes))
        return dslopes

    return sum_rows
