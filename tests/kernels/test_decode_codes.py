"""Caches of 8-bit codes: what each code becomes, and that no magnitude of queries or scales leaves float16's range on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from pytransformer.kernels.decode_attention.widen import narrow_rows, widen
from pytransformer.kernels.launch import assume_arch, device_limits
from tests.conftest import INTERPRETING
from tests.kernels.decode_contract import Decode, Inputs, check_contract, draw, run

pytestmark = pytest.mark.usefixtures("poison_empty")

FORMATS = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e4m3_sm89": torch.float8_e4m3fn}


@triton.jit
def _widen_kernel(codes_ptr, out_ptr, FORMAT: tl.constexpr, IS_PURE: tl.constexpr):
    places = tl.arange(0, 256)
    tl.store(out_ptr + places, widen(tl.load(codes_ptr + places), FORMAT, IS_PURE))


@triton.jit
def _narrow_kernel(q_ptr, out_ptr, inverse_ptr, ROWS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, 16)
    narrow, inverse = narrow_rows(tl.load(q_ptr + rows[:, None] * 16 + columns[None, :]))
    tl.store(out_ptr + rows[:, None] * 16 + columns[None, :], narrow)
    tl.store(inverse_ptr + rows, inverse)


def _needs(arch: int, device: torch.device) -> None:
    if not INTERPRETING and device_limits(device).arch < arch:
        pytest.skip(f"only a GPU of compute capability {arch} has the instruction")


@pytest.mark.parametrize("is_pure", [True, False])
@pytest.mark.parametrize("format_", FORMATS)
def test_every_code_has_the_bits_that_torch_reads(format_, is_pure, device):
    """All ways to read a code agree on all 256 of them, subnormals and -0 too."""
    _needs(89 if format_ == "e4m3_sm89" else 80, device)
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes.view(torch.int8) if format_ == "int8" else codes
    out = torch.empty(256, dtype=torch.float16, device=device)
    _widen_kernel[(1,)](codes, out, FORMAT=format_, IS_PURE=is_pure)
    expected = codes.view(FORMATS[format_]).to(torch.float16)
    numbers = ~expected.isnan()
    assert torch.equal(out.isnan(), ~numbers)
    assert numbers.sum() == (256 if format_ == "int8" else 254)
    assert torch.equal(out[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_code_is_attended_to(arch, cache_dtype, device):
    """By the way of each generation of GPUs a single key gives its values, exactly; NaN stays NaN."""
    _needs(arch, device)
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(cache_dtype)
    one = torch.ones(1, device=device)
    tensors = {
        "k_cache": torch.zeros(1, 1, 1, 16, dtype=torch.uint8, device=device).view(cache_dtype),
        "v_cache": codes.view(1, 1, 1, 256), "k_scale": one, "v_scale": one,
        "cache_seqlens": torch.ones(1, dtype=torch.int32, device=device),
    }  # fmt: skip
    case = Decode(dims=(16, 256), heads=(1, 1), lengths=(1,))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        q = torch.zeros(1, 1, 1, 16, dtype=dtype, device=device)
        with assume_arch(arch):
            out, _ = run(Inputs({**tensors, "q": q}, {}, {}), case)
        assert torch.equal(out.flatten().float().nan_to_num(nan=1e9), codes.float().nan_to_num(nan=1e9))


def test_rows_are_narrowed_exactly(device):
    """Every magnitude of bfloat16 from 2^-112 on; smaller ones are as near to 0 as the largest power allows."""
    exponents = torch.arange(-112, 128, dtype=torch.float64)[:, None]
    mantissas = 1 + torch.arange(16, dtype=torch.float64) / 16
    q = (mantissas * torch.exp2(exponents)).to(torch.bfloat16)
    q[:, 8:] *= 2**-24  # 24 binary digits below the largest
    tiny = torch.tensor([[2.0**-133], [0.0], [float("inf")], [float("nan")]]).expand(4, 16).to(torch.bfloat16)
    q = torch.cat([q, tiny, q[:12]]).to(device)
    assert q.shape[0] == 256
    out = torch.empty(q.shape, dtype=torch.float16, device=device)
    inverse = torch.empty(256, dtype=torch.float32, device=device)
    _narrow_kernel[(1,)](q, out, inverse, ROWS=256)
    back = out.double() * inverse[:, None].double()
    assert torch.equal(back.nan_to_num(nan=1.0), q.double().nan_to_num(nan=1.0))
    assert (out[:240].float().amax(1) < 2**15).all()


@pytest.mark.parametrize("power", [-100, 100])
def test_the_magnitude_of_queries_changes_no_bit(power, device):
    case = Decode(
        lengths=(33,), heads=(4, 1), capacity=33, dtype=torch.bfloat16, cache_dtype=torch.int8, scale_per_token=True
    )
    inputs = draw(case, 1, device)
    out, lse = run(inputs, case, softmax_scale=0.25)
    inputs.tensors["q"] = inputs.tensors["q"] * 2.0**power
    again = run(inputs, case, softmax_scale=0.25 * 2.0**-power)
    assert torch.equal(again[0], out)
    assert torch.equal(again[1], lse)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_query_that_is_no_number_stays_alone(value, device):
    case = Decode(lengths=(33,), heads=(4, 1), capacity=33, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn)
    inputs = draw(case, 2, device)
    out, lse = run(inputs, case)
    inputs.tensors["q"][0, 0, 1, 3] = value
    again = run(inputs, case)
    others = [0, 2, 3]
    assert torch.equal(again[0][:, :, others], out[:, :, others])
    assert torch.equal(again[1][:, others], lse[:, others])
    assert again[0][0, 0, 1].isnan().all()


SCALES = {
    "large": lambda scale, generator: scale * 2.0**40,
    "small": lambda scale, generator: scale * 2.0**-60,
    # Tokens that count for nothing in the sum may have the largest values, and the other way round.
    "far apart": lambda scale, generator: scale * torch.exp2(torch.randint(-30, 31, scale.shape, generator=generator)),
}


# float16 has no results as large as the others'.
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in SCALES), ("small", torch.float16)], ids=str
)
def test_scales_of_values_of_any_magnitude(name, dtype, device):
    """Weights times scales are what the second product takes, and float16 holds neither 2^40 nor 2^-60."""

    def alter(inputs: Inputs, seed: int) -> None:
        changed = SCALES[name](inputs.clean["v_scale"].cpu(), torch.Generator().manual_seed(seed)).to(device)
        unused = inputs.tensors["v_scale"].isnan()
        inputs.clean["v_scale"] = changed
        inputs.tensors["v_scale"] = changed.masked_fill(unused, float("nan"))

    case = Decode(
        (40,), heads=(1, 1), capacity=40, dtype=dtype, cache_dtype=torch.int8, scale_per_token=True,
        options={"sinks": torch.tensor([0.5])},
    )  # fmt: skip
    check_contract(case, device, ((40,), (17,)), alter=alter)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_batch_pages_and_capacity_change_no_bit(cache_dtype, device):
    case = Decode(
        (0, 17, 40), heads=(1, 1), capacity=48, dtype=torch.bfloat16, cache_dtype=cache_dtype, scale_per_token=True
    )
    inputs = draw(case, 3, device)
    out, lse = run(inputs, case)
    paged = run(draw(replace(case, page_size=16), 3, device), replace(case, page_size=16))
    assert torch.equal(paged[0], out)
    assert torch.equal(paged[1], lse)
    for sequence, length in enumerate(case.lengths):
        alone = {name: value[sequence : sequence + 1] for name, value in inputs.tensors.items()}
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            alone[name] = alone[name][:, : max(length, 1)]
        again = run(Inputs(alone, inputs.options, {}), case)
        assert torch.equal(again[0][0], out[sequence]), length
        assert torch.equal(again[1][0], lse[sequence]), length
