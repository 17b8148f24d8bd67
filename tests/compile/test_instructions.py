"""What the hardened interpreter takes for granted of compiled code, read in the PTX: see pytransformer/triton_interpreter/formats.py."""

from __future__ import annotations

import re

import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pytransformer.kernels.launch import COMMON_OPTIONS
from pytransformer.precompile import _compiling
from tests.compile.cases import attention
from tests.support.launch_recorder import record

pytestmark = pytest.mark.compiles

ARCHITECTURES = (80, 90, 100)
RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])


@triton.jit
def _cast_kernel(x_ptr, out_ptr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def _unary_kernel(x_ptr, out_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if FUNCTION == "exp":
        x = tl.exp(x)
    elif FUNCTION == "exp2":
        x = tl.exp2(x)
    elif FUNCTION == "sqrt":
        x = tl.sqrt(x)
    elif FUNCTION == "rsqrt":
        x = tl.rsqrt(x)
    elif FUNCTION == "floor":
        x = tl.floor(x)
    elif FUNCTION == "ceil":
        x = tl.ceil(x)
    elif FUNCTION == "negative":
        x = -x
    elif FUNCTION == "largest":
        x = tl.max(x, 0) + x
    elif FUNCTION == "sum":
        x = tl.sum(x, 0) + x
    tl.store(out_ptr + offsets, x)


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    y = tl.load(y_ptr + offsets)
    if FUNCTION == "maximum":
        x = tl.maximum(x, y)
    elif FUNCTION == "minimum":
        x = tl.minimum(x, y)
    elif FUNCTION == "maximum_nan":
        x = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif FUNCTION == "clamp":
        x = tl.clamp(x, y, y + 1)
    elif FUNCTION == "remainder":
        x = x % y
    elif FUNCTION == "add":
        x = x + y
    tl.store(out_ptr + offsets, x)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(x_ptr + offsets), tl.load(y_ptr + offsets), input_precision=PRECISION))


def _ptx(kernel, types: tuple[str, ...], arch: int, **constants: object) -> str:
    names = kernel.arg_names[: len(types)]
    signature = {name: f"*{kind}" for name, kind in zip(names, types)} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, **COMMON_OPTIONS}).asm[
        "ptx"
    ]


def _instructions(ptx: str, beginning: str) -> set[str]:
    return set(re.findall(rf"(?<![.\w]){beginning}[.\w]*", ptx)) - {"cvt.u64.u32", "cvt.u32.u16", "cvt.u16.u32"}


def _cast(source: str, target: str, arch: int, rounding: str | None = None) -> str:
    return _ptx(_cast_kernel, (source, target), arch, ROUNDING=rounding, BLOCK=128)


def _products_of_tf32() -> object:
    return dict(attention.compile_cases())["attention_forward-float32-d64-tf32"]()


