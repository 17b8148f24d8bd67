"""What the attention kernels share: where a program works, how a tile is loaded, which keys a query sees, what is added to a score.

Positions are local to a sequence. With ``distance = i + seqlen_k - seqlen_q - j``, query ``i`` sees key ``j`` iff
``-window_right <= distance <= window_left`` (a causal call is ``window_right = 0``).

Weights are ``exp(scores - shift)`` by exp2, in one of two ways (SCALE_FIRST):

* 16-bit inputs without softcap, bias and ALiBi: scores are the plain products, and ``exp2(scores * factor - shift)`` with ``factor =
  softmax_scale * log2(e)`` and the shift in base 2 costs one fused multiply-add and one ex2;
* else scores are in natural units and the difference is taken first: exact where a logit is far from 0 (float32 needs p = 1 of a lone
  large logit to be 1, forward and backward), and free of overflow for a bias of finfo.min.

Kernels are given strides and constants as named tuples. Pointers stand beside them, so that a launch that is made again writes addresses
into a list and builds no tuple; so do sizes that change from call to call, because ``do_not_specialize`` does not reach into a tuple.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..mathematics import LOG2E, tanh


class RowStrides(NamedTuple):
    """Of a tensor (batch, seqlen, heads, features) whose features are contiguous; 0 for the batch of packed sequences."""

    batch: Any
    seq: Any
    head: Any


class ScoreStrides(NamedTuple):
    """Of a tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k): 0 where it is repeated."""

    batch: Any
    head: Any
    row: Any
    col: Any


class OptionStrides(NamedTuple):
    """Of the score options; None where one is not used. ``padding`` is (batch, seqlen_k) and ``alibi`` (batch, heads): 0 for the rest."""

    bias: ScoreStrides | None
    mask: ScoreStrides | None
    padding: ScoreStrides | None
    alibi: ScoreStrides | None


class Traits(NamedTuple):
    """The constants that say what an attention call is, constexprs all of them.

    HAS_LEFT, HAS_RIGHT: whether the window ends there; SCALE_FIRST: see above; PRECISION: of float32 products; STREAMED: see row_products.
    """

    HEADS_PER_KV: Any
    HAS_LEFT: Any
    HAS_RIGHT: Any
    SCALE_FIRST: Any
    HAS_SOFTCAP: Any
    HEAD_DIM: Any
    VALUE_DIM: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    PRECISION: Any
    STREAMED: Any
    EXACT: Any


class Options(NamedTuple):
    """What is added to the scores: base pointers, None where an option is not used, and their strides."""

    bias_ptr: Any
    mask_ptr: Any
    padding_ptr: Any
    alibi_ptr: Any
    strides: OptionStrides


class HeadOptions(NamedTuple):
    """Where the options of one batch and head begin, and its slope. Offsets and not pointers: in Triton 3.6 no function returns a None."""

    bias: Any
    mask: Any
    padding: Any
    alibi_slope: Any


class Edges(NamedTuple):
    """What ends the scores of a sequence: its lengths and the window."""

    seqlen_q: Any
    seqlen_k: Any
    window_left: Any
    window_right: Any


class Place(NamedTuple):
    """What a program owns of the tensor whose rows are shared out, and what it meets in the other one (q and k, or k and q).

    sequence: ``batch`` for a packed program whose rows belong to none.
    option_sequence: the sequence, or the last one for rows of none, which see nothing but must not read past the options.
    start, length: the tile's first position in its sequence, and the sequence's length.
    row: the tile's first row in the tensor.
    other_row, other_length: the sequence's first row in the other tensor, and its length there.
    """

    sequence: Any
    option_sequence: Any
    head: Any
    start: Any
    length: Any
    row: Any
    other_row: Any
    other_length: Any


class Tile(NamedTuple):
    """Rows of features, and where they were loaded from."""

    data: Any
    ptr: Any
    stride: Any
    rows_left: Any
    offs_row: Any


class Dropout(NamedTuple):
    """The generator's key, the largest word that drops a weight, and what the kept ones are multiplied by."""

    seed: Any
    offset: Any
    last_out: Any
    scale: Any


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
def locate(cu_seqlens_ptr, other_cu_seqlens_ptr, slot, tile, batch, heads, length, other_length, BLOCK: tl.constexpr):
    """The place, in 32 bits, of a program that has a tile of a slot: a head, or where sequences are not packed one of batch · heads."""
    head = slot
    sequence = slot
    first = 0
    other_first = 0
    if cu_seqlens_ptr is not None:
        sequence, tile, first, length, other_first, other_length = packed_tile(
            cu_seqlens_ptr, other_cu_seqlens_ptr, batch, length, other_length, tile, BLOCK
        )
    else:
        head = slot % heads
        sequence = slot // heads
    start = tile * BLOCK
    return Place(sequence, sequence, head, start, length, first + start, other_first, other_length)


