"""The CUDA norm kernels against the reference: the contract at every launch shape, memory, promised bits, refusals, and faults put in.

Cases and measuring are those of the Triton kernels (tests/kernels/test_norm.py). The first call of a case runs in every schedule of the
emulator, whose results must have the same bits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytransformer import extension
from pytransformer.verification import SEEDS, Contract
from tests.kernels.test_norm import (
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
from tests.support.broken_cuda import run_broken
from tests.support.emulator import in_every_schedule

EMULATED = "PYTRANSFORMER_CUDA_LIBRARY" in os.environ
SANITIZED = os.environ.get("PYTRANSFORMER_TEST_CUDA") in ("address", "thread")


class Launchers:
    """The extension's training ops in the shape of the Triton launchers; the first pass runs in every schedule."""

    def __init__(self, num_sms: int = 4) -> None:
        self.num_sms = num_sms
        self._passes = {"forward": 0, "backward": 0}

    def _run(self, which: str, function: Callable[[], list[Tensor]]) -> list[Tensor]:
        self._passes[which] += 1
        return in_every_schedule(function, num_sms=self.num_sms) if self._passes[which] == 1 else function()

    def forward(self, x, weight, bias, residual, *, eps, is_rms, weight_offset=0.0, config=None):
        def launch() -> list[Tensor]:
            results = extension.op("norm_forward")(x, weight, bias, residual, eps, weight_offset, is_rms)
            return [*results, *lean(x, weight, bias, residual, eps, weight_offset, is_rms)]

        y, s, mean, rstd, *for_inference = self._run("forward", launch)
        for training, inference in zip((y, s), for_inference):
            assert torch.equal(training, inference)
        return y, None if residual is None else s, None if is_rms else mean, rstd

    def backward(
        self, dy, ds, s, weight, mean, rstd, *, weight_offset=0.0, need_dweight=True, dbias_dtype=None, config=None
    ):
        op = extension.op("norm_backward")
        arguments = (dy, ds, s, weight, rstd if mean is None else mean, rstd, weight_offset, mean is None)
        dx, dweight, dbias = self._run("backward", lambda: list(op(*arguments, need_dweight, dbias_dtype)))
        has_dweight = need_dweight and weight is not None
        return dx, dweight if has_dweight else None, None if dbias_dtype is None else dbias

    @property
    def both(self) -> dict[str, Callable[..., object]]:
        return {"forward": self.forward, "backward": self.backward}


def lean(x, weight, bias, residual, eps, weight_offset, is_rms) -> list[Tensor]:
    """y, or y and s, by the op for inference."""
    vectors = (weight, eps, weight_offset) if is_rms else (weight, bias, eps)
    name = "rms_norm" if is_rms else "layer_norm"
    if residual is None:
        return [extension.op(name)(x, *vectors)]
    return list(extension.op(f"add_{name}")(x, residual, *vectors))


def check(case: Case, device: torch.device, seeds: int = SEEDS, num_sms: int = 4) -> None:
    measure(case, device, seeds=seeds, **Launchers(num_sms).both).check()


# --- the contract: every launch shape ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("is_rms", "dtype"), [(True, FLOAT32), (False, BFLOAT16)])
@pytest.mark.parametrize("cols", [1, 2, 7, 8, 31, 64, 100, 128, 129, 136, 256, 264])
def test_contract_holds_at_every_narrow_width(cols: int, is_rms: bool, dtype: torch.dtype, device) -> None:
    # Around one element, one access of 16 bytes, one warp of them, and the scalar path between.
    check(Case(5, cols, is_rms, dtype, dtype, residual_dtype=dtype), device)


@pytest.mark.parametrize(
    ("rows", "cols", "is_rms", "dtype"),
    [
        (2, 512, False, BFLOAT16),  # one warp, two accesses
        (2, 1000, False, FLOAT16),  # one warp, four; backward: two warps
        (2, 1032, True, BFLOAT16),  # a block
        (1, 1001, False, FLOAT32),  # the same, an element at a time
        (1, 8200, True, FLOAT16),  # 32 elements a thread; backward: columns
        (1, 5001, False, FLOAT32),  # an element at a time; backward: columns
    ],
)
def test_contract_holds_for_a_block_of_a_row(rows: int, cols: int, is_rms: bool, dtype: torch.dtype, device) -> None:
    # One draw has more elements than eight of the narrow cases together.
    check(Case(rows, cols, is_rms, dtype, dtype, residual_dtype=dtype), device, seeds=1)