def decided_by() -> list[str]:
    """The other kernels are in this file."""
    return [launch.key for arch in ARCHITECTURES for launch in record(_products_of_tf32, arch)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_rounds_to_tf32_before_the_tensor_core(arch, tmp_path, monkeypatch):
    """So it reads 19 bits of each operand and drops 13: had a kernel or Triton a rounding, the interpreter would have to round."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with _compiling(arch):
        _products_of_tf32()
    ptx = "".join(path.read_text() for path in tmp_path.rglob("*.ptx"))
    assert re.search(r"\.tf32\.tf32|kind::tf32", ptx)
    assert "cvt.rna.tf32" not in ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_three_tf32_products_round_the_large_part_only(arch):
    ptx = _ptx(_dot_kernel, ("fp32", "fp32", "fp32"), arch, PRECISION="tf32x3", BLOCK=64)
    assert ptx.count("cvt.rna.tf32.f32") == len(re.findall(r"\bsub(\.rn)?\.f32", ptx)) > 0
    assert "setp.num.f32" in ptx  # the small products' NaN is replaced


@pytest.mark.parametrize("arch", [90, 100])
def test_float32_to_8_bits_saturates(arch):
    assert "cvt.rn.satfinite.e4m3x2.f32" in _cast("fp32", "fp8e4nv", arch)
    assert "cvt.rn.satfinite.e5m2x2.f32" in _cast("fp32", "fp8e5", arch)


@pytest.mark.skipif(RELEASE < (3, 9), reason="before, Triton casts 16 bits to float8e5 without saturation")
@pytest.mark.parametrize("source", ["fp32", "bf16", "fp16"])
def test_float8e5_saturates_without_the_instruction_too(source):
    ptx = _cast(source, "fp8e5", 80)
    assert "min.f16x2" in ptx and "0x7b007b00" in ptx  # 57344, the largest
    assert "set.nan.f16x2.f16x2" in ptx


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float8e5_to_bfloat16_multiplies_whatever_the_bits_mean(arch):
    ptx = _cast("fp8e5", "bf16", arch)
    assert re.search(r"e112, 0x7780", ptx)
    assert not _instructions(ptx, "setp") and not _instructions(ptx, "set")


@pytest.mark.parametrize(
    ("source", "target", "rounding"),
    [
        ("fp64", "fp8e4nv", None),
        ("fp64", "fp8e5", None),
        ("fp8e4nv", "fp64", None),
        ("fp8e5", "fp64", None),
        ("fp8e5", "fp8e4nv", None),
        ("fp32", "fp8e4nv", "rtz"),
        ("fp16", "fp8e5", "rtz"),
        ("bf16", "fp8e5", "rtz"),
        ("fp64", "fp32", "rtz"),
        ("fp64", "fp16", "rtz"),
        ("bf16", "fp8e4b15", None),
        ("fp32", "fp8e4b8", None),
        ("fp32", "fp8e5b16", None),
    ],
)
def test_casts_that_the_interpreter_refuses_do_not_compile(source, target, rounding):
    with pytest.raises(Exception):  # noqa: B017 - of many types, out of Triton's frontend and passes
        _cast(source, target, 90, rounding)


@pytest.mark.parametrize(
    ("kernel", "function"),
    [(_binary_kernel, "add"), (_binary_kernel, "maximum"), (_unary_kernel, "negative"), (_unary_kernel, "sum")],
)
def test_arithmetic_of_8_bit_floats_does_not_compile(kernel, function):
    with pytest.raises(Exception):  # noqa: B017
        _ptx(kernel, ("fp8e4nv",) * (3 if kernel is _binary_kernel else 2), 90, FUNCTION=function, BLOCK=128)


@pytest.mark.parametrize("source", ["fp16", "bf16", "fp32", "fp64"])
def test_floats_become_integers_by_a_saturating_conversion(source):
    for target, kind in {
        "i8": "s16",
        "u8": "u16",
        "i16": "s16",
        "i32": "s32",
        "u32": "u32",
        "i64": "s64",
        "u64": "u64",
    }.items():
        found = _instructions(_cast(source, target, 90), "cvt.rzi")
        assert len(found) == 1 and next(iter(found)).startswith(f"cvt.rzi.{kind}."), (target, found)


def test_integers_and_float64_become_bfloat16_in_one_rounding():
    assert _instructions(_cast("i32", "bf16", 90), "cvt.rn") == {"cvt.rn.bf16.s32"}
    assert _instructions(_cast("i64", "bf16", 90), "cvt.rn") == {"cvt.rn.bf16.s64"}
    assert _instructions(_cast("fp64", "bf16", 90), "cvt.rn") == {"cvt.rn.bf16.f64"}
    assert _instructions(_cast("i32", "bf16", 80), "cvt.rn") == {"cvt.rn.f32.s32", "cvt.rn.bf16.f32"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("function", "instructions"),
    [
        ("exp", {"ex2.approx.f32"}),
        ("exp2", {"ex2.approx.ftz.f32"}),
        ("sqrt", {"sqrt.approx.ftz.f32"}),
        ("rsqrt", {"rsqrt.approx.ftz.f32"}),
        ("floor", {"cvt.rmi.ftz.f32.f32"}),
        ("ceil", {"cvt.rpi.ftz.f32.f32"}),
    ],
)
def test_functions_of_float32_are_the_instructions_that_are_modelled(arch, function, instructions):
    ptx = _ptx(_unary_kernel, ("fp32", "fp32"), arch, FUNCTION=function, BLOCK=128)
    beginnings = ("ex2", "sqrt", "rsqrt", "cvt.r", "max")
    assert set().union(*(_instructions(ptx, beginning) for beginning in beginnings)) == instructions


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("function", "instructions"),
    [
        ("maximum", {"max.f32"}),
        ("minimum", {"min.f32"}),
        ("maximum_nan", {"max.NaN.f32"}),
        ("clamp", {"max.f32", "min.f32"}),
        ("remainder", {"div.rn.f32", "cvt.rzi.f32.f32", "fma.rn.f32", "testp.infinite.f32"}),
    ],
)
def test_minima_maxima_and_remainders_are_the_instructions_that_are_modelled(arch, function, instructions):
    ptx = _ptx(_binary_kernel, ("fp32",) * 3, arch, FUNCTION=function, BLOCK=128)
    beginnings = ("max", "min", "div", "cvt.rz", "fma", "testp")
    assert set().union(*(_instructions(ptx, beginning) for beginning in beginnings)) == instructions


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_largest_element_leaves_nan_out(arch):
    ptx = _ptx(_unary_kernel, ("fp32", "fp32"), arch, FUNCTION="largest", BLOCK=128)
    assert _instructions(ptx, "max") | _instructions(ptx, "redux") in ({"max.f32"}, {"redux.sync.max.f32"})


def test_a_sum_of_float16_rounds_at_each_step():
    assert _instructions(_ptx(_unary_kernel, ("fp16", "fp16"), 90, FUNCTION="sum", BLOCK=128), "add.f") == {"add.f16"}