@triton.jit
def in_64_bits(place, batch):
    """The place as offsets need it. After the exit of programs without rows: what is computed before lives in other registers, and a dq
    kernel with all options spilled 68 bytes of them."""
    sequence = place.sequence.to(tl.int64)
    return Place(
        sequence,
        tl.minimum(sequence, batch - 1),
        place.head.to(tl.int64),
        place.start,
        place.length,
        place.row.to(tl.int64),
        tl.cast(place.other_row, tl.int64),
        place.other_length,
    )


@triton.jit
def row_offset(strides, sequence, row, head):
    """Where a row of a head begins."""
    return sequence * strides.batch + row * strides.seq + head * strides.head


@triton.jit
def head_options(options, sequence, head):
    """The options of one batch and head."""
    strides = options.strides
    bias = tl.zeros([], tl.int64)
    mask = tl.zeros([], tl.int64)
    padding = tl.zeros([], tl.int64)
    slope = 0.0
    if options.bias_ptr is not None:
        bias = sequence * strides.bias.batch + head * strides.bias.head
    if options.mask_ptr is not None:
        mask = sequence * strides.mask.batch + head * strides.mask.head
    if options.padding_ptr is not None:
        padding = sequence * strides.padding.batch
    if options.alibi_ptr is not None:
        slope = tl.load(options.alibi_ptr + sequence * strides.alibi.batch + head * strides.alibi.head).to(tl.float32)
    return HeadOptions(bias, mask, padding, slope)


@triton.jit
def load_dropout(seed_ptr, last_out, scale):
    """What of dropout is the same for all tiles; zeros without it."""
    seed = tl.zeros([], tl.int64)
    offset = tl.zeros([], tl.int64)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
        offset = tl.load(seed_ptr + 1)
    return Dropout(seed, offset, last_out, scale)


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
    return Tile(tile, tile_ptr, stride_row, rows_left, offs_row)


@triton.jit
def load_statistic(ptr, rows_left, offs_row, other, MASK_ROWS: tl.constexpr):
    if MASK_ROWS:
        values = tl.load(ptr + offs_row, mask=offs_row < rows_left, other=other)
    else:
        values = tl.load(ptr + offs_row)
    return values


