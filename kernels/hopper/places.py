"""Where a block of Hopper's forward kernel works: the places that it goes to one after another, and the tiles that it meets at each.

Positions are local to a sequence, as in kernels/attention/tile.py. A descriptor ends where a sequence does (``boxes`` in launch.py): past
the end a box reads zeros, never a neighbour, and writes nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# A packed tensor's descriptor has so many rows, whose last one is the last of the sequence that a box is of: see ``boxes``.
RAGGED = gl.constexpr(2**30)


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
    """The tiles of keys that a block meets at a place, from ``last`` down: ``count`` of them, of which the first ``high`` and those from
    ``low`` on are cut by an edge. It has met ``before`` tiles at earlier places."""

    last: Any
    count: Any
    high: Any
    low: Any
    before: Any


class Ground(NamedTuple):
    """All places: those of each tile of queries of each slot, a head of a dense sequence or a head of all packed ones. Of tensors that
    are not packed cu_seqlens are not read. With the strides of their statistics."""

    cu_seqlens_q_ptr: Any
    cu_seqlens_k_ptr: Any
    batch: Any
    num_heads: Any
    seqlen_q: Any
    seqlen_k: Any
    num_tiles: Any
    num_slots: Any
    slots_per_group: Any
    stride_lse_batch: Any
    stride_lse_head: Any


@gluon.jit
def coordinates(sequence, first, length, row, head, PACKED: gl.constexpr):
    """Of the box of a sequence's rows from ``row`` on."""
    if PACKED:
        return [RAGGED, first + length, RAGGED - length + row, head, 0]
    else:
        return [sequence, row, head, 0]


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
def visits(ground):
    """How many places this block goes to: of those that are left over for a last round, one for each block as long as there are any."""
    count = ground.num_tiles * ground.num_slots
    rounds = count // gl.num_programs(0)
    return rounds + (number(rounds) < count).to(gl.int32)


@gluon.jit
def number(visit):
    """The number of the place of a block's visit. Blocks take places in turns, to and fro: one that has the longest of a round has the
    shortest of the next."""
    blocks = gl.num_programs(0)
    turn = gl.program_id(0)
    return visit * blocks + gl.where(visit % 2 == 0, turn, blocks - 1 - turn)


@gluon.jit
def locate(visit, ground, traits, BLOCK: gl.constexpr):
    """The place of a block's visit. Heads come in groups whose keys and values fit the L2 cache together; inside a group all work on the
    same tile, the longest first. The rows of a packed tensor that belong to no sequence form one that has no keys."""
    place = number(visit)
    group = place // (ground.slots_per_group * ground.num_tiles)
    first_slot = group * ground.slots_per_group
    slots_here = gl.minimum(ground.slots_per_group, ground.num_slots - first_slot)
    within = place - first_slot * ground.num_tiles
    tile = within // slots_here
    if traits.HAS_RIGHT:
        tile = ground.num_tiles - 1 - tile
    slot = first_slot + within % slots_here
    sequence = slot // ground.num_heads
    head = slot % ground.num_heads
    first = 0
    other_first = 0
    length = ground.seqlen_q
    other_length = ground.seqlen_k
    if traits.PACKED:
        sequence = find_sequence(ground.cu_seqlens_q_ptr, ground.batch, tile, BLOCK)
        real = sequence < ground.batch
        first = gl.load(ground.cu_seqlens_q_ptr + sequence)
        end = gl.load(ground.cu_seqlens_q_ptr + sequence + 1, mask=real, other=ground.seqlen_q)
        other_first = gl.load(ground.cu_seqlens_k_ptr + sequence)
        other_end = gl.load(ground.cu_seqlens_k_ptr + sequence + 1, mask=real, other=other_first)
        tile -= first // BLOCK + sequence
        length = gl.minimum(end, ground.seqlen_q) - first
        other_length = gl.minimum(other_end, ground.seqlen_k) - other_first
    return Place(
        sequence, head, head // traits.HEADS_PER_KV, tile * BLOCK, first, length, other_first, other_length,
    )  # fmt: skip


@gluon.jit
def walk_of(place, before, scores, traits, BLOCK_M: gl.constexpr):
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
    return Walk(end - 1, end - begin, end - inside_end, end - inside_begin, before)
