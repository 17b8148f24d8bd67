"""SwiGLU, GEGLU and GELU, forward and backward, in one kernel each.

    SwiGLU:      out = x · σ(x) · up                                   x: the gate
    GEGLU:       out = x · Φ(x) · up,  Φ(x) = (1 + erf(x / √2)) / 2;  GELU: the same without up
    tanh form:   x · (1 + tanh(v)) / 2 = x · σ(2v),  v = √(2/π) · (x + 0.044715 x³): no tanh is needed
    f'(x) = σ(w) + x · w' · σ(w) · (1 - σ(w)) with w = x or 2v;        Φ(x) + x · exp(-x² / 2) / √(2π)
    dgate = dout · up · f'(gate),  dup = dout · f(gate)                float32 throughout, one rounding at the end

Bound by memory: per element of b bytes, forward reads gate and up and writes out, 3b (GELU 2b); backward reads gate, up and dout and
writes dgate and dup, 5b (GELU 3b). 10 to 40 FLOP per element. Nothing but the inputs is kept between the two passes: f is recomputed.

gate and up may be the halves [gate; up] of one tensor; so, then, are their gradients, and no copy puts them together.
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

from .launch import COMMON_OPTIONS, NewTensor, cdiv, next_power_of_2
from .norm.forward import RowLayout, copied_places, made_contiguous, row_layout, row_offsets
from .prepared import PreparedLaunch

if TYPE_CHECKING:
    from pytransformer.ops.activation import ActivationCall, ActivationGradientCall

# ------------------------------------------------------------------------------------------------------------------ launch policy


@dataclass(frozen=True)
class ActivationConfig:
    """Tile and launch shape.

    Attributes:
        block_rows: rows per tile, one tile per program.
        block_cols: columns per tile, a power of two.
        num_warps: warps per program.
    """

    block_rows: int
    block_cols: int
    num_warps: int = 4


# 16 elements a thread are two 128-bit loads of 16-bit data in flight per tensor. A thread needs at most 40 registers, so 1536 of them fit
# an SM and have 96 KB in flight: a multiple of what the latency of memory asks for (25 KB on an H200).
FORWARD_ELEMENTS = 2048
# Backward reads three tensors, and holds more in registers: half as many elements keep 72 KB in flight.
BACKWARD_ELEMENTS = 1024


def tile_config(num_cols: int, elements: int) -> ActivationConfig:
    """Tile of ``elements`` for rows of ``num_cols``; the number of rows has no say, so there is one compiled kernel for all of them."""
    block_cols = math.gcd(num_cols, elements)
    if block_cols < 64:
        # Columns that divide the row leave no lane idle; below 64 (128 bytes of 16-bit data, the unit of a cache line) a masked tile
        # is better: it is read in whole lines.
        block_cols = min(next_power_of_2(num_cols), elements)
    return ActivationConfig(elements // block_cols, block_cols)


# ------------------------------------------------------------------------------------------------------------------------ kernels

# Another number of rows, or another stride, must not mean another compilation; what the strides divide by is said by ALIGNMENT.
FORWARD_INTEGERS = ["num_rows", "rows_per_group"] + [
    f"stride_{name}_{kind}" for name in ("gate", "up") for kind in ("group", "row")
]
BACKWARD_INTEGERS = [*FORWARD_INTEGERS, "stride_dout_group", "stride_dout_row"]


@triton.jit
def activation_and_slope(x, ACTIVATION: tl.constexpr):
    """f(x) and f'(x) in float32. Exact limits for any finite x; f(inf) = inf, f(-inf) = f'(±inf) = NaN, as the formulas have it."""
    if ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        # x² may overflow: exp(-inf) is the right 0.
        slope = cdf + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))
        return x * cdf, slope
    if ACTIVATION == "silu":
        size = tl.abs(x)
        inner_slope = 1.0
    else:
        # Beyond 16 the sigmoid is 0 or 1 in float32 to the last bit, and the cube must not overflow: its slope would be inf · 0.
        clamped = tl.minimum(tl.abs(x), 16.0)
        size = 1.5957691216057308 * clamped * (1.0 + 0.044715 * clamped * clamped)
        inner_slope = 1.5957691216057308 * (1.0 + 0.134145 * clamped * clamped)
    # exp of a negative number never overflows, and σ and 1 - σ each keep their relative accuracy: nothing cancels.
    decay = tl.exp(-size)
    reciprocal = 1.0 / (1.0 + decay)
    sigmoid = tl.where(x >= 0, 1.0, decay) * reciprocal
    # σ (1 - σ) = decay · reciprocal² is multiplied with x first: it is 0 where x · w' could overflow.
    slope = sigmoid + x * (decay * reciprocal * reciprocal) * inner_slope
    return x * sigmoid, slope


@triton.jit
def tile_of_program(num_rows, NUM_COLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Rows, columns (1, BLOCK_COLS) and mask of this program's tile; those of a row lie side by side in memory and in the grid."""
    col_blocks: tl.constexpr = (NUM_COLS + BLOCK_COLS - 1) // BLOCK_COLS
    tile = tl.program_id(0)
    rows = (tile // col_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = (tile % col_blocks * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]
    return rows, cols, (rows < num_rows)[:, None] & (cols < NUM_COLS)


@triton.jit
def load_gate_and_up(
    gate_ptr,
    stride_gate_group,
    stride_gate_row,
    up_ptr,
    stride_up_group,
    stride_up_row,
    rows,
    cols,
    mask,
    rows_per_group,
    NUM_COLS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Both tiles in float32; without up the gate's twice. IS_PACKED: up lies NUM_COLS behind gate, up_ptr is None."""
    gate_offsets = row_offsets(rows, rows_per_group, stride_gate_group, stride_gate_row, GROUPED, ALIGNMENT)
    gate_tile = gate_ptr + gate_offsets[:, None] + cols
    gate = tl.load(gate_tile, mask=mask, other=0.0).to(tl.float32)
    up = gate
    if IS_PACKED:
        up = tl.load(gate_tile + NUM_COLS, mask=mask, other=0.0).to(tl.float32)
    elif IS_GATED:
        up_offsets = row_offsets(rows, rows_per_group, stride_up_group, stride_up_row, GROUPED, ALIGNMENT)
        up = tl.load(up_ptr + up_offsets[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit(do_not_specialize=FORWARD_INTEGERS)
def activation_forward_kernel(
    gate_ptr,
    stride_gate_group,
    stride_gate_row,
    up_ptr,
    stride_up_group,
    stride_up_row,
    out_ptr,
    num_rows,
    rows_per_group,
    NUM_COLS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """One tile per program. out is contiguous."""
    rows, cols, mask = tile_of_program(num_rows, NUM_COLS, BLOCK_ROWS, BLOCK_COLS)
    gate, up = load_gate_and_up(
        gate_ptr, stride_gate_group, stride_gate_row, up_ptr, stride_up_group, stride_up_row,
        rows, cols, mask, rows_per_group, NUM_COLS, IS_GATED, IS_PACKED, GROUPED, ALIGNMENT,
    )  # fmt: skip
    out, _ = activation_and_slope(gate, ACTIVATION)
    if IS_GATED:
        out *= up
    tl.store(out_ptr + rows[:, None] * NUM_COLS + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=BACKWARD_INTEGERS)
def activation_backward_kernel(
    dout_ptr,
    stride_dout_group,
    stride_dout_row,
    gate_ptr,
    stride_gate_group,
    stride_gate_row,
    up_ptr,
    stride_up_group,
    stride_up_row,
    dgate_ptr,
    dup_ptr,
    num_rows,
    rows_per_group,
    NUM_COLS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_PACKED: tl.constexpr,
    GROUPED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Tiles as in the forward kernel. dgate and dup are contiguous; IS_PACKED: halves of one contiguous tensor, dup_ptr is None."""
    rows, cols, mask = tile_of_program(num_rows, NUM_COLS, BLOCK_ROWS, BLOCK_COLS)
    dout_offsets = row_offsets(rows, rows_per_group, stride_dout_group, stride_dout_row, GROUPED, ALIGNMENT)
    dout = tl.load(dout_ptr + dout_offsets[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    gate, up = load_gate_and_up(
        gate_ptr, stride_gate_group, stride_gate_row, up_ptr, stride_up_group, stride_up_row,
        rows, cols, mask, rows_per_group, NUM_COLS, IS_GATED, IS_PACKED, GROUPED, ALIGNMENT,
    )  # fmt: skip
    activated, slope = activation_and_slope(gate, ACTIVATION)
    dgate = dout * slope
    if IS_GATED:
        dgate *= up
    if IS_PACKED:
        dgate_tile = dgate_ptr + rows[:, None] * (2 * NUM_COLS) + cols
        tl.store(dgate_tile + NUM_COLS, (dout * activated).to(dgate_ptr.dtype.element_ty), mask=mask)
    else:
        dgate_tile = dgate_ptr + rows[:, None] * NUM_COLS + cols
        if IS_GATED:
            dup = (dout * activated).to(dup_ptr.dtype.element_ty)
            tl.store(dup_ptr + rows[:, None] * NUM_COLS + cols, dup, mask=mask)
    tl.store(dgate_tile, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)


# ----------------------------------------------------------------------------------------------------------------------- launcher


def _prepared(
    kernel: Any,
    tensors: Sequence[Tensor | None],
    layout: RowLayout,
    num_cols: int,
    activation: str,
    gated: bool,
    config: ActivationConfig,
) -> PreparedLaunch:
    """The launch of either kernel for its inputs (the last is up, or None) and the places of as many outputs as there are gradients."""
    strides = [*layout.strides, (0, 0)][: len(tensors)]
    inputs = [value for tensor, pair in zip(tensors, strides) for value in (tensor, *pair)]
    outputs = [None] * (len(tensors) - 1)
    constants = {
        "NUM_COLS": num_cols,
        "ACTIVATION": activation,
        "IS_GATED": gated,
        "IS_PACKED": gated and tensors[-1] is None,
        "GROUPED": layout.grouped,
        "ALIGNMENT": layout.alignment,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLS": config.block_cols,
        "num_warps": config.num_warps,
        **COMMON_OPTIONS,
    }
    grid = (cdiv(layout.num_rows, config.block_rows) * cdiv(num_cols, config.block_cols),)
    return PreparedLaunch(kernel, grid, (*inputs, *outputs, layout.num_rows, layout.rows_per_group), constants)


class ActivationForward:
    """The launch for calls of certain shapes, strides, dtypes and options, to be called with such any number of times.

    Args:
        call: a checked call, of whose tensors only shapes, strides and dtypes count.
        config: overrides the launch policy, for tests.
    """

    def __init__(self, call: ActivationCall, *, config: ActivationConfig | None = None) -> None:
        gate, up, activation, gated = call
        packed = gated and up is None
        num_cols = gate.shape[-1] // 2 if packed else gate.shape[-1]
        self._half = (*gate.shape[:-1], num_cols) if packed else None
        self._new_out = NewTensor(gate)
        self._launch: PreparedLaunch | None = None
        if gate.numel() > 0:
            walked, layout = row_layout([gate] if up is None else [gate, up])
            self._copied = copied_places((gate, up), walked)
            config = config or tile_config(num_cols, FORWARD_ELEMENTS)
            self._launch = _prepared(
                activation_forward_kernel, (gate, up), layout, num_cols, activation, gated, config
            )  # fmt: skip

    def __call__(self, call: ActivationCall) -> Tensor:
        """(..., width) in gate's dtype, contiguous. ``call`` may be a plain tuple in the order of the arguments."""
        gate, up, _, _ = call
        half = self._half
        out = self._new_out(gate) if half is None else torch.empty(half, dtype=gate.dtype, device=gate.device)
        if self._launch is not None:
            if self._copied:
                gate, up = made_contiguous((gate, up), self._copied)
            self._launch((gate, up, out))
        return out


class ActivationBackward:
    """The same for the backward kernel."""

    def __init__(self, call: ActivationGradientCall, *, config: ActivationConfig | None = None) -> None:
        dout, gate, up, activation, gated = call
        self._new_dgate, self._new_dup = NewTensor(gate), None if up is None else NewTensor(up)
        self._launch: PreparedLaunch | None = None
        if gate.numel() > 0:
            num_cols = dout.shape[-1]
            walked, layout = _walk(dout, gate, up, gated)
            self._copied = copied_places((dout, gate, up), walked)
            config = config or tile_config(num_cols, BACKWARD_ELEMENTS)
            self._launch = _prepared(
                activation_backward_kernel, (dout, gate, up), layout, num_cols, activation, gated, config
            )  # fmt: skip

    def __call__(self, call: ActivationGradientCall) -> tuple[Tensor, Tensor | None]:
        """The gradient of gate, both halves of it if up is one of them, and that of up or None; contiguous."""
        dout, gate, up, _, _ = call
        dgate = self._new_dgate(gate)
        dup = None if self._new_dup is None or up is None else self._new_dup(up)
        if self._launch is not None:
            if self._copied:
                dout, gate, up = made_contiguous((dout, gate, up), self._copied)
            self._launch((dout, gate, up, dgate, dup))
        return dgate, dup


def _walk(dout: Tensor, gate: Tensor, up: Tensor | None, gated: bool) -> tuple[list[Tensor], RowLayout]:
    """:func:`row_layout` of the backward pass's inputs; a packed gate has longer rows than dout, which are walked in step with it."""
    if up is not None or not gated:
        return row_layout([dout, gate] if up is None else [dout, gate, up])
    num_cols = dout.shape[-1]
    if dout.is_contiguous() and gate.is_contiguous():
        num_rows = dout.numel() // num_cols
        strides = ((0, num_cols), (0, 2 * num_cols))
        return [dout, gate], RowLayout(num_rows, num_rows, strides, math.gcd(num_cols, 16))
    half = gate.narrow(-1, 0, num_cols)
    walked, layout = row_layout([dout, half])
    if walked[1] is not half:  # a copy of this half would not have the other one behind it
        return _walk(dout.contiguous(), gate.contiguous(), None, gated)
    return [walked[0], gate], layout
