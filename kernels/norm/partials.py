"""Sums over the programs of a kernel: each writes a row of partial sums, and the last to arrive add the rows up in a fixed order.

One program would take long to read them all, so it is done in two steps: the last program of each group adds the group's rows, the last
of those adds their sums. Of P rows in groups of √P that is twice √P rows, one after the other. Who is last changes from run to run; what
it adds, and in which order, does not.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..launch import cdiv

# Up to this many rows are added by one program: a second step costs as much as reading a few more of them.
_ONE_GROUP = 16


def merge_group(programs: int) -> int:
    """Programs whose rows are added up by the last of them."""
    return programs if programs <= _ONE_GROUP else math.isqrt(programs - 1) + 1


def count_counters(programs: int, col_blocks: int) -> int:
    """Counters that :func:`merge_partials` needs: of each block of columns one for each group, and one for the groups."""
    return col_blocks * (cdiv(programs, merge_group(programs)) + 1)


def merge_rows(block_cols: int, num_warps: int) -> int:
    """Partial rows that are read together: 32 elements a thread, eight 128-bit loads."""
    return max(1, min(32, num_warps * 32 * 32 // block_cols))


@triton.jit
def _store_row(partial_ptr, row, sums, NUM_COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    tl.store(partial_ptr + row.to(tl.int64) * NUM_COLS + cols, sums, mask=cols < NUM_COLS)


@triton.jit
def _add_rows(
    partial_ptr, first_row, step, number, NUM_COLS: tl.constexpr, BLOCK_COLS: tl.constexpr, MERGE_ROWS: tl.constexpr
):  # fmt: skip
    """The sum of ``number`` partial rows, ``step`` apart. Not by the first-level cache: other multiprocessors wrote them."""
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    sums = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    for first in range(0, number, MERGE_ROWS):
        places = first + tl.arange(0, MERGE_ROWS)
        rows = (first_row + places * step).to(tl.int64)
        mask = (places < number)[:, None] & (cols < NUM_COLS)[None, :]
        part = tl.load(
            partial_ptr + rows[:, None] * NUM_COLS + cols[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
        sums += tl.sum(part, axis=0)
    return sums


@triton.jit
def _is_last(counter_ptr, number):
    """Whether this is the last of ``number`` programs to ask, and so may read what all of them stored."""
    tl.debug_barrier()  # every thread's part is stored before the counter counts it
    # Release what was stored here, acquire what the others stored.
    is_last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == number - 1
    if is_last:
        # The next launch finds the counter as this one did.
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed", scope="gpu")
    return is_last


@triton.jit
def merge_partials(
    dweight, dbias, dweight_ptr, dbias_ptr, dweight_partial_ptr, dbias_partial_ptr, counters_ptr, merge_group,
    NUM_COLS: tl.constexpr, NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr, BLOCK_COLS: tl.constexpr, MERGE_ROWS: tl.constexpr,
):  # fmt: skip
    """Adds dweight and dbias of all programs that share a block of columns, program_id(1), and rounds the sums to their dtypes."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    groups = tl.cdiv(programs, merge_group)
    first = program // merge_group * merge_group
    counters_ptr += tl.program_id(1) * (groups + 1)
    if NEED_DWEIGHT:
        _store_row(dweight_partial_ptr, program, dweight, NUM_COLS, BLOCK_COLS)
    if NEED_DBIAS:
        _store_row(dbias_partial_ptr, program, dbias, NUM_COLS, BLOCK_COLS)
    number = tl.minimum(programs - first, merge_group)
    if _is_last(counters_ptr + program // merge_group, number):
        if NEED_DWEIGHT:
            dweight = _add_rows(dweight_partial_ptr, first, 1, number, NUM_COLS, BLOCK_COLS, MERGE_ROWS)
        if NEED_DBIAS:
            dbias = _add_rows(dbias_partial_ptr, first, 1, number, NUM_COLS, BLOCK_COLS, MERGE_ROWS)
        is_last = groups == 1
        if groups > 1:
            tl.debug_barrier()  # the group's first row is read: its sum takes that place
            if NEED_DWEIGHT:
                _store_row(dweight_partial_ptr, first, dweight, NUM_COLS, BLOCK_COLS)
            if NEED_DBIAS:
                _store_row(dbias_partial_ptr, first, dbias, NUM_COLS, BLOCK_COLS)
            is_last = _is_last(counters_ptr + groups, groups)
            if is_last:
                if NEED_DWEIGHT:
                    dweight = _add_rows(dweight_partial_ptr, 0, merge_group, groups, NUM_COLS, BLOCK_COLS, MERGE_ROWS)
                if NEED_DBIAS:
                    dbias = _add_rows(dbias_partial_ptr, 0, merge_group, groups, NUM_COLS, BLOCK_COLS, MERGE_ROWS)
        if is_last:
            cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
            if NEED_DWEIGHT:
                tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=cols < NUM_COLS)
            if NEED_DBIAS:
                tl.store(dbias_ptr + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=cols < NUM_COLS)
