"""What the attention kernels share: where a program works, how a tile is loaded, which keys a query sees, what is added to a score.

Positions are local to a sequence. With ``distance = i + seqlen_k - seqlen_q - j``, query ``i`` sees key ``j`` iff
``-window_right <= distance <= window_left`` (a causal call is ``window_right = 0``).

Weights are ``exp(scores - shift)`` by exp2, in one of two ways (SCALE_FIRST):

* 16-bit inputs without softcap, bias and ALiBi: scores are the plain products, and ``exp2(scores * factor - shift)`` with ``factor =
  softmax_scale * log2(e)`` and the shift in base 2 costs one fused multiply-add and one ex2;
* else scores are in natural units and the difference is taken first: exact where a logit is far from 0 (float32 needs p = 1 of a lone
  large logit to be 1, forward and backward), and free of overflow for a bias of finfo.min.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..mathematics import LOG2E, tanh


@triton.jit
def program_tile(num_tiles, num_slots, slots_per_group, REVERSED: tl.constexpr):
    """This program's (tile, slot). Slots come in groups whose keys and values fit the L2 cache together; inside a group the slot runs
    fastest, so all heads work on the same tile, the longest first (``REVERSED`` where the last tile sees most)."""
    pid = tl.program_id(0)
    group = pid // (slots_per_group * num_tiles)
    first_slot = group * slots_per_group
    slots_here = tl.minimum(slots_per_group, num_slots - first_slot)
    within = pid - first_slot * num_tiles
    tile = within // slots_here
    if REVERSED:
        tile = num_tiles - 1 - tile
    return tile, first_slot + within % slots_here


@triton.jit
def find_sequence(cu_seqlens_ptr, batch, tile, BLOCK: tl.constexpr):
    """The sequence of a packed tile: the last b in [0, batch] with ``cu_seqlens[b] // BLOCK + b <= tile``; ``batch`` = past the end."""
    low = 0
    high = batch + 1
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def packed_tile(cu_seqlens_ptr, other_cu_seqlens_ptr, batch, total, other_total, tile, BLOCK: tl.constexpr):
    """(sequence, tile in it, its start and length, start and length of the same sequence in the other tensor). The rows that belong to no
    sequence form one that meets nothing; its index is ``batch``."""
    sequence = find_sequence(cu_seqlens_ptr, batch, tile, BLOCK)
    real = sequence < batch
    start = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=real, other=total)
    other_start = tl.load(other_cu_seqlens_ptr + sequence)
    other_end = tl.load(other_cu_seqlens_ptr + sequence + 1, mask=real, other=other_start)
    tile -= start // BLOCK + sequence
    return (
        sequence,
        tile,
        start,
        tl.minimum(end, total) - start,
        other_start,
        tl.minimum(other_end, other_total) - other_start,
    )


