"""Launches of Hopper's attention kernels: policy, descriptors, and the two ways to run a Gluon kernel, on a GPU or in the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from triton.experimental.gluon import language as gl

from ..attention.options import Geometry, block_dim, geometry, maker, window_limits
from ..attention.policy import slots_per_group
from ..launch import COMMON_OPTIONS, device_limits, interpreting
from ..prepared import PreparedLaunch
from .descriptors import HostDescriptor
from .forward import BLOCK_M, ROWS, Traits, attention_forward_kernel
from .places import RAGGED

if TYPE_CHECKING:
    from pytransformer.gluon_interpreter import Schedule
    from pytransformer.ops.attention.call import AttentionCall

_OPTIONS = {"num_warps": 4, **COMMON_OPTIONS}  # of each consumer: a warpgroup
_MOST_APART = 128  # features, of which outputs find room beside queries, keys and values
_ALIGNMENT = 8  # elements of 16 bits in the 16 bytes that strides of a descriptor are multiples of
# Of the dimensions before a packed tensor's own: see boxes.
_RAGGED_STRIDE, _MOST = 2**34, 0x7FFF0000


@dataclass(frozen=True)
class HopperConfig:
    """Tile of keys, stages of each ring, and blocks that there are at most, which go from place to place."""

    block_n: int
    stages: int
    blocks: int


def hopper_config(head_dim: int, value_dim: int, device: torch.device) -> HopperConfig:
    """Launch policy. Shared memory decides: 64 queries for each consumer and two stages of k and v in 227 KB. At d = 128 that is 192 KB
    with tiles of 128 keys and memory for outputs; at d = 256, 192 KB with 64, and outputs in the place of queries. Registers, of which a
    block takes all, leave room for one on a multiprocessor."""
    width = max(block_dim(head_dim), block_dim(value_dim))
    return HopperConfig(128 if width <= 128 else 64, 2, device_limits(device).num_sms)


def boxes(like: torch.Tensor, block_rows: int, block_dim: int) -> HostDescriptor:
    """The descriptor of rows of one head, of tensors (batch, seqlen, heads, features), or packed (total, heads, features), like this one.

    Dense, its dimensions are the tensor's: past the end of a sequence and behind the features zeros are read and nothing is written.

    Packed, sequences end anywhere, so that the tensor is taken for one of 2^30 rows whose last one is the sequence's. Two more dimensions,
    of which one steps 2^34 elements less a row and the other a row, say where those rows begin: at the coordinates ``2^30, end of the
    sequence, 2^30 - length + row`` the offset is ``end - length + row`` rows and 2^64 elements, around which addresses wrap (the idea is
    that of Triton's ``ragged_tma``).
    """
    shape, strides = list(like.shape), like.stride()
    # Of what is there once, the stride is anything, and a descriptor's is a multiple of 16 bytes.
    steps = [stride if size > 1 else _ALIGNMENT for size, stride in zip(shape[:-1], strides)] + [1]
    block = [1, block_rows, 1, block_dim]
    if like.dim() == 3:
        shape, steps = [_MOST, _MOST, RAGGED.value, *shape[1:]], [_RAGGED_STRIDE - steps[0], steps[0], *steps]
        block = [1, *block]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))
    return HostDescriptor(tuple(shape), tuple(steps), like.dtype, tuple(block), layout)


_schedule: Schedule | None = None


@contextlib.contextmanager
def interpreted_in(schedule: Schedule) -> Iterator[None]:
    """Inside, the Gluon interpreter runs Hopper's kernels in this schedule."""
    global _schedule
    before, _schedule = _schedule, schedule
    try:
        yield
    finally:
        _schedule = before


def run(kernel: Any, grid: Sequence[int], arguments: Sequence[Any], constants: Mapping[str, Any]) -> Any:
    """Launches a Gluon kernel on the GPU of its tensors and returns what was compiled, or, while kernels are interpreted, in the Gluon
    interpreter."""
    if interpreting():
        from pytransformer import gluon_interpreter

        schedule = gluon_interpreter.EARLY if _schedule is None else _schedule
        known = {name: value for name, value in constants.items() if name in (*kernel.arg_names, "num_warps")}
        gluon_interpreter.launch(kernel, tuple(grid), *arguments, schedule=schedule, **known)
        return None
    return kernel.run(*arguments, grid=tuple(grid), warmup=False, **constants)


def prepare(
    kernel: Any,
    grid: Sequence[int],
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    order: Sequence[int | None] | None = None,
) -> PreparedLaunch:
    """The launch of a Gluon kernel, to be made many times: its descriptors (:func:`boxes`) are encoded once for an address."""
    return PreparedLaunch(kernel, grid, arguments, constants, order, start=run)


def window_of(call: AttentionCall, shape: Geometry) -> tuple[int, int]:
    """(left, right) with causality folded in; what no pair of positions is far enough apart to leave is no limit: -1."""
    left, right = window_limits(call.causal, call.window)
    return (-1 if left >= shape.seqlen_k - 1 else left), (-1 if right >= shape.seqlen_q - 1 else right)


class HopperForward:
    """The forward launch for calls that are alike, which :func:`.serves.refusal` has nothing against; made any number of times.

    Args:
        call: of its tensors only shapes, strides, dtypes and device count.
        config: replaces the launch policy.
    """

    __slots__ = ("_launch", "_new_lse", "_new_out")

    def __init__(self, call: AttentionCall, *, config: HopperConfig | None = None) -> None:
        shape = geometry(call)
        config = config or hopper_config(shape.head_dim, shape.value_dim, call.q.device)
        out_shape = (*call.q.shape[:-1], shape.value_dim)
        self._new_out, self._new_lse = maker(call.q, out_shape), maker(call.q, shape.lse_shape, torch.float32)
        rows, block_d, block_dv = ROWS.value, block_dim(shape.head_dim), block_dim(shape.value_dim)
        out = torch.empty(out_shape, dtype=call.q.dtype, device="meta")
        descriptors = (
            boxes(call.q, rows, block_d),
            boxes(call.k, config.block_n, block_d),
            boxes(call.v, config.block_n, block_dv),
            boxes(out, rows, block_dv),
        )
        num_tiles = shape.tiles(shape.seqlen_q, BLOCK_M.value)
        num_slots = shape.slots(shape.num_heads)
        left, right = window_of(call, shape)
        constants = {
            "HEADS_PER_KV": shape.num_heads // shape.num_kv_heads,
            "BLOCK_N": config.block_n,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "THREE_QUARTERS": 4 * shape.head_dim == 3 * block_d,
            "STAGES": config.stages,
            "OUT_APART": block_d <= _MOST_APART or block_dv != block_d,
            "PACKED": shape.packed,
            "HAS_LEFT": left >= 0,
            "HAS_RIGHT": right >= 0,
            "HAS_SOFTCAP": call.softcap > 0.0,
            "HAS_SINKS": call.sinks is not None,
        }
        sizes = (*shape.sizes, num_tiles, num_slots, slots_per_group(shape, call.k))
        scalars = (call.softmax_scale, call.softcap, left, right)
        traits = Traits(**{name: gl.constexpr(value) for name, value in constants.items()})
        arguments = (*descriptors, None, *shape.lse_strides, None, None, None, *sizes, *scalars, traits)
        self._launch = prepare(
            attention_forward_kernel, (min(num_tiles * num_slots, config.blocks),), arguments, _OPTIONS
        )

    def __call__(self, call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor]:
        """Results as :func:`..attention.forward.attention_forward` returns them, of a call that is like the first."""
        out, lse = self._new_out(call.q), self._new_lse(call.q)
        self._launch((call.q, call.k, call.v, out, lse, call.cu_seqlens_q, call.cu_seqlens_k, call.sinks))
        return out, lse
