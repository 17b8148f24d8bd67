"""Attention forward for Hopper (sm_90) in Gluon: ``out = softmax(q kᵀ · softmax_scale) v`` and the log-sum-exp of each row.

One block owns 64 queries of one head for each of its consumers. A producer warp copies tiles of k and v into a ring of stages (TMA); each
consumer, a warpgroup, multiplies (wgmma) its queries with a tile of k while the product of the tile before with v still runs, so that the
softmax of one tile lies beside the products of another; with two consumers one's softmax lies beside the other's products too (Shah et al.
2024, FlashAttention-3). The output and the statistics of each row stay in registers (Milakov & Gimelshein 2018; Dao et al. 2022). Cost:
4 · batch · heads · Lq · Lk · d FLOP (half if causal); q, k, v read and out, lse written once as far as L2 serves the other blocks.

Tiles are walked from the last one to the first: the diagonal's, which need a mask, come first, in a loop of their own; whole tiles follow
in one without; those at the left edge of a window come last. Tile ``i`` of the walk is in stage ``i % STAGES``, which it is the
``i // STAGES``-th to use: that is the phase of its barriers.

Positions are local to a sequence, as in kernels/attention/tile.py. A descriptor ends where a sequence does (``boxes`` in launch.py): past
the end a box reads zeros, never a neighbour, and writes nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..attention import options
from ..mathematics import LN2, LOG2E
from .names import OLD, async_load, async_store

# Queries of one consumer: the rows of one wgmma.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
# Up to so many columns of v weights are rounded when their product is next, not when they are made, as registers suffice for their float32.
# Beyond, Triton 3.9 needs none on the stack, but for windows; it and 3.6 there swap the halves of each pair that is carried to the next
# tile, 64 instructions, which is more than what is read from the stack once a block.
MOST_LATE = gl.constexpr(128 if OLD else 64)
# Of a column's number in wgmma's results those that depend on the thread: the others are the same for all, immediates of a comparison.
LANE_BITS = gl.constexpr(6)
# A packed tensor's descriptor has so many rows, whose last one is the last of the sequence that a box is of: see ``boxes``.
RAGGED = gl.constexpr(2**30)

# Beside them, of the same kind, what scales scores.
UNSPECIALISED = (*options.UNSPECIALISED, "softmax_scale", "softcap")


class Place(NamedTuple):
    """What a block works on.

    Attributes:
        sequence, head, kv_head: which.
        start: the block's first query, counted from the sequence's begin.
        first, length: the sequence's first row in q, 0 where sequences are not packed, and its length there.
        other_first, other_length: the same in k and v.
    """

    sequence: Any
    head: Any
    kv_head: Any
    start: Any
    first: Any
    length: Any
    other_first: Any
    other_length: Any


class Walk(NamedTuple):
    """The tiles of keys that a block meets, from ``last`` down: ``count`` of them, of which the first ``high`` and those from ``low`` on
    are cut by an edge."""

    last: Any
    count: Any
    high: Any
    low: Any


class Ring(NamedTuple):
    """Stages of shared memory, and for each a barrier that completes when it is full, and one when all consumers have left it."""

    tiles: Any
    full: Any
    empty: Any


class Traits(NamedTuple):
    """The constants that say what a call is, constexprs all of them: heads that share keys, keys in a tile, features as powers of two,
    whether a quarter of those of q and k is empty, stages, whether sequences are packed, where the window ends, and what else there is."""

    HEADS_PER_KV: Any
    BLOCK_N: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    THREE_QUARTERS: Any
    STAGES: Any
    PACKED: Any
    HAS_LEFT: Any
    HAS_RIGHT: Any
    HAS_SOFTCAP: Any
    HAS_SINKS: Any


class Memory(NamedTuple):
    """A block's shared memory: queries of each consumer and the barrier that says that all are there, keys, values, outputs."""

    q_tiles: Any
    q_full: Any
    k_ring: Any
    v_ring: Any
    out_tiles: Any


class Scores(NamedTuple):
    """What turns products into scores and hides some of them."""

    factor: Any
    softcap: Any
    window_left: Any
    window_right: Any


@gluon.jit
def coordinates(sequence, first, length, row, head, PACKED: gl.constexpr):
    """Of the box of a sequence's rows from ``row`` on."""
    if PACKED:
        return [RAGGED, first + length, RAGGED - length + row, head, 0]
    else:
        return [sequence, row, head, 0]


