"""Attention forward for sm_100 (tcgen05) in Gluon, as far as its compiled figures are wanted: docs/tcgen05.md.

It has never run: no GPU of that kind was at hand, and the Gluon interpreter knows no tensor memory. Whole tiles only: no mask, no ragged
lengths. One block owns 2 × 128 queries; beside the warpgroup that starts the others and then corrects there are two for the softmax, a warp
that issues products and one that issues copies.

Tensor memory has 512 columns of 128 lanes of 32 bits. Here all are taken: scores and outputs of two tiles, 128 columns each; weights in
bfloat16 lie in the first half of the scores that they were made of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    fma2,
    mbarrier,
    mul2,
    tcgen05_commit,
    tcgen05_mma,
    tma,
)

LOG2E = gl.constexpr(1.4426950408889634)
ROWS = gl.constexpr(128)  # queries of a tile: the lanes of tensor memory
STAGES = gl.constexpr(2)
PART = gl.constexpr(32)  # columns that a thread takes at once


class Memory(NamedTuple):
    """Shared memory of q, of stages of k and v, of each row's factor, and tensor memory of scores and outputs of both tiles."""

    q: Any
    k: Any
    v: Any
    factors: Any
    scores: Any
    out: Any


class Barriers(NamedTuple):
    """Of copies: q, k and v are there, a stage is free. Of each tile: scores are there, the factor is there and was taken, the weights are
    there, the outputs are corrected, the product with v is done."""

    q_full: Any
    k_full: Any
    k_empty: Any
    v_full: Any
    v_empty: Any
    scores_full: Any
    factor_full: Any
    factor_empty: Any
    weights_full: Any
    out_corrected: Any
    out_full: Any


@gluon.jit
def barriers(COUNT: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=1)
    return bars


