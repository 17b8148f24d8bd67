"""Attention backward for Hopper: dq, dk, dv of five matrix products, warp-specialised.

A program has 128 keys of one key head and meets, head by head of its GQA group, every tile of 64 queries that sees some of them:

    s = k qᵀ,  p = exp2(factor · s - shift),  dp = v doutᵀ,  ds = p ∘ (dp - delta),
    dv += p dout,  dk += ds q,  dq += dsᵀ k

A producer warp loads q and dout into two stages each; two warpgroups, which own 64 keys each, do the rest. A part of dq is a sum over the
keys of both: it goes through shared memory and is added to float32 memory by the copy engine, in whatever order programs get there, so
**dq is not the same bits each run**; dk and dv are. Calls that ask for determinism are served by the two portable kernels, which form s
and dp twice: seven products.

Cost: 10 · batch · heads · Lq · Lk · d FLOP, half of it if causal. Memory: besides inputs and results, 4 bytes per element of q for the sums
of dq, written, added to once for each 128 keys that are seen, and read.

Copies end at the end of their sequence, packed or not (``boxes`` in launch.py): rows behind it are loaded as zeros and never written. That
is all that short tiles of queries need, as their shift is inf. Tiles that the window or the end of the keys cuts have a loop of their own,
with a mask.
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
from .forward import buffers
from .names import async_load, async_store
from .places import coordinates, find_sequence

BLOCK_M = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)
STAGES = gl.constexpr(2)
# So many queries, or more than there are.
NO_LIMIT = gl.constexpr(2**30)

# Beside them, of the same kind, heads and tiles of these programs, and what scales scores.
UNSPECIALISED = (*options.UNSPECIALISED, "num_kv_heads", "tiles_q", "factor", "softmax_scale", "cap")


class Place(NamedTuple):
    """What a program works on.

    Attributes:
        sequence, kv_head: which.
        start: its first key, counted from the sequence's begin.
        first_k, seqlen_k: the sequence's first row in k and v, 0 where sequences are not packed, and its length there.
        first_q, seqlen_q: the same in q and dout.
        statistic: where the statistics of its first query begin, of the group's first head: a row of the sums of dq too.
    """

    sequence: Any
    kv_head: Any
    start: Any
    first_k: Any
    seqlen_k: Any
    first_q: Any
    seqlen_q: Any
    statistic: Any


class Tiles(NamedTuple):
    """Tiles of queries: ``whole_begin`` to ``whole_end`` need no mask, from ``begin`` on before and up to ``end`` behind them are cut."""

    begin: Any
    whole_begin: Any
    whole_end: Any
    end: Any


class Memory(NamedTuple):
    """Shared memory: keys and values; in stages q with its shifts and dout with its deltas; ds for the product with k; a part of dq on
    its way out."""

    k: Any
    v: Any
    q: Any
    shift: Any
    dout: Any
    delta: Any
    ds: Any
    dq: Any


class Traits(NamedTuple):
    """The constants that say what a call is, constexprs all of them: query heads of a key head, features, whether sequences are packed,
    where the window ends, and whether scores are capped."""

    HEADS_PER_KV: Any
    HEAD_DIM: Any
    PACKED: Any
    HAS_LEFT: Any
    HAS_RIGHT: Any
    HAS_SOFTCAP: Any


class Scores(NamedTuple):
    """What turns products into weights: exp2(factor · product - shift), or with a cap, itself in base 2, exp2(cap · tanh - shift), where
    ``factor`` takes the product to the tanh's argument."""

    factor: Any
    cap: Any
    window_left: Any
    window_right: Any


class Barriers(NamedTuple):
    """k and v are there; a stage may be read; it may be overwritten."""

    kv_full: Any
    full: Any
    empty: Any