@triton.jit
def tile_offsets(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if WIDE:
        offsets = offsets.to(tl.int64)
    return offsets


@triton.jit
def load_tile(
    tile_ptr,
    stride_row,
    rows_left,
    offs_row,
    offs_dim,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Rows of features from ``tile_ptr`` on, 0 for rows from ``rows_left`` and features from DIM on. A tensor descriptor would go here.

    The offsets inside the tile are summed before they meet the pointer: 32-bit sums, where pointers take twice the registers."""
    ptrs = tile_ptr + (offs_row[:, None] * stride_row + offs_dim[None, :])
    if MASK_ROWS:
        if DIM != BLOCK_DIM:
            tile = tl.load(ptrs, mask=(offs_row[:, None] < rows_left) & (offs_dim[None, :] < DIM), other=0.0)
        else:
            tile = tl.load(ptrs, mask=offs_row[:, None] < rows_left, other=0.0)
    elif DIM != BLOCK_DIM:
        tile = tl.load(ptrs, mask=offs_dim[None, :] < DIM, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def load_statistic(ptr, rows_left, offs_row, other, MASK_ROWS: tl.constexpr):
    if MASK_ROWS:
        values = tl.load(ptr + offs_row, mask=offs_row < rows_left, other=other)
    else:
        values = tl.load(ptr + offs_row)
    return values


@triton.jit
def row_products(
    a, a_ptr, stride_a, a_left, offs_a, b, b_ptr, stride_b, b_left, offs_b,
    DIM: tl.constexpr, PRECISION: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """``a bᵀ`` of two tiles of rows. ``STREAMED`` reads them again, 32 features at a time, in place of using the loaded ones: exact float32
    products run on the FMA units, whose operands lie in registers for the whole depth of a dot, and more than 64 features spill."""
    if STREAMED:
        products = tl.zeros([offs_a.shape[0], offs_b.shape[0]], tl.float32)
        for start in range(0, DIM, 32):
            dims = start + tl.arange(0, 32)
            a_ptrs = a_ptr + (offs_a[:, None] * stride_a + dims[None, :])
            b_ptrs = b_ptr + (offs_b[:, None] * stride_b + dims[None, :])
            a_part = tl.load(a_ptrs, mask=(offs_a[:, None] < a_left) & (dims[None, :] < DIM), other=0.0)
            b_part = tl.load(b_ptrs, mask=(offs_b[:, None] < b_left) & (dims[None, :] < DIM), other=0.0)
            products = tl.dot(a_part, tl.trans(b_part), products, input_precision=PRECISION)
    else:
        products = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    return products


@triton.jit
def store_tile(tile_ptr, stride_row, rows_left, offs_row, offs_dim, value, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    ptrs = tile_ptr + (offs_row[:, None] * stride_row + offs_dim[None, :])
    mask = offs_row[:, None] < rows_left
    if DIM != BLOCK_DIM:
        mask = mask & (offs_dim[None, :] < DIM)
    tl.store(ptrs, value.to(tile_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tile_ranges(
    first, last, low_shift, high_shift, length, BLOCK: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr
):
    """Bounds (begin, end, begin, …) of three runs over the tiles of the other axis, of which row r, ``first <= r <= last``, meets the
    positions ``r + low_shift .. r + high_shift`` within ``0 .. length - 1``: tiles that every row meets whole, which need no mask; tiles
    cut by the high edge or by the end; tiles cut by the low edge. Tiles that no row meets are in none of them."""
    begin = 0
    inside_begin = 0
    end_position = length
    inside_end_position = length
    if HAS_LOW:
        begin = tl.maximum(first + low_shift, 0) // BLOCK
        inside_begin = (tl.maximum(last + low_shift, 0) + BLOCK - 1) // BLOCK
    if HAS_HIGH:
        end_position = tl.minimum(length, last + high_shift + 1)
        inside_end_position = tl.minimum(length, first + high_shift + 1)
    end = tl.maximum(begin, (tl.maximum(end_position, 0) + BLOCK - 1) // BLOCK)
    inside_begin = tl.minimum(inside_begin, end)
    inside_end = tl.minimum(tl.maximum(tl.maximum(inside_end_position, 0) // BLOCK, inside_begin), end)
    return inside_begin, inside_end, inside_end, end, begin, inside_begin


@triton.jit
def visible(rows, cols, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which of the scores at (rows, cols), two index tensors that broadcast against each other, exist at all."""
    keep = (cols < seqlen_k) & (rows < seqlen_q)
    if HAS_LEFT or HAS_RIGHT:
        distance = rows + (seqlen_k - seqlen_q) - cols
        if HAS_LEFT:
            keep = keep & (distance <= window_left)
        if HAS_RIGHT:
            keep = keep & (distance >= -window_right)
    return keep


@triton.jit
def scaled_scores(
    products, softmax_scale, softcap, SCALE_FIRST: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EXACT_TANH: tl.constexpr
):
    """q·k turned into scores, before anything is added to them."""
    scores = products
    if SCALE_FIRST:
        scores = scores * softmax_scale
    if HAS_SOFTCAP:
        scores = softcap * tanh(scores / softcap, EXACT_TANH)
    return scores


@triton.jit
def exponentials(scores, shift, factor, SCALE_FIRST: tl.constexpr):
    """exp of scores less shift, which is in base 2 unless SCALE_FIRST."""
    if SCALE_FIRST:
        exponents = (scores - shift) * LOG2E
    else:
        exponents = scores * factor - shift
    return tl.exp2(exponents)


@triton.jit
def weights(scores, shift, norm, factor, SCALE_FIRST: tl.constexpr):
    """Normalised weights, for the backward kernels: ``exp(scores - shift)`` less a base-2 logarithm of the sum that the shift lacks."""
    if SCALE_FIRST:
        exponents = (scores - shift) * LOG2E - norm
    else:
        exponents = scores * factor - shift
    return tl.exp2(exponents)


@triton.jit
def score_terms(
    scores, rows, cols, seqlen_q, seqlen_k,
    bias_ptr, stride_bias_row, stride_bias_col,
    mask_ptr, stride_mask_row, stride_mask_col,
    padding_ptr, stride_padding_col,
    alibi_slope, window_left, window_right,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Adds bias and ALiBi and hides what may not be seen. ``rows`` and ``cols`` are index tensors that broadcast against each other; the
    pointers belong to this batch and head already, None where an option is not used. ``MASKED``: the window or the end of the keys cuts
    the tile."""
    if alibi_slope is not None:
        scores -= alibi_slope * tl.abs(rows + (seqlen_k - seqlen_q) - cols).to(tl.float32)
    inside = (rows < seqlen_q) & (cols < seqlen_k)
    if bias_ptr is not None:
        bias = tl.load(
            bias_ptr + rows.to(tl.int64) * stride_bias_row + cols.to(tl.int64) * stride_bias_col, mask=inside, other=0.0
        )
        scores += bias.to(tl.float32)
    if mask_ptr is not None:
        attend = tl.load(
            mask_ptr + rows.to(tl.int64) * stride_mask_row + cols.to(tl.int64) * stride_mask_col, mask=inside, other=0
        )
        scores = tl.where(attend != 0, scores, float("-inf"))
    if padding_ptr is not None:
        attend = tl.load(padding_ptr + cols.to(tl.int64) * stride_padding_col, mask=cols < seqlen_k, other=0)
        scores = tl.where(attend != 0, scores, float("-inf"))
    if MASKED:
        scores = tl.where(
            visible(rows, cols, seqlen_q, seqlen_k, window_left, window_right, HAS_LEFT, HAS_RIGHT),
            scores,
            float("-inf"),
        )
    return scores


@triton.jit
def softcap_slope(capped, softcap):
    """d softcap(s) / ds from the capped score: 1 - tanh²."""
    ratio = capped / softcap
    return 1.0 - ratio * ratio


@triton.jit
def dropout_keep(seed, offset, place, start_m, start_n, last_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of the (BLOCK_M, BLOCK_N) tile at (start_m, start_n) stay: those whose word, philox(seed, offset, place = batch ·
    num_heads + head, i, j), is above ``last_out``. One evaluation gives four neighbouring keys' words, so BLOCK_N and start_n are
    multiples of 4."""
    rows = start_m + tl.arange(0, BLOCK_M)[:, None]
    quads = start_n // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(
        seed,
        zero + quads.to(tl.uint32),
        zero + rows.to(tl.uint32),
        zero + place.to(tl.uint32),
        zero + offset.to(tl.uint32),
    )
    words = tl.reshape(tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)), [BLOCK_M, BLOCK_N])
    return words > last_out.to(tl.uint32)
