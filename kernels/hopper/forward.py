"""Attention forward for Hopper (sm_90) in Gluon: ``out = softmax(q kᵀ · softmax_scale) v`` and the log-sum-exp of each row.

One block owns 64 queries of one head for each of its consumers. A producer warp copies tiles of k and v into a ring of stages (TMA); each
consumer, a warpgroup, multiplies (wgmma) its queries with a tile of k while the product of the tile before with v still runs, so that the
softmax of one tile lies beside the products of another; with two consumers one's softmax lies beside the other's products too (Shah et al.
2024, FlashAttention-3). The output and the statistics of each row stay in registers (Milakov & Gimelshein 2018; Dao et al. 2022). Cost:
4 · batch · heads · Lq · Lk · d FLOP (half if causal); q, k, v read and out, lse written once as far as L2 serves the other blocks.

Tiles are walked from the last one to the first: the diagonal's, which need a mask, come first, in a loop of their own; whole tiles follow
in one without; those at the left edge of a window come last. The ``n``-th tile that a block meets is in stage ``n % STAGES``, which it is
the ``n // STAGES``-th to use: that is the phase of its barriers.

There is a block for each multiprocessor, at most, and it goes from place to place (places.py): the next queries, keys and values are copied
while the last tiles of a place are worked on and its output leaves. A block that began anew at each place would have nothing to do
meanwhile, as no second one fits.
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
from .places import Ground, coordinates, locate, visits, walk_of

# Queries of one consumer: the rows of one wgmma.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(CONSUMERS.value * ROWS.value)
# Up to so many columns of v weights are rounded when their product is next, not when they are made, as registers suffice for their float32.
# Carried to the next tile in 16 bits, Triton 3.6 swaps the halves of each pair, 64 instructions at 128 columns, and 3.9 does with a window:
# more than what is read from the stack once a place. Beyond 128 columns float32 would double what is on the stack.
MOST_LATE = gl.constexpr(128 if OLD else 64)
# Of a column's number in wgmma's results those that depend on the thread: the others are the same for all, immediates of a comparison.
LANE_BITS = gl.constexpr(6)

# Beside them, of the same kind, what scales scores.
UNSPECIALISED = (*options.UNSPECIALISED, "softmax_scale", "softcap")


class Ring(NamedTuple):
    """Stages of shared memory, and for each a barrier that completes when it is full, and one when all consumers have left it."""

    tiles: Any
    full: Any
    empty: Any


class Traits(NamedTuple):
    """The constants that say what a call is, constexprs all of them: heads that share keys, keys in a tile, features as powers of two,
    whether a quarter of those of q and k is empty, stages, whether outputs have memory of their own or that of the queries, whether
    sequences are packed, where the window ends, and what else there is."""

    HEADS_PER_KV: Any
    BLOCK_N: Any
    BLOCK_D: Any
    BLOCK_DV: Any
    THREE_QUARTERS: Any
    STAGES: Any
    OUT_APART: Any
    PACKED: Any
    HAS_LEFT: Any
    HAS_RIGHT: Any
    HAS_SOFTCAP: Any
    HAS_SINKS: Any


class Memory(NamedTuple):
    """A block's shared memory: queries of each consumer, with a barrier that completes when all are there and one when they may be
    overwritten, keys, values, outputs."""

    q_tiles: Any
    q_full: Any
    q_empty: Any
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
def copy_queries(visit, desc, memory, place, traits):
    """Copies the queries of both consumers, as soon as they have left those of the place before."""
    mbarrier.wait(memory.q_empty.index(0), (visit & 1) ^ 1)
    mbarrier.expect(memory.q_full.index(0), CONSUMERS * desc.block_type.nbytes)
    for w in gl.static_range(CONSUMERS):
        box = coordinates(place.sequence, place.first, place.length, place.start + w * ROWS, place.head, traits.PACKED)
        async_load(desc, box, memory.q_full.index(0), memory.q_tiles.index(w))


@gluon.jit
def copy_tile(i, desc, ring, place, walk, traits):
    """Copies tile i of the walk into its stage of a ring, as soon as that is free."""
    n = walk.before + i
    stage = n % traits.STAGES
    row = (walk.last - i) * traits.BLOCK_N
    box = coordinates(place.sequence, place.other_first, place.other_length, row, place.kv_head, traits.PACKED)
    mbarrier.wait(ring.empty.index(stage), ((n // traits.STAGES) & 1) ^ 1)
    mbarrier.expect(ring.full.index(stage), desc.block_type.nbytes)
    async_load(desc, box, ring.full.index(stage), ring.tiles.index(stage))


@gluon.jit
def produce(q_desc, k_desc, v_desc, memory, ground, scores, traits):
    """Copies what consumers need, in the order in which they do: keys a tile ahead of values."""
    k_ring, v_ring = memory.k_ring, memory.v_ring
    before = 0
    for visit in range(visits(ground)):
        place = locate(visit, ground, traits, BLOCK_M)
        walk = walk_of(place, before, scores, traits, BLOCK_M)
        copy_tile(0, k_desc, k_ring, place, walk, traits)
        copy_queries(visit, q_desc, memory, place, traits)
        for i in range(1, walk.count):
            copy_tile(i, k_desc, k_ring, place, walk, traits)
            copy_tile(i - 1, v_desc, v_ring, place, walk, traits)
        copy_tile(walk.count - 1, v_desc, v_ring, place, walk, traits)
        before += walk.count


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
    if traits.BLOCK_DV > 128 or (traits.BLOCK_DV > MOST_LATE and not traits.HAS_LEFT):
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
    n = walk.before + i
    stage = n % traits.STAGES
    before = (n - 1) % traits.STAGES
    mbarrier.wait(k_ring.full.index(stage), (n // traits.STAGES) & 1)
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
    mbarrier.wait(v_ring.full.index(stage), (n // traits.STAGES) & 1)
    out = warpgroup_mma_wait(0, deps=[out_next])
    mbarrier.arrive(v_ring.empty.index(before), count=1)
    p = kept(p, traits, own.dtype, A)
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
    return p, out, larger, total


@gluon.jit
def begin(visit, own, memory, walk, scores, seen, traits, S: gl.constexpr, A: gl.constexpr):
    """The first tile, which has no product beside it and is taken for cut in any case."""
    factor = exponent_factor(scores, traits)
    k_ring, v_ring = memory.k_ring, memory.v_ring
    stage = walk.before % traits.STAGES
    parity = (walk.before // traits.STAGES) & 1
    mbarrier.wait(memory.q_full.index(0), visit & 1)
    mbarrier.wait(k_ring.full.index(stage), parity)
    products = multiplied(own, k_ring, stage, traits, S)
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(k_ring.empty.index(stage), count=1)
    products = capped(products, scores, traits)
    products = hidden(products, seen, walk.last * traits.BLOCK_N, traits, S)
    largest = gl.max(products, 1) * factor
    shift = gl.where(largest == float("-inf"), 0.0, largest)
    p = gl.exp2(products * factor - shift[:, None])
    total = gl.sum(p, 1)
    p = kept(p, traits, own.dtype, A)
    out = gl.zeros([ROWS, traits.BLOCK_DV], gl.float32, A)
    mbarrier.wait(v_ring.full.index(stage), parity)
    return p, out, largest, total


@gluon.jit
def finish(state, memory, walk, traits, A: gl.constexpr):
    """The product of the last tile with v."""
    p, out, largest, total = state
    v_ring = memory.v_ring
    weights = rounded(p, v_ring.tiles.dtype, A)
    stage = (walk.before + walk.count - 1) % traits.STAGES
    out_next = warpgroup_mma(weights, values(v_ring, stage, traits), out, is_async=True)
    if traits.OUT_APART:
        mbarrier.arrive(memory.q_empty.index(0), count=1)
    out = warpgroup_mma_wait(0, deps=[out_next])
    mbarrier.arrive(v_ring.empty.index(stage), count=1)
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
def store(W: gl.constexpr, out, lse, rows, out_desc, lse_ptr, memory, place, ground, traits):
    """Writes what a consumer has made; the copy of the output goes on after it."""
    sequence = gl.cast(place.sequence, gl.int64)
    lse_ptr += sequence * ground.stride_lse_batch + place.head.to(gl.int64) * ground.stride_lse_head + place.first
    gl.store(lse_ptr + rows, lse, mask=rows < place.length)
    out_tile = memory.out_tiles.index(W)
    if traits.OUT_APART:
        # The copy engine may still read the output of the place before.
        tma.store_wait(0)
    out_tile.reshape([ROWS, traits.BLOCK_DV]).store(out.to(out_tile.dtype))
    fence_async_shared()
    box = coordinates(place.sequence, place.first, place.length, place.start + W * ROWS, place.head, traits.PACKED)
    async_store(out_desc, box, out_tile)
    if not traits.OUT_APART:
        tma.store_wait(0)
        mbarrier.arrive(memory.q_empty.index(0), count=1)


@gluon.jit
def attend(visit, W: gl.constexpr, out_desc, lse_ptr, sinks_ptr, memory, place, walk, ground, scores, traits):
    """The attention of 64 queries, those of consumer W. S and A are the layouts of scores and of the accumulated output."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, traits.BLOCK_N, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, traits.BLOCK_DV, 16])
    own = memory.q_tiles.index(W).reshape([ROWS, traits.BLOCK_D])
    rows = place.start + W * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    seen = keys_of(rows, place, scores, traits)
    state = begin(visit, own, memory, walk, scores, seen, traits, S, A)
    high = gl.maximum(walk.high, 1)
    if traits.HAS_RIGHT:  # without an edge there only the first tile can be cut
        for i in range(1, high):
            state = advance(i, state, own, memory, walk, scores, seen, traits, S, A, True)
    for i in range(high, walk.low):
        state = advance(i, state, own, memory, walk, scores, seen, traits, S, A, False)
    if traits.HAS_LEFT:
        for i in range(gl.maximum(high, walk.low), walk.count):
            state = advance(i, state, own, memory, walk, scores, seen, traits, S, A, True)
    out, largest, total = finish(state, memory, walk, traits, A)
    out, lse = normalised(out, largest, total, sinks_ptr, place, traits, gl.SliceLayout(1, A))
    store(W, out, lse, rows, out_desc, lse_ptr, memory, place, ground, traits)