@gluon.jit
def buffers(desc, COUNT: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr, PACKED: gl.constexpr):
    """Shared memory for so many boxes of a descriptor."""
    if PACKED:
        return gl.allocate_shared_memory(desc.dtype, [COUNT, 1, 1, BLOCK, 1, DIM], desc.layout)
    else:
        return gl.allocate_shared_memory(desc.dtype, [COUNT, 1, BLOCK, 1, DIM], desc.layout)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Initialised barriers, each of which completes with so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(COUNT):
        mbarrier.init(bars.index(stage), count=ARRIVALS)
    return bars


@gluon.jit
def find_sequence(cu_seqlens_ptr, batch, tile, BLOCK: gl.constexpr):
    """The sequence of a packed tile: the last b in [0, batch] with ``cu_seqlens[b] // BLOCK + b <= tile``; ``batch`` = past the end."""
    low = 0
    high = batch + 1
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@gluon.jit
def locate(
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    traits, BLOCK: gl.constexpr,
):  # fmt: skip
    """This block's place. Heads come in groups whose keys and values fit the L2 cache together; inside a group all work on the same tile,
    the longest first. The rows of a packed tensor that belong to no sequence form one that has no keys."""
    pid = gl.program_id(0)
    group = pid // (slots_per_group * num_tiles)
    first_slot = group * slots_per_group
    slots_here = gl.minimum(slots_per_group, num_slots - first_slot)
    within = pid - first_slot * num_tiles
    tile = within // slots_here
    if traits.HAS_RIGHT:
        tile = num_tiles - 1 - tile
    slot = first_slot + within % slots_here
    sequence = slot // num_heads
    head = slot % num_heads
    first = 0
    other_first = 0
    length = seqlen_q
    other_length = seqlen_k
    if traits.PACKED:
        sequence = find_sequence(cu_seqlens_q_ptr, batch, tile, BLOCK)
        real = sequence < batch
        first = gl.load(cu_seqlens_q_ptr + sequence)
        end = gl.load(cu_seqlens_q_ptr + sequence + 1, mask=real, other=seqlen_q)
        other_first = gl.load(cu_seqlens_k_ptr + sequence)
        other_end = gl.load(cu_seqlens_k_ptr + sequence + 1, mask=real, other=other_first)
        tile -= first // BLOCK + sequence
        length = gl.minimum(end, seqlen_q) - first
        other_length = gl.minimum(other_end, seqlen_k) - other_first
    return Place(
        sequence, head, head // traits.HEADS_PER_KV, tile * BLOCK, first, length, other_first, other_length,
    )  # fmt: skip


