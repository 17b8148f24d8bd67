"""A linear layer for each group of rows, and its gradients, without a loop over groups and without the host knowing their sizes.

    y[r] = weight[g] x[r] + bias[g]        r: the rows of group g, offsets[g] ≤ r < offsets[g + 1]
    dx[r] = weight[g]ᵀ dy[r]               the same kernel, which then walks the weight's rows
    dweight[g] = Σ dy[r] x[r]ᵀ,  dbias[g] = Σ dy[r]

For T rows, I inputs and O outputs 2·T·I·O FLOP each (dbias T·O). Sums are in float32 and rounded once. A tile of rows never crosses a
group: with B rows in a tile, T/B whole tiles and one that is not full for each group are an upper bound, so that is the grid, and each
program finds its group among the sums of tiles; those behind the last return at once. The gradient of a weight has programs for each
tile of each group's weight, which walk all rows of the group and write once: no atomics, so the same bits each run, and zeros for an
empty group. Rows of other groups are masked, so what is in them (NaN, say) stays theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import COMMON_OPTIONS, cdiv, next_power_of_2
from .prepared import PreparedLaunch

if TYPE_CHECKING:
    from pytransformer.ops.grouped_linear.call import GroupedLinearCall, GroupedLinearGradientCall

# ------------------------------------------------------------------------------------------------------------------ launch policy


@dataclass(frozen=True)
class GroupedConfig:
    """Tile and launch shape of a product.

    Attributes:
        block_rows, block_cols: tile of the result.
        block_inner: columns of both factors that are multiplied at a time.
        num_warps, num_stages: of a program; stages are tiles of the factors under way at once.
    """

    block_rows: int
    block_cols: int
    block_inner: int
    num_warps: int
    num_stages: int


# Tiles of rows beside each other in the grid: they read the same columns of the weight, which then come from L2.
BAND = 8


def product_config(num_rows: int, num_groups: int, dtype: torch.dtype) -> GroupedConfig:
    """Of y and dx. The mean size of a group decides: rows of a tile that are not there are multiplied all the same."""
    rows_per_group = num_rows // num_groups
    if dtype == torch.float32:
        # Without matrix units: 64 × 64 results of 128 threads are 32 registers each.
        return GroupedConfig(16 if rows_per_group <= 16 else 64, 64, 32, 4, 2)
    if rows_per_group <= 16:
        # Decoding: bound by reading the weights, for which tiles should be long and many under way.
        return GroupedConfig(16, 64, 128, 4, 3)
    if rows_per_group <= 64:
        return GroupedConfig(64, 128, 64, 4, 3)
    # 96 KB for three stages: two programs fit an SM of sm_90, one an SM of sm_86.
    return GroupedConfig(128, 128, 64, 8, 3)


def gradient_config(dtype: torch.dtype) -> GroupedConfig:
    """Of dweight: rows and columns are the weight's, inner ones the group's rows."""
    return GroupedConfig(64, 64, 32, 4, 2) if dtype == torch.float32 else GroupedConfig(128, 128, 64, 8, 3)


# Rows and columns of a tile of dy whose columns are summed.
BIAS_ROWS, BIAS_COLS = 64, 64

# ------------------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def group_of_tile(tile, offsets_ptr, num_groups, BLOCK_ROWS: tl.constexpr, BLOCK_GROUPS: tl.constexpr):
    """(group, number of its first tile) of a tile of rows; the group is num_groups behind the last tile."""
    groups = tl.arange(0, BLOCK_GROUPS)
    inside = groups < num_groups
    starts = tl.load(offsets_ptr + groups, mask=inside, other=0)
    ends = tl.load(offsets_ptr + groups + 1, mask=inside, other=0)
    tiles_up_to = tl.cumsum((ends - starts + BLOCK_ROWS - 1) // BLOCK_ROWS, axis=0)
    is_before = inside & (tiles_up_to <= tile)
    group = tl.sum(is_before.to(tl.int32), axis=0)
    first = tl.max(tl.where(is_before, tiles_up_to, 0), axis=0)
    return group, first


@triton.jit(do_not_specialize=["num_row_tiles", "num_groups"])
def grouped_product_kernel(
    x_ptr,
    stride_x_row,
    weight_ptr,
    stride_weight_group,
    stride_weight_row,
    bias_ptr,
    stride_bias_group,
    offsets_ptr,
    out_ptr,
    num_row_tiles,
    num_groups,
    NUM_COLS: tl.constexpr,
    NUM_INNER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BAND: tl.constexpr,
):
    """One tile of out (rows, NUM_COLS), contiguous: x times the transpose of the group's weight, or TRANSPOSED times the weight itself."""
    col_tiles: tl.constexpr = (NUM_COLS + BLOCK_COLS - 1) // BLOCK_COLS
    program = tl.program_id(0)
    first_row_tile = program // (BAND * col_tiles) * BAND
    tiles_in_band = tl.minimum(num_row_tiles - first_row_tile, BAND)
    place = program % (BAND * col_tiles)
    tile = first_row_tile + place % tiles_in_band
    group, first_of_group = group_of_tile(tile, offsets_ptr, num_groups, BLOCK_ROWS, BLOCK_GROUPS)
    if group < num_groups:
        start = tl.load(offsets_ptr + group)
        end = tl.load(offsets_ptr + group + 1)
        rows = start + (tile - first_of_group) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        cols = place // tiles_in_band * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
        inner = tl.arange(0, BLOCK_INNER)
        is_row, is_col = rows < end, cols < NUM_COLS
        x_tile = x_ptr + rows.to(tl.int64)[:, None] * stride_x_row + inner[None, :]
        weight_group = weight_ptr + group.to(tl.int64) * stride_weight_group
        # (BLOCK_COLS, BLOCK_INNER) as it lies in memory, or TRANSPOSED (BLOCK_INNER, BLOCK_COLS).
        if TRANSPOSED:
            weight_tile = weight_group + inner.to(tl.int64)[:, None] * stride_weight_row + cols[None, :]
        else:
            weight_tile = weight_group + cols.to(tl.int64)[:, None] * stride_weight_row + inner[None, :]
        total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for done in range(0, NUM_INNER, BLOCK_INNER):
            is_inner = inner < NUM_INNER - done
            x = tl.load(x_tile, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            if TRANSPOSED:
                weight = tl.load(weight_tile, mask=is_inner[:, None] & is_col[None, :], other=0.0)
                weight_tile += BLOCK_INNER * tl.cast(stride_weight_row, tl.int64)
            else:
                weight = tl.trans(tl.load(weight_tile, mask=is_col[:, None] & is_inner[None, :], other=0.0))
                weight_tile += BLOCK_INNER
            total = tl.dot(x, weight, total, input_precision=PRECISION)
            x_tile += BLOCK_INNER
        if HAS_BIAS:
            bias_group = bias_ptr + group.to(tl.int64) * stride_bias_group
            total += tl.load(bias_group + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
        out_tile = out_ptr + rows.to(tl.int64)[:, None] * NUM_COLS + cols[None, :]
        tl.store(out_tile, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_col[None, :])


@triton.jit
def grouped_weight_gradient_kernel(
    dy_ptr,
    stride_dy_row,
    x_ptr,
    stride_x_row,
    offsets_ptr,
    dweight_ptr,
    NUM_ROWS: tl.constexpr,
    NUM_COLS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One tile of one group's dweight (NUM_ROWS, NUM_COLS), contiguous: the transpose of dy times x, over the rows of the group."""
    row_tiles: tl.constexpr = (NUM_ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS
    col_tiles: tl.constexpr = (NUM_COLS + BLOCK_COLS - 1) // BLOCK_COLS
    program = tl.program_id(0)
    group = program // (row_tiles * col_tiles)
    place = program % (row_tiles * col_tiles)
    rows = place // col_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = place % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    is_row, is_col = rows < NUM_ROWS, cols < NUM_COLS
    start = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    inner = start.to(tl.int64) + tl.arange(0, BLOCK_INNER)
    dy_tile = dy_ptr + inner[:, None] * stride_dy_row + rows[None, :]
    x_tile = x_ptr + inner[:, None] * stride_x_row + cols[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in range(start, end, BLOCK_INNER):
        is_inner = tl.arange(0, BLOCK_INNER) < end - first
        dy = tl.load(dy_tile, mask=is_inner[:, None] & is_row[None, :], other=0.0)
        x = tl.load(x_tile, mask=is_inner[:, None] & is_col[None, :], other=0.0)
        total = tl.dot(tl.trans(dy), x, total, input_precision=PRECISION)
        dy_tile += BLOCK_INNER * tl.cast(stride_dy_row, tl.int64)
        x_tile += BLOCK_INNER * tl.cast(stride_x_row, tl.int64)
    dweight_group = dweight_ptr + group.to(tl.int64) * NUM_ROWS * NUM_COLS
    dweight_tile = dweight_group + rows.to(tl.int64)[:, None] * NUM_COLS + cols[None, :]
    tl.store(dweight_tile, total.to(dweight_ptr.dtype.element_ty), mask=is_row[:, None] & is_col[None, :])


@triton.jit
def grouped_bias_gradient_kernel(
    dy_ptr,
    stride_dy_row,
    offsets_ptr,
    dbias_ptr,
    NUM_COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Some columns of one group's dbias (NUM_COLS), contiguous: sums over the rows of the group."""
    group = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    is_col = cols < NUM_COLS
    start = tl.load(offsets_ptr + group)
    end = tl.load(offsets_ptr + group + 1)
    rows = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for first in range(start, end, BLOCK_ROWS):
        dy_tile = dy_ptr + (first + rows).to(tl.int64)[:, None] * stride_dy_row + cols[None, :]
        is_inside = (rows < end - first)[:, None] & is_col[None, :]
        total += tl.load(dy_tile, mask=is_inside, other=0.0).to(tl.float32)
    dbias = tl.sum(total, axis=0)
    tl.store(dbias_ptr + group.to(tl.int64) * NUM_COLS + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=is_col)


# ----------------------------------------------------------------------------------------------------------------------- launcher


def _precision(dtype: torch.dtype, allow_tf32: bool) -> str:
    return "tf32" if dtype == torch.float32 and allow_tf32 else "ieee"


def _product_launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool, allow_tf32: bool, config: GroupedConfig | None
) -> PreparedLaunch:
    """The launch for pointers x, weight, bias, offsets, out."""
    num_groups, *sizes = weight.shape
    num_inner, num_cols = sizes if transposed else reversed(sizes)
    config = config or product_config(x.shape[0], num_groups, x.dtype)
    # Whole tiles, and one more for each group that has a row.
    row_tiles = x.shape[0] // config.block_rows + min(num_groups, x.shape[0])
    arguments = (
        None, x.stride(0), None, *weight.stride()[:2], None, 0 if bias is None else bias.stride(0), None, None,
        row_tiles, num_groups,
    )  # fmt: skip
    constants = {
        "NUM_COLS": num_cols,
        "NUM_INNER": num_inner,
        "TRANSPOSED": transposed,
        "HAS_BIAS": bias is not None,
        "PRECISION": _precision(x.dtype, allow_tf32),
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLS": config.block_cols,
        "BLOCK_INNER": config.block_inner,
        "BLOCK_GROUPS": next_power_of_2(num_groups),
        "BAND": BAND,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **COMMON_OPTIONS,
    }
    grid = (row_tiles * cdiv(num_cols, config.block_cols),)
    return PreparedLaunch(grouped_product_kernel, grid, arguments, constants)


class GroupedForward:
    """The launch for calls of certain shapes, strides and dtypes, to be called with such any number of times.

    Args:
        call: a checked call, of whose tensors only shapes, strides and dtypes count.
        allow_tf32: whether float32 products may be of tf32, whose operands lack the low 13 bits.
        config: overrides the launch policy, for tests.
    """

    def __init__(
        self, call: GroupedLinearCall, *, allow_tf32: bool = False, config: GroupedConfig | None = None
    ) -> None:
        x, weight, _, bias = call
        self._shape = (x.shape[0], weight.shape[1])
        self._copies_bias = bias is not None and bias.stride(-1) != 1
        self._launch: PreparedLaunch | None = None
        if x.shape[0] > 0:
            bias = self._dense(bias)
            self._launch = _product_launch(x, weight, bias, transposed=False, allow_tf32=allow_tf32, config=config)

    def _dense(self, bias: Tensor | None) -> Tensor | None:
        return bias.contiguous() if self._copies_bias and bias is not None else bias

    def __call__(self, call: GroupedLinearCall) -> Tensor:
        """(total, out_features), contiguous. ``call`` may be a plain tuple in the order of the arguments."""
        x, weight, offsets, bias = call
        y = torch.empty(self._shape, dtype=x.dtype, device=x.device)
        if self._launch is not None:
            self._launch((x, weight, self._dense(bias), offsets, y))
        return y


class GroupedBackward:
    """The same for the backward pass.

    Args:
        call, allow_tf32: as for the forward pass.
        config, gradient: override the launch policy of dx and of dweight.
    """

    def __init__(
        self,
        call: GroupedLinearGradientCall,
        *,
        allow_tf32: bool = False,
        config: GroupedConfig | None = None,
        gradient: GroupedConfig | None = None,
    ) -> None:
        dy, x, weight = call.dy, call.x, call.weight
        self._copies_dy = dy.stride(-1) != 1 and dy.shape[-1] > 1
        self._dx = self._dweight = self._dbias = None
        dy = self._dense(dy)
        num_groups, num_rows, num_cols = weight.shape
        if call.want_dx and x.shape[0] > 0:
            self._dx = _product_launch(dy, weight, None, transposed=True, allow_tf32=allow_tf32, config=config)
        if call.want_dweight:
            gradient = gradient or gradient_config(x.dtype)
            constants: dict[str, Any] = {
                "NUM_ROWS": num_rows,
                "NUM_COLS": num_cols,
                "PRECISION": _precision(x.dtype, allow_tf32),
                "BLOCK_ROWS": gradient.block_rows,
                "BLOCK_COLS": gradient.block_cols,
                "BLOCK_INNER": gradient.block_inner,
                "num_warps": gradient.num_warps,
                "num_stages": gradient.num_stages,
                **COMMON_OPTIONS,
            }
            tiles = cdiv(num_rows, gradient.block_rows) * cdiv(num_cols, gradient.block_cols)
            arguments = (None, dy.stride(0), None, x.stride(0), None, None)
            self._dweight = PreparedLaunch(
                grouped_weight_gradient_kernel, (num_groups * tiles,), arguments, constants
            )  # fmt: skip
        if call.want_dbias:
            constants = {"NUM_COLS": num_rows, "BLOCK_ROWS": BIAS_ROWS, "BLOCK_COLS": BIAS_COLS, **COMMON_OPTIONS}
            grid = (num_groups, cdiv(num_rows, BIAS_COLS))
            self._dbias = PreparedLaunch(
                grouped_bias_gradient_kernel, grid, (None, dy.stride(0), None, None), constants
            )

    def _dense(self, dy: Tensor) -> Tensor:
        return dy.contiguous() if self._copies_dy else dy

    def __call__(self, call: GroupedLinearGradientCall) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dweight, dbias), contiguous, of each None if it is not wanted."""
        dy, x, weight, offsets = self._dense(call.dy), call.x, call.weight, call.offsets
        new: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
        dx = torch.empty(x.shape, **new) if call.want_dx else None
        dweight = torch.empty(weight.shape, **new) if call.want_dweight else None
        dbias = torch.empty(weight.shape[:2], **new) if call.want_dbias else None
        if self._dx is not None:
            self._dx((dy, weight, None, offsets, dx))
        if self._dweight is not None:
            self._dweight((dy, x, offsets, dweight))
        if self._dbias is not None:
            self._dbias((dy, offsets, dbias))
        return dx, dweight, dbias