@pytest.mark.parametrize(
    ("rows", "cols", "is_rms", "dtype", "num_sms"),
    [
        (1, 16400, False, BFLOAT16, 4),  # split over two blocks
        (1, 8201, True, FLOAT32, 4),  # over five, an element at a time
        (2, 16400, False, FLOAT32, 1),  # a block for each, staged in shared memory
        (1, 60000, True, FLOAT32, 1),  # more than shared memory holds
        (1, 131072, False, BFLOAT16, 8),
    ],
)
def test_contract_holds_for_the_widest_rows(rows, cols, is_rms, dtype, num_sms, device) -> None:
    case = Case(rows, cols, is_rms, dtype, None if cols == 131072 else FLOAT32, residual_dtype=dtype)
    launchers = Launchers(num_sms)
    launchers._passes = {"forward": SANITIZED and cols > 50000, "backward": SANITIZED and cols > 10000}
    measure(case, device, seeds=1, **launchers.both).check()


@BOTH
@pytest.mark.parametrize(("rows", "cols"), [(70, 40), (13, 1040)], ids=["rows of a warp", "rows of a block"])
def test_each_block_walks_several_rows(rows: int, cols: int, is_rms: bool, device: torch.device) -> None:
    # With one SM, four blocks share the rows in the backward pass: more rows than are in flight, and an incomplete last round.
    check(Case(rows, cols, is_rms, BFLOAT16, BFLOAT16, BFLOAT16), device, seeds=1, num_sms=1)


@pytest.mark.parametrize("cols", [72, 75], ids=["vectors", "elements"])
@pytest.mark.parametrize(
    ("is_rms", "dtype", "weight_dtype", "residual_dtype"),
    [
        (False, FLOAT16, FLOAT16, FLOAT16),
        (True, BFLOAT16, FLOAT32, BFLOAT16),
        (False, FLOAT16, FLOAT32, FLOAT32),
        (True, BFLOAT16, BFLOAT16, FLOAT32),
        (False, FLOAT32, BFLOAT16, BFLOAT16),
        (True, BFLOAT16, FLOAT16, FLOAT16),
        (False, FLOAT32, FLOAT32, FLOAT16),
    ],
)
def test_dtypes_mix(is_rms, dtype, weight_dtype, residual_dtype, cols: int, device: torch.device) -> None:
    check(Case(3, cols, is_rms, dtype, weight_dtype, residual_dtype), device)


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
def test_optional_arguments(is_rms: bool, options: dict[str, object], device: torch.device) -> None:
    check(replace(Case(3, 72, is_rms), **options), device)


# --- difficult values -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "cols", "num_sms"), [(3, 192, 4), (1, 16400, 4), (1, 16400, 1)])
def test_layer_norm_does_not_cancel_where_the_mean_is_large(rows: int, cols: int, num_sms: int, device) -> None:
    case = Case(rows, cols, False, weight_dtype=None, draw=lambda *shape: 1e4 + torch.randn(shape))
    inputs = case.inputs(device, 0)
    launchers = Launchers(num_sms)
    # One-pass float32 moments would be off by whole units here: E[x²] is 1e8, with a resolution of 8.
    y = by_kernel(case, inputs, **launchers.both)["y"]
    torch.testing.assert_close(y.var(dim=1, unbiased=False).cpu(), torch.ones(rows), atol=1e-3, rtol=0)
    measure(case, device, **launchers.both).check()


@BOTH
def test_outliers(is_rms: bool, device: torch.device) -> None:
    def with_outliers(*shape: int) -> Tensor:
        x = torch.randn(shape)
        x[:, 7] *= 1e4
        x[0] *= 1e-4
        return x

    check(Case(3, 136, is_rms, BFLOAT16, FLOAT32, draw=with_outliers), device)


