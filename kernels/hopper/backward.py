"""Attention backward for Hopper: dq, dk, dv of five matrix products, warp-specialised.

A program has 128 keys of one key head and meets, head by head of its GQA group, every tile of 64 queries that sees some of them:

    s = k qᵀ,  p = exp2(factor · s - shift),  dp = v doutᵀ,  ds = p ∘ (dp - delta),
    dv += p dout,  dk += ds q,  dq += dsᵀ k

A producer warp loads q and dout into two stages each; two warpgroups, which own 64 keys each, do the rest. A part of dq is a sum over the
keys of both: it goes through shared memory and is added to float32 memory by the copy engine, in whatever order programs get there, so
**dq is not the same bits each run**; dk and dv are. A call that asks for determinism is served by the two portable kernels, which form s and
dp twice: seven products.

Cost: 10 · batch · heads · Lq · Lk · d FLOP, half of it if causal. Memory: besides inputs and results, 4 bytes per element of q for the sums
of dq, written, added to once for each 128 keys that are seen, and read.

Copies end at the end of their sequence, packed or not (boxes.py): rows behind it are loaded as zeros and never written. That is all that
short tiles of queries need, as their shift is inf. Tiles that the window or the end of the keys cuts have a loop of their own, with a mask.
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

from ..mathematics import LOG2E
from .names import async_load, async_store

BLOCK_M = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)
STAGES = gl.constexpr(2)
# How a box of a packed tensor is addressed: see boxes.py.
BILLION = gl.constexpr(2**30)
_LOG2E = gl.constexpr(LOG2E.value if isinstance(LOG2E, gl.constexpr) else LOG2E)


class Rows(NamedTuple):
    """Where the rows of a sequence are in a tensor: the coordinates of a box that starts at row r are (outer, inner, first + r, column)."""

    outer: Any
    inner: Any
    first: Any


class Place(NamedTuple):
    """The part of a call that a program has.

    kv_head, start: its keys, ``start`` counted from the beginning of their sequence.
    keys, queries: the sequence's rows in k and v, and in q and dout.
    seqlen_q, seqlen_k: its lengths.
    statistic: where the statistics of its first query and of the first head of the group begin, a row of the sums of dq too.
    """

    kv_head: Any
    start: Any
    keys: Rows
    queries: Rows
    seqlen_q: Any
    seqlen_k: Any
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


class Barriers(NamedTuple):
    """k and v are there; a stage may be read; it may be overwritten."""

    kv_full: Any
    full: Any
    empty: Any


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
def packed_rows(cu_seqlens_ptr, sequence, batch, total):
    """(rows, length, first row) of a packed sequence. Rows behind the last one form a sequence of their own, with the number ``batch``."""
    first = gl.load(cu_seqlens_ptr + sequence)
    last = total
    if sequence < batch:
        last = gl.minimum(gl.load(cu_seqlens_ptr + sequence + 1), total)
    return Rows(BILLION, last, BILLION - (last - first)), last - first, first


@gluon.jit
def locate(
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_kv_heads, seqlen_q, seqlen_k, num_slots, tiles_q, HEADS_PER_KV: gl.constexpr
):  # fmt: skip
    """This program's place. Slots run fastest, so that all heads work on the same keys: the first ones, which a causal call's queries see
    most of, begin."""
    tile = gl.program_id(0) // num_slots
    slot = gl.program_id(0) % num_slots
    if cu_seqlens_k_ptr is not None:
        sequence = find_sequence(cu_seqlens_k_ptr, batch, tile, BLOCK_N)
        keys, length_k, first_k = packed_rows(cu_seqlens_k_ptr, sequence, batch, seqlen_k)
        tile -= first_k // BLOCK_N + sequence
        queries, length_q, first_q = packed_rows(cu_seqlens_q_ptr, sequence, batch, seqlen_q)
        if sequence == batch:
            length_q = 0
        first_tile = slot * HEADS_PER_KV * tiles_q + first_q // BLOCK_M + sequence
        place = Place(slot, tile * BLOCK_N, keys, queries, length_q, length_k, first_tile * BLOCK_M)
    else:
        sequence = slot // num_kv_heads
        rows = Rows(0, sequence, 0)
        # Heads of q are numbered through all sequences as slots are.
        statistic = slot * HEADS_PER_KV * tiles_q * BLOCK_M
        place = Place(slot % num_kv_heads, tile * BLOCK_N, rows, rows, seqlen_q, seqlen_k, statistic)
    return place


@gluon.jit
def query_tiles(place, window_left, window_right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """The tiles of queries that see some of a place's keys. Where keys are missing all of them are cut."""
    shift = place.seqlen_q - place.seqlen_k
    first_key = place.start + shift
    last_key = gl.minimum(place.start + BLOCK_N, place.seqlen_k) - 1 + shift
    end = (place.seqlen_q + BLOCK_M - 1) // BLOCK_M
    begin = 0
    whole_begin = 0
    whole_end = end
    if HAS_RIGHT:
        begin = gl.maximum(first_key - window_right, 0) // BLOCK_M
        whole_begin = (gl.maximum(last_key - window_right, 0) + BLOCK_M - 1) // BLOCK_M
    if HAS_LEFT:
        end = gl.minimum(end, (gl.maximum(last_key + window_left + 1, 0) + BLOCK_M - 1) // BLOCK_M)
        whole_end = gl.maximum(first_key + window_left + 1, 0) // BLOCK_M
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
def produce(
    q_desc, shift_desc, dout_desc, delta_desc, memory, barriers, place, tiles, statistics_per_head, q_head_columns, dout_head_columns,
    HEADS_PER_KV: gl.constexpr,
):  # fmt: skip
    """Loads the tiles of q and dout in the order in which they are consumed."""
    queries = place.queries
    loaded = 0
    for member in range(HEADS_PER_KV):
        head = place.kv_head * HEADS_PER_KV + member
        for run in gl.static_range(2):
            for step in range(num_steps(tiles, run == 0)):
                first_query = tile_of(step, tiles, run == 0) * BLOCK_M
                row = queries.first + first_query
                statistic = place.statistic + member * statistics_per_head + first_query
                stage = loaded & 1
                phase = ((loaded >> 1) & 1) ^ 1
                full = barriers.full.index(stage)
                mbarrier.wait(barriers.empty.index(stage), phase)
                mbarrier.expect(full, 2 * q_desc.nbytes_per_cta + 3 * shift_desc.nbytes_per_cta)
                at = [queries.outer, queries.inner, row]
                async_load(q_desc, at + [head * q_head_columns], full, memory.q.index(stage))
                async_load(shift_desc, [statistic], full, memory.shift.index(stage))
                async_load(dout_desc, at + [head * dout_head_columns], full, memory.dout.index(stage))
                async_load(delta_desc, [statistic], full, memory.delta.index(2 * stage))
                async_load(delta_desc, [statistic], full, memory.delta.index(2 * stage + 1))
                loaded += 1


@gluon.jit
def visible(first_query, columns, keys, place, window_left, window_right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Which of a tile's scores (keys, queries) exist: what ends a query's keys is one last key of it, and one first if the window does."""
    distance = place.seqlen_k - place.seqlen_q - place.start + first_query
    last = columns * 0 + (place.seqlen_k - place.start - 1)
    if HAS_RIGHT:
        last = gl.minimum(last, columns + (distance + window_right))
    keep = keys[:, None] <= last[None, :]
    if HAS_LEFT:
        keep = keep & (keys[:, None] >= (columns + (distance - window_left))[None, :])
    return keep


@gluon.jit
def consume(
    dq_desc, dk_desc, dv_desc, memory, barriers, place, tiles, statistics_per_head,
    factor, softmax_scale, softcap, window_left, window_right,
    HEADS_PER_KV: gl.constexpr, D: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_M, 16]
    )
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, D, 16])
    # Of dq, which has 64 rows, each warpgroup makes half of the columns.
    PART: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, D // 2, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    columns = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))
    own = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SCORES))
    k, v = memory.k.reshape([BLOCK_N, D]), memory.v.reshape([BLOCK_N, D])
    dk = gl.zeros([BLOCK_N, D], gl.float32, SUMS)
    dv = gl.zeros([BLOCK_N, D], gl.float32, SUMS)
    mbarrier.wait(barriers.kv_full, 0)
    used = 0
    for member in range(HEADS_PER_KV):
        first_statistic = place.statistic + member * statistics_per_head
        for run in gl.static_range(2):
            for step in range(num_steps(tiles, run == 0)):
                first_query = tile_of(step, tiles, run == 0) * BLOCK_M
                statistic = first_statistic + first_query
                stage = used & 1
                phase = (used >> 1) & 1
                q = memory.q.index(stage).reshape([BLOCK_M, D])
                dout = memory.dout.index(stage).reshape([BLOCK_M, D])

                empty = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, SCORES)
                mbarrier.wait(barriers.full.index(stage), phase)
                shift = memory.shift.index(stage).load(gl.SliceLayout(0, SCORES))
                first = memory.delta.index(2 * stage).load(gl.SliceLayout(0, SCORES))
                second = memory.delta.index(2 * stage + 1).load(gl.SliceLayout(0, SCORES))
                dp = gl.where((own & 8)[:, None] == 0, first[None, :], second[None, :])
                scores = warpgroup_mma(k, q.permute((1, 0)), empty, use_acc=False, is_async=True)
                dp = warpgroup_mma(v, dout.permute((1, 0)), dp, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[scores])
                if HAS_SOFTCAP:
                    capped = 1.0 - 2.0 / (1.0 + gl.exp2(scores * factor))
                    p = gl.exp2(capped * softcap - shift[None, :])
                else:
                    p = gl.exp2(scores * factor - shift[None, :])
                if run == 0:
                    keep = visible(first_query, columns, own, place, window_left, window_right, HAS_LEFT, HAS_RIGHT)
                    p = gl.where(keep, p, 0.0)
                weights = gl.convert_layout(p.to(q.dtype), OPERAND)
                dp = warpgroup_mma_wait(0, deps=[dp])
                dv = warpgroup_mma(weights, dout, dv, is_async=True)
                ds = p * dp
                if HAS_SOFTCAP:
                    ds = ds * (1.0 - capped * capped)
                rounded = ds.to(q.dtype)
                memory.ds.store(rounded)
                fence_async_shared()
                slopes = gl.convert_layout(rounded, OPERAND)
                dk = warpgroup_mma(slopes, q, dk, is_async=True)
                nothing = gl.zeros([BLOCK_M, D], gl.float32, PART)
                part = warpgroup_mma(memory.ds.permute((1, 0)), k, nothing, use_acc=False, is_async=True)
                dv, dk, part = warpgroup_mma_wait(0, deps=[dv, dk, part])
                mbarrier.arrive(barriers.empty.index(stage), count=1)
                tma.store_wait(0)
                memory.dq.store(part)
                fence_async_shared()
                tma.async_atomic_add(dq_desc, [statistic, 0], memory.dq)
                used += 1

    # Rows that were not there are not written.
    k.store((dk * softmax_scale).to(k.dtype))
    v.store(dv.to(v.dtype))
    fence_async_shared()
    keys = place.keys
    row = keys.first + place.start
    async_store(dk_desc, [keys.outer, keys.inner, row, place.kv_head * D], memory.k)
    async_store(dv_desc, [keys.outer, keys.inner, row, place.kv_head * D], memory.v)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("batch", "num_kv_heads", "seqlen_q", "seqlen_k", "num_slots", "window_left", "window_right"))
def attention_backward_hopper_kernel(
    q_desc, k_desc, v_desc, dout_desc, shift_desc, delta_desc, dq_desc, dk_desc, dv_desc, cu_seqlens_q_ptr, cu_seqlens_k_ptr,
    q_head_columns, k_head_columns, v_head_columns, dout_head_columns,
    batch, num_kv_heads, seqlen_q, seqlen_k, num_slots, tiles_q,
    factor, softmax_scale, softcap, window_left, window_right,
    HEADS_PER_KV: gl.constexpr, D: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_SOFTCAP: gl.constexpr,
):  # fmt: skip
    place = locate(
        cu_seqlens_q_ptr, cu_seqlens_k_ptr, batch, num_kv_heads, seqlen_q, seqlen_k, num_slots, tiles_q, HEADS_PER_KV
    )
    if place.start >= place.seqlen_k:
        return
    tiles = query_tiles(place, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    kind: gl.constexpr = q_desc.dtype
    SLOPES: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    memory = Memory(
        gl.allocate_shared_memory(kind, [1, 1, BLOCK_N, D], k_desc.layout),
        gl.allocate_shared_memory(kind, [1, 1, BLOCK_N, D], v_desc.layout),
        gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], shift_desc.layout),
        gl.allocate_shared_memory(kind, [STAGES, 1, 1, BLOCK_M, D], dout_desc.layout),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, BLOCK_M], delta_desc.layout),
        gl.allocate_shared_memory(kind, [BLOCK_N, BLOCK_M], SLOPES),
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
    keys = place.keys
    row = keys.first + place.start
    mbarrier.expect(barriers.kv_full, k_desc.nbytes_per_cta + v_desc.nbytes_per_cta)
    async_load(k_desc, [keys.outer, keys.inner, row, place.kv_head * k_head_columns], barriers.kv_full, memory.k)
    async_load(v_desc, [keys.outer, keys.inner, row, place.kv_head * v_head_columns], barriers.kv_full, memory.v)
    gl.warp_specialize(
        [
            (consume, (dq_desc, dk_desc, dv_desc, memory, barriers, place, tiles, tiles_q * BLOCK_M,
                       factor, softmax_scale, softcap, window_left, window_right,
                       HEADS_PER_KV, D, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP)),
            (produce, (q_desc, shift_desc, dout_desc, delta_desc, memory, barriers, place, tiles, tiles_q * BLOCK_M,
                       q_head_columns, dout_head_columns, HEADS_PER_KV)),
        ],
        [1],
        [24],
    )  # fmt: skip