@gluon.jit
def consume(W: gl.constexpr, out_desc, lse_ptr, sinks_ptr, memory, ground, scores, traits):
    """Consumer W, at all places of the block."""
    before = 0
    for visit in range(visits(ground)):
        place = locate(visit, ground, traits, BLOCK_M)
        walk = walk_of(place, before, scores, traits, BLOCK_M)
        attend(visit, W, out_desc, lse_ptr, sinks_ptr, memory, place, walk, ground, scores, traits)
        before += walk.count
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def attention_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, stride_lse_batch, stride_lse_head,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, sinks_ptr,
    batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
    softmax_scale, softcap, window_left, window_right, traits,
):  # fmt: skip
    # A tuple holds no None: in its place stands what is not read.
    if sinks_ptr is None:
        sinks_ptr = lse_ptr
    if cu_seqlens_q_ptr is None:
        cu_seqlens_q_ptr = lse_ptr
        cu_seqlens_k_ptr = lse_ptr
    ground = Ground(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_heads, seqlen_q, seqlen_k, num_tiles, num_slots, slots_per_group,
        stride_lse_batch, stride_lse_head,
    )  # fmt: skip
    scores = Scores(softmax_scale * LOG2E, softcap, window_left, window_right)
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
    if traits.OUT_APART:
        out_tiles = buffers(out_desc, CONSUMERS, ROWS, traits.BLOCK_DV, traits.PACKED)
    memory = Memory(q_tiles, barriers(1, 1), barriers(1, CONSUMERS), k_ring, v_ring, out_tiles)
    gl.warp_specialize(
        [
            (consume, (0, out_desc, lse_ptr, sinks_ptr, memory, ground, scores, traits)),
            (consume, (1, out_desc, lse_ptr, sinks_ptr, memory, ground, scores, traits)),
            (produce, (q_desc, k_desc, v_desc, memory, ground, scores, traits)),
        ],
        [4, 1],
        [240, 24],
    )
