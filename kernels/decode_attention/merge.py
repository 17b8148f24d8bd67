"""How partial results become one: folding a split into those before it, and the end of a row.

The result of a tile is the fold of its splits in ascending order, whoever computed them. A product is rounded before it is added, and the
rest is one fused operation, in so many words: a compiler that chose for itself could choose otherwise elsewhere.

Scratch is slots of ``scratch_rows`` rows each: the outputs of all slots, then their maxima and sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import row_pointers


@triton.jit
def join_sink(row_max, row_sum, sink):
    """The sink joins the denominator: (new maximum, new sum, factor of the output so far)."""
    new_max = tl.maximum(row_max, sink)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    factor = tl.exp(row_max - shift)
    return new_max, row_sum * factor + tl.exp(sink - shift), factor


@triton.jit
def fold(total_max, total_sum, total_out, split_max, split_sum, split_out):
    """(maximum, sum, output) of the rows of a tile over the keys so far and those of the next split; nothing yet is -inf, 0, 0."""
    new_max = tl.maximum(total_max, split_max)
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    kept = tl.exp(total_max - shift)
    weight = tl.exp(split_max - shift)
    new_sum = tl.fma(total_sum, kept, split_sum * weight)
    kept_columns = tl.broadcast_to(kept[:, None], total_out.shape)
    return new_max, new_sum, tl.fma(total_out, kept_columns, split_out * weight[:, None])


@triton.jit
def _places(
    scratch_ptr, num_slots, slot, scratch_rows, offs_row, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr
):
    """Pointers to the outputs and the maxima of rows of a slot; sums lie ``scratch_rows`` behind the maxima."""
    offs_dim = tl.arange(0, BLOCK_VALUE_DIM)
    # Offsets within a slot fit in 32 bits, and take half the registers.
    out_ptr = scratch_ptr + slot * scratch_rows * VALUE_DIM
    stats_ptr = scratch_ptr + (num_slots * VALUE_DIM + slot * 2) * scratch_rows
    return out_ptr + (offs_row[:, None] * VALUE_DIM + offs_dim[None, :]), stats_ptr + offs_row


@triton.jit
def _row_mask(rows, num_rows, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr):
    mask = rows[:, None] < num_rows
    if VALUE_DIM != BLOCK_VALUE_DIM:
        mask = mask & (tl.arange(0, BLOCK_VALUE_DIM)[None, :] < VALUE_DIM)
    return mask


@triton.jit
def store_partial(
    scratch_ptr, num_slots, slot, scratch_rows, offs_row, rows, num_rows, row_max, row_sum, out,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Writes those of the rows that are below ``num_rows`` to a slot, where they are the rows ``offs_row``."""
    out_ptr, stats_ptr = _places(scratch_ptr, num_slots, slot, scratch_rows, offs_row, VALUE_DIM, BLOCK_VALUE_DIM)
    tl.store(stats_ptr, row_max, mask=rows < num_rows)
    tl.store(stats_ptr + scratch_rows, row_sum, mask=rows < num_rows)
    tl.store(out_ptr, out, mask=_row_mask(rows, num_rows, VALUE_DIM, BLOCK_VALUE_DIM))


@triton.jit
def _fold_slot(
    total_max, total_sum, total_out, scratch_ptr, num_slots, slot, scratch_rows, offs_row, rows, num_rows,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Folds a slot in, its rows below ``num_rows``. Not by the first-level cache: other multiprocessors write there."""
    out_ptr, stats_ptr = _places(scratch_ptr, num_slots, slot, scratch_rows, offs_row, VALUE_DIM, BLOCK_VALUE_DIM)
    split_max = tl.load(stats_ptr, mask=rows < num_rows, other=float("-inf"), cache_modifier=".cg")
    split_sum = tl.load(stats_ptr + scratch_rows, mask=rows < num_rows, other=0.0, cache_modifier=".cg")
    mask = _row_mask(rows, num_rows, VALUE_DIM, BLOCK_VALUE_DIM)
    split_out = tl.load(out_ptr, mask=mask, other=0.0, cache_modifier=".cg")
    return fold(total_max, total_sum, total_out, split_max, split_sum, split_out)


@triton.jit
def fold_slots(
    scratch_ptr, num_slots, before_slot, num_before, first_slot, count, scratch_rows, offs_row, rows, num_rows,
    VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr, FOLD_ROWS: tl.constexpr, MERGE_SPLITS: tl.constexpr,
):  # fmt: skip
    """(maximum, sum, output) of rows: the fold of ``before_slot``, if ``num_before`` is 1 and not 0, and ``count`` slots in their order."""
    row_max = tl.full([FOLD_ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([FOLD_ROWS], tl.float32)
    out = tl.zeros([FOLD_ROWS, BLOCK_VALUE_DIM], tl.float32)
    row_max, row_sum, out = _fold_slot(
        row_max, row_sum, out, scratch_ptr, num_slots, before_slot, scratch_rows, offs_row, rows, tl.where(num_before > 0, num_rows, 0),
        VALUE_DIM, BLOCK_VALUE_DIM,
    )  # fmt: skip
    for first in range(0, count, MERGE_SPLITS):
        # Unrolled, so that the loads of several splits are under way together. Behind the last one there is nothing to fold in.
        for place in tl.static_range(MERGE_SPLITS):
            row_max, row_sum, out = _fold_slot(
                row_max, row_sum, out, scratch_ptr, num_slots, first_slot + first + place, scratch_rows, offs_row, rows,
                tl.where(first + place < count, num_rows, 0), VALUE_DIM, BLOCK_VALUE_DIM,
            )  # fmt: skip
    return row_max, row_sum, out


@triton.jit
def finish_rows(
    out_ptr, stride_out_batch, stride_out_token, stride_out_head, lse_ptr, stride_lse_batch, stride_lse_head, sinks_ptr,
    sequence, first_token, kv_head, rows, num_rows, row_max, row_sum, out,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Sink, division and rounding of the rows below ``num_rows``; 0 and -inf where a row sees nothing."""
    token = first_token + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=rows < num_rows, other=0.0).to(tl.float32)
        row_max, row_sum, factor = join_sink(row_max, row_sum, sink)
        out *= factor[:, None]
    offs_dim = tl.arange(0, BLOCK_VALUE_DIM)
    out_rows_ptr = row_pointers(out_ptr, stride_out_batch, stride_out_token, stride_out_head, sequence, token, head)
    out = out / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    mask = _row_mask(rows, num_rows, VALUE_DIM, BLOCK_VALUE_DIM)
    tl.store(out_rows_ptr[:, None] + offs_dim[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(row_sum == 0.0, float("-inf"), row_max + tl.log(row_sum))
    tl.store(lse_ptr + sequence * stride_lse_batch + head * stride_lse_head + token, lse, mask=rows < num_rows)