@gluon.jit
def locate(cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_kv_heads, seqlen_q, seqlen_k, num_slots, tiles_q, traits):
    """This program's place. Slots run fastest, so that all heads work on the same keys, beginning with the first ones, which most queries
    of a causal call see. Keys of a packed tensor that belong to no sequence form one that no query sees."""
    tile = gl.program_id(0) // num_slots
    slot = gl.program_id(0) % num_slots
    sequence = slot // num_kv_heads
    kv_head = slot % num_kv_heads
    first_k = 0
    first_q = 0
    # Heads of q are numbered through all sequences as slots are.
    first_tile = slot * traits.HEADS_PER_KV * tiles_q
    if traits.PACKED:
        kv_head = slot
        sequence = find_sequence(cu_seqlens_k_ptr, batch, tile, BLOCK_N)
        real = sequence < batch
        first_k = gl.load(cu_seqlens_k_ptr + sequence)
        end_k = gl.load(cu_seqlens_k_ptr + sequence + 1, mask=real, other=seqlen_k)
        first_q = gl.load(cu_seqlens_q_ptr + sequence)
        end_q = gl.load(cu_seqlens_q_ptr + sequence + 1, mask=real, other=first_q)
        tile -= first_k // BLOCK_N + sequence
        first_tile += first_q // BLOCK_M + sequence
        seqlen_k = gl.minimum(end_k, seqlen_k) - first_k
        seqlen_q = gl.minimum(end_q, seqlen_q) - first_q
    return Place(sequence, kv_head, tile * BLOCK_N, first_k, seqlen_k, first_q, seqlen_q, first_tile * BLOCK_M)


