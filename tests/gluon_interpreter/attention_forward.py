"""A warp-specialised forward pass of attention for Hopper: what the Gluon interpreter has to be able to run.

One producer loads tiles of k and v into two stages each; two consumers of 64 queries each multiply, the product with
v of one tile running beside that with k of the next.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pytransformer.gluon_interpreter import Schedule, Trace, launch
from pytransformer.kernels.hopper.names import async_load, async_store

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
ROWS = 64  # queries of one consumer
LOG2_E = 1.4426950408889634


@gluon.jit
def produce(k_desc, v_desc, k, v, k_full, k_empty, v_full, v_empty, row, num_tiles, BLOCK: gl.constexpr):
    for i in range(num_tiles):
        stage = i % 2
        phase = ((i // 2) & 1) ^ 1
        begin = row + (num_tiles - 1 - i) * BLOCK
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        async_load(k_desc, [begin, 0], k_full.index(stage), k.index(stage))
        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        async_load(v_desc, [begin, 0], v_full.index(stage), v.index(stage))


@gluon.jit
def consume(
    W: gl.constexpr, o_desc, lse, q, q_full, k, v, k_full, k_empty, v_full, v_empty, first, row, num_tiles, scale,
    D: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    O_ROWS: gl.constexpr = gl.SliceLayout(1, O)
    own = q.index(W)
    rows = row + W * 64 + gl.arange(0, 64, layout=S_ROWS)
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S))
    empty = gl.zeros([64, BLOCK], gl.float32, S)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(own, k.index(0).permute((1, 0)), empty, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0), count=1)
    if CAUSAL:
        limit = rows - (num_tiles - 1) * BLOCK
        scores = gl.where(limit[:, None] >= columns[None, :], scores, float("-inf"))
    largest = gl.max(scores, 1)
    p = gl.exp2(scores * scale - (largest * scale)[:, None])
    total = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(gl.bfloat16), P)
    out = gl.zeros([64, D], gl.float32, O)
    for i in range(1, num_tiles):
        stage = i % 2
        before = (i - 1) % 2
        mbarrier.wait(k_full.index(stage), (i // 2) & 1)
        scores_next = warpgroup_mma(own, k.index(stage).permute((1, 0)), empty, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // 2) & 1)
        out_next = warpgroup_mma(weights, v.index(before), out, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores_next])
        mbarrier.arrive(k_empty.index(stage), count=1)
        larger = gl.maximum(largest, gl.max(scores, 1))
        shrink = gl.exp2((largest - larger) * scale)
        p = gl.exp2(scores * scale - (larger * scale)[:, None])
        total = total * shrink + gl.sum(p, 1)
        largest = larger
        out = warpgroup_mma_wait(0, deps=[out_next])
        mbarrier.arrive(v_empty.index(before), count=1)
        weights = gl.convert_layout(p.to(gl.bfloat16), P)
        out = out * gl.convert_layout(shrink, O_ROWS)[:, None]
    last = (num_tiles - 1) % 2
    mbarrier.wait(v_full.index(last), ((num_tiles - 1) // 2) & 1)
    out_next = warpgroup_mma(weights, v.index(last), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out_next])
    gl.store(lse + first + W * 64 + gl.arange(0, 64, layout=S_ROWS), largest * scale + gl.log2(total))
    out = out / gl.convert_layout(total, O_ROWS)[:, None]
    own.store(out.to(gl.bfloat16))
    fence_async_shared()
    async_store(o_desc, [first + W * 64, 0], own)
    tma.store_wait(0)


@gluon.jit
def attention(
    q_desc, k_desc, v_desc, o_desc, lse, scale, seqlen, D: gl.constexpr, BLOCK: gl.constexpr, CAUSAL: gl.constexpr
):
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    head = gl.program_id(0)
    first = head * seqlen + tile * 128
    num_tiles = (tile * 128 + 128 + BLOCK - 1) // BLOCK if CAUSAL else (seqlen + BLOCK - 1) // BLOCK
    q = gl.allocate_shared_memory(gl.bfloat16, [2, 64, D], q_desc.layout)
    k = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, D], k_desc.layout)
    v = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(2):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    mbarrier.expect(q_full, 2 * q_desc.block_type.nbytes)
    for w in gl.static_range(2):
        async_load(q_desc, [first + w * 64, 0], q_full, q.index(w))
    # fmt: off
    gl.warp_specialize(
        [
            (consume, (0, o_desc, lse, q, q_full, k, v, k_full, k_empty, v_full, v_empty, first, tile * 128, num_tiles, scale,
                       D, BLOCK, CAUSAL)),
            (consume, (1, o_desc, lse, q, q_full, k, v, k_full, k_empty, v_full, v_empty, first, tile * 128, num_tiles, scale,
                       D, BLOCK, CAUSAL)),
            (produce, (k_desc, v_desc, k, v, k_full, k_empty, v_full, v_empty, head * seqlen, num_tiles, BLOCK)),
        ],
        [4, 1],
        [240, 24],
    )
    # fmt: on


def descriptor(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """Boxes of some rows of a 16-bit matrix."""
    return TensorDescriptor.from_tensor(tensor, [rows, tensor.shape[1]], SWIZZLED)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, block: int, schedule: Schedule, kernel=attention
) -> tuple[torch.Tensor, torch.Tensor, list[Trace]]:
    """(output, log-sum-exp in base 2, traces) of (num_heads, seqlen, head_dim); with one head there may be fewer queries than keys."""
    heads, seqlen, head_dim = q.shape
    rows = [x.reshape(-1, head_dim) for x in (q, k, v)]
    out, lse = torch.full_like(rows[0], float("nan")), torch.full((heads * seqlen,), float("nan"))
    descriptors = [descriptor(x, size) for x, size in zip((*rows, out), (ROWS, block, block, ROWS))]
    scale = head_dim**-0.5 * LOG2_E
    grid = (heads, seqlen // 128)
    traces = launch(kernel, grid, *descriptors, lse, scale, k.shape[1], head_dim, block, causal, schedule=schedule)
    return out.view_as(q), lse.view(heads, seqlen), traces