@BOTH
def test_a_row_of_infinity_or_nan_stays_its_own(is_rms: bool, device: torch.device) -> None:
    x = torch.randn(5, 40, device=device)
    (clean,) = lean(x, None, None, None, 1e-5, 0.0, is_rms)
    x[1, 3], x[3, 0] = float("inf"), float("nan")
    (y,) = in_every_schedule(lambda: lean(x, None, None, None, 1e-5, 0.0, is_rms))
    assert torch.equal(y[::2], clean[::2]) and bool(y[3].isnan().all())


@BOTH
@pytest.mark.parametrize("cols", [24, 1040])
def test_a_row_does_not_depend_on_the_others(cols: int, is_rms: bool, device: torch.device) -> None:
    case = Case(5, cols, is_rms, BFLOAT16, BFLOAT16, BFLOAT16)
    inputs = case.inputs(device, 0)
    together = by_kernel(case, inputs, **Launchers().both)
    one = {name: value[3:4] if value.dim() == 2 else value for name, value in inputs.items()}
    alone = by_kernel(case, one, **Launchers().both)
    for name in ("y", "s", "grad s"):
        assert torch.equal(together[name][3:4], alone[name]), name


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_the_sum_is_exact_and_is_what_is_normalised(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(4, 152, device=device).to(BFLOAT16)
    residual = (3 * torch.randn(4, 152, device=device)).to(dtype)
    y, s = lean(x, None, None, residual, 1e-5, 0.0, False)
    assert torch.equal(s, (x.float() + residual.float()).to(dtype))
    assert torch.equal(y, lean(s, None, None, None, 1e-5, 0.0, False)[0].to(BFLOAT16)) or dtype != BFLOAT16


# --- memory -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_free(layout: str, device: torch.device) -> None:
    case = Case(8, 72, False, BFLOAT16, FLOAT32, BFLOAT16)
    strided = replace(case, view=LAYOUTS[layout])
    launchers, contract = Launchers(), Contract(case.dtype)
    for seed in range(SEEDS):
        inputs = case.inputs(device, seed)
        actual = {
            name: value.flatten(0, -2) if value.dim() > 2 else value
            for name, value in by_kernel(strided, inputs, **launchers.both).items()
        }
        contract.add_all(actual, by_reference(case, inputs), by_reference(case, inputs, torch.float64))
    contract.check()


def test_unaligned_vectors_and_strided_weights(device: torch.device) -> None:
    x = torch.randn(3, 64, device=device)
    weight = torch.randn(65, device=device)[1:]
    twice = torch.randn(64, 2, device=device)
    for bias in (weight, twice[:, 0]):
        (y,) = in_every_schedule(lambda bias=bias: lean(x, weight, bias, None, 1e-5, 0.0, False))
        aligned = lean(x, weight.clone(), bias.clone(), None, 1e-5, 0.0, False)[0]
        torch.testing.assert_close(y, aligned, rtol=1e-6, atol=1e-6)


@BOTH
def test_expanded_inputs(is_rms: bool, device: torch.device) -> None:
    row = torch.randn(48, device=device)
    x, dy = row.expand(6, 48), torch.ones((), device=device).expand(6, 48)
    results = []
    for tensors in ((x, dy), (x.contiguous(), dy.contiguous())):
        launchers = Launchers()
        y, _, mean, rstd = launchers.forward(tensors[0], row, None, None, eps=1e-5, is_rms=is_rms)
        ds, dweight, _ = launchers.backward(tensors[1], None, tensors[0], row, mean, rstd)
        results.append((y, ds, dweight))
    for value, again in zip(*results):
        assert torch.equal(value, again)


def far_apart(rows: Tensor, folder: Path) -> Tensor:
    """Two rows more than 2^31 elements apart; only the pages that hold them are ever touched."""
    elements = 2**31 + 4096
    if rows.is_cuda:
        holder = torch.empty(elements, dtype=rows.dtype, device=rows.device)
    else:
        holder = torch.from_file(str(folder / "holder"), shared=True, size=elements, dtype=rows.dtype)
    return holder.as_strided(rows.shape, (2**31 + 160, 1), 80).copy_(rows)


@BOTH
def test_rows_lie_beyond_2_to_31_elements(is_rms: bool, device: torch.device, tmp_path: Path) -> None:
    case = Case(2, 80, is_rms, BFLOAT16, FLOAT32)
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs, **Launchers().both)
    for name in ("x", "dy"):
        (tmp_path / name).mkdir()
        inputs[name] = far_apart(inputs[name], tmp_path / name)
    for name, value in by_kernel(case, inputs, **Launchers().both).items():
        assert torch.equal(value, expected[name]), name


