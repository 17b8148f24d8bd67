"""What the backward kernel for Hopper needs before and after it: statistics of the rows, and the sums of dq turned into dq. Plain Triton.

Both go over tiles of BLOCK_M queries of one head. Statistics and sums are kept by tiles too, each whole: tile t of slot s (a head, or
where sequences are not packed one of batch · heads) has the rows from ``(s · num_tiles + t) · BLOCK_M`` on. So a copy of a tile never meets
rows of another sequence, and what stands behind a short tile's rows is known: a shift of inf, that is a weight of 0.

Bytes: out, dout and lse are read, 8 bytes per row and 4 per element of the sums written; then the sums are read and dq written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention import tile as common
from ..attention.options import UNSPECIALISED
from ..mathematics import LOG2E


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_statistics_kernel(
    dout_ptr, dout_strides, out_ptr, out_strides, lse_ptr, dlse_ptr, stride_lse_batch, stride_lse_head, sinks_ptr,
    shift_ptr, delta_ptr, sums_ptr, dsinks_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``shift = lse · log2(e)`` and ``-delta = dlse - rowsum(dout ∘ out)`` of each row, zeros for the sums, this tile's part of dsinks."""
    tile, slot = tl.program_id(0) // num_slots, tl.program_id(0) % num_slots
    place = common.locate(cu_seqlens_q_ptr, cu_seqlens_k_ptr, slot, tile, batch, num_heads, seqlen_q, seqlen_k, BLOCK_M)
    if place.start >= place.length:
        return
    place = common.in_64_bits(place, batch)
    dout_ptr += common.row_offset(dout_strides, place.sequence, place.row, place.head)
    out_ptr += common.row_offset(out_strides, place.sequence, place.row, place.head)
    statistic = place.sequence * stride_lse_batch + place.head * stride_lse_head + place.row
    row = (slot.to(tl.int64) * num_tiles + tile) * BLOCK_M

    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    rows_left = place.length - place.start
    exists = offs_m < rows_left
    dout = common.load_tile(dout_ptr, dout_strides.seq, rows_left, offs_m, offs_d, HEAD_DIM, HEAD_DIM, True)
    out = common.load_tile(out_ptr, out_strides.seq, rows_left, offs_m, offs_d, HEAD_DIM, HEAD_DIM, True)
    delta = tl.sum(dout.data.to(tl.float32) * out.data.to(tl.float32), 1)
    lse = tl.load(lse_ptr + statistic + offs_m, mask=exists, other=float("-inf"))
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + statistic + offs_m, mask=exists, other=0.0)
    # A row that saw nothing gets p = 0 from a shift of inf, and no gradient whatever flows into its lse.
    sees = lse != float("-inf")
    delta = tl.where(sees, delta, 0.0)
    shift = tl.where(sees, lse, float("inf")) * LOG2E
    tl.store(shift_ptr + row + offs_m, shift)
    tl.store(delta_ptr + row + offs_m, -delta)
    if sinks_ptr is not None:
        weight = tl.exp2(tl.load(sinks_ptr + place.head).to(tl.float32) * LOG2E - shift)
        tl.store(dsinks_ptr + slot.to(tl.int64) * num_tiles + tile, -tl.sum(weight * delta, 0))
    zeros = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    tl.store(sums_ptr + (row + offs_m[:, None]) * HEAD_DIM + offs_d[None, :], zeros)


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_dq_kernel(
    sums_ptr, dq_ptr, dq_strides,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``dq = softmax_scale · sums`` in the dtype of dq."""
    tile, slot = tl.program_id(0) // num_slots, tl.program_id(0) % num_slots
    place = common.locate(cu_seqlens_q_ptr, cu_seqlens_k_ptr, slot, tile, batch, num_heads, seqlen_q, seqlen_k, BLOCK_M)
    if place.start >= place.length:
        return
    place = common.in_64_bits(place, batch)
    dq_ptr += common.row_offset(dq_strides, place.sequence, place.row, place.head)
    row = (slot.to(tl.int64) * num_tiles + tile) * BLOCK_M
    offs_m, offs_d = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    sums = tl.load(sums_ptr + (row + offs_m[:, None]) * HEAD_DIM + offs_d[None, :])
    common.store_tile(
        dq_ptr, dq_strides.seq, place.length - place.start, offs_m, offs_d, sums * softmax_scale, HEAD_DIM, HEAD_DIM
    )
