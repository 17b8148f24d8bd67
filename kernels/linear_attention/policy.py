"""The host's side of a call: its sizes and constants, launch policy, and how a pass over it is prepared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl

from ..attention.options import dot_precision, needs_wide_offsets, row_strides
from ..attention.tile import RowStrides
from ..launch import COMMON_OPTIONS, next_power_of_2
from .tile import Traits

if TYPE_CHECKING:
    from pytransformer.ops.linear_attention.call import LinearAttentionCall

# Up to here a program walks token by token; a token costs it about as long as a launch, of which the passes over chunks are three.
FEW_TOKENS = 8
# Columns of S in a program of the recurrence: rows of 128 bytes, 64 values of S a thread at head_dim 256.
RECURRENCE_COLUMNS, RECURRENCE_WARPS = 32, 4
# Numbers of the states in a program of the scan: it waits for memory, so that there should be many.
SCAN_BLOCK, SCAN_WARPS = 512, 4
STATISTICS_ROWS = 32


@dataclass(frozen=True)
class LinearConfig:
    """Launch policy of the passes over chunks.

    Attributes:
        chunk: tokens between two states in memory, a multiple of ``block_rows``.
        block_rows: tokens of a tile.
        block_f, block_e: features contracted at a time and columns of the result; also the tile of a state.
        num_warps, num_stages: of a program for out or dv; stages are tiles under way at once.
        more_warps: of a program for dq, dk or a state, which hold more beside the result.
    """

    chunk: int
    block_rows: int
    block_f: int
    block_e: int
    num_warps: int
    num_stages: int
    more_warps: int


def linear_config(head_dim: int, value_dim: int, dtype: torch.dtype, arch: int) -> LinearConfig:
    """Launch policy.

    A state of D · E numbers is written, scanned (read and written) and read for each chunk, 16·D·E bytes, where q, k, v and out of a
    token have about 8·D: with 2·D tokens in a chunk the states are as much as the tensors. Longer chunks cost more products than they
    save bytes. Figures are for 128 features with a decay, on sm_90 unless it is said.
    """
    width = max(head_dim, value_dim)
    chunk = 128 if width <= 64 else 256
    if dtype == torch.float32:
        # Exact products run on the FMA units, whose operands lie in registers for the whole depth of a dot: by four
        # warps dq spilled 420 bytes, and dv 44 at 256 features.
        block_f, block_e = (min(limit, max(16, next_power_of_2(width))) for limit in (32, 64))
        return LinearConfig(chunk, 32, block_f, block_e, 8, 1, 8)
    # 64 × 128 results and 64 × 64 products by four warps are 96 registers of a thread: out takes 230, dv 244; dq and dk, which go back
    # through the feature map and have a gradient of the decay, spill 60 bytes so, and take 222 by eight. mma.sync's operands lie in
    # registers too: dq spills 112 bytes by eight warps on sm_80.
    block_f, block_e = (min(limit, max(16, next_power_of_2(width))) for limit in (64, 128 if arch >= 90 else 64))
    return LinearConfig(chunk, 64, block_f, block_e, 4, 2, 8)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a call."""

    batch: int
    num_heads: int
    num_kv_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    value_dim: int

    @property
    def slots(self) -> int:
        """Heads of keys over all sequences, each of which has a state."""
        return self.batch * self.num_kv_heads

    @property
    def state_size(self) -> int:
        """Numbers of S and z together."""
        return self.head_dim * (self.value_dim + 1)

    def states(self, num_chunks: int) -> tuple[int, int]:
        """The shape of the states of all chunks, and of one if there is none, for those that all queries read."""
        return self.slots, max(num_chunks, 1) * self.state_size


def geometry(call: LinearAttentionCall) -> Geometry:
    """The sizes of a call."""
    batch, seqlen_q, num_heads, head_dim = call.q.shape
    return Geometry(batch, num_heads, call.k.shape[2], seqlen_q, call.k.shape[1], head_dim, call.v.shape[-1])


