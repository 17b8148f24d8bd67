"""The LayerNorm and RMSNorm kernels against the reference: the contract, edges, memory, determinism, and faults that must be seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytransformer import triton_interpreter
from pytransformer.kernels.launch import DeviceLimits
from pytransformer.kernels.norm.backward import backward_config
from pytransformer.kernels.norm.forward import NormConfig, forward_config, row_layout
from pytransformer.verification import Contract, ContractError
from tests.kernels.norm_contract import (
    BFLOAT16,
    BOTH,
    FLOAT16,
    FLOAT32,
    LAYOUTS,
    Case,
    by_kernel,
    by_reference,
    measure,
)
from tests.support.broken_kernel import load_broken
from tests.support.draws import pool
from tests.support.launchers import norm_backward, norm_backward_by, norm_forward, norm_forward_by

# Rows of more than 64 columns are walked in blocks by these: what ships so are rows above 32k columns (8k in the backward pass).
WIDE = NormConfig(1, 64, 4)
WIDE_BACKWARD = NormConfig(2, 64, 4, programs_per_sm=2, num_stages=2)


# --- the contract -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_rms", "dtype"), [(True, FLOAT32), (False, BFLOAT16)])
@pytest.mark.parametrize("cols", [1, 2, 3, 8, 64, 100, 128, 1000])
def test_contract_holds_at_every_width(cols: int, is_rms: bool, dtype: torch.dtype, device: torch.device) -> None:
    rows = 1 if cols == 1000 else 7
    measure(Case(rows, cols, is_rms, dtype, dtype, residual_dtype=dtype), device).check()


def test_contract_holds_at_a_model_width(device: torch.device) -> None:
    # The sums of weight gradients over programs take most of the interpreter's time, and narrower rows have shown them.
    measure(Case(1, 4096, False, FLOAT16, None, residual_dtype=FLOAT16), device).check()


@pytest.mark.parametrize(
    ("cols", "is_rms", "dtype", "weight_dtype"), [(20000, False, FLOAT32, FLOAT32), (131072, False, BFLOAT16, None)]
)
def test_contract_holds_for_the_widest_rows(cols: int, is_rms: bool, dtype, weight_dtype, device: torch.device) -> None:
    # One draw has more elements than eight of the other cases together.
    measure(Case(1, cols, is_rms, dtype, weight_dtype, residual_dtype=dtype), device, seeds=1).check()


@BOTH
@pytest.mark.parametrize("cols", [63, 64, 129])
def test_rows_walked_in_blocks(cols: int, is_rms: bool, device: torch.device) -> None:
    case = Case(3, cols, is_rms, BFLOAT16, FLOAT32, BFLOAT16, forward_config=WIDE, backward_config=WIDE_BACKWARD)
    measure(case, device).check()


@pytest.mark.parametrize(
    ("is_rms", "dtype", "weight_dtype", "residual_dtype", "configs"),
    [
        (False, FLOAT16, FLOAT16, FLOAT16, (None, None)),
        (True, FLOAT16, FLOAT16, FLOAT16, (None, None)),
        (False, FLOAT32, FLOAT32, FLOAT32, (WIDE, WIDE_BACKWARD)),
        (True, BFLOAT16, FLOAT32, BFLOAT16, (None, None)),
        (False, FLOAT16, FLOAT32, FLOAT32, (WIDE, WIDE_BACKWARD)),
        (True, BFLOAT16, BFLOAT16, FLOAT32, (WIDE, WIDE_BACKWARD)),
        (False, FLOAT32, BFLOAT16, BFLOAT16, (None, None)),
        (True, BFLOAT16, FLOAT16, FLOAT16, (None, None)),
    ],
)
def test_dtypes_mix(is_rms, dtype, weight_dtype, residual_dtype, configs, device: torch.device) -> None:
    case = Case(5, 72, is_rms, dtype, weight_dtype, residual_dtype)
    measure(replace(case, forward_config=configs[0], backward_config=configs[1]), device, least=1).check()


@pytest.mark.parametrize("configs", [(None, None), (WIDE, WIDE_BACKWARD)], ids=["whole", "blocks"])
@pytest.mark.parametrize(
    ("is_rms", "options"),
    [
        (False, {"weight_dtype": None}),
        (True, {"weight_dtype": None}),
        (False, {"has_bias": False}),
        (True, {"weight_offset": 1.0}),
        (False, {"residual_dtype": FLOAT32, "weight_dtype": None}),
    ],
    ids=str,
)
def test_optional_arguments(is_rms: bool, options: dict[str, object], configs, device: torch.device) -> None:
    case = Case(5, 72, is_rms, forward_config=configs[0], backward_config=configs[1])
    measure(replace(case, **options), device, least=1).check()


# --- difficult values -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configs", [(None, None), (WIDE, WIDE_BACKWARD)], ids=["whole", "blocks"])
def test_layer_norm_does_not_cancel_where_the_mean_is_large(configs: tuple[NormConfig, NormConfig], device) -> None:
    case = Case(
        4,
        192,
        False,
        draw=lambda *shape: 1e4 + torch.randn(shape),
        forward_config=configs[0],
        backward_config=configs[1],
    )
    measure(case, device).check()
    inputs = case.inputs(device, 0)
    # One-pass float32 moments would be off by whole units here: E[x²] is 1e8, with a resolution of 8.
    y = by_kernel(replace(case, weight_dtype=None), {"x": inputs["x"], "dy": inputs["dy"]})["y"]
    torch.testing.assert_close(y.var(dim=1, unbiased=False).cpu(), torch.ones(4), atol=1e-3, rtol=0)


@BOTH
@pytest.mark.parametrize("configs", [(None, None), (WIDE, WIDE_BACKWARD)], ids=["whole", "blocks"])
def test_outliers(configs: tuple[NormConfig, NormConfig], is_rms: bool, device: torch.device) -> None:
    def with_outliers(*shape: int) -> Tensor:
        x = torch.randn(shape)
        x[:, 7] *= 1e4
        x[0] *= 1e-4
        return x

    case = Case(
        4, 130, is_rms, BFLOAT16, FLOAT32, draw=with_outliers, forward_config=configs[0], backward_config=configs[1]
    )
    measure(case, device).check()


@BOTH
def test_constant_and_zero_rows(is_rms: bool, device: torch.device) -> None:
    x = torch.zeros(2, 33, device=device)
    x[1] = 3.0
    y, _, _, rstd = norm_forward(x, None, None, None, eps=1e-5, is_rms=is_rms)
    assert torch.equal(y[0], x[0])
    if not is_rms:
        assert torch.equal(y[1], torch.zeros_like(y[1]))
    torch.testing.assert_close(rstd[0].cpu(), torch.tensor(1e-5).rsqrt())


@BOTH
def test_a_row_of_infinity_or_nan_stays_its_own(is_rms: bool, device: torch.device) -> None:
    x = torch.randn(5, 40, device=device)
    clean = norm_forward(x, None, None, None, eps=1e-5, is_rms=is_rms)[0]
    x[1, 3], x[3, 0] = float("inf"), float("nan")
    y = norm_forward(x, None, None, None, eps=1e-5, is_rms=is_rms)[0]
    assert torch.equal(y[::2], clean[::2]) and bool(y[3].isnan().all())


# --- shapes and memory ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_rows_around_a_tile(rows: int, device: torch.device, poison_empty: None) -> None:
    tile = NormConfig(4, 32, 4, programs_per_sm=1, num_stages=2)
    case = Case(rows, 20, False, BFLOAT16, BFLOAT16, BFLOAT16, forward_config=tile, backward_config=tile)
    measure(case, device, least=1).check()


@BOTH
@pytest.mark.parametrize("backward", [NormConfig(4, 64, 4, 1, 2), NormConfig(1, 32, 4, 2, 2)], ids=["whole", "blocks"])
def test_each_program_walks_several_tiles(
    backward: NormConfig, is_rms: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytransformer.kernels.norm.backward.device_limits", lambda device: DeviceLimits(90, 2, 232448))
    measure(Case(9, 48, is_rms, BFLOAT16, BFLOAT16, backward_config=backward), device, least=1).check()


@BOTH
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (4, 0)])
def test_nothing_to_normalise(shape: tuple[int, ...], is_rms: bool, device: torch.device, poison_empty: None) -> None:
    x = torch.empty(shape, device=device)
    weight = torch.randn(shape[-1], device=device)
    y, s, mean, rstd = norm_forward(x, weight, None, x, eps=1e-5, is_rms=is_rms)
    assert y.shape == s.shape == x.shape and rstd.shape == x.shape[:-1]
    ds, dweight, dbias = norm_backward(y, None, s, weight, mean, rstd, dbias_dtype=FLOAT16)
    assert ds.shape == x.shape and dbias.dtype == FLOAT16
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(dbias))


@pytest.mark.parametrize(
    ("layout", "configs"),
    [*((layout, (None, None)) for layout in LAYOUTS), ("heads of qkv", (WIDE, WIDE_BACKWARD))],
    ids=[*LAYOUTS, "heads of qkv in blocks"],
)
def test_strides_are_free(layout: str, configs: tuple[NormConfig, NormConfig], device: torch.device) -> None:
    case = Case(12, 72, False, BFLOAT16, FLOAT32, BFLOAT16, forward_config=configs[0], backward_config=configs[1])

    def reshaped(tensor: Tensor) -> Tensor:
        assert torch.equal(LAYOUTS[layout](tensor).reshape(tensor.shape), tensor)
        return LAYOUTS[layout](tensor)

    strided = replace(case, view=reshaped)
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        inputs = case.inputs(device, seed)
        actual = {
            name: value.flatten(0, -2) if value.dim() > 2 else value
            for name, value in by_kernel(strided, inputs).items()
        }
        plain, golden = by_reference(case, inputs), by_reference(case, inputs, torch.float64)
        contract.add_all(actual, plain, golden)

    pool(contract, add, 1).check()


@BOTH
def test_expanded_inputs(is_rms: bool, device: torch.device) -> None:
    row = torch.randn(48, device=device)
    x, dy = row.expand(6, 48), torch.ones((), device=device).expand(6, 48)
    for tensors in ((x, dy), (x.contiguous(), dy.contiguous())):
        y, _, mean, rstd = norm_forward(tensors[0], row, None, None, eps=1e-5, is_rms=is_rms)
        ds, dweight, _ = norm_backward(tensors[1], None, tensors[0], row, mean, rstd)
        if tensors[0] is x:
            first = (y, ds, dweight)
    for value, again in zip(first, (y, ds, dweight)):
        torch.testing.assert_close(value, again)
    assert torch.equal(y[0].expand_as(y), y)


def test_row_layout_folds_dimensions() -> None:
    qkv = torch.empty(2, 5, 3, 4, 16, device="meta")
    q = qkv[:, :, 0]  # (2, 5, 4, 16): tokens 3 · 4 · 16 apart, heads 16 apart
    (walked,), layout = row_layout([q])
    assert walked is q and layout.grouped
    assert (layout.num_rows, layout.rows_per_group, layout.strides) == (40, 4, ((192, 16),))
    assert layout.alignment == 16
    _, layout = row_layout([qkv])
    assert not layout.grouped and layout.strides == ((0, 16),) and layout.num_rows == 120
    _, layout = row_layout([torch.empty(7, 12, device="meta")])
    assert layout.alignment == 4
    (walked,), layout = row_layout([torch.empty(6, 2, 8, device="meta").transpose(0, 1)])
    assert layout.grouped and walked.shape == (2, 6, 8) and layout.strides == ((8, 16),)


@BOTH
@pytest.mark.parametrize("configs", [(None, None), (WIDE, WIDE_BACKWARD)], ids=["whole", "blocks"])
def test_rows_lie_beyond_2_to_31_elements(
    configs: tuple[NormConfig, NormConfig], is_rms: bool, device: torch.device
) -> None:
    # Of the 4 GB only the pages of the two rows at its ends are ever touched.
    holder = torch.empty(2**31 + 2048, dtype=BFLOAT16, device=device)
    case = Case(2, 80, is_rms, BFLOAT16, FLOAT32, forward_config=configs[0], backward_config=configs[1])
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    far = holder.as_strided((2, 80), (2**31 + 160, 1)), holder.as_strided((2, 80), (2**31 + 160, 1), 80)
    for name, rows in zip(("x", "dy"), far):
        inputs[name] = rows.copy_(inputs[name])
    for name, value in by_kernel(case, inputs).items():
        torch.testing.assert_close(value, expected[name], atol=0, rtol=0)


# --- promised bits ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("config", [None, WIDE], ids=["whole", "blocks"])
def test_the_sum_is_exact(dtype: torch.dtype, config: NormConfig | None, device: torch.device) -> None:
    x = torch.randn(6, 150, device=device).to(BFLOAT16)
    residual = (3 * torch.randn(6, 150, device=device)).to(dtype)
    _, s, _, _ = norm_forward(x, None, None, residual, eps=1e-5, is_rms=True, config=config)
    assert torch.equal(s, (x.float() + residual.float()).to(dtype))


def normalises_the_rounded_sum(device: torch.device, config: NormConfig | None, forward=norm_forward) -> bool:
    """Whether y is, bit for bit, the norm of the sum that is returned."""
    x, residual = (torch.randn(4, 150, device=device).to(BFLOAT16) for _ in range(2))
    y, s, _, _ = forward(x, None, None, residual, eps=1e-5, is_rms=False, config=config)
    return torch.equal(y, forward(s, None, None, None, eps=1e-5, is_rms=False, config=config)[0])


@pytest.mark.parametrize("config", [None, WIDE], ids=["whole", "blocks"])
def test_what_is_normalised_is_the_rounded_sum(config: NormConfig | None, device: torch.device, tmp_path: Path) -> None:
    assert normalises_the_rounded_sum(device, config)
    store = "tl.store(s_ptr + out_offsets, rounded, mask=mask)\n        s ="
    broken = load_broken(
        tmp_path, "norm/forward", (f"{store} rounded.to(tl.float32)", f"{store} s + residual.to(tl.float32)")
    )
    assert normalises_the_rounded_sum(device, None, norm_forward_by(broken)) is False


@BOTH
@pytest.mark.parametrize("configs", [(None, None), (WIDE, WIDE_BACKWARD)], ids=["whole", "blocks"])
def test_same_bits_each_run_in_any_order_of_programs(
    configs: tuple[NormConfig, NormConfig], is_rms: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytransformer.kernels.norm.backward.device_limits", lambda device: DeviceLimits(90, 3, 232448))
    backward = configs[1] or NormConfig(1, 128, 4, 1, 2)
    case = Case(11, 100, is_rms, BFLOAT16, FLOAT32, BFLOAT16, forward_config=configs[0], backward_config=backward)
    inputs = case.inputs(device, 0)
    first = by_kernel(case, inputs)
    for seed in range(200 if device.type == "cuda" else 1):
        order = triton_interpreter.program_order(seed) if triton_interpreter.installed() else contextlib.nullcontext()
        with order:
            again = by_kernel(case, inputs)
        for name, value in first.items():
            assert torch.equal(value, again[name]), name


@BOTH
@pytest.mark.parametrize("cols", [24, 3000])
def test_a_row_does_not_depend_on_the_others(cols: int, is_rms: bool, device: torch.device) -> None:
    case = Case(5, cols, is_rms, BFLOAT16, BFLOAT16, BFLOAT16)
    inputs = case.inputs(device, 0)
    together = by_kernel(case, inputs)
    alone = by_kernel(case, {name: value[3:4] if value.dim() == 2 else value for name, value in inputs.items()})
    for name in ("y", "s", "grad s"):
        assert torch.equal(together[name][3:4], alone[name]), name


def test_unwanted_gradients_are_not_computed(device: torch.device) -> None:
    x, weight = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    y, _, mean, rstd = norm_forward(x, weight, None, None, eps=1e-5, is_rms=False)
    ds, dweight, dbias = norm_backward(y, None, x, weight, mean, rstd, need_dweight=False)
    assert dweight is None and dbias is None
    assert torch.equal(ds, norm_backward(y, None, x, weight, mean, rstd, dbias_dtype=FLOAT32)[0])


# --- launch policy ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 3, 64, 128, 500, 1024, 2048, 4096, 5000, 8192, 16384, 32768, 32769, 65536, 131072])
def test_tiles_fit_registers_and_cover_rows(cols: int) -> None:
    halves, floats, backward = forward_config(cols, 2), forward_config(cols, 4), backward_config(cols)
    for config, widest in ((halves, 32768), (floats, 16384), (backward, 8192)):
        assert config.block_cols >= cols or (cols > widest and config.block_rows == 1)
        elements_per_thread = config.block_rows * config.block_cols / (32 * config.num_warps)
        assert 8 <= elements_per_thread <= 32
    assert backward.programs_per_sm * backward.num_warps <= 32


# --- faults -----------------------------------------------------------------------------------------------------------------------------

# Faults write and read out of bounds: the interpreter sees that, a GPU would let it corrupt the other tests.
INTERPRETED = pytest.mark.skipif(
    not triton_interpreter.installed(), reason="faulty kernels run in the interpreter only"
)

FORWARD_FAULTS = {
    "no mask at the row's end": [("col_mask = cols < NUM_COLS", "col_mask = cols < BLOCK_COLS")],
    "no mask at the last row": [("row_mask = rows < num_rows", "row_mask = rows < num_rows + BLOCK_ROWS")],
    "columns past the end join the variance": [("tl.where(col_mask, s - mean[:, None], 0.0)", "s - mean[:, None]")],
    "wrong row stride": [("offsets = rows * stride_row", "offsets = rows * (stride_row - 1)")],
    "one-pass variance": [
        (
            "rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / NUM_COLS + eps)",
            "rstd = 1.0 / tl.sqrt_rn(tl.sum(s * s, axis=1) / NUM_COLS - mean * mean + eps)",
        )
    ],
    "divides by the block": [("mean = tl.sum(s, axis=1) / NUM_COLS", "mean = tl.sum(s, axis=1) / BLOCK_COLS")],
    "sum not stored": [("tl.store(s_ptr + out_offsets, rounded, mask=mask)", "pass")],
}
WIDE_FAULTS = {
    "lanes not merged": [("lane_squares += lane_count * shift * shift", "pass")],
    "count of the last block": [
        (
            "lane_count = ((NUM_COLS - lanes + BLOCK_COLS - 1) // BLOCK_COLS)",
            "lane_count = ((NUM_COLS - lanes * 0) // BLOCK_COLS)",
        )
    ],
    "masked lanes join the mean": [("lane_mean = tl.where(mask, new_mean, lane_mean)", "lane_mean = new_mean")],
}
BACKWARD_FAULTS = {
    "no mean of g": [("dx -= g_mean[:, None]", "pass")],
    "ds dropped": [
        ("dx += tl.load(ds_ptr + ds_offsets[:, None] + cols, mask=mask, other=0.0).to(tl.float32)", "pass"),
    ],
    "no mask at the last row": [
        ("row_mask = rows < num_rows\n        mask", "row_mask = rows < num_rows + BLOCK_ROWS\n        mask")
    ],
    "weight gradient of the last tile only": [("dweight += dy * xhat", "dweight = dy * xhat")],
    "wrong gradient stride": [
        (
            "dy_offsets = row_offsets(rows, rows_per_group, stride_dy_group, stride_dy_row,",
            "dy_offsets = row_offsets(rows, rows_per_group, stride_dy_group, stride_dy_row + 1,",
        )
    ],
}


def _fault_case(configs: tuple[NormConfig | None, NormConfig | None]) -> Case:
    return Case(
        *(11, 52, False, BFLOAT16, FLOAT32, BFLOAT16),
        draw=lambda *shape: 30 + torch.randn(shape),
        forward_config=configs[0],
        backward_config=configs[1],
    )


TILES = NormConfig(4, 64, 4), NormConfig(2, 64, 4, programs_per_sm=1, num_stages=2)


def _is_caught(case: Case, device: torch.device, **launchers: Callable[..., object]) -> bool:
    """Whether the check that the good kernels pass says no: by the contract, or by an error of the interpreter."""
    try:
        measure(case, device, seeds=1, **launchers).check()  # faults are gross
    except (ContractError, triton_interpreter.KernelFault):
        return True
    return False


@pytest.mark.parametrize("configs", [TILES, (WIDE, WIDE_BACKWARD)], ids=["whole", "blocks"])
def test_the_check_for_faults_passes_faithful_copies(configs, device, tmp_path: Path, poison_empty: None) -> None:
    forward, backward = (
        norm_forward_by(load_broken(tmp_path, "norm/forward")),
        norm_backward_by(load_broken(tmp_path, "norm/backward")),
    )
    case = _fault_case(configs)
    assert not _is_caught(case, device, forward=forward, backward=backward)
    assert not _is_caught(replace(case, weight_dtype=None, residual_dtype=None), device, forward=forward)


@INTERPRETED
@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_fault_in_the_forward_kernel_is_caught(fault: str, device, tmp_path: Path, poison_empty: None) -> None:
    broken = load_broken(tmp_path, "norm/forward", *FORWARD_FAULTS[fault])
    case = _fault_case(TILES)
    if fault == "one-pass variance":
        case = replace(case, dtype=FLOAT32, residual_dtype=None, draw=lambda *shape: 1e4 + torch.randn(shape))
    assert _is_caught(case, device, forward=norm_forward_by(broken))


@INTERPRETED
@pytest.mark.parametrize("fault", WIDE_FAULTS)
def test_a_fault_in_the_wide_kernel_is_caught(fault: str, device, tmp_path: Path, poison_empty: None) -> None:
    broken = load_broken(tmp_path, "norm/forward", *WIDE_FAULTS[fault])
    case = replace(_fault_case((WIDE, None)), cols=100)
    assert _is_caught(case, device, forward=norm_forward_by(broken))


@INTERPRETED
@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_fault_in_the_backward_kernels_is_caught(
    fault: str, device, tmp_path: Path, poison_empty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = load_broken(tmp_path, "norm/backward", *BACKWARD_FAULTS[fault])
    # Two programs share six tiles. Faults of what adds up their sums: test_norm_partials.py.
    monkeypatch.setattr(broken, "device_limits", lambda device: DeviceLimits(90, 2, 232448))
    assert _is_caught(_fault_case(TILES), device, backward=norm_backward_by(broken))
