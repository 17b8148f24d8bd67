"""Launch policy of decode attention: tiles by the number of query rows, and where the splits of the keys begin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..attention.options import block_dim
from ..launch import cdiv, device_limits

UNLIMITED = 2**30  # more keys than a cache can hold, small enough to be added to in 32 bits


@dataclass(frozen=True)
class SplitPlan:
    """Where splits begin: ``fine_splits`` of ``fine_keys`` keys, then ``coarse_keys`` each; multiples of ``DecodeConfig.block_n``."""

    fine_keys: int
    fine_splits: int
    coarse_keys: int

    def count(self, capacity: int) -> int:
        """Splits that cover ``capacity`` keys, at least 1."""
        fine_total = self.fine_keys * self.fine_splits
        if capacity <= fine_total:
            return max(1, cdiv(capacity, self.fine_keys))
        return self.fine_splits + cdiv(capacity - fine_total, self.coarse_keys)


# A few rows: 256 keys of one head are 128 KB in bf16 at head_dim 128. Shorter splits write too many partial results (3 % of the
# bytes here), longer ones leave SMs idle: batch 1 with 8 key heads and 4k keys gives 128 programs. Beyond 8k keys there are enough.
FINE_SPLITS = SplitPlan(256, 32, 512)
# Some tens of rows: a partial result is as long as its rows are many, so splits are longer and fewer.
COARSE_SPLITS = SplitPlan(1024, 8, 4096)
# More rows fill the GPU by themselves, and partial results would outgrow the cache.
NO_SPLITS = SplitPlan(UNLIMITED, 1, UNLIMITED)


@dataclass(frozen=True)
class DecodeConfig:
    """Tile and launch of the sequences with more than ``rows_above`` and up to ``rows_up_to`` query rows (tokens · heads per key head).

    Attributes:
        block_m: query rows of a tile; at least 16 for the tensor cores.
        block_n: keys per step.
        splits: where splits begin.
    """

    rows_above: int
    rows_up_to: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    splits: SplitPlan


def decode_configs(
    head_dim: int, value_dim: int, itemsize: int, device: torch.device, paged: bool = False, masked: bool = False
) -> tuple[DecodeConfig, ...]:
    """The three row classes, narrow to wide. Which class serves a sequence depends on its own rows only; likewise every tile size.

    Args:
        itemsize: bytes of an element of the cache.
        paged: a step first loads page numbers, so the pipeline is one stage deeper. Stages do not change results.
        masked: a mask or bias is read for every score.
    """
    limits = device_limits(device)
    row_bytes = (block_dim(head_dim) + block_dim(value_dim)) * itemsize
    # 32 KB per stage (64 keys at head_dim 128, 16-bit) on two blocks per SM: HBM3's latency asks for ~40 KB per SM in flight.
    block_n = 64 if row_bytes <= 512 else 32
    stages = max(1, min(3, (limits.shared_memory // 2 - 8192) // (block_n * row_bytes)))
    # float32 products without tensor cores keep their operands in registers, and a mask or bias its 64-bit addresses: 64 rows spill.
    block_m = 64
    if masked or (itemsize == 4 and row_bytes > 512):
        block_m = 16 if itemsize == 4 and row_bytes >= 1024 else 32
    # 4 warps hold 64 rows of 128 features in 249 registers, and with options on top they spill. Triton 3.6 needs more registers for float32
    # than later releases: there 4 warps spill with 16 rows of 256 features, and 8 warps with 32 rows of 128.
    wide = (block_m, block_n, 4 if row_bytes <= 256 else 8, min(stages, 2) + paged)
    return (
        DecodeConfig(0, 16, 16, block_n, 8 if itemsize == 4 and row_bytes >= 1024 else 4, stages + paged, FINE_SPLITS),
        DecodeConfig(16, 128, *wide, COARSE_SPLITS),
        DecodeConfig(128, UNLIMITED, *wide, NO_SPLITS),
    )


def fixed_splits(capacity: int, num_splits: int, block_n: int) -> SplitPlan:
    """``num_splits`` equal splits of a cache of ``capacity`` keys, in whole tiles."""
    num_splits = max(1, min(num_splits, cdiv(capacity, block_n)))  # also keeps key positions within 32 bits
    keys = max(block_n, cdiv(cdiv(capacity, num_splits), block_n) * block_n)
    return SplitPlan(keys, num_splits, keys)


def row_classes(
    configs: tuple[DecodeConfig, ...], rows: int, packed: bool, capacity: int, num_splits: int
) -> Iterator[DecodeConfig]:
    """The classes to launch: the one of a dense call, every one that a packed sequence of up to ``rows`` rows can be in."""
    for config in configs:
        if rows <= config.rows_above or (not packed and rows > config.rows_up_to):
            continue
        if num_splits > 0:
            config = replace(config, splits=fixed_splits(capacity, num_splits, config.block_n))
        yield config