@BOTH
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (4, 0)])
def test_nothing_to_normalise(shape: tuple[int, ...], is_rms: bool, device: torch.device) -> None:
    x, weight = torch.empty(shape, device=device), torch.randn(shape[-1], device=device)
    op = extension.op("norm_forward")
    y, s, mean, rstd = op(x, weight, None, x, 1e-5, 0.0, is_rms)
    assert y.shape == s.shape == x.shape and rstd.shape == x.shape[:-1]
    ds, dweight, dbias = extension.op("norm_backward")(y, None, s, weight, mean, rstd, 0.0, is_rms, True, FLOAT16)
    assert ds.shape == x.shape and dbias.dtype == FLOAT16
    assert torch.equal(dweight, torch.zeros_like(weight)) and torch.equal(dbias, torch.zeros_like(dbias))


def test_only_what_is_wanted_is_computed(device: torch.device) -> None:
    x, weight = torch.randn(3, 24, device=device), torch.randn(24, device=device)
    launchers = Launchers()
    _, _, mean, rstd = launchers.forward(x, weight, weight, None, eps=1e-5, is_rms=False)
    full = launchers.backward(x, None, x, weight, mean, rstd, dbias_dtype=FLOAT32)
    for need_dweight, dbias_dtype in ((False, None), (True, None), (False, FLOAT32)):
        part = launchers.backward(x, None, x, weight, mean, rstd, need_dweight=need_dweight, dbias_dtype=dbias_dtype)
        assert (part[1] is None, part[2] is None) == (not need_dweight, dbias_dtype is None)
        assert all(value is None or torch.equal(value, other) for value, other in zip(part, full))


# --- what is refused --------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "x must be float32, float16 or bfloat16, got float64": {"x": torch.ones(2, 8, dtype=torch.float64)},
    "x must have at least 1 dimension": {"x": torch.tensor(1.0)},
    "weight must have shape (8), got (7)": {"weight": torch.ones(7)},
    "weight must be float32, float16 or bfloat16, got int32": {"weight": torch.ones(8).int()},
    "bias must have shape (8), got (1, 8)": {"bias": torch.ones(1, 8)},
    "residual must have shape (2, 8), got (8)": {"residual": torch.ones(8)},
    "residual must be float32, float16 or bfloat16, got int64": {"residual": torch.ones(2, 8).long()},
    "eps must be finite and at least 0, got -1": {"eps": -1.0},
    "eps must be finite and at least 0, got nan": {"eps": float("nan")},
    "weight_offset must be finite, got inf": {"weight_offset": float("inf")},
}


@pytest.mark.parametrize("message", REFUSED)
def test_forward_refuses(message: str, device: torch.device) -> None:
    arguments = {
        "x": torch.ones(2, 8),
        "weight": None,
        "bias": None,
        "residual": None,
        "eps": 1e-5,
        "weight_offset": 0.0,
    }
    arguments |= {"is_rms": False} | REFUSED[message]
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments.values()]
    with pytest.raises(ValueError, match=re.escape(message)):
        extension.op("norm_forward")(*moved)


REFUSED_BACKWARD = {
    "dy must have shape (2, 8), got (2, 7)": {"dy": torch.ones(2, 7)},
    "ds must have s's dtype float32, got float16": {"ds": torch.ones(2, 8).half()},
    "ds must have shape (2, 8), got (8)": {"ds": torch.ones(8)},
    "rstd must have the leading shape of s (2, 8), got (3)": {"rstd": torch.ones(3)},
    "mean must be float32, got float16": {"mean": torch.ones(2).half()},
    "rstd must be contiguous": {"rstd": torch.ones(4)[::2]},
    "dbias_dtype must be float32, float16 or bfloat16": {"dbias_dtype": torch.int8},
}


