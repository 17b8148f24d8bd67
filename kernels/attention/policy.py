"""Launch policy of the attention kernels: tile sizes, warps and stages, each with the figures that decided."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .options import Geometry, block_dim

# Keys and values of the heads that run at the same time should stay in L2 (60 MB on an H200, part of it for everything else).
L2_BYTES = 32 * 2**20


@dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes and pipeline of the forward kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def forward_config(head_dim: int, value_dim: int, dtype: torch.dtype, arch: int, options: int = 0) -> ForwardConfig:
    """Launch policy. ``options``: how much there is beside causality, each part of which needs registers (see ``ScoreOptions``).

    Registers decide: at 8 warps a thread holds block_m · dv / 256 values of the output and block_m · block_n / 256 scores. Shared memory
    holds q once and block_n rows of k and v for each stage. Figures are for sm_90.
    """
    width = max(block_dim(head_dim), block_dim(value_dim))
    if dtype == torch.float32:
        return ForwardConfig(32, 32, 4, 1)  # exact products run on the FMA units from registers: 168 to 215 of them
    if arch < 90:
        # mma.sync keeps q in registers and both operands of a product: half the tile, and 163 KB hold two stages up to d = 128.
        if width <= 64:
            return ForwardConfig(128, 64 if options < 2 else 32, 8, 2)
        return ForwardConfig(128 if width <= 128 else 64, 32, 8, 2)
    if width <= 128:
        # Up to 255 registers and 160 KB without a spill; 4 warps spill.
        return ForwardConfig(128, {0: 128, 1: 64}.get(options, 32), 8, 2)
    if options == 0 and arch == 90:
        # 255 registers and 16 bytes of spills before the loop, 192 KB; sm_100 spills more.
        return ForwardConfig(128, 64, 8, 2)
    return ForwardConfig(128 if options < 2 else 64, 32, 8, 2)


def forward_config_of_blocks(config: ForwardConfig, block_size: tuple[int, int], shape: Geometry) -> ForwardConfig:
    """The policy under a block mask: a tile lies inside one block, so that it shrinks to the largest power of two that divides that."""
    rows, cols = block_size
    block_m = math.gcd(config.block_m, rows)
    return replace(
        config,
        block_m=block_m,
        block_n=math.gcd(config.block_n, cols),
        num_warps=_warps(config.num_warps, config.block_m, block_m, shape),
    )


def _warps(num_warps: int, block: int, smaller: int, shape: Geometry) -> int:
    """Fewer rows leave fewer warps something to do; wgmma has four to its 64 rows. At d = 256 four spill 516 bytes in the forward loop."""
    width = max(block_dim(shape.head_dim), block_dim(shape.value_dim))
    return num_warps if smaller == block or smaller * width > 64 * 128 else min(num_warps, 4)


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of the dq kernel (``q_*``: owns q_block_m queries) and of the dk/dv kernel (``kv_*``: owns kv_block_n keys)."""

    q_block_m: int
    q_block_n: int
    q_num_warps: int
    q_num_stages: int
    kv_block_m: int
    kv_block_n: int
    kv_num_warps: int
    kv_num_stages: int


def backward_config(head_dim: int, value_dim: int, dtype: torch.dtype, arch: int, options: int = 0) -> BackwardConfig:
    """Launch policy; ``options`` as for the forward kernel.

    Registers decide: at 8 warps a thread of the dk/dv kernel holds kv_block_n · (d + dv) / 256 gradients, two score tiles and two
    statistics of each query; of the dq kernel one gradient tile and two score tiles. Figures are for sm_90.
    """
    width = max(block_dim(head_dim), block_dim(value_dim))
    if dtype == torch.float32:
        # Exact products run on the FMA units from registers; two accumulators of 32 · 256, or an option's values too, are too many of them.
        kv_block_m = 32 if width <= 128 and options == 0 else 16
        return BackwardConfig(32, 32, 8 if width <= 64 else 4, 1, kv_block_m, 32, 8, 1)
    if arch < 90:
        if width <= 64 and options < 2:
            return BackwardConfig(64, 64, 8, 2, 32, 64, 4, 2)
        if width <= 64:
            return BackwardConfig(32, 32, 4, 2, 16, 64, 4, 2)
        if width <= 128 and options < 2:
            return BackwardConfig(64, 32, 8, 2, 32, 64, 8, 2)
        return BackwardConfig(32, 32, 8, 2, 16, 32, 8, 2)
    if width <= 64:
        if options == 0:
            # dq 185 registers, dk/dv 230.
            return BackwardConfig(128, 64, 8, 2, 64, 128, 8, 2)
        if options == 1:
            return BackwardConfig(128, 64, 8, 2, 32, 128, 8, 2)
        return BackwardConfig(128, 32, 8, 2, 32 if options < 4 else 16, 64, 8, 2)
    if width <= 128:
        if options == 0:
            # dq 251 registers, dk/dv 248; 64 queries at a time spill.
            return BackwardConfig(128, 64, 8, 2, 32, 128, 8, 2)
        if options == 1:
            return BackwardConfig(128, 32, 8, 2, 32, 64, 8, 2)
        return BackwardConfig(64, 32, 8, 2, 16, 64, 8, 2)
    if options == 0:
        # dq 220 registers on sm_90, where 32 keys spill; for dk/dv wgmma's 64 rows would spill, so mma.sync.
        return BackwardConfig(64, 16 if arch == 90 else 32, 8, 2, 32, 32, 8, 2)
    return BackwardConfig(32, 32, 8, 2, 16, 32, 8, 2)


def backward_config_of_blocks(config: BackwardConfig, block_size: tuple[int, int], shape: Geometry) -> BackwardConfig:
    """As :func:`forward_config_of_blocks`."""
    rows, cols = block_size
    q_block_m, kv_block_n = math.gcd(config.q_block_m, rows), math.gcd(config.kv_block_n, cols)
    return replace(
        config,
        q_block_m=q_block_m,
        q_block_n=math.gcd(config.q_block_n, cols),
        q_num_warps=_warps(config.q_num_warps, config.q_block_m, q_block_m, shape),
        kv_block_m=math.gcd(config.kv_block_m, rows),
        kv_block_n=kv_block_n,
        # 64 keys with their two gradients need the registers of all eight: at d = 128 four spill 80 bytes.
        kv_num_warps=config.kv_num_warps
        if kv_block_n >= 64
        else _warps(config.kv_num_warps, config.kv_block_n, kv_block_n, shape),
    )


def slots_per_group(shape: Geometry, k: torch.Tensor) -> int:
    """Heads that share the L2 cache: whole GQA groups, as many as their keys and values fit."""
    heads_per_kv = shape.num_heads // shape.num_kv_heads
    bytes_per_kv_head = max(1, shape.seqlen_k * (shape.head_dim + shape.value_dim) * k.element_size())
    return min(shape.slots(shape.num_heads), heads_per_kv * max(1, L2_BYTES // bytes_per_kv_head))
