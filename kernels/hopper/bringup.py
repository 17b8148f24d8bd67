"""Parts of attention on Hopper as kernels of their own, for the first minutes on a GPU: copies, the product q kᵀ, the softmax.

Each has the structure of the whole kernel (forward.py): a producer warp copies tiles by TMA into two stages of shared memory, a warpgroup
takes them from there, and barriers say when a stage is full and when it is empty. benchmarks/programs/hopper_stages.py runs them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from .names import async_load

ROWS = gl.constexpr(64)  # of a tile of queries or scores: those of one wgmma
BLOCK = gl.constexpr(128)  # keys of a tile
LOG2E = gl.constexpr(1.4426950408889634)
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit
def ring(desc, ARRIVALS: gl.constexpr):
    """Two stages of shared memory for boxes of a descriptor, with the barriers that say that a stage is full, and that it is empty."""
    tiles = gl.allocate_shared_memory(desc.dtype, [2, desc.block_type.shape[0], desc.block_type.shape[1]], desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=ARRIVALS)
    return tiles, full, empty


@gluon.jit
def produce(desc, tiles, full, empty, row, column, step_row, step_column, num_tiles):
    """Copies boxes, each a step farther, into the stages in turns."""
    for i in range(num_tiles):
        stage = i % 2
        mbarrier.wait(empty.index(stage), ((i // 2) & 1) ^ 1)
        mbarrier.expect(full.index(stage), desc.block_type.nbytes)
        async_load(desc, [row + i * step_row, column + i * step_column], full.index(stage), tiles.index(stage))


@gluon.jit
def store_tiles(out_ptr, tiles, full, empty, row, num_tiles, D: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, L))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    for i in range(num_tiles):
        stage = i % 2
        mbarrier.wait(full.index(stage), (i // 2) & 1)
        tile = tiles.index(stage).load(L)
        mbarrier.arrive(empty.index(stage), count=1)
        gl.store(out_ptr + (row + i * BLOCK + rows)[:, None].to(gl.int64) * D + columns[None, :], tile)


@gluon.jit
def loads_kernel(x_desc, out_ptr, num_tiles, D: gl.constexpr):
    """out = x, through shared memory: what barriers and copies do without any product."""
    row = gl.program_id(0) * num_tiles * BLOCK
    tiles, full, empty = ring(x_desc, 1)
    gl.warp_specialize(
        [
            (store_tiles, (out_ptr, tiles, full, empty, row, num_tiles, D)),
            (produce, (x_desc, tiles, full, empty, row, 0, BLOCK, 0, num_tiles)),
        ],
        [1],
        [24],
    )


@gluon.jit
def multiply(out_ptr, q, q_full, tiles, full, empty, row, keys, num_tiles):
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S))
    none = gl.zeros([ROWS, BLOCK], gl.float32, S)
    mbarrier.wait(q_full, 0)
    for i in range(num_tiles):
        stage = i % 2
        mbarrier.wait(full.index(stage), (i // 2) & 1)
        scores = warpgroup_mma(q, tiles.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(empty.index(stage), count=1)
        gl.store(out_ptr + (row + rows)[:, None].to(gl.int64) * keys + (i * BLOCK + columns)[None, :], scores)


@gluon.jit
def product_kernel(q_desc, k_desc, out_ptr, num_tiles):
    """out = q kᵀ in float32: copies of loads_kernel, and wgmma with both operands in shared memory."""
    row = gl.program_id(0) * ROWS
    q = gl.allocate_shared_memory(q_desc.dtype, q_desc.block_type.shape, q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    tiles, full, empty = ring(k_desc, 1)
    mbarrier.expect(q_full, q_desc.block_type.nbytes)
    async_load(q_desc, [row, 0], q_full, q)
    gl.warp_specialize(
        [
            (multiply, (out_ptr, q, q_full, tiles, full, empty, row, num_tiles * BLOCK, num_tiles)),
            (produce, (k_desc, tiles, full, empty, 0, 0, BLOCK, 0, num_tiles)),
        ],
        [1],
        [24],
    )


@gluon.jit
def reduce(lse_ptr, last_ptr, tiles, full, empty, row, num_tiles):
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK, 16])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    columns = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, S))
    largest = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    weights = gl.zeros([ROWS, BLOCK], gl.float32, S)
    for i in range(num_tiles):
        stage = i % 2
        mbarrier.wait(full.index(stage), (i // 2) & 1)
        scores = tiles.index(stage).load(S).to(gl.float32)
        mbarrier.arrive(empty.index(stage), count=1)
        larger = gl.maximum(largest, gl.max(scores, 1))
        weights = gl.exp2((scores - larger[:, None]) * LOG2E)
        total = total * gl.exp2((largest - larger) * LOG2E) + gl.sum(weights, 1)
        largest = larger
    gl.store(lse_ptr + row + rows, largest + gl.log2(total) / LOG2E)
    gl.store(last_ptr + (row + rows)[:, None] * BLOCK + columns[None, :], weights / total[:, None])


@gluon.jit
def softmax_kernel(scores_desc, lse_ptr, last_ptr, num_tiles):
    """Log-sum-exp of each row of scores, and the weights of its last tile: the online softmax, in the layout of wgmma's results."""
    row = gl.program_id(0) * ROWS
    tiles, full, empty = ring(scores_desc, 1)
    gl.warp_specialize(
        [
            (reduce, (lse_ptr, last_ptr, tiles, full, empty, row, num_tiles)),
            (produce, (scores_desc, tiles, full, empty, row, 0, 0, BLOCK, num_tiles)),
        ],
        [1],
        [24],
    )