@pytest.mark.parametrize("message", REFUSED_BACKWARD)
def test_backward_refuses(message: str, device: torch.device) -> None:
    arguments = {"dy": torch.ones(2, 8), "ds": None, "s": torch.ones(2, 8), "weight": None, "mean": torch.ones(2)}
    arguments |= {
        "rstd": torch.ones(2),
        "weight_offset": 0.0,
        "is_rms": False,
        "want_dweight": True,
        "dbias_dtype": None,
    }
    arguments |= REFUSED_BACKWARD[message]
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in arguments.values()]
    with pytest.raises(ValueError, match=re.escape(message)):
        extension.op("norm_backward")(*moved)


def test_opcheck(device: torch.device) -> None:
    x, weight = torch.randn(3, 5, 16, device=device), torch.randn(16, device=device)
    utilities = ("test_schema", "test_faketensor")
    ops = torch.ops.pytransformer_cuda
    for op, arguments in (
        (ops.norm_forward, (x, weight, weight, x, 1e-5, 0.0, False)),
        (ops.norm_forward, (x[:, ::2], None, None, None, 1e-5, 1.0, True)),
        (ops.layer_norm, (x, weight, None, 1e-5)),
        (ops.add_rms_norm, (x, x.half(), weight, 1e-5, 1.0)),
    ):
        torch.library.opcheck(op, arguments, test_utils=utilities)
    _, s, mean, rstd = ops.norm_forward(x, weight, weight, x, 1e-5, 0.0, False)
    torch.library.opcheck(
        ops.norm_backward, (x, s, s, weight, mean, rstd, 0.0, False, True, FLOAT16), test_utils=utilities
    )


# --- faults put in ----------------------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from pytransformer import extension
from tests.support.emulator import configure
op = extension.op
for schedule in range(6):
    configure(schedule, num_sms=1)
    for rows, cols in ((6, 40), (5, 1032)):
        x = torch.randn(rows, cols).bfloat16()
        weight = torch.ones(cols)
        y, _, mean, rstd = op("norm_forward")(x, weight, weight, None, 1e-5, 0.0, False)
        dx, dweight, dbias = op("norm_backward")(x, None, x, weight, mean, rstd, 0.0, False, True, torch.float32)
        xhat = torch.nn.functional.layer_norm(x.float(), (cols,))
        assert (y.float() - xhat - 1).abs().max() < 0.05 and not dx.isnan().any(), "wrong result"
        assert (dbias - x.float().sum(0)).abs().max() < 1e-3, "wrong result"
print("nothing was found")
"""
FAULTS = {
    "a row's last vector is read past its end": (
        "address",
        "norm/forward.cuh",
        ("return vector < vectors ? vector : -1;", "return vector <= vectors ? vector : -1;"),
        ["norm/forward_bfloat16.cu"],
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "the next row is not waited for": (
        "address",
        "norm/backward.cuh",
        ("if constexpr (STAGED) ptx::cp_async_wait<0>();", ""),
        ["norm/backward_bfloat16.cu"],
        "cp.async that was never waited for|wrong result",
    ),
    "partial sums are read before they are there": (
        "thread",
        "norm/backward.cu",
        ("slices[threadIdx.y][threadIdx.x] = sum;\n  __syncthreads();", "slices[threadIdx.y][threadIdx.x] = sum;"),
        [],
        "ThreadSanitizer: data race",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not EMULATED, reason="sanitizers see what runs in the emulator")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_kernels_is_reported(fault: str, tmp_path: Path) -> None:
    flavor, source, change, recompile, report = FAULTS[fault]
    result = run_broken(tmp_path, source, [change], SCRIPT, flavor=flavor, recompile=recompile)
    assert result.returncode != 0 and "nothing was found" not in result.stdout
    assert re.search(report, result.stderr), result.stderr[-2000:]
