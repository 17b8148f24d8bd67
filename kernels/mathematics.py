"""Constants and functions that several kernels compute with."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh by exp2; near 0, where 1 - 2 / (1 + exp(2x)) cancels, by Cephes' polynomial for float32 inputs (16-bit ones do not see it)."""
    result = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if EXACT:
        z = x * x
        series = -5.70498872745e-3 * z + 2.06390887954e-2
        series = (series * z - 5.37397155531e-2) * z + 1.33314422036e-1
        series = (series * z - 3.33332819422e-1) * z * x + x
        result = tl.where(z < 0.390625, series, result)
    return result
