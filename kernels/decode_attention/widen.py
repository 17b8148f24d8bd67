"""Codes of 8-bit caches as numbers that the tensor cores take, several codes of a register at a time.

float16 holds every int8 and every float8_e4m3fn exactly, and takes fewer instructions than bfloat16: for four codes five of int8, two of
e4m3 where an instruction reads it (sm_89 and newer), 16 where it is taken apart by hand. So with a cache of codes both products are of
float16, whatever 16-bit type the queries have; :func:`narrow_rows` and :func:`reach_of_keys` bring what stands beside the codes into range.

It is PTX because nothing in the language works on the four bytes of a register. The hardened interpreter runs the same text.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 0x64uu is 1024 + uu in float16; codes are shifted to 0 … 255 before.
_INT8 = tl.constexpr("""{
    .reg .b32 codes, low, high, exponents, offset;
    mov.b32 exponents, 0x64646464;
    mov.b32 offset, 0x64806480;
    xor.b32 codes, $2, 0x80808080;
    prmt.b32 low, codes, exponents, 0x4140;
    prmt.b32 high, codes, exponents, 0x4342;
    sub.f16x2 $0, low, offset;
    sub.f16x2 $1, high, offset;
}""")
_E4M3_BY_INSTRUCTION = tl.constexpr("""{
    .reg .b16 low, high;
    mov.b32 {low, high}, $2;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")
# Exponent and mantissa are moved to float16's places, and a product with 2^8 makes up for the exponent's bias; exact, subnormals too. That
# leaves NaN as 480, the only number that overflows when multiplied with 140: 0 times that is NaN, and otherwise 0 of the number's sign.
_E4M3_BY_HAND = tl.constexpr("""{
    .reg .b32 low, high, moved, power, over, zero, far;
    mov.b32 power, 0x5c005c00;
    mov.b32 over, 0x58605860;
    mov.b32 zero, 0;
    prmt.b32 low, $2, zero, 0x1404;
    prmt.b32 high, $2, zero, 0x3424;
    shr.b32 moved, low, 1;
    and.b32 moved, moved, 0x3f803f80;
    and.b32 low, low, 0x80008000;
    or.b32 low, low, moved;
    mul.f16x2 low, low, power;
    mul.f16x2 far, low, over;
    fma.rn.f16x2 $0, far, zero, low;
    shr.b32 moved, high, 1;
    and.b32 moved, moved, 0x3f803f80;
    and.b32 high, high, 0x80008000;
    or.b32 high, high, moved;
    mul.f16x2 high, high, power;
    mul.f16x2 far, high, over;
    fma.rn.f16x2 $1, far, zero, high;
}""")
# What is at most 1, or 2 with its scale, goes into a product times 2^14: float16 has normal numbers down to 2^-28 for it. log(2^14).
HEADROOM = tl.constexpr(9.704060527839234)


@triton.jit
def _in_registers(codes, ASSEMBLY: tl.constexpr, IS_PURE: tl.constexpr):
    """Four codes at a time through the assembly, as float16."""
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,=r,r", [codes], dtype=tl.float16, is_pure=IS_PURE, pack=4)


@triton.jit
def widen(codes, FORMAT: tl.constexpr, IS_PURE: tl.constexpr):
    """Codes ("int8", or bytes of "e4m3" or, from sm_89 on, "e4m3_sm89") as float16; exact, and NaN stays NaN.

    What is not pure stays where it is: the compiler moves it no further from the load, into the layout of the product.
    """
    if FORMAT == "int8":
        values = _in_registers(codes, _INT8, IS_PURE)
    elif FORMAT == "e4m3_sm89":
        values = _in_registers(codes, _E4M3_BY_INSTRUCTION, IS_PURE)
    else:
        tl.static_assert(FORMAT == "e4m3")
        values = _in_registers(codes, _E4M3_BY_HAND, IS_PURE)
    return values


@triton.jit
def narrow_rows(q):
    """(rows times powers of two as float16, what undoes those): the largest feature of a row lies between 2^14 and 2^15.

    Exact but for features below 2^-28 of that, which lose no more than 2^-39 of it.
    """
    largest = tl.max(tl.abs(q.to(tl.float32)), 1)
    # Both powers are to be normal numbers.
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15)
    power = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return (q.to(tl.float32) * power[:, None]).to(tl.float16), inverse


@triton.jit
def reach_of_keys(scales):
    """Logarithms of the powers of two in the magnitudes of scales; those of 0 and of what is tiny are that of 2^-80.

    exp(score - shift) · scale is in range for the largest shift of score + reach, and the sum of exp(score - shift) in that of float32.
    """
    exponent = (scales.to(tl.int32, bitcast=True) >> 23) & 0xFF
    return (tl.maximum(exponent, 47) - 127).to(tl.float32) * 0.6931471805599453