@triton.jit
def row_products(a, b, DIM: tl.constexpr, PRECISION: tl.constexpr, STREAMED: tl.constexpr):
    """``a bᵀ`` of two tiles. ``STREAMED`` reads them again, 32 features at a time, in place of using the loaded ones: exact float32
    products run on the FMA units, whose operands lie in registers for the whole depth of a dot, and more than 64 features spill."""
    if STREAMED:
        products = tl.zeros([a.offs_row.shape[0], b.offs_row.shape[0]], tl.float32)
        for start in range(0, DIM, 32):
            dims = start + tl.arange(0, 32)
            a_ptrs = a.ptr + (a.offs_row[:, None] * a.stride + dims[None, :])
            b_ptrs = b.ptr + (b.offs_row[:, None] * b.stride + dims[None, :])
            a_part = tl.load(a_ptrs, mask=(a.offs_row[:, None] < a.rows_left) & (dims[None, :] < DIM), other=0.0)
            b_part = tl.load(b_ptrs, mask=(b.offs_row[:, None] < b.rows_left) & (dims[None, :] < DIM), other=0.0)
            products = tl.dot(a_part, tl.trans(b_part), products, input_precision=PRECISION)
    else:
        products = tl.dot(a.data, tl.trans(b.data), input_precision=PRECISION)
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
def key_ranges(start_m, edges, traits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The key tiles that the BLOCK_M queries from ``start_m`` on see; see :func:`tile_ranges`."""
    shift = edges.seqlen_k - edges.seqlen_q
    return tile_ranges(
        start_m, tl.minimum(start_m + BLOCK_M, edges.seqlen_q) - 1, shift - edges.window_left, shift + edges.window_right,
        edges.seqlen_k, BLOCK_N, traits.HAS_LEFT, traits.HAS_RIGHT,
    )  # fmt: skip


@triton.jit
def query_ranges(start_n, edges, traits, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The query tiles that see some of the BLOCK_N keys from ``start_n`` on."""
    shift = edges.seqlen_q - edges.seqlen_k
    return tile_ranges(
        start_n, tl.minimum(start_n + BLOCK_N, edges.seqlen_k) - 1, shift - edges.window_right, shift + edges.window_left,
        edges.seqlen_q, BLOCK_M, traits.HAS_RIGHT, traits.HAS_LEFT,
    )  # fmt: skip


@triton.jit
def visible(rows, start_n, keys, edges, traits):
    """Which scores of queries ``rows`` and keys ``start_n + keys`` exist at all. What ends a row is folded into one last key of it, and a
    first one where the window ends there, counted from ``start_n``: one comparison of each score, not one for each reason."""
    last = tl.where(rows < edges.seqlen_q, edges.seqlen_k - 1, -1)
    if traits.HAS_RIGHT:
        last = tl.minimum(last, rows + (edges.seqlen_k - edges.seqlen_q + edges.window_right))
    if (
        traits.BLOCK_DV > 128
    ):  # costs a few instructions more, and of the forward kernel's registers fewer: 8 bytes of spills, not 52
        keep = start_n + keys <= last
    else:
        keep = keys <= last - start_n
    if traits.HAS_LEFT:
        keep = keep & (keys >= rows + (edges.seqlen_k - edges.seqlen_q - edges.window_left) - start_n)
    return keep


@triton.jit
def scaled_scores(products, softmax_scale, softcap, traits):
    """q·k turned into scores, before anything is added to them."""
    scores = products
    if traits.SCALE_FIRST:
        scores = scores * softmax_scale
    if traits.HAS_SOFTCAP:
        scores = softcap * tanh(scores / softcap, traits.EXACT)
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
def distances(rows, cols, edges):
    """ALiBi's: how far each key lies from each query, float32."""
    return tl.abs(rows + (edges.seqlen_k - edges.seqlen_q) - cols).to(tl.float32)


@triton.jit
def score_terms(scores, rows, start_n, keys, options, here, edges, traits, MASKED: tl.constexpr):
    """Adds bias and ALiBi and hides what may not be seen, of the queries ``rows`` and the keys ``start_n + keys``, index tensors that
    broadcast against each other; ``here`` is what :func:`head_options` says of this batch and head. ``MASKED``: the window or the end of
    the keys cuts the tile."""
    cols = start_n + keys
    if options.alibi_ptr is not None:
        scores -= here.alibi_slope * distances(rows, cols, edges)
    inside = (rows < edges.seqlen_q) & (cols < edges.seqlen_k)
    if options.bias_ptr is not None:
        row_ptrs = options.bias_ptr + here.bias + rows.to(tl.int64) * options.strides.bias.row
        bias = tl.load(row_ptrs + cols.to(tl.int64) * options.strides.bias.col, mask=inside, other=0.0)
        scores += bias.to(tl.float32)
    if options.mask_ptr is not None:
        row_ptrs = options.mask_ptr + here.mask + rows.to(tl.int64) * options.strides.mask.row
        attend = tl.load(row_ptrs + cols.to(tl.int64) * options.strides.mask.col, mask=inside, other=0)
        scores = tl.where(attend != 0, scores, float("-inf"))
    if options.padding_ptr is not None:
        padding_ptrs = options.padding_ptr + here.padding + cols.to(tl.int64) * options.strides.padding.col
        attend = tl.load(padding_ptrs, mask=cols < edges.seqlen_k, other=0)
        scores = tl.where(attend != 0, scores, float("-inf"))
    if MASKED:
        scores = tl.where(visible(rows, start_n, keys, edges, traits), scores, float("-inf"))
    return scores


@triton.jit
def softcap_slope(capped, softcap):
    """d softcap(s) / ds from the capped score: 1 - tanh²."""
    ratio = capped / softcap
    return 1.0 - ratio * ratio


@triton.jit
def dropout_keep(dropout, place, start_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights of the (BLOCK_M, BLOCK_N) tile at (start_m, start_n) stay: those whose word, philox(seed, offset, place = batch ·
    num_heads + head, i, j), is above the last that drops. One evaluation gives four neighbouring keys' words, so BLOCK_N and start_n are
    multiples of 4."""
    rows = start_m + tl.arange(0, BLOCK_M)[:, None]
    quads = start_n // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(
        dropout.seed,
        zero + quads.to(tl.uint32),
        zero + rows.to(tl.uint32),
        zero + place.to(tl.uint32),
        zero + dropout.offset.to(tl.uint32),
    )
    words = tl.reshape(tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3)), [BLOCK_M, BLOCK_N])
    return words > dropout.last_out.to(tl.uint32)
