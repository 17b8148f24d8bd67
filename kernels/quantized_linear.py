"""A linear layer over 8- or 4-bit codes, and its gradient to x: codes become numbers in registers, on their way to the matrix units.

    y = x Wᵀ + bias,  dx = dy W        W = code · scale[row], or (code - zero_point[row, group]) · scale[row, group] with 4 bits

For R rows, I inputs and O outputs 2·R·I·O FLOP each, and I·O bytes of codes, or I·O/2. With few rows the codes are all that is read: half
or a quarter of the bytes of a bfloat16 weight. Sums are in float32 and rounded once.

Forward, a program has one scale for all it adds up (8 bits) or one for each group of columns (4 bits). The codes themselves are exact in
every dtype, so that they are multiplied as they are, and the sum is multiplied by the scale, of each group for itself. Backward, each
product has another scale, so that the weight is rounded to the dtype of dy, as it would be if it were held in that.

Byte j of a group of 4-bit codes has column j in its low half and column j + group_size/2 in its high one: each half of a tile of bytes is a
tile of adjacent columns, and nothing moves between threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import COMMON_OPTIONS, cdiv
from .prepared import PreparedLaunch

if TYPE_CHECKING:
    from pytransformer.ops.quantized_linear.call import QuantizedLinearCall, QuantizedLinearGradientCall

# ------------------------------------------------------------------------------------------------------------------ launch policy


@dataclass(frozen=True)
class QuantizedConfig:
    """Tile and launch shape of a product.

    Attributes:
        block_rows, block_cols: tile of the result; backward with 4 bits a program has two such tiles, of the low and the high halves.
        block_inner: columns of both factors that are multiplied at a time; forward with 4 bits it is half a group instead.
        num_warps, num_stages: of a program; stages are tiles of the factors under way at once.
    """

    block_rows: int
    block_cols: int
    block_inner: int
    num_warps: int
    num_stages: int


def product_config(num_rows: int, dtype: torch.dtype) -> QuantizedConfig:
    """Of y and dx."""
    if dtype == torch.float32:
        # Without matrix units both factors are held in registers, the codes in several forms: larger tiles spill.
        return QuantizedConfig(16, 32, 32, 4, 2)
    if num_rows <= 16:
        # Decoding: bound by reading codes. Few columns make many programs (4096 columns fill 128 SMs), long tiles many bytes under way.
        return QuantizedConfig(16, 32, 128, 4, 4)
    if num_rows <= 64:
        return QuantizedConfig(64, 64, 64, 4, 3)
    # Two sums of 128 × 64 (4 bits: of a group and of all, or of both halves) spill in 128 threads of sm_80, not in 256.
    return QuantizedConfig(128, 64, 64, 8, 3)


# ------------------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def unpacked(codes, zero):
    """The halves of a tile of bytes, low and high, less the zero points."""
    return (codes & 15).to(tl.int32) - zero, (codes >> 4).to(tl.int32) - zero


@triton.jit(do_not_specialize=["num_rows"])
def quantized_product_kernel(
    x_ptr,
    stride_x_row,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    NUM_COLS: tl.constexpr,
    NUM_INNER: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One tile of out (rows, NUM_COLS), contiguous: x (rows, NUM_INNER) times the transposed weight; GROUP_SIZE 0: 8 bits."""
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    is_row, is_col = rows < num_rows, cols < NUM_COLS
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x_row
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    dtype = x_ptr.dtype.element_ty
    if GROUP_SIZE == 0:
        inner = tl.arange(0, BLOCK_INNER)
        x_tile = x_rows + inner[None, :]
        weight_tile = weight_ptr + cols.to(tl.int64)[None, :] * NUM_INNER + inner[:, None]
        for done in range(0, NUM_INNER, BLOCK_INNER):
            is_inner = inner < NUM_INNER - done
            x = tl.load(x_tile, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            codes = tl.load(weight_tile, mask=is_inner[:, None] & is_col[None, :], other=0)
            total = tl.dot(x, codes.to(dtype), total, input_precision=PRECISION)
            x_tile += BLOCK_INNER
            weight_tile += BLOCK_INNER
        total *= tl.load(scale_ptr + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    else:
        HALF: tl.constexpr = GROUP_SIZE // 2
        NUM_GROUPS: tl.constexpr = NUM_INNER // GROUP_SIZE
        half = tl.arange(0, HALF)
        low_tile = x_rows + half[None, :]
        weight_tile = weight_ptr + cols.to(tl.int64)[None, :] * (NUM_INNER // 2) + half[:, None]
        group_of_cols = cols.to(tl.int64) * NUM_GROUPS
        for group in range(0, NUM_GROUPS):
            x_low = tl.load(low_tile, mask=is_row[:, None], other=0.0)
            x_high = tl.load(low_tile + HALF, mask=is_row[:, None], other=0.0)
            zero = 8
            if HAS_ZERO:
                zero = tl.load(zero_ptr + group_of_cols + group, mask=is_col, other=0).to(tl.int32)[None, :]
            low, high = unpacked(tl.load(weight_tile, mask=is_col[None, :], other=0), zero)
            scale = tl.load(scale_ptr + group_of_cols + group, mask=is_col, other=0.0).to(tl.float32)
            part = tl.dot(x_low, low.to(dtype), input_precision=PRECISION)
            part = tl.dot(x_high, high.to(dtype), part, input_precision=PRECISION)
            total += part * scale[None, :]
            low_tile += GROUP_SIZE
            weight_tile += HALF
    if HAS_BIAS:
        total += tl.load(bias_ptr + cols, mask=is_col, other=0.0).to(tl.float32)[None, :]
    out_tile = out_ptr + rows.to(tl.int64)[:, None] * NUM_COLS + cols[None, :]
    tl.store(out_tile, total.to(dtype), mask=is_row[:, None] & is_col[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def quantized_gradient_kernel(
    dy_ptr,
    stride_dy_row,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    num_rows,
    NUM_COLS: tl.constexpr,
    NUM_INNER: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):
    """One tile of out (rows, NUM_COLS), contiguous: dy (rows, NUM_INNER) times the weight; with 4 bits tiles of both halves of bytes."""
    rows = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    stored = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)  # columns of the codes as they are stored
    NUM_STORED: tl.constexpr = NUM_COLS if GROUP_SIZE == 0 else NUM_COLS // 2
    is_row, is_col = rows < num_rows, stored < NUM_STORED
    inner = tl.arange(0, BLOCK_INNER)
    dy_tile = dy_ptr + rows.to(tl.int64)[:, None] * stride_dy_row + inner[None, :]
    weight_tile = weight_ptr + inner.to(tl.int64)[:, None] * NUM_STORED + stored[None, :]
    out_rows = out_ptr + rows.to(tl.int64)[:, None] * NUM_COLS
    is_out = is_row[:, None] & is_col[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    dtype = dy_ptr.dtype.element_ty
    if GROUP_SIZE == 0:
        for done in range(0, NUM_INNER, BLOCK_INNER):
            is_inner = inner < NUM_INNER - done
            dy = tl.load(dy_tile, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            codes = tl.load(weight_tile, mask=is_inner[:, None] & is_col[None, :], other=0)
            scale = tl.load(scale_ptr + done + inner, mask=is_inner, other=0.0).to(tl.float32)
            weight = (codes.to(tl.float32) * scale[:, None]).to(dtype)
            total = tl.dot(dy, weight, total, input_precision=PRECISION)
            dy_tile += BLOCK_INNER
            weight_tile += BLOCK_INNER * NUM_STORED
        tl.store(out_rows + stored[None, :], total.to(dtype), mask=is_out)
    else:
        HALF: tl.constexpr = GROUP_SIZE // 2
        NUM_GROUPS: tl.constexpr = NUM_COLS // GROUP_SIZE
        groups = inner.to(tl.int64)[:, None] * NUM_GROUPS + (stored // HALF)[None, :]
        total_high = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for done in range(0, NUM_INNER, BLOCK_INNER):
            is_inner = inner < NUM_INNER - done
            is_code = is_inner[:, None] & is_col[None, :]
            dy = tl.load(dy_tile, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            zero = 8
            if HAS_ZERO:
                zero = tl.load(zero_ptr + groups, mask=is_code, other=0).to(tl.int32)
            low, high = unpacked(tl.load(weight_tile, mask=is_code, other=0), zero)
            scale = tl.load(scale_ptr + groups, mask=is_code, other=0.0).to(tl.float32)
            total = tl.dot(dy, (low.to(tl.float32) * scale).to(dtype), total, input_precision=PRECISION)
            total_high = tl.dot(dy, (high.to(tl.float32) * scale).to(dtype), total_high, input_precision=PRECISION)
            dy_tile += BLOCK_INNER
            weight_tile += BLOCK_INNER * NUM_STORED
            groups += BLOCK_INNER * NUM_GROUPS
        cols = stored // HALF * GROUP_SIZE + stored % HALF
        tl.store(out_rows + cols[None, :], total.to(dtype), mask=is_out)
        tl.store(out_rows + HALF + cols[None, :], total_high.to(dtype), mask=is_out)


# ----------------------------------------------------------------------------------------------------------------------- launcher


def _common(
    dtype: torch.dtype, weight: Tensor, scale: Tensor, zero_point: Tensor | None, tf32: bool, config: QuantizedConfig
) -> dict[str, Any]:
    """The constants of both kernels but their sizes."""
    num_in = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    return {
        "GROUP_SIZE": num_in // scale.shape[1] if weight.dtype == torch.uint8 else 0,
        "HAS_ZERO": zero_point is not None,
        "PRECISION": "tf32" if dtype == torch.float32 and tf32 else "ieee",
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_COLS": config.block_cols,
        "BLOCK_INNER": config.block_inner,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **COMMON_OPTIONS,
    }


class _Launch:
    """What both passes share: rows that lie in any order are copied, and no rows are no launch."""

    _launch: PreparedLaunch | None = None

    def __init__(self, rows: Tensor, width: int) -> None:
        self._shape = (rows.shape[0], width)
        self._copies = rows.stride(-1) != 1 and rows.shape[-1] > 1

    def _dense(self, rows: Tensor) -> Tensor:
        return rows.contiguous() if self._copies else rows

    def _run(self, rows: Tensor, *rest: Tensor | None) -> Tensor:
        out = torch.empty(self._shape, dtype=rows.dtype, device=rows.device)
        if self._launch is not None:
            self._launch((self._dense(rows), *rest, out))
        return out


class QuantizedForward(_Launch):
    """The launch for calls of certain shapes, strides and dtypes, to be called with such any number of times.

    Args:
        call: a checked call, of whose tensors only shapes, strides and dtypes count.
        allow_tf32: whether float32 products may be of tf32, whose operands lack the low 13 bits.
        config: overrides the launch policy, for tests.
    """

    def __init__(
        self, call: QuantizedLinearCall, *, allow_tf32: bool = False, config: QuantizedConfig | None = None
    ) -> None:
        x, weight, scale, zero_point, bias = call
        super().__init__(x, weight.shape[0])
        self._copies_bias = bias is not None and bias.stride(-1) != 1
        if x.shape[0] == 0:
            return
        config = config or product_config(x.shape[0], x.dtype)
        arguments = (None, self._dense(x).stride(0), None, None, None, None, None, x.shape[0])
        constants = {
            **_common(x.dtype, weight, scale, zero_point, allow_tf32, config),
            "NUM_COLS": weight.shape[0],
            "NUM_INNER": x.shape[1],
            "HAS_BIAS": bias is not None,
        }
        grid = (cdiv(weight.shape[0], config.block_cols), cdiv(x.shape[0], config.block_rows))
        self._launch = PreparedLaunch(quantized_product_kernel, grid, arguments, constants)

    def __call__(self, call: QuantizedLinearCall) -> Tensor:
        """(rows, out_features), contiguous. ``call`` may be a plain tuple in the order of the arguments."""
        x, weight, scale, zero_point, bias = call
        bias = bias.contiguous() if self._copies_bias and bias is not None else bias
        return self._run(x, weight, scale, zero_point, bias)


class QuantizedBackward(_Launch):
    """The same for the backward pass to x.

    Args:
        call, allow_tf32, config: as for the forward pass.
    """

    def __init__(
        self, call: QuantizedLinearGradientCall, *, allow_tf32: bool = False, config: QuantizedConfig | None = None
    ) -> None:
        dy, weight, scale, zero_point = call
        num_in = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
        super().__init__(dy, num_in)
        if dy.shape[0] == 0:
            return
        config = config or product_config(dy.shape[0], dy.dtype)
        arguments = (None, self._dense(dy).stride(0), None, None, None, None, dy.shape[0])
        constants = {
            **_common(dy.dtype, weight, scale, zero_point, allow_tf32, config),
            "NUM_COLS": num_in,
            "NUM_INNER": dy.shape[1],
        }
        grid = (cdiv(weight.shape[1], config.block_cols), cdiv(dy.shape[0], config.block_rows))
        self._launch = PreparedLaunch(quantized_gradient_kernel, grid, arguments, constants)

    def __call__(self, call: QuantizedLinearGradientCall) -> Tensor:
        """(rows, in_features), contiguous."""
        return self._run(*call)