@gluon.jit
def weights_of(memory, W: gl.constexpr, BLOCK: gl.constexpr):
    """The weights of a tile, in the place of its scores."""
    L: gl.constexpr = TensorMemoryLayout([ROWS, BLOCK], col_stride=1)
    return memory.scores.index(W).slice(0, BLOCK // 2).reinterpret(gl.bfloat16, [ROWS, BLOCK], L)


@gluon.jit
def load(q_desc, k_desc, v_desc, memory, bars, first, row, num_tiles, BLOCK: gl.constexpr):
    """The warp that issues copies."""
    mbarrier.expect(bars.q_full.index(0), 2 * q_desc.block_type.nbytes)
    for w in gl.static_range(2):
        tma.async_load(q_desc, [first + w * ROWS, 0], bars.q_full.index(0), memory.q.index(w))
    for i in range(num_tiles):
        stage = i % STAGES
        phase = ((i // STAGES) & 1) ^ 1
        mbarrier.wait(bars.k_empty.index(stage), phase)
        mbarrier.expect(bars.k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_load(k_desc, [row + i * BLOCK, 0], bars.k_full.index(stage), memory.k.index(stage))
        mbarrier.wait(bars.v_empty.index(stage), phase)
        mbarrier.expect(bars.v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_load(v_desc, [row + i * BLOCK, 0], bars.v_full.index(stage), memory.v.index(stage))


@gluon.jit
def multiply(memory, bars, num_tiles, BLOCK: gl.constexpr):
    """The warp one thread of which issues products. They run in the order in which they are issued: so the scores of the next tile may take
    the place of weights whose product is before them."""
    mbarrier.wait(bars.q_full.index(0), 0)
    mbarrier.wait(bars.k_full.index(0), 0)
    for w in gl.static_range(2):
        k = memory.k.index(0).permute((1, 0))
        done = bars.scores_full.index(w)
        tcgen05_mma(memory.q.index(w), k, memory.scores.index(w), use_acc=False, mbarriers=[done])
    tcgen05_commit(bars.k_empty.index(0))
    for i in range(num_tiles):
        stage = i % STAGES
        following = (i + 1) % STAGES
        has_next = i + 1 < num_tiles
        mbarrier.wait(bars.v_full.index(stage), (i // STAGES) & 1)
        if has_next:
            mbarrier.wait(bars.k_full.index(following), ((i + 1) // STAGES) & 1)
        for w in gl.static_range(2):
            mbarrier.wait(bars.weights_full.index(w), i & 1)
            mbarrier.wait(bars.out_corrected.index(w), i & 1)
            done = bars.out_full.index(w)
            tcgen05_mma(
                weights_of(memory, w, BLOCK),
                memory.v.index(stage),
                memory.out.index(w),
                use_acc=i > 0,
                mbarriers=[done],
            )
            if has_next:
                k = memory.k.index(following).permute((1, 0))
                done = bars.scores_full.index(w)
                tcgen05_mma(memory.q.index(w), k, memory.scores.index(w), use_acc=False, mbarriers=[done])
        tcgen05_commit(bars.v_empty.index(stage))
        if has_next:
            tcgen05_commit(bars.k_empty.index(following))


@gluon.jit
def exponentials(scores_memory, largest, factor, BLOCK: gl.constexpr):
    """Makes weights of scores, in their place, and returns each row's sum. A part at a time is read again: all of a row, and what becomes
    of it, would be more than a thread has registers. Weights of a part go where parts before it were."""
    W: gl.constexpr = TensorMemoryLayout([ROWS, PART], col_stride=1)
    total = 0.0
    for part in gl.static_range(BLOCK // PART):
        scores = scores_memory.slice(part * PART, PART).load()
        shift = gl.convert_layout(largest * factor, gl.SliceLayout(1, scores.type.layout))
        weights = gl.exp2(fma2(scores, factor, -shift[:, None]))
        place = scores_memory.slice(part * PART // 2, PART // 2).reinterpret(gl.bfloat16, [ROWS, PART], W)
        place.store(gl.convert_layout(weights.to(gl.bfloat16), place.get_reg_layout(num_warps=4)))
        total += gl.convert_layout(gl.sum(weights, 1), largest.type.layout)
    return total


@gluon.jit
def softmax(W: gl.constexpr, memory, bars, num_tiles, factor, BLOCK: gl.constexpr):
    """A warpgroup: a thread has a row of scores, so that no value crosses threads. After the last tile it leaves the rows' sums."""
    scores_memory = memory.scores.index(W)
    L: gl.constexpr = scores_memory.get_reg_layout(num_warps=4)
    R: gl.constexpr = gl.SliceLayout(1, L)
    largest = gl.full([ROWS], float("-inf"), gl.float32, R)
    total = gl.zeros([ROWS], gl.float32, R)
    for i in range(num_tiles):
        mbarrier.wait(bars.scores_full.index(W), i & 1)
        scores = scores_memory.load(L)
        larger = gl.maximum(largest, gl.max(scores, 1))
        shrink = gl.exp2((largest - larger) * factor)
        mbarrier.wait(bars.factor_empty.index(W), (i & 1) ^ 1)
        memory.factors.index(W).store(shrink)
        mbarrier.arrive(bars.factor_full.index(W), count=1)
        total = total * shrink + exponentials(scores_memory, larger, factor, BLOCK)
        mbarrier.arrive(bars.weights_full.index(W), count=1)
        largest = larger
    mbarrier.wait(bars.factor_empty.index(W), (num_tiles & 1) ^ 1)
    memory.factors.index(W).store(total)
    mbarrier.arrive(bars.factor_full.index(W), count=1)


@gluon.jit
def shrink_outputs(out_memory, shrink, D: gl.constexpr):
    for part in gl.static_range(D // PART):
        place = out_memory.slice(part * PART, PART)
        out = place.load()
        place.store(mul2(out, gl.convert_layout(shrink, gl.SliceLayout(1, out.type.layout))[:, None]))


@gluon.jit
def correct(out_desc, memory, bars, first, num_tiles, D: gl.constexpr):
    """The warpgroup that shrinks outputs where a row has met a larger score, off the softmax's way; then it writes them out."""
    L: gl.constexpr = memory.out.index(0).get_reg_layout(num_warps=4)
    R: gl.constexpr = gl.SliceLayout(1, L)
    for i in range(num_tiles):
        for w in gl.static_range(2):
            mbarrier.wait(bars.factor_full.index(w), i & 1)
            shrink = memory.factors.index(w).load(R)
            mbarrier.arrive(bars.factor_empty.index(w), count=1)
            if i > 0:
                mbarrier.wait(bars.out_full.index(w), (i - 1) & 1)
                shrink_outputs(memory.out.index(w), shrink, D)
            mbarrier.arrive(bars.out_corrected.index(w), count=1)
    for w in gl.static_range(2):
        mbarrier.wait(bars.factor_full.index(w), num_tiles & 1)
        total = memory.factors.index(w).load(R)
        mbarrier.wait(bars.out_full.index(w), (num_tiles - 1) & 1)
        for half in gl.static_range(D // 64):
            out = memory.out.index(w).slice(half * 64, 64).load()
            out /= gl.convert_layout(total, gl.SliceLayout(1, out.type.layout))[:, None]
            memory.q.index(w).slice(half * 64, 64, dim=1).store(out.to(gl.bfloat16))
        fence_async_shared()
        tma.async_store(out_desc, [first + w * ROWS, 0], memory.q.index(w))
    tma.store_wait(0)


@gluon.jit
def attention(q_desc, k_desc, v_desc, out_desc, factor, seqlen, num_tiles, D: gl.constexpr, BLOCK: gl.constexpr):
    row = gl.program_id(0) * seqlen
    first = row + gl.program_id(1) * 2 * ROWS
    S: gl.constexpr = TensorMemoryLayout([ROWS, BLOCK], col_stride=1)
    O: gl.constexpr = TensorMemoryLayout([ROWS, D], col_stride=1)  # noqa: E741
    memory = Memory(
        gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, D], q_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, D], k_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK, D], v_desc.layout),
        gl.allocate_shared_memory(gl.float32, [2, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        allocate_tensor_memory(gl.float32, [2, ROWS, BLOCK], S),
        allocate_tensor_memory(gl.float32, [2, ROWS, D], O),
    )
    bars = Barriers(
        barriers(1), barriers(STAGES), barriers(STAGES), barriers(STAGES), barriers(STAGES),
        barriers(2), barriers(2), barriers(2), barriers(2), barriers(2), barriers(2),
    )  # fmt: skip
    gl.warp_specialize(
        [
            (correct, (out_desc, memory, bars, first, num_tiles, D)),
            (softmax, (0, memory, bars, num_tiles, factor, BLOCK)),
            (softmax, (1, memory, bars, num_tiles, factor, BLOCK)),
            (multiply, (memory, bars, num_tiles, BLOCK)),
            (load, (q_desc, k_desc, v_desc, memory, bars, first, row, num_tiles, BLOCK)),
        ],
        [4, 4, 1, 1],
        [192, 192, 24, 24],
    )