@gluon.jit
def query_tiles(place, scores, traits):
    """The tiles of queries that see some of a place's keys. Where keys are missing all of them are cut."""
    shift = place.seqlen_q - place.seqlen_k
    first_key = place.start + shift
    last_key = gl.minimum(place.start + BLOCK_N, place.seqlen_k) - 1 + shift
    end = (place.seqlen_q + BLOCK_M - 1) // BLOCK_M
    begin = 0
    whole_begin = 0
    whole_end = end
    if traits.HAS_RIGHT:
        begin = gl.maximum(first_key - scores.window_right, 0) // BLOCK_M
        whole_begin = (gl.maximum(last_key - scores.window_right, 0) + BLOCK_M - 1) // BLOCK_M
    if traits.HAS_LEFT:
        end = gl.minimum(end, (gl.maximum(last_key + scores.window_left + 1, 0) + BLOCK_M - 1) // BLOCK_M)
        whole_end = gl.maximum(first_key + scores.window_left + 1, 0) // BLOCK_M
    end = gl.maximum(begin, end)
    whole_begin = gl.minimum(whole_begin, end)
    if place.start + BLOCK_N > place.seqlen_k:
        whole_begin = end
    whole_end = gl.minimum(gl.maximum(whole_end, whole_begin), end)
    return Tiles(begin, whole_begin, whole_end, end)


@gluon.jit
def tile_of(step, tiles, MASKED: gl.constexpr):
    """The tile that a run meets in a step: of the cut ones first those before the whole ones, then those behind."""
    if MASKED:
        tile = tiles.begin + step
        if tile >= tiles.whole_begin:
            tile += tiles.whole_end - tiles.whole_begin
    else:
        tile = tiles.whole_begin + step
    return tile


@gluon.jit
def num_steps(tiles, MASKED: gl.constexpr):
    """How many tiles a run has."""
    whole = tiles.whole_end - tiles.whole_begin
    return tiles.end - tiles.begin - whole if MASKED else whole


@gluon.jit
def next_step(member, step, count):
    """Of a run, which meets its tiles anew for each head of the group. One loop for all heads: nested ones take more registers, and so do,
    for whatever reason, loops without this counting where there is one head."""
    step += 1
    was_last = step == count
    return member + was_last.to(gl.int32), gl.where(was_last, 0, step)


@gluon.jit
def produce(q_desc, shift_desc, dout_desc, delta_desc, memory, barriers, place, tiles, tiles_q, traits):
    """Loads the tiles of q and dout in the order in which they are consumed."""
    loaded = 0
    for run in gl.static_range(2):
        count = num_steps(tiles, run == 0)
        member, step = 0, 0
        for _ in range(count * traits.HEADS_PER_KV):
            head = place.kv_head * traits.HEADS_PER_KV + member
            row = tile_of(step, tiles, run == 0) * BLOCK_M
            statistic = place.statistic + member * tiles_q * BLOCK_M + row
            at = coordinates(place.sequence, place.first_q, place.seqlen_q, row, head, traits.PACKED)
            stage = loaded & 1
            full = barriers.full.index(stage)
            mbarrier.wait(barriers.empty.index(stage), ((loaded >> 1) & 1) ^ 1)
            mbarrier.expect(full, 2 * q_desc.nbytes_per_cta + 3 * shift_desc.nbytes_per_cta)
            async_load(q_desc, at, full, memory.q.index(stage))
            async_load(shift_desc, [statistic], full, memory.shift.index(stage))
            async_load(dout_desc, at, full, memory.dout.index(stage))
            async_load(delta_desc, [statistic], full, memory.delta.index(2 * stage))
            async_load(delta_desc, [statistic], full, memory.delta.index(2 * stage + 1))
            loaded += 1
            member, step = next_step(member, step, count)


@gluon.jit
def first_queries(keys, place, scores, traits):
    """The first query that the window lets see each of the keys; of keys that are not there one behind all."""
    shift = keys + (place.start + place.seqlen_q - place.seqlen_k)
    if traits.HAS_RIGHT:
        first = shift - scores.window_right
    elif traits.HAS_LEFT:
        first = shift + scores.window_left - NO_LIMIT
    else:
        first = shift * 0
    return gl.where(keys < place.seqlen_k - place.start, first, 2**31 - 1)


@gluon.jit
def visible(queries, first, scores, traits):
    """Which scores exist, of queries and the first ones that see the keys: one comparison each, of how far a query lies behind the first
    one, without a sign where it may lie too far."""
    if traits.HAS_LEFT:
        width = NO_LIMIT + 0 * scores.window_left
        if traits.HAS_RIGHT:
            width = scores.window_left + scores.window_right
        return (queries[None, :] - first[:, None]).to(gl.uint32) <= width.to(gl.uint32)
    else:
        return queries[None, :] >= first[:, None]


@gluon.jit
def consume(dq_desc, dk_desc, dv_desc, at, memory, barriers, place, tiles, tiles_q, scores, softmax_scale, traits):
    """The products of all tiles, and in the end dk and dv, whose box is ``at``."""
    D: gl.constexpr = traits.HEAD_DIM
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_M, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, D, 16])
    # Of dq, which has 64 rows, each warpgroup makes half of the columns.
    PART: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, D // 2, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))
    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SCORES))
    k, v = memory.k.index(0).reshape([BLOCK_N, D]), memory.v.index(0).reshape([BLOCK_N, D])
    dk = gl.zeros([BLOCK_N, D], gl.float32, SUMS)
    dv = gl.zeros([BLOCK_N, D], gl.float32, SUMS)
    first_seen_by = first_queries(keys, place, scores, traits)
    mbarrier.wait(barriers.kv_full, 0)
    used = 0
    for run in gl.static_range(2):
        count = num_steps(tiles, run == 0)
        member, step = 0, 0
        for _ in range(count * traits.HEADS_PER_KV):
            first_query = tile_of(step, tiles, run == 0) * BLOCK_M
            statistic = place.statistic + member * tiles_q * BLOCK_M + first_query
            stage = used & 1
            q = memory.q.index(stage).reshape([BLOCK_M, D])
            dout = memory.dout.index(stage).reshape([BLOCK_M, D])
            empty = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SCORES)
            mbarrier.wait(barriers.full.index(stage), (used >> 1) & 1)
            # dp begins as -delta, which saves the subtraction. A thread has it for two of its rows, and from two places: were it one
            # value, the compiler would copy it behind the first product and wait for that one's end.
            first = memory.delta.index(2 * stage).load(gl.SliceLayout(0, SCORES))
            second = memory.delta.index(2 * stage + 1).load(gl.SliceLayout(0, SCORES))
            dp = gl.where((keys & 8)[:, None] == 0, first[None, :], second[None, :])
            products = warpgroup_mma(k, q.permute((1, 0)), empty, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, dout.permute((1, 0)), dp, is_async=True)
            products = warpgroup_mma_wait(1, deps=[products])
            # Here, and not beside delta: its registers would be taken while those of both products are.
            shift = memory.shift.index(stage).load(gl.SliceLayout(0, SCORES))
            exponents = products * scores.factor
            if traits.HAS_SOFTCAP:
                ratio = 1.0 - 2.0 / (1.0 + gl.exp2(exponents))
                exponents = ratio * scores.cap
            p = gl.exp2(exponents - shift[None, :])
            if run == 0:
                p = gl.where(visible(first_query + columns, first_seen_by, scores, traits), p, 0.0)
            weights = gl.convert_layout(p.to(q.dtype), OPERAND)
            if traits.HAS_SOFTCAP:
                p = p * (1.0 - ratio * ratio)
            # Before the wait for dp, and not only to keep the tensor cores busy: ptxas would move that wait in front of the exponentials.
            dv = warpgroup_mma(weights, dout, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
            ds = (p * dp).to(q.dtype)
            memory.ds.store(ds)
            fence_async_shared()
            nothing = gl.zeros([BLOCK_M, D], gl.float32, PART)
            part = warpgroup_mma(memory.ds.permute((1, 0)), k, nothing, use_acc=False, is_async=True)
            slopes = gl.convert_layout(ds, OPERAND)
            dk = warpgroup_mma(slopes, q, dk, is_async=True)
            # dq's part leaves while the tensor cores are at dk.
            dv, part = warpgroup_mma_wait(1, deps=[dv, part])
            tma.store_wait(0)
            memory.dq.store(part)
            fence_async_shared()
            tma.async_atomic_add(dq_desc, [statistic, 0], memory.dq)
            dk = warpgroup_mma_wait(0, deps=[dk])
            mbarrier.arrive(barriers.empty.index(stage), count=1)
            used += 1
            member, step = next_step(member, step, count)

    k.store((dk * softmax_scale).to(k.dtype))
    v.store(dv.to(v.dtype))
    fence_async_shared()
    async_store(dk_desc, at, memory.k.index(0))
    async_store(dv_desc, at, memory.v.index(0))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALISED)
