"""What the gradients need of each query: n = 1 / (φ(q) · z) and δ = dout · out; 1 and 0 where the denominator is 0 and counts as 1.

Reads dout and out once, 2·T·E elements for T queries of E values, and writes two numbers of float32 for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..attention.tile import tile_offsets
from ..launch import cdiv, next_power_of_2
from ..prepared import PreparedLaunch
from .policy import STATISTICS_ROWS, Geometry, Passes
from .tile import load_features, row_begin


@triton.jit(do_not_specialize=["num_row_heads", "seqlen", "num_tiles"])
def linear_attention_statistics_kernel(
    dout_ptr, dout_strides, out_ptr, out_strides, denominator_ptr, inverse_ptr, delta_ptr,
    num_row_heads, seqlen, num_tiles,
    traits, BLOCK_ROWS: tl.constexpr, BLOCK_E: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Some rows of one head."""
    slot = tl.program_id(0) // num_tiles
    start = tl.program_id(0) % num_tiles * BLOCK_ROWS
    batch, head = (slot // num_row_heads).to(tl.int64), (slot % num_row_heads).to(tl.int64)
    offs_row, offs_e = tile_offsets(BLOCK_ROWS, WIDE), tl.arange(0, BLOCK_E)
    rows, rows_left = start + tl.arange(0, BLOCK_ROWS), seqlen - start
    at = start.to(tl.int64)
    dout = load_features(
        dout_ptr + row_begin(dout_strides, batch, at, head, traits), dout_strides.seq, rows_left, offs_row, offs_e,
        traits.VALUE_DIM, False, traits,
    )  # fmt: skip
    out = load_features(
        out_ptr + row_begin(out_strides, batch, at, head, traits), out_strides.seq, rows_left, offs_row, offs_e,
        traits.VALUE_DIM, False, traits,
    )  # fmt: skip
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    statistic = slot.to(tl.int64) * seqlen
    denominator = tl.load(denominator_ptr + statistic + rows, mask=rows < seqlen, other=0.0)
    is_zero = denominator == 0.0
    tl.store(delta_ptr + statistic + rows, tl.where(is_zero, 0.0, delta), mask=rows < seqlen)
    tl.store(inverse_ptr + statistic + rows, 1.0 / tl.where(is_zero, 1.0, denominator), mask=rows < seqlen)


def statistics_launch(passes: Passes, shape: Geometry) -> PreparedLaunch | None:
    """The launch; None without queries."""
    num_tiles = cdiv(shape.seqlen_q, STATISTICS_ROWS)
    if shape.batch * num_tiles == 0:
        return None
    values = {
        "num_row_heads": shape.num_heads,
        "seqlen": shape.seqlen_q,
        "num_tiles": num_tiles,
        "BLOCK_ROWS": STATISTICS_ROWS,
        "BLOCK_E": next_power_of_2(shape.value_dim),
    }
    programs = shape.batch * shape.num_heads * num_tiles
    return PreparedLaunch(
        linear_attention_statistics_kernel,
        *passes.arguments(linear_attention_statistics_kernel, programs, {}, values, 4),
    )
