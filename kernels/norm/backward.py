"""LayerNorm and RMSNorm, backward. The forward pass, the symbols and the walk over rows are in norm.py.

    g  = dy · (weight + weight_offset)
    dx = rstd · (g - xhat · mean(g · xhat) - mean(g)) + ds             the last mean only in LayerNorm; ds: gradient of the returned s
    dweight = Σ_rows dy · xhat,  dbias = Σ_rows dy

Bound by memory: about 15 FLOP and 3b bytes per element of b bytes (4b with ds); rows too wide for one program's registers are read a
second time: by a kernel for the row sums first, then by one that takes column blocks.

Gradients of weight and bias are summed in registers over the rows of a fixed number of programs, then over the programs in a fixed
order (partials.py): the same bits each run. dx of a row does not depend on how many rows there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..counters import Counters
from ..launch import COMMON_OPTIONS, NewTensor, cdiv, device_limits, next_power_of_2
from ..prepared import PreparedLaunch
from .forward import UNSPECIALISED, NormConfig, copied_places, made_contiguous, row_layout, row_offsets
from .partials import count_counters, merge_group, merge_partials, merge_rows

if TYPE_CHECKING:
    from pytransformer.ops.norm.call import NormGradientCall

# ------------------------------------------------------------------------------------------------------------------ launch policy


def backward_config(num_cols: int) -> NormConfig:
    """Tile of the backward kernel. It also holds the running dweight and dbias, hence half the forward kernel's widest row."""
    block_cols = next_power_of_2(num_cols)
    if block_cols <= 512:
        # Rows of a head's size: the per-row values are replicated over the threads of a row, so 8 elements a thread need up to 96
        # registers, with which five programs run on an SM.
        return NormConfig(1024 // block_cols, block_cols, num_warps=4, programs_per_sm=5, num_stages=2)
    if block_cols <= 8192:
        # 16 elements a thread of s, dy, weight, dweight, dbias and the result fit 128 registers, so 16 warps fit an SM. The programs
        # are just as many as run at once: each more would write partial sums, and a second wave of them would be a short one. Two rows
        # share a program's sums, which halves those; of 8192 columns a second row does not fit.
        # Two stages: the next tile's loads are in flight while this one is reduced.
        block_rows = 1 if block_cols == 8192 else 2
        num_warps = block_rows * block_cols // 512
        return NormConfig(block_rows, block_cols, num_warps, programs_per_sm=16 // num_warps, num_stages=2)
    # Column blocks of a row whose sums are known: nothing is reduced inside the loop, and 8 elements a thread let 32 warps run.
    return NormConfig(1, 2048, num_warps=8, programs_per_sm=4, num_stages=2)


# ------------------------------------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_row_sums_kernel(
    dy_ptr,
    stride_dy_group,
    stride_dy_row,
    s_ptr,
    stride_s_group,
    stride_s_row,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    g_xhat_mean_ptr,
    g_mean_ptr,
    rows_per_group,
    weight_offset,
    NUM_COLS: tl.constexpr,
    IS_RMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """mean(g · xhat) and mean(g) of one wide row per program."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_COLS)
    dy_row = dy_ptr + row_offsets(row, rows_per_group, stride_dy_group, stride_dy_row, GROUPED, ALIGNMENT)
    s_row = s_ptr + row_offsets(row, rows_per_group, stride_s_group, stride_s_row, GROUPED, ALIGNMENT)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if not IS_RMS:
        mean = tl.load(mean_ptr + row)
    g_xhat_sum = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    g_sum = tl.zeros([BLOCK_COLS], dtype=tl.float32)
    for start in range(0, NUM_COLS, BLOCK_COLS):
        cols = start + lanes
        mask = cols < NUM_COLS
        g = tl.load(dy_row + cols, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_row + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32) + weight_offset
        # g is 0 in lanes past the end, so xhat needs no mask there.
        g_xhat_sum += g * ((s - mean) * rstd)
        g_sum += g
    tl.store(g_xhat_mean_ptr + row, tl.sum(g_xhat_sum, axis=0) / NUM_COLS)
    if not IS_RMS:
        tl.store(g_mean_ptr + row, tl.sum(g_sum, axis=0) / NUM_COLS)


@triton.jit(do_not_specialize=UNSPECIALISED)
def norm_backward_kernel(
    dy_ptr,
    stride_dy_group,
    stride_dy_row,
    ds_ptr,
    stride_ds_group,
    stride_ds_row,
    s_ptr,
    stride_s_group,
    stride_s_row,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    g_xhat_mean_ptr,
    g_mean_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dweight_partial_ptr,
    dbias_partial_ptr,
    counters_ptr,
    num_rows,
    rows_per_group,
    weight_offset,
    merge_group,
    NUM_COLS: tl.constexpr,
    IS_RMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DS: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    SUMS_GIVEN: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """dx of every num_programs(0)-th tile of rows, and the sums of dweight and dbias over them, which the last programs add up.

    SUMS_GIVEN: program_id(1) selects a block of columns, and the row's means come from norm_row_sums_kernel; else rows are whole.
    dx is contiguous, the partial sums are (num_programs(0), NUM_COLS).
    """
    cols = (tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    col_mask = cols < NUM_COLS
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32) + weight_offset
    # One running sum per tile element: the rows of a tile are added up once, after the loop.
    dweight = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype=tl.float32)

    num_tiles = tl.cdiv(num_rows, BLOCK_ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=NUM_STAGES):
        rows = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & col_mask
        dy_offsets = row_offsets(rows, rows_per_group, stride_dy_group, stride_dy_row, GROUPED, ALIGNMENT)
        s_offsets = row_offsets(rows, rows_per_group, stride_s_group, stride_s_row, GROUPED, ALIGNMENT)
        dy = tl.load(dy_ptr + dy_offsets[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(s_ptr + s_offsets[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
        xhat = s * rstd
        if not IS_RMS:
            mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
            xhat = (s - mean) * rstd
        if NEED_DWEIGHT:
            dweight += dy * xhat
        if NEED_DBIAS:
            dbias += dy
        # dy, and so g, is 0 in masked lanes: they add nothing to the sums.
        g = dy
        if HAS_WEIGHT:
            g = dy * weight
        if SUMS_GIVEN:
            g_xhat_mean = tl.load(g_xhat_mean_ptr + rows, mask=row_mask, other=0.0)
        else:
            g_xhat_mean = tl.sum(g * xhat, axis=1) / NUM_COLS
        dx = g - xhat * g_xhat_mean[:, None]
        if not IS_RMS:
            if SUMS_GIVEN:
                g_mean = tl.load(g_mean_ptr + rows, mask=row_mask, other=0.0)
            else:
                g_mean = tl.sum(g, axis=1) / NUM_COLS
            dx -= g_mean[:, None]
        dx *= rstd
        if HAS_DS:
            ds_offsets = row_offsets(rows, rows_per_group, stride_ds_group, stride_ds_row, GROUPED, ALIGNMENT)
            dx += tl.load(ds_ptr + ds_offsets[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * NUM_COLS + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    if NEED_DWEIGHT or NEED_DBIAS:
        merge_partials(
            tl.sum(dweight, axis=0), tl.sum(dbias, axis=0), dweight_ptr, dbias_ptr, dweight_partial_ptr, dbias_partial_ptr,
            counters_ptr, merge_group, NUM_COLS, NEED_DWEIGHT, NEED_DBIAS, BLOCK_COLS, MERGE_ROWS,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------- launcher


class NormBackward:
    """The backward launches for calls of certain shapes, strides, dtypes and options, to be called with such any number of times.

    Args:
        call: of whose tensors only shapes, strides and dtypes count.
        config: overrides the launch policy, for tests.
    """

    def __init__(self, call: NormGradientCall, *, config: NormConfig | None = None) -> None:
        dy, ds, s, weight, mean, rstd, weight_offset, is_rms, want_dweight, dbias_dtype = call
        num_cols = s.shape[-1]
        config = config or backward_config(num_cols)
        self._new_dx = NewTensor(s)
        self._num_cols = num_cols
        self._dweight_dtype = weight.dtype if want_dweight and weight is not None else None
        self._dbias_dtype = dbias_dtype
        self._sums_first = config.block_cols < num_cols
        self._is_empty = s.numel() == 0
        if self._is_empty:
            return
        walked, layout = row_layout([dy, s] if ds is None else [dy, s, ds])
        flat_weight = None if weight is None else weight.contiguous()
        self._copied = copied_places(
            (dy, ds, s, weight), (walked[0], None if ds is None else walked[2], walked[1], flat_weight)
        )
        strides = [*layout.strides, (0, 0)][:3]
        flags = {
            "NUM_COLS": num_cols,
            "IS_RMS": is_rms,
            "HAS_WEIGHT": weight is not None,
            "GROUPED": layout.grouped,
            "ALIGNMENT": layout.alignment,
            **COMMON_OPTIONS,
        }
        rows = (dy, *strides[0], s, *strides[1], weight, mean, rstd, None, None)
        self._row_sums = PreparedLaunch(
            norm_row_sums_kernel,
            (layout.num_rows,),
            (*rows, layout.rows_per_group, weight_offset),
            {
                **flags,
                "BLOCK_COLS": max(4096, config.block_cols) if num_cols > 4096 else config.block_cols,
                "num_warps": 8,
            },
        )
        programs, col_blocks = _backward_grid(layout.num_rows, num_cols, config, s.device)
        self._partial_shape = (programs, num_cols)
        self._counters = Counters(s.device, count_counters(programs, col_blocks))
        self._backward = PreparedLaunch(
            norm_backward_kernel,
            (programs, col_blocks),
            (
                *(dy, *strides[0], ds, *strides[2], s, *strides[1], weight, mean, rstd, *(None,) * 8),
                *(layout.num_rows, layout.rows_per_group, weight_offset, merge_group(programs)),
            ),
            {
                **flags,
                "HAS_DS": ds is not None,
                "NEED_DWEIGHT": self._dweight_dtype is not None,
                "NEED_DBIAS": dbias_dtype is not None,
                "SUMS_GIVEN": self._sums_first,
                "BLOCK_ROWS": config.block_rows,
                "BLOCK_COLS": config.block_cols,
                "MERGE_ROWS": merge_rows(config.block_cols, config.num_warps),
                "NUM_STAGES": config.num_stages,
                "num_warps": config.num_warps,
            },
        )

    def __call__(self, call: NormGradientCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Launches; ``call`` may be a plain tuple in the order of the arguments.

        Returns:
            ds + dx in s's dtype (the gradient of x and of residual), dweight (weight's dtype) and dbias, or None where not wanted.
        """
        dy, ds, s, weight, mean, rstd, _, _, _, _ = call
        device = s.device
        dx = self._new_dx(s)
        dweight = dbias = dweight_partial = dbias_partial = None
        if self._dweight_dtype is not None:
            dweight = torch.empty(self._num_cols, dtype=self._dweight_dtype, device=device)
        if self._dbias_dtype is not None:
            dbias = torch.empty(self._num_cols, dtype=self._dbias_dtype, device=device)
        if self._is_empty:
            return dx, None if dweight is None else dweight.zero_(), None if dbias is None else dbias.zero_()
        if self._copied:
            dy, ds, s, weight = made_contiguous((dy, ds, s, weight), self._copied)
        sums: tuple[Tensor | None, Tensor | None] = (None, None)
        if self._sums_first:
            sums = (torch.empty_like(rstd), None if mean is None else torch.empty_like(rstd))
            self._row_sums((dy, s, weight, mean, rstd, *sums))
        counters = None
        if dweight is not None:
            dweight_partial = torch.empty(self._partial_shape, dtype=torch.float32, device=device)
        if dbias is not None:
            dbias_partial = torch.empty(self._partial_shape, dtype=torch.float32, device=device)
        if dweight is not None or dbias is not None:
            counters = self._counters()
        grads = (dx, dweight, dbias, dweight_partial, dbias_partial, counters)
        self._backward((dy, ds, s, weight, mean, rstd, *sums, *grads))
        return dx, dweight, dbias


def _backward_grid(num_rows: int, num_cols: int, config: NormConfig, device: torch.device) -> tuple[int, int]:
    """(programs that share the rows, column blocks); the first is fixed by the device and the width unless there are fewer tiles."""
    col_blocks = cdiv(num_cols, config.block_cols)
    programs = max(1, device_limits(device).num_sms * config.programs_per_sm // col_blocks)
    return min(programs, cdiv(num_rows, config.block_rows)), col_blocks
