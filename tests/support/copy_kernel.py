"""A Gluon kernel that takes what one of attention on Hopper takes: four descriptors, a pointer and numbers. It copies a tile of v."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from pytransformer.kernels.hopper import launch
from pytransformer.kernels.hopper.descriptors import HostDescriptor
from pytransformer.kernels.hopper.names import async_load, async_store
from pytransformer.kernels.launch import COMMON_OPTIONS
from pytransformer.kernels.prepared import PreparedLaunch, Varying

ROWS = 64
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.jit(do_not_specialize=["row"])
def copy_kernel(q_desc, k_desc, lse_ptr, v_desc, out_desc, scale, row, D: gl.constexpr):
    tiles = gl.allocate_shared_memory(gl.bfloat16, [3, 64, D], q_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.expect(full, 3 * q_desc.block_type.nbytes)
    async_load(q_desc, [row, 0], full, tiles.index(0))
    async_load(k_desc, [row, 0], full, tiles.index(1))
    async_load(v_desc, [row, 0], full, tiles.index(2))
    mbarrier.wait(full, 0)
    rows = gl.arange(0, 64, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(lse_ptr + row + rows, rows * scale)
    async_store(out_desc, [row, 0], tiles.index(2))
    tma.store_wait(0)


def tensors(rows: int = 256, head_dim: int = 128) -> tuple[torch.Tensor, ...]:
    """q, k, lse, v, out: as :func:`prepare`'s launch takes them."""
    of_16_bits = [torch.zeros(rows, head_dim, dtype=torch.bfloat16) for _ in range(4)]
    return (*of_16_bits[:2], torch.zeros(rows), *of_16_bits[2:])


def prepare(given: Sequence[torch.Tensor], padding: str = "zero") -> PreparedLaunch:
    """The launch of tensors like these."""
    arguments = [
        x if x.dtype == torch.float32 else HostDescriptor.of(x, (ROWS, x.shape[1]), LAYOUT, padding) for x in given
    ]
    return launch.prepare(
        copy_kernel, (1,), (*arguments, 0.5, Varying(0)), {"D": given[0].shape[1], "num_warps": 4, **COMMON_OPTIONS}
    )
