"""Who computes what: the splits of a sequence's keys, and the stretch of all work that a program takes.

The splits of a sequence follow from its own length, rows and window alone. Which program computes a split changes nothing in a result,
so that this may depend on the whole batch: the work of all sequences, in steps of keys, is laid out in a row and cut into one stretch for
each program. A program computes the splits that begin in its stretch. It finds the sequences there from their lengths, on the device.

A *task* is one tile of query rows of one key head of one sequence. The program in whose stretch a task begins lends its scratch and its
counter to those that share the task. A program begins many tasks, but only the last one can reach into another program's stretch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cache import sequence_extent

# Sequences that a program looks at together when it looks for its own.
BLOCK_SEQUENCES = 128


@triton.jit
def sequence_steps(
    seqlen_q, seqlen_k, leftpad, capacity, window_left, max_splits, BLOCK_N: tl.constexpr
):  # fmt: skip
    """(first step, steps, splits) of what some row of a sequence sees, in steps of BLOCK_N keys; one split at least."""
    low = seqlen_k * 0
    if window_left >= 0:
        low = tl.maximum(low, seqlen_k - seqlen_q - window_left)
    first_step = low // BLOCK_N
    last_step = (tl.maximum(tl.minimum(seqlen_k, capacity - leftpad), 0) + BLOCK_N - 1) // BLOCK_N
    steps = tl.maximum(last_step - first_step, 0)
    return first_step, steps, tl.maximum(tl.minimum(steps, max_splits), 1)


@triton.jit
def split_start(split, steps, splits):
    """The step at which a split begins: splits are as equal as whole steps allow, and the first ones are the longer ones."""
    return split * (steps // splits) + tl.minimum(split, steps % splits)


@triton.jit
def first_split_from(step, steps, splits):
    """The first split that begins at ``step`` >= 0 or later; ``splits`` if there is none."""
    shorter = tl.maximum(steps // splits, 1)
    longer = steps % splits
    of_longer = (step + shorter) // (shorter + 1)
    beyond = step - longer * (shorter + 1)
    of_short = longer + (beyond + shorter - 1) // shorter
    return tl.minimum(tl.where(beyond <= 0, of_longer, of_short), splits)


@triton.jit
def sequence_tiles(
    seqlen_q, GROUP: tl.constexpr, ROWS_ABOVE: tl.constexpr, ROWS_UP_TO: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Tiles of query rows of a sequence; none if its rows are for another launch."""
    num_rows = seqlen_q * GROUP
    return tl.where((num_rows > ROWS_ABOVE) & (num_rows <= ROWS_UP_TO), (num_rows + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def _work_of(
    sequence, batch, cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, seqlen_q, capacity, window_left, max_splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS_ABOVE: tl.constexpr, ROWS_UP_TO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The work of sequences: of each task its steps, and one for what it costs beside them. 0 behind the last sequence."""
    within = tl.minimum(sequence, batch - 1)
    _, seqlen_q, seqlen_k, leftpad = sequence_extent(cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, within, seqlen_q)
    _, steps, _ = sequence_steps(seqlen_q, seqlen_k, leftpad, capacity, window_left, max_splits, BLOCK_N)
    tasks = sequence_tiles(seqlen_q, GROUP, ROWS_ABOVE, ROWS_UP_TO, BLOCK_M) * NUM_KV_HEADS
    return tl.where(sequence < batch, tasks * (steps + 1).to(tl.int64), 0)


@triton.jit
def stretch_of(
    program, batch, cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, seqlen_q, capacity, window_left, max_splits,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS_ABOVE: tl.constexpr, ROWS_UP_TO: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SEQUENCES: tl.constexpr,
):  # fmt: skip
    """(begin, end of the program's stretch, all work, the sequence at its begin, where that one's work begins)."""
    offs_sequence = tl.arange(0, BLOCK_SEQUENCES)
    total = tl.full([], 0, tl.int64)
    for first in range(0, batch, BLOCK_SEQUENCES):
        work = _work_of(
            first + offs_sequence, batch, cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, seqlen_q, capacity, window_left, max_splits,
            NUM_KV_HEADS, GROUP, ROWS_ABOVE, ROWS_UP_TO, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        total += tl.sum(work, 0)
    begin = program * total // tl.num_programs(0)
    end = (program + 1) * total // tl.num_programs(0)
    sequence = tl.full([], 0, tl.int64)
    start = tl.full([], 0, tl.int64)
    passed = tl.full([], 0, tl.int64)
    for first in range(0, batch, BLOCK_SEQUENCES):
        work = _work_of(
            first + offs_sequence, batch, cache_seqlens_ptr, cu_seqlens_q_ptr, leftpad_ptr, seqlen_q, capacity, window_left, max_splits,
            NUM_KV_HEADS, GROUP, ROWS_ABOVE, ROWS_UP_TO, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        before = passed + tl.cumsum(work, 0) <= begin
        sequence += tl.sum((before & (first + offs_sequence < batch)).to(tl.int64), 0)
        start += tl.sum(tl.where(before, work, 0), 0)
        passed += tl.sum(work, 0)
    return begin, end, total, sequence, start


@triton.jit
def program_at(place, total):
    """The program in whose stretch a place in the row of all work lies."""
    return ((place + 1) * tl.num_programs(0) - 1) // total