@gluon.jit
def walk_of(place, scores, traits, BLOCK_M: gl.constexpr):
    """The tiles that any query of the block sees, at least one, which then is hidden whole."""
    shift = place.other_length - place.length
    final = gl.minimum(place.start + BLOCK_M, place.length) - 1
    begin = 0
    inside_begin = 0
    end_key = place.other_length
    inside_end_key = place.other_length
    if traits.HAS_LEFT:
        begin = gl.maximum(place.start + shift - scores.window_left, 0) // traits.BLOCK_N
        inside_begin = (gl.maximum(final + shift - scores.window_left, 0) + traits.BLOCK_N - 1) // traits.BLOCK_N
    if traits.HAS_RIGHT:
        end_key = gl.minimum(end_key, final + shift + scores.window_right + 1)
        inside_end_key = gl.minimum(inside_end_key, place.start + shift + scores.window_right + 1)
    end = gl.maximum(begin + 1, (gl.maximum(end_key, 0) + traits.BLOCK_N - 1) // traits.BLOCK_N)
    inside_begin = gl.minimum(inside_begin, end)
    inside_end = gl.minimum(gl.maximum(gl.maximum(inside_end_key, 0) // traits.BLOCK_N, inside_begin), end)
    return Walk(end - 1, end - begin, end - inside_end, end - inside_begin)


@gluon.jit
def copy_tile(i, desc, ring, place, walk, traits):
    """Copies tile i of the walk into its stage of a ring, as soon as that is free."""
    stage = i % traits.STAGES
    row = (walk.last - i) * traits.BLOCK_N
    box = coordinates(place.sequence, place.other_first, place.other_length, row, place.kv_head, traits.PACKED)
    mbarrier.wait(ring.empty.index(stage), ((i // traits.STAGES) & 1) ^ 1)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes)
    async_load(desc, box, ring.full.index(stage), ring.tiles.index(stage))


@gluon.jit
def produce(k_desc, v_desc, k_ring, v_ring, place, walk, traits):
    """Copies the tiles of keys and values, in the order in which consumers need them: keys a tile ahead."""
    copy_tile(0, k_desc, k_ring, place, walk, traits)
    for i in range(1, walk.count):
        copy_tile(i, k_desc, k_ring, place, walk, traits)
        copy_tile(i - 1, v_desc, v_ring, place, walk, traits)
    copy_tile(walk.count - 1, v_desc, v_ring, place, walk, traits)


@gluon.jit
def capped(products, scores, traits):
    """Scores in units in which ``exp2(scores * factor)`` is the weight: products as they are, or capped ones in base 2."""
    if traits.HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + exp(2x))
        products = (scores.softcap * LOG2E) * (
            1.0 - 2.0 / (1.0 + gl.exp2(products * (scores.factor * 2.0 / scores.softcap)))
        )
    return products


@gluon.jit
def keys_of(rows, place, scores, traits):
    """(first, last) key that each of these queries sees, by the window and the ends of the sequence; no first one is no limit there."""
    shift = place.other_length - place.length
    last = gl.where(rows < place.length, place.other_length - 1, -1)
    if traits.HAS_RIGHT:
        last = gl.minimum(last, rows + (shift + scores.window_right))
    first = rows + (shift - scores.window_left) if traits.HAS_LEFT else last
    return first, last


@gluon.jit
def hidden(products, seen, start_n, traits, S: gl.constexpr):
    """Scores of the keys from ``start_n`` on, -inf where a query does not see them."""
    first, last = seen
    columns = gl.arange(0, traits.BLOCK_N, layout=gl.SliceLayout(0, S))
    of_thread = (columns & LANE_BITS)[None, :]
    of_register = (columns & ~LANE_BITS)[None, :]
    keep = of_register <= (last - start_n)[:, None] - of_thread
    if traits.HAS_LEFT:
        keep = keep & (of_register >= (first - start_n)[:, None] - of_thread)
    return gl.where(keep, products, float("-inf"))


@gluon.jit
def exponent_factor(scores, traits):
    """Weights are ``exp2(this · score - largest)``: the largest score of a row is kept in base 2."""
    return 1.0 if traits.HAS_SOFTCAP else scores.factor


@gluon.jit
def multiplied(own, k_ring, stage, traits, S: gl.constexpr):
    """The products of queries and a tile of keys, not waited for: of three quarters of the features where the last one is empty."""
    keys = k_ring.tiles.index(stage).reshape([traits.BLOCK_N, traits.BLOCK_D])
    empty = gl.zeros([ROWS, traits.BLOCK_N], gl.float32, S)
    if traits.THREE_QUARTERS:
        HALF: gl.constexpr = traits.BLOCK_D // 2
        QUARTER: gl.constexpr = traits.BLOCK_D // 4
        first, k = own.slice(0, HALF, dim=1), keys.slice(0, HALF, dim=1)
        products = warpgroup_mma(first, k.permute((1, 0)), empty, use_acc=False, is_async=True)
        then, k = own.slice(HALF, QUARTER, dim=1), keys.slice(HALF, QUARTER, dim=1)
        products = warpgroup_mma(then, k.permute((1, 0)), products, is_async=True)
    else:
        products = warpgroup_mma(own, keys.permute((1, 0)), empty, use_acc=False, is_async=True)
    return products


@gluon.jit
def rounded(p, dtype: gl.constexpr, A: gl.constexpr):
    """Weights as a first operand; those that are one already stay as they are."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, A, 2))


@gluon.jit
def kept(p, traits, dtype: gl.constexpr, A: gl.constexpr):
    """Weights as they are carried to the next tile."""
    if traits.BLOCK_DV > MOST_LATE and not traits.HAS_LEFT:
        p = rounded(p, dtype, A)
    return p


@gluon.jit
def values(v_ring, stage, traits):
    """A tile of values as a second operand."""
    return v_ring.tiles.index(stage).reshape([traits.BLOCK_N, traits.BLOCK_DV])


@gluon.jit
def advance(
    i, state, own, memory, walk, scores, seen, traits, S: gl.constexpr, A: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tile i of the walk: its scores and weights, while the product of the tile before with v runs."""
    p, out, largest, total = state
    k_ring, v_ring = memory.k_ring, memory.v_ring
    factor = exponent_factor(scores, traits)
    stage = i % traits.STAGES
    before = (i - 1) % traits.STAGES
    mbarrier.wait(k_ring.full.index(stage), (i // traits.STAGES) & 1)
    products = multiplied(own, k_ring, stage, traits, S)
    weights = rounded(p, own.dtype, A)
    out_next = warpgroup_mma(weights, values(v_ring, before, traits), out, is_async=True)
    products = warpgroup_mma_wait(1, deps=[products])
    mbarrier.arrive(k_ring.empty.index(stage), count=1)
    products = capped(products, scores, traits)
    if MASKED:
        products = hidden(products, seen, (walk.last - i) * traits.BLOCK_N, traits, S)
    larger = gl.maximum(largest, gl.max(products, 1) * factor)
    shift = larger
    if MASKED:  # a row may have seen nothing yet
        shift = gl.where(larger == float("-inf"), 0.0, larger)
    shrink = gl.exp2(largest - shift)
    p = gl.exp2(products * factor - shift[:, None])
    total = total * shrink + gl.sum(p, 1)
    # For the next product. It stands here as a bar: in one block with the exponentials ptxas moves the wait below in front of them.
    mbarrier.wait(v_ring.full.index(stage), (i // traits.STAGES) & 1)
    out = warpgroup_mma_wait(0, deps=[out_next])
    mbarrier.arrive(v_ring.empty.index(before), count=1)
    p = kept(p, traits, own.dtype, A)
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
    return p, out, larger, total


@gluon.jit
def begin(own, memory, walk, scores, seen, traits, S: gl.constexpr, A: gl.constexpr):
    """The first tile, which has no product beside it and is taken for cut in any case."""
    factor = exponent_factor(scores, traits)
    k_ring = memory.k_ring
    mbarrier.wait(memory.q_full.index(0), 0)
    mbarrier.wait(k_ring.full.index(0), 0)
    products = multiplied(own, k_ring, 0, traits, S)
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(k_ring.empty.index(0), count=1)
    products = capped(products, scores, traits)
    products = hidden(products, seen, walk.last * traits.BLOCK_N, traits, S)
    largest = gl.max(products, 1) * factor
    shift = gl.where(largest == float("-inf"), 0.0, largest)
    p = gl.exp2(products * factor - shift[:, None])
    total = gl.sum(p, 1)
    p = kept(p, traits, own.dtype, A)
    out = gl.zeros([ROWS, traits.BLOCK_DV], gl.float32, A)
    mbarrier.wait(memory.v_ring.full.index(0), 0)
    return p, out, largest, total


@gluon.jit
def finish(state, v_ring, walk, traits, A: gl.constexpr):
    """The product of the last tile with v."""
    p, out, largest, total = state
    weights = rounded(p, v_ring.tiles.dtype, A)
    stage = (walk.count - 1) % traits.STAGES
    out_next = warpgroup_mma(weights, values(v_ring, stage, traits), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out_next])
    return out, largest, total


@gluon.jit
def normalised(out, largest, total, sinks_ptr, place, traits, ROWS_OF_OUT: gl.constexpr):
    """(out, lse) of rows with their running sums; a sink is a logit that joins the sum."""
    if traits.HAS_SINKS:
        sink = gl.load(sinks_ptr + place.head).to(gl.float32) * LOG2E
        larger = gl.maximum(largest, sink)
        shift = gl.where(larger == float("-inf"), 0.0, larger)
        shrink = gl.exp2(largest - shift)
        total = total * shrink + gl.exp2(sink - shift)
        out = out * gl.convert_layout(shrink, ROWS_OF_OUT)[:, None]
        largest = larger
    nothing = total == 0.0
    total = gl.where(nothing, 1.0, total)
    lse = gl.where(nothing, float("-inf"), (largest + gl.log2(total)) * LN2)
    return out / gl.convert_layout(total, ROWS_OF_OUT)[:, None], lse


@gluon.jit
def consume(W: gl.constexpr, out_desc, lse_ptr, sinks_ptr, memory, place, walk, scores, traits):
    """The attention of 64 queries, those of consumer W. S and A are the layouts of scores and of the accumulated output."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, traits.BLOCK_N, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, traits.BLOCK_DV, 16])
    own = memory.q_tiles.index(W).reshape([ROWS, traits.BLOCK_D])
    rows = place.start + W * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    seen = keys_of(rows, place, scores, traits)
    state = begin(own, memory, walk, scores, seen, traits, S, A)
    high = gl.maximum(walk.high, 1)
    if traits.HAS_RIGHT:  # without an edge there only the first tile can be cut
        for i in range(1, high):
            state = advance(i, state, own, memory, walk, scores, seen, traits, S, A, True)
    for i in range(high, walk.low):
        state = advance(i, state, own, memory, walk, scores, seen, traits, S, A, False)
    if traits.HAS_LEFT:
        for i in range(gl.maximum(high, walk.low), walk.count):
            state = advance(i, state, own, memory, walk, scores, seen, traits, S, A, True)
    out, largest, total = finish(state, memory.v_ring, walk, traits, A)
    out, lse = normalised(out, largest, total, sinks_ptr, place, traits, gl.SliceLayout(1, A))
    gl.store(lse_ptr + rows, lse, mask=rows < place.length)
    out_tile = memory.out_tiles.index(W)
    out_tile.reshape([ROWS, traits.BLOCK_DV]).store(out.to(own.dtype))
    fence_async_shared()
    box = coordinates(place.sequence, place.first, place.length, place.start + W * ROWS, place.head, traits.PACKED)
    async_store(out_desc, box, out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def attention_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, stride_lse_batch, stride_lse_head,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, sinks_ptr,
    batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    softmax_scale, softcap, window_left, window_right, traits,
):  # fmt: skip
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    place = locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
        traits, BLOCK_M,
    )  # fmt: skip
    scores = Scores(softmax_scale * LOG2E, softcap, window_left, window_right)
    walk = walk_of(place, scores, traits, BLOCK_M)
    q_tiles = buffers(q_desc, CONSUMERS, ROWS, traits.BLOCK_D, traits.PACKED)
    k_ring = Ring(
        buffers(k_desc, traits.STAGES, traits.BLOCK_N, traits.BLOCK_D, traits.PACKED),
        barriers(traits.STAGES, 1),
        barriers(traits.STAGES, CONSUMERS),
    )
    v_ring = Ring(
        buffers(v_desc, traits.STAGES, traits.BLOCK_N, traits.BLOCK_DV, traits.PACKED),
        barriers(traits.STAGES, 1),
        barriers(traits.STAGES, CONSUMERS),
    )
    out_tiles = q_tiles  # queries are not needed after the last product of theirs
    if traits.BLOCK_DV != traits.BLOCK_D:
        out_tiles = buffers(out_desc, CONSUMERS, ROWS, traits.BLOCK_DV, traits.PACKED)
    q_full = barriers(1, 1)
    mbarrier.expect(q_full.index(0), CONSUMERS * q_desc.block_type.nbytes)
    for w in gl.static_range(CONSUMERS):
        box = coordinates(place.sequence, place.first, place.length, place.start + w * ROWS, place.head, traits.PACKED)
        async_load(q_desc, box, q_full.index(0), q_tiles.index(w))
    sequence = gl.cast(place.sequence, gl.int64)
    lse_ptr += sequence * stride_lse_batch + place.head.to(gl.int64) * stride_lse_head + place.first
    if sinks_ptr is None:  # a tuple holds no None
        sinks_ptr = lse_ptr
    memory = Memory(q_tiles, q_full, k_ring, v_ring, out_tiles)
    gl.warp_specialize(
        [
            (consume, (0, out_desc, lse_ptr, sinks_ptr, memory, place, walk, scores, traits)),
            (consume, (1, out_desc, lse_ptr, sinks_ptr, memory, place, walk, scores, traits)),
            (produce, (k_desc, v_desc, k_ring, v_ring, place, walk, traits)),
        ],
        [4, 1],
        [240, 24],
    )
