"""Rows whose lse has lost the logarithm of their sum: the dq kernel normalises them again, by a second walk over what they meet."""

from __future__ import annotations

import triton
import triton.language as tl

from . import tile as common


@triton.jit
def normalised_again(
    q, k_ptr, stride_k_seq, sinks_ptr, start_m, begin, end, entries_ptr, place, options, here, edges, softmax_scale, softcap,
    traits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(shift, norm) of rows with SCALE_FIRST, from a second walk over the key tiles ``begin`` to ``end`` (with a block mask: those
    entries of a list): their largest score, and the base-2 logarithm of their sum of exponentials less that."""
    offs_m = common.tile_offsets(BLOCK_M, WIDE)
    offs_n = common.tile_offsets(BLOCK_N, WIDE)
    offs_d = tl.arange(0, traits.BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        row_max = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + place.head).to(tl.float32)
        row_sum = tl.where(row_max == float("-inf"), 0.0, 1.0)
    for step in range(begin, end):
        tile_n = step
        if entries_ptr is not None:
            tile_n = tl.load(entries_ptr + step)
        start_n = tile_n * BLOCK_N
        k = common.load_tile(
            k_ptr + tl.cast(start_n, tl.int64) * stride_k_seq, stride_k_seq, edges.seqlen_k - start_n, offs_n, offs_d,
            traits.HEAD_DIM, traits.BLOCK_D, True,
        )  # fmt: skip
        scores = common.row_products(q, k, traits.HEAD_DIM, traits.PRECISION, traits.STREAMED)
        scores = common.scaled_scores(scores, softmax_scale, softcap, traits)
        rows, keys = (start_m + offs_m)[:, None], offs_n[None, :]
        scores = common.score_terms(scores, rows, start_n, keys, options, here, edges, traits, True)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = common.exponentials(scores, origin[:, None], 1.0, True)
        row_sum = row_sum * common.exponentials(row_max, origin, 1.0, True) + tl.sum(p, 1)
        row_max = new_max
    shift = tl.where(row_sum == 0.0, float("inf"), row_max)
    return shift, tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum))
