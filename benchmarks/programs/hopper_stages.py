"""The parts of attention on Hopper as kernels of their own, for the first minutes on a GPU: copies, the product q kᵀ, the softmax.

Each has the structure of the whole kernel: a producer warp copies tiles by TMA into two stages of shared memory, a warpgroup takes them from
there, and barriers say when a stage is full and when it is empty. So what one of them hangs on or gets wrong is one of few things: see
:data:`STAGES`. They run in the Gluon interpreter as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from pytransformer.kernels.hopper.descriptors import HostDescriptor
from pytransformer.kernels.hopper.names import async_load
from pytransformer.kernels.launch import COMMON_OPTIONS
from pytransformer.kernels.prepared import PreparedLaunch

ROWS = gl.constexpr(64)  # of a tile of queries or scores: those of one wgmma
BLOCK = gl.constexpr(128)  # keys of a tile
LOG2E = gl.constexpr(1.4426950408889634)
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
NUM_WARPS = 4


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


@dataclass(frozen=True)
class Size:
    """How much a stage does: so many programs, each over so many tiles of 128 keys, of vectors of ``head_dim``."""

    programs: int
    tiles: int
    head_dim: int

    @property
    def rows(self) -> int:
        return self.programs * ROWS.value

    @property
    def keys(self) -> int:
        return self.tiles * BLOCK.value


# More tiles than stages, so that each stage is used again; on a GPU two programs for each SM of an H200.
TINY = Size(2, 3, 64)
LARGE = Size(264, 16, 128)


Results = dict[str, Tensor]
# What a draw of inputs comes to, name by name: by the kernel, which is launched anew each time, by torch in 16 bits, and in float64.
Case = tuple[Callable[[], Results], Callable[[], Results], Callable[[], Results]]


def loads(size: Size, device: torch.device) -> Case:
    """A copy: right to the bit, or wrong."""
    x = _normal(size.programs * size.keys, size.head_dim, device=device)
    out = torch.full_like(x, float("nan"))
    launch = _prepared(loads_kernel, size, (_tiles(x, BLOCK.value), None, size.tiles), {"D": size.head_dim})

    def run() -> Results:
        launch((x, out))
        return {"out": out}

    return run, lambda: {"out": x}, lambda: {"out": x.double()}


def product(size: Size, device: torch.device) -> Case:
    """Scores of all queries and keys."""
    q = _normal(size.rows, size.head_dim, device=device)
    k = _normal(size.keys, size.head_dim, device=device)
    out = torch.full((size.rows, size.keys), float("nan"), device=device)
    arguments = (_tiles(q, ROWS.value), _tiles(k, BLOCK.value), None, size.tiles)
    launch = _prepared(product_kernel, size, arguments, {})

    def run() -> Results:
        launch((q, k, out))
        return {"out": out}

    return run, lambda: {"out": q @ k.T}, lambda: {"out": q.double() @ k.double().T}


def softmax(size: Size, device: torch.device) -> Case:
    """The softmax of scores that are given."""
    scores = 3 * _normal(size.rows, size.keys, device=device)
    lse = torch.full((size.rows,), float("nan"), device=device)
    last = torch.full((size.rows, BLOCK.value), float("nan"), device=device)
    launch = _prepared(softmax_kernel, size, (_tiles(scores, ROWS.value), None, None, size.tiles), {})

    def run() -> Results:
        launch((scores, lse, last))
        return {"lse": lse, "weights": last}

    def by_torch(x: Tensor) -> Results:
        return {"lse": x.logsumexp(1), "weights": x.softmax(1)[:, -BLOCK.value :]}

    return run, lambda: by_torch(scores), lambda: by_torch(scores.double())


def _prepared(kernel: Any, size: Size, arguments: tuple[Any, ...], constants: dict[str, Any]) -> PreparedLaunch:
    return PreparedLaunch(kernel, (size.programs,), arguments, {**constants, "num_warps": NUM_WARPS, **COMMON_OPTIONS})


def _tiles(matrix: Tensor, rows: int) -> HostDescriptor:
    """Boxes of so many rows, as wide as a tile: the features, or 128 scores."""
    return HostDescriptor.of(matrix, (rows, min(matrix.shape[1], BLOCK.value)), LAYOUT)


def _normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


@dataclass(frozen=True)
class Stage:
    """One part of the kernel.

    Attributes:
        cases: name → draws inputs at that size on a device.
        suspects: what to look at if it hangs or is wrong while the stages before it passed.
    """

    cases: dict[str, Callable[[bool, torch.device], Case]]
    suspects: str


def _sized(case: Callable[[Size, torch.device], Case]) -> dict[str, Callable[[bool, torch.device], Case]]:
    def at(head_dim: int) -> Callable[[bool, torch.device], Case]:
        return lambda tiny, device: case(replace(TINY if tiny else LARGE, head_dim=head_dim), device)

    return {"d64": at(64), "d128": at(128)}


STAGES = {
    "loads": Stage(
        _sized(loads), "tensor maps (descriptors.py), expected bytes, phases of full and empty, register counts"
    ),
    "product": Stage(
        _sized(product), "layouts of wgmma's operands, its wait, what a stage holds when it is given back"
    ),
    "softmax": Stage(
        {"d128": _sized(softmax)["d128"]}, "reductions in the layout of wgmma's results, exp2, reads of shared memory"
    ),
}