def traits_of(call: LinearAttentionCall, shape: Geometry, allow_tf32: bool, *strides: RowStrides) -> Traits:
    """The constants of a call, whose rows have these strides."""
    dtype, has_decay = call.q.dtype, call.decay is not None
    # Features of 16 bits times a power of the decay have more digits than one such number holds. Those of elu have been rounded to it
    # once, beside which two are exact; given ones are exact themselves and take three.
    parts = 1 if not has_decay or dtype == torch.float32 else 2 if call.feature_map == "elu" else 3
    constants = {
        "HEADS_PER_KV": shape.num_heads // shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "VALUE_DIM": shape.value_dim,
        "ELU": call.feature_map == "elu",
        "CAUSAL": call.causal,
        "NORMALIZE": call.normalize,
        "HAS_DECAY": has_decay,
        "SCALED": dtype == torch.float16,
        "PRECISION": dot_precision(dtype, allow_tf32),
        "PARTS": parts,
        "ALIGNMENT": math.gcd(16, *(stride for of_tensor in strides for stride in of_tensor)),
    }
    return Traits(**{name: tl.constexpr(value) for name, value in constants.items()})


def tiles_of(config: LinearConfig, *strides: RowStrides) -> dict[str, Any]:
    """The constants of tiles, and whether offsets inside of one need 64 bits."""
    return {
        "CHUNK": config.chunk,
        "BLOCK_ROWS": config.block_rows,
        "WIDE": needs_wide_offsets(config.block_rows, *strides),
    }


def tile_of(config: LinearConfig, depth: int, width: int) -> dict[str, int]:
    """The constants of a tile of a product that contracts ``depth`` features into ``width`` columns, or of a state of so many features
    and values: where values are fewer than features, results and states of values need fewer columns than those of features."""
    return {
        "BLOCK_F": min(config.block_f, max(16, next_power_of_2(depth))),
        "BLOCK_E": min(config.block_e, max(16, next_power_of_2(width))),
    }


def strides_of(tensor: torch.Tensor | None) -> RowStrides:
    """(batch, seqlen, head) strides of q, k, v, out and gradients."""
    return RowStrides(0, 0, 0) if tensor is None else row_strides(tensor)


def state_strides(tensor: torch.Tensor | None) -> RowStrides:
    """(batch, row, head) strides of S or z."""
    if tensor is None:
        return RowStrides(0, 0, 0)
    return RowStrides(tensor.stride(0), tensor.stride(2) if tensor.dim() == 4 else 0, tensor.stride(1))


class Passes:
    """Says what the kernels are launched with, over one call.

    Args:
        names: of the tensors that each launch is given, in this order.
        strides: by name, of those that have some.
        common: values and constants by the names that kernels give them, the same in all passes.
        absent: names of tensors that the calls do not have.
    """

    def __init__(
        self, names: Sequence[str], strides: Mapping[str, RowStrides], common: Mapping[str, Any], absent: Sequence[str]
    ) -> None:
        self._names, self._strides, self._common, self._absent = names, strides, common, absent

    def arguments(
        self,
        kernel: Any,
        programs: int,
        roles: Mapping[str, str | None],
        values: Mapping[str, Any],
        num_warps: int,
        num_stages: int = 1,
    ) -> tuple[tuple[int], list[Any], dict[str, Any], list[int | None]]:
        """What a ``PreparedLaunch`` takes behind the kernel.

        Args:
            kernel: takes ``<role>_ptr`` and ``<role>_strides``.
            programs: size of the grid.
            roles: for each role the name of the tensor that has it, or None; a role that is not here is a name.
            values: further values and constants.
            num_warps, num_stages: of a program.
        """
        values = {**self._common, **values}
        arguments: list[Any] = []
        order: list[int | None] = []
        for name in kernel.arg_names:
            if name.endswith("_ptr"):
                tensor = roles.get(name.removesuffix("_ptr"), name.removesuffix("_ptr"))
                order.append(None if tensor is None or tensor in self._absent else self._names.index(tensor))
                arguments.append(None)
            elif name.endswith("_strides"):
                tensor = roles.get(name.removesuffix("_strides"), name.removesuffix("_strides"))
                arguments.append(RowStrides(0, 0, 0) if tensor is None else self._strides[tensor])
            elif not name.isupper():
                arguments.append(values[name])
        constants = {name: values[name] for name in kernel.arg_names if name.isupper()}
        constants |= {"num_warps": num_warps, "num_stages": num_stages, **COMMON_OPTIONS}
        return (programs,), arguments, constants, order
