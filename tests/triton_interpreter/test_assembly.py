"""Inline assembly in the interpreter: each instruction beside its definition, and what is not known raises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from pytransformer.triton_interpreter import UnsupportedTritonError
from pytransformer.triton_interpreter.assembly import run

BITS = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)


@triton.jit
def _kernel(x_ptr, out_ptr, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    out = tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, [x], dtype=out_ptr.dtype.element_ty, is_pure=True, pack=PACK)
    tl.store(out_ptr + tl.arange(0, BLOCK), out)


def _one(instruction: str, *inputs: np.ndarray, operands: str = "$1, $2") -> np.ndarray:
    (result,) = run(f"{{ {instruction} $0, {operands}; }}", inputs, 1)
    return result


def _halves(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.float16).copy())


def test_bits():
    other = BITS[::-1].copy()
    assert np.array_equal(_one("and.b32", BITS, other), BITS & other)
    assert np.array_equal(_one("or.b32", BITS, other), BITS | other)
    assert np.array_equal(_one("xor.b32", BITS, BITS, operands="$1, 0x80808080"), BITS ^ 0x80808080)
    assert np.array_equal(_one("shr.b32", BITS, operands="$1, 3"), BITS >> 3)
    assert not _one("shr.b32", BITS, operands="$1, 32").any()


def test_bytes_are_permuted():
    x, y = np.uint32([0x33221100]), np.uint32([0x77665544])
    assert _one("prmt.b32", x, y, operands="$1, $2, 0x4140")[0] == 0x44114400
    assert _one("prmt.b32", x, y, operands="$1, $2, 0x7210")[0] == 0x77221100
    with pytest.raises(UnsupportedTritonError, match="without replicated signs"):
        _one("prmt.b32", x, y, operands="$1, $2, 0x8140")


@pytest.mark.parametrize(("name", "function"), [("mul", torch.mul), ("sub", torch.sub)])
def test_float16_rounds_once(name, function):
    x, y = BITS, BITS[::-1].copy()
    result, expected = _halves(_one(f"{name}.f16x2", x, y)), function(_halves(x), _halves(y))
    assert torch.equal(result.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(result.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])


def test_fma_rounds_once():
    # 1 + 2^-10 squared is 1 + 2^-9 + 2^-20: rounded before 2^-11 is added, it would end as an even number.
    bits = torch.tensor([1 + 2**-10, 1 + 2**-10, 2**-11], dtype=torch.float16).view(torch.int16).tolist()
    operands = ", ".join(hex(part | part << 16) for part in bits)
    result = _halves(_one("fma.rn.f16x2", BITS[:1], operands=operands))
    assert result.tolist() == [1 + 2**-9 + 2**-10] * 2
    infinity_times_0 = _one("fma.rn.f16x2", BITS[:1], operands="0x7c007c00, 0, 0x3c003c00")
    assert infinity_times_0[0] == 0x7FFF7FFF


def test_a_kernel_packs_elements_into_registers():
    """Elements beyond the last whole pack are served too."""
    codes = torch.arange(64, dtype=torch.uint8)
    out = torch.empty(64, dtype=torch.uint8)
    _kernel[(1,)](codes, out, "{ xor.b32 $0, $1, 0x04030201; }", "=r,r", 4, BLOCK=64)
    assert torch.equal(out, codes ^ torch.tensor([1, 2, 3, 4], dtype=torch.uint8).repeat(16))
    _kernel[(1,)](codes, out, "{ mov.b32 $0, $1; }", "=r,r", 4, BLOCK=2)
    assert torch.equal(out[:2], codes[:2])


@pytest.mark.parametrize(
    ("assembly", "message"),
    [
        ("{ add.s32 $0, $1, 1; }", "got 'add.s32"),
        ("{ .reg .f32 x; mov.b32 $0, $1; }", "got .f32"),
        ("{ and.b32 $0, $1, x; }", "reads x, which holds nothing"),
        ("{ .reg .b16 x; xor.b32 x, $1, $1; }", r"reads \$0, which holds nothing"),
        ("{ mov.b32 {x, y}, $1; mov.b32 $0, x; }", "takes a register apart"),
    ],
)
def test_what_is_not_known_raises(assembly, message):
    with pytest.raises(UnsupportedTritonError, match=message):
        run(assembly, [BITS], 1)


@pytest.mark.parametrize(("constraints", "pack"), [("=r,r", 2), ("=f,f", 4), ("=r,=r,r", 4)])
def test_registers_that_elements_do_not_fill_are_refused(constraints, pack):
    codes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(UnsupportedTritonError, match="inputs of one 32-bit register each"):
        _kernel[(1,)](codes, codes.clone(), "{ mov.b32 $0, $1; }", constraints, pack, BLOCK=8)
