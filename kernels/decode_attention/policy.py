"""Launch policy of decode attention: tiles by the number of query rows, how many splits a sequence has, and how many programs run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..attention.options import block_dim
from ..launch import cdiv, device_limits

UNLIMITED = 2**30  # more keys than a cache can hold, small enough to be added to in 32 bits


# One sequence should fill a GPU by itself: so many programs share its keys, over all key heads, as soon as it has that many steps of
# keys (64 a step: 1k keys with 8 key heads; of codes 128). More would only write more partial results: each task leaves at most as many
# as it has splits, and scratch is bounded by the splits that the programs of a launch can begin.
PROGRAMS_OF_A_SEQUENCE = 128
LEAST_SPLITS, MOST_SPLITS = 8, 64
# With more rows a partial result is longer, and a GPU sooner full.
PROGRAMS_OF_MANY_ROWS = 64
LEAST_SPLITS_OF_MANY_ROWS, MOST_SPLITS_OF_MANY_ROWS = 4, 16
# A thread takes all registers that it may have, so that an SM holds so many warps: two programs of four.
WARPS_PER_SM = 8


@dataclass(frozen=True)
class DecodeConfig:
    """Tile and launch of the sequences with more than ``rows_above`` and up to ``rows_up_to`` query rows (tokens · heads per key head).

    Attributes:
        block_m: query rows of a tile; at least 16 for the tensor cores.
        block_n: keys per step.
        max_splits: how many programs share the keys of a sequence and key head at most; 1 = it is not split.
    """

    rows_above: int
    rows_up_to: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_splits: int


def decode_configs(
    head_dim: int, value_dim: int, itemsize: int, device: torch.device, paged: bool = False, masked: bool = False,
    num_kv_heads: int = 8, q_itemsize: int = 2,
) -> tuple[DecodeConfig, ...]:  # fmt: skip
    """The three row classes, narrow to wide. Which class serves a sequence depends on its own rows only; likewise every tile size.

    Args:
        itemsize: bytes of an element of the cache.
        paged: a step first loads page numbers, so the pipeline is one stage deeper. Stages do not change results.
        masked: a mask or bias is read for every score.
        num_kv_heads: with few of them each is split more.
        q_itemsize: bytes of an element of the queries.
    """
    limits = device_limits(device)
    row_bytes = (block_dim(head_dim) + block_dim(value_dim)) * itemsize
    # 32 KB per stage (64 keys at head_dim 128, 16-bit) on two blocks per SM: HBM3's latency asks for ~40 KB per SM in flight.
    block_n = 64 if row_bytes <= 512 and itemsize < 4 else 32
    # Codes are half as many bytes; with few rows a step takes twice as many, as half of its instructions do not depend on how many.
    is_coded = itemsize == 1 and q_itemsize == 2
    narrow_n = 2 * block_n if is_coded and row_bytes <= 256 and not masked else block_n
    stages = max(1, min(3, (limits.shared_memory // 2 - 8192) // (narrow_n * row_bytes)))
    # float32 products without tensor cores keep their operands in registers, and a mask or bias its 64-bit addresses: 64 rows spill.
    # Codes that are taken apart by hand spill there too.
    block_m = 64
    if masked or (is_coded and limits.arch < 89) or (itemsize == 4 and row_bytes > 512):
        block_m = 16 if itemsize == 4 and row_bytes >= 1024 else 32
    # 4 warps hold 64 rows of 128 features in 249 registers, and with options on top they spill. Triton 3.6 needs more registers for float32
    # than later releases: there 4 warps spill with 16 rows of 256 features, and 8 warps with 32 rows of 128.
    # Codes become 16 bits.
    wide_warps = 4 if row_bytes * (2 if is_coded else 1) <= 256 else 8
    wide = (block_m, block_n, wide_warps, min(stages, 2) + paged)
    few = max(LEAST_SPLITS, min(MOST_SPLITS, PROGRAMS_OF_A_SEQUENCE // num_kv_heads))
    many = max(LEAST_SPLITS_OF_MANY_ROWS, min(MOST_SPLITS_OF_MANY_ROWS, PROGRAMS_OF_MANY_ROWS // num_kv_heads))
    # More than 128 rows fill the GPU by themselves, and partial results would outgrow the cache.
    # Registers again: what is kept beside the loop over the keys leaves room in four warps for nothing but plain rows of 16 bits, and for
    # tiles of no more than 32 rows with 256 features.
    narrow_warps = 8 if masked or paged or itemsize != 2 else 4
    split_rows = min(block_m, 32) if row_bytes >= 1024 else block_m
    return (
        DecodeConfig(0, 16, 16, narrow_n, narrow_warps, stages + paged, few),
        DecodeConfig(16, 128, split_rows, *wide[1:], many),
        DecodeConfig(128, UNLIMITED, *wide, 1),
    )


def row_classes(
    configs: tuple[DecodeConfig, ...], rows: int, packed: bool, capacity: int, num_splits: int
) -> Iterator[DecodeConfig]:
    """The classes to launch: the one of a dense call, every one that a packed sequence of up to ``rows`` rows can be in.

    Their ``max_splits`` are no more than a cache of ``capacity`` keys has steps, which leaves every sequence the splits it has.
    """
    for config in configs:
        if rows <= config.rows_above or (not packed and rows > config.rows_up_to):
            continue
        yield replace(config, max_splits=max(1, min(num_splits or config.max_splits, cdiv(capacity, config.block_n))))


def num_programs(config: DecodeConfig, tasks: int, device: torch.device) -> int:
    """Programs of a launch whose sequences have up to ``tasks`` tiles of rows, over all key heads."""
    if config.max_splits == 1:
        return tasks
    return min(WARPS_PER_SM // config.num_warps * device_limits(device).num_sms, tasks * config.max_splits)
