"""LayerNorm and RMSNorm, forward, with the residual addition fused in. The backward pass is in backward.py.

    s = x + residual                                                   rounded to residual's dtype and returned; s = x without one
    LayerNorm:  xhat = (s - mean(s)) · rstd,  rstd = 1 / sqrt(mean((s - mean(s))²) + eps)
    RMSNorm:    xhat = s · rstd,              rstd = 1 / sqrt(mean(s²) + eps)
    y = xhat · (weight + weight_offset) + bias                         float32 throughout, one rounding at the end

Bound by memory: about 8 FLOP per element, 2b bytes per element of b bytes, 4b with a residual; weights and rstd are small beside them.

Rows that fit the registers of one program are read once, narrow ones several to a program; wider rows are read twice, the second time
from L2. No result of a row depends on how many rows there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import COMMON_OPTIONS, NewTensor, cdiv, next_power_of_2
from ..prepared import PreparedLaunch

if TYPE_CHECKING:
    from pytransformer.ops.norm.call import NormCall

# ------------------------------------------------------------------------------------------------------------------ launch policy


@dataclass(frozen=True)
class NormConfig:
    """Tile and launch shape of one norm kernel.

    Attributes:
        block_rows: rows per tile.
        block_cols: columns per tile, a power of two; smaller than the row means the row is walked in blocks.
        num_warps: warps per program.
        programs_per_sm: backward only: programs that share the rows, per SM. Each writes one partial row of dweight and dbias.
        num_stages: backward only: tiles in flight in the loop over rows.
    """

    block_rows: int
    block_cols: int
    num_warps: int
    programs_per_sm: int = 1
    num_stages: int = 1


def forward_config(num_cols: int, itemsize: int) -> NormConfig:
    """Tile of the forward kernel for rows of ``num_cols`` elements of ``itemsize`` bytes, or fewer.

    It depends on nothing else, so a row's bits do not depend on its batch.
    """
    block_cols = next_power_of_2(num_cols)
    if block_cols <= 2048:
        # Narrow rows share a program: 16 elements a thread are two 128-bit loads of 16-bit data in flight per tensor.
        return NormConfig(2048 // block_cols, block_cols, num_warps=4)
    if block_cols <= 16384:
        # 16 elements a thread up to 8k columns, 32 at 16k: x, weight and the result stay in registers.
        return NormConfig(1, block_cols, num_warps=min(block_cols // 512, 16))
    if block_cols == 32768 and itemsize <= 2:
        # 32 elements a thread again, which fit the 64 registers that each of 32 warps can have. Those of float32 spill, as do 64 elements a
        # thread of 16 warps on sm_100, and rows of 64k columns over 32 warps.
        return NormConfig(1, block_cols, num_warps=32)
    # Wider rows would spill, so they are walked in blocks. 16 warps of 8 elements a thread let two programs share an SM; more would
    # have more rows in flight than L2 holds for the second reading (2 · SMs rows of 64k 16-bit columns are 35 MB).
    return NormConfig(1, 4096, num_warps=16)


# ------------------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def row_offsets(rows, rows_per_group, stride_group, stride_row, GROUPED: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Element offsets of rows whose leading dimensions fold into one or, if GROUPED, two strides; all multiples of ALIGNMENT."""
    if GROUPED:
        offsets = (rows // rows_per_group) * stride_group + (rows % rows_per_group) * stride_row
    else:
        offsets = rows * stride_row
    return tl.multiple_of(offsets, ALIGNMENT)


# Integers that differ from call to call of one model must not make Triton compile again. What it would learn from strides that are
# multiples of 16, ALIGNMENT says.
UNSPECIALISED = [
    "num_rows", "rows_per_group", "stride_x_group", "stride_x_row", "stride_residual_group", "stride_residual_row", "stride_dy_group",
    "stride_dy_row", "stride_s_group", "stride_s_row", "stride_ds_group", "stride_ds_row", "merge_group",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_forward_kernel(
    x_ptr,
    stride_x_group,
    stride_x_row,
    residual_ptr,
    stride_residual_group,
    stride_residual_row,
    weight_ptr,
    bias_ptr,
    y_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    num_rows,
    rows_per_group,
    eps,
    weight_offset,
    NUM_COLS: tl.constexpr,
    IS_RMS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Whole rows, BLOCK_ROWS per program. y and s are contiguous."""
    # Weight and bias are asked for with the row, not when it is reduced; behind 4k columns their registers would cost programs per SM.
    EARLY: tl.constexpr = BLOCK_COLS <= 4096
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    row_mask = rows < num_rows
    col_mask = cols < NUM_COLS
    mask = row_mask[:, None] & col_mask
    out_offsets = rows[:, None] * NUM_COLS + cols

    x_offsets = row_offsets(rows, rows_per_group, stride_x_group, stride_x_row, GROUPED, ALIGNMENT)
    s = tl.load(x_ptr + x_offsets[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual_offsets = row_offsets(
            rows, rows_per_group, stride_residual_group, stride_residual_row, GROUPED, ALIGNMENT
        )
        residual = tl.load(residual_ptr + residual_offsets[:, None] + cols, mask=mask, other=0.0)
        rounded = (s + residual.to(tl.float32)).to(residual.dtype)
        tl.store(s_ptr + out_offsets, rounded, mask=mask)
        s = rounded.to(tl.float32)

    if HAS_WEIGHT and EARLY:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0)
    if HAS_BIAS and EARLY:
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0)
    if IS_RMS:
        centred = s
    else:
        # The variance is taken from centred values: E[s²] - E[s]² would cancel where the mean is large.
        mean = tl.sum(s, axis=1) / NUM_COLS
        if mean_ptr is not None:
            tl.store(mean_ptr + rows, mean, mask=row_mask)
        centred = tl.where(col_mask, s - mean[:, None], 0.0)
    # Not tl.sqrt, which takes a subnormal for 0: with eps = 0 a tiny row has such a mean square.
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / NUM_COLS + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)

    y = centred * rstd[:, None]
    if HAS_WEIGHT and not EARLY:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0)
    if HAS_BIAS and not EARLY:
        bias = tl.load(bias_ptr + cols, mask=col_mask, other=0.0)
    if HAS_WEIGHT:
        y *= weight.to(tl.float32) + weight_offset
    if HAS_BIAS:
        y += bias.to(tl.float32)
    tl.store(y_ptr + out_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_forward_wide_kernel(
    x_ptr,
    stride_x_group,
    stride_x_row,
    residual_ptr,
    stride_residual_group,
    stride_residual_row,
    weight_ptr,
    bias_ptr,
    y_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    rows_per_group,
    eps,
    weight_offset,
    NUM_COLS: tl.constexpr,
    IS_RMS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One row per program in blocks of columns: a loop for the statistics, a second one that normalises."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_COLS)
    x_row = x_ptr + row_offsets(row, rows_per_group, stride_x_group, stride_x_row, GROUPED, ALIGNMENT)
    y_row = y_ptr + row * NUM_COLS
    if HAS_RESIDUAL:
        residual_row = residual_ptr + row_offsets(
            row, rows_per_group, stride_residual_group, stride_residual_row, GROUPED, ALIGNMENT
        )
        s_row = s_ptr + row * NUM_COLS

    # Each lane keeps its own statistics (Welford's update: no cancellation); the lanes are merged once, after the loop.
    lane_mean = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    lane_squares = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    for start in range(0, NUM_COLS, BLOCK_COLS):
        cols = start + lanes
        mask = cols < NUM_COLS
        s = tl.load(x_row + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if HAS_RESIDUAL:
            residual = tl.load(residual_row + cols, mask=mask, other=0.0, eviction_policy="evict_first")
            rounded = (s + residual.to(tl.float32)).to(residual.dtype)
            tl.store(s_row + cols, rounded, mask=mask)
            s = rounded.to(tl.float32)
        if IS_RMS:
            lane_squares += s * s
        else:
            delta = s - lane_mean
            new_mean = lane_mean + delta * (1.0 / (start // BLOCK_COLS + 1))
            lane_squares = tl.where(mask, lane_squares + delta * (s - new_mean), lane_squares)
            lane_mean = tl.where(mask, new_mean, lane_mean)

    if IS_RMS:
        mean = 0.0
    else:
        lane_count = ((NUM_COLS - lanes + BLOCK_COLS - 1) // BLOCK_COLS).to(tl.float32)
        mean = tl.sum(lane_mean * lane_count, axis=0) / NUM_COLS
        shift = lane_mean - mean
        lane_squares += lane_count * shift * shift
        if mean_ptr is not None:
            tl.store(mean_ptr + row, mean)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(lane_squares, axis=0) / NUM_COLS + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)

    if HAS_RESIDUAL:
        # s was written by other threads of this program than those that may read it now.
        tl.debug_barrier()
    for start in range(0, NUM_COLS, BLOCK_COLS):
        cols = start + lanes
        mask = cols < NUM_COLS
        if HAS_RESIDUAL:
            s = tl.load(s_row + cols, mask=mask, other=0.0)
        else:
            s = tl.load(x_row + cols, mask=mask, other=0.0, eviction_policy="evict_first")
        y = (s.to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + weight_offset
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_row + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------- launcher


@dataclass(frozen=True)
class RowLayout:
    """How several tensors of one shape (..., num_cols) are walked row by row.

    Attributes:
        num_rows: product of the leading dimensions.
        rows_per_group: row r lies at ``(r // rows_per_group) · stride_group + (r % rows_per_group) · stride_row``.
        strides: (stride_group, stride_row) per tensor.
        alignment: largest power of two, at most 16, that divides all strides.
    """

    num_rows: int
    rows_per_group: int
    strides: tuple[tuple[int, int], ...]
    alignment: int

    @property
    def grouped(self) -> bool:
        return self.rows_per_group != self.num_rows


def _folded_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The one stride that walks these dimensions in order, or None if there is none."""
    stride, span = 0, 1
    for size, dim_stride in zip(reversed(shape), reversed(strides)):
        if size == 1:
            continue
        if span == 1:
            stride = dim_stride
        elif dim_stride != stride * span:
            return None
        span *= size
    return stride


def row_layout(tensors: Sequence[Tensor]) -> tuple[list[Tensor], RowLayout]:
    """A common walk over the rows; tensors that no common walk fits are copied first.

    Two strides are enough for a slice of heads out of a fused (batch, seqlen, 3 · num_heads, head_dim) projection.
    """
    shape = tensors[0].shape
    num_cols, leading = shape[-1], shape[:-1]
    num_rows = math.prod(leading)
    if all(tensor.is_contiguous() for tensor in tensors):
        strides = ((0, num_cols),) * len(tensors)
        return list(tensors), RowLayout(num_rows, num_rows, strides, math.gcd(num_cols, 16))
    walked = [tensor if tensor.stride(-1) == 1 or num_cols == 1 else tensor.contiguous() for tensor in tensors]
    for split in range(len(leading)):
        pairs = [
            (_folded_stride(leading[:split], strides[:split]), _folded_stride(leading[split:], strides[split:-1]))
            for strides in (tensor.stride() for tensor in walked)
        ]
        strides = tuple((group, row) for group, row in pairs if group is not None and row is not None)
        if len(strides) == len(walked):
            break
    else:
        return row_layout([tensor.contiguous() for tensor in tensors])
    rows_per_group = num_rows if split == 0 else math.prod(leading[split:])
    alignment = math.gcd(16, *(stride for pair in strides for stride in pair))
    return walked, RowLayout(num_rows, rows_per_group, strides, alignment)


def copied_places(before: Sequence[Tensor | None], after: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Where ``after`` has a copy of what ``before`` has."""
    return tuple(place for place, (old, new) in enumerate(zip(before, after)) if old is not new)


def made_contiguous(tensors: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """The tensors, those at ``places`` copied."""
    copied = list(tensors)
    for place in places:
        copied[place] = copied[place].contiguous()
    return copied


class NormForward:
    """The forward launch for calls of certain shapes, strides, dtypes and options, to be called with such any number of times.

    Args:
        call: a checked call, of whose tensors only shapes, strides and dtypes count.
        statistics: whether mean and rstd are wanted, which only the backward pass needs.
        config: overrides the launch policy, for tests.
    """

    def __init__(self, call: NormCall, *, statistics: bool = True, config: NormConfig | None = None) -> None:
        x, weight, bias, residual = tensors = (call.x, call.weight, call.bias, call.residual)
        self._new_y, self._new_s = NewTensor(x), None if residual is None else NewTensor(residual)
        self._row_shape = x.shape[:-1] if statistics else None
        self._is_rms = call.is_rms
        self._copied: tuple[int, ...] = ()
        self._launch: PreparedLaunch | None = None
        if x.numel() == 0:
            return
        walked, layout = row_layout([x] if residual is None else [x, residual])
        vectors = (None if vector is None else vector.contiguous() for vector in (weight, bias))
        self._copied = copied_places(tensors, (walked[0], *vectors, None if residual is None else walked[1]))
        itemsize = max(tensor.element_size() for tensor in walked)
        self._launch = self._prepare(call, layout, config or forward_config(x.shape[-1], itemsize))

    def _prepare(self, call: NormCall, layout: RowLayout, config: NormConfig) -> PreparedLaunch:
        x, weight, bias, residual, eps, weight_offset, is_rms = call
        num_cols = x.shape[-1]
        flags = {
            "NUM_COLS": num_cols,
            "IS_RMS": is_rms,
            "HAS_RESIDUAL": residual is not None,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": bias is not None,
            "GROUPED": layout.grouped,
            "ALIGNMENT": layout.alignment,
            "BLOCK_COLS": config.block_cols,
            "num_warps": config.num_warps,
            **COMMON_OPTIONS,
        }
        residual_row = (residual, *((0, 0) if residual is None else layout.strides[1]))
        # Places of y, s, mean and rstd, which each call allocates.
        arguments = (x, *layout.strides[0], *residual_row, weight, bias, None, None, None, None)
        scalars = (layout.rows_per_group, eps, weight_offset)
        if config.block_cols < num_cols:
            return PreparedLaunch(norm_forward_wide_kernel, (layout.num_rows,), (*arguments, *scalars), flags)
        grid = (cdiv(layout.num_rows, config.block_rows),)
        flags["BLOCK_ROWS"] = config.block_rows
        return PreparedLaunch(norm_forward_kernel, grid, (*arguments, layout.num_rows, *scalars), flags)

    def __call__(self, call: NormCall) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Launches; ``call`` may be a plain tuple in the order of the arguments.

        Returns:
            y (x's dtype), s = x + residual (residual's dtype; None without residual), mean (None for RMSNorm) and rstd, float32 with the
            leading shape of x; the last two None where they are not wanted. All contiguous.
        """
        x, weight, bias, residual, _, _, _ = call
        y, s = self._new_y(x), None if self._new_s is None or residual is None else self._new_s(residual)
        mean = rstd = None
        if self._row_shape is not None:
            rstd = torch.empty(self._row_shape, dtype=torch.float32, device=x.device)
            mean = None if self._is_rms else torch.empty_like(rstd)
        if self._launch is not None:
            if self._copied:
                x, weight, bias, residual = made_contiguous((x, weight, bias, residual), self._copied)
            self._launch((x, residual, weight, bias, y, s, mean, rstd))
        return y, s, mean, rstd