def attention_backward_kernel(
    q_desc, k_desc, v_desc, dout_desc, shift_desc, delta_desc, dq_desc, dk_desc, dv_desc, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    batch, num_kv_heads, seqlen_q, seqlen_k, num_slots, tiles_q,
    factor, softmax_scale, cap, window_left, window_right, traits,
):  # fmt: skip
    place = locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_kv_heads, seqlen_q, seqlen_k, num_slots, tiles_q, traits
    )
    if place.start >= place.seqlen_k:
        return
    scores = Scores(factor, cap, window_left, window_right)
    tiles = query_tiles(place, scores, traits)
    D: gl.constexpr = traits.HEAD_DIM
    SLOPES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    memory = Memory(
        buffers(k_desc, 1, BLOCK_N, D, traits.PACKED),
        buffers(v_desc, 1, BLOCK_N, D, traits.PACKED),
        buffers(q_desc, STAGES, BLOCK_M, D, traits.PACKED),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], shift_desc.layout),
        buffers(dout_desc, STAGES, BLOCK_M, D, traits.PACKED),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], delta_desc.layout),
        gl.allocate_shared_memory(q_desc.dtype, [BLOCK_N, BLOCK_M], SLOPES),
        gl.allocate_shared_memory(gl.float32, [BLOCK_M, D], dq_desc.layout),
    )
    barriers = Barriers(
        mbarrier.allocate_mbarrier(),
        mbarrier.allocate_mbarrier(batch=STAGES),
        mbarrier.allocate_mbarrier(batch=STAGES),
    )
    mbarrier.init(barriers.kv_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.full.index(stage), count=1)
        mbarrier.init(barriers.empty.index(stage), count=1)
    at = coordinates(place.sequence, place.first_k, place.seqlen_k, place.start, place.kv_head, traits.PACKED)
    mbarrier.expect(barriers.kv_full, 2 * k_desc.nbytes_per_cta)
    async_load(k_desc, at, barriers.kv_full, memory.k.index(0))
    async_load(v_desc, at, barriers.kv_full, memory.v.index(0))
    gl.warp_specialize(
        [
            (consume, (dq_desc, dk_desc, dv_desc, at, memory, barriers, place, tiles, tiles_q, scores, softmax_scale, traits)),
            (produce, (q_desc, shift_desc, dout_desc, delta_desc, memory, barriers, place, tiles, tiles_q, traits)),
        ],
        [1],
        [24],
    )  # fmt: skip
