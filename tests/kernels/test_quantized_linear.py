"""The kernels of the product with codes against the reference: the contract, sizes around a tile, rows in any order, faults to be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytransformer import reference, triton_interpreter
from pytransformer.kernels.quantized_linear import QuantizedConfig, product_config
from pytransformer.verification import SEEDS, Contract, ContractError
from tests.support.broken_kernel import load_broken
from tests.support.launchers import quantized_backward, quantized_by, quantized_forward

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("without_overflow_checks")
# Small tiles: several of each kind, with a rest that no tile divides.
CONFIG = QuantizedConfig(16, 16, 16, 4, 2)


@dataclass(frozen=True)
class Case:
    """One call, forward and backward; ``group_size`` 0: 8 bits."""

    group_size: int
    features: tuple[int, int] = (96, 40)
    num_rows: int = 19
    dtype: torch.dtype = FLOAT32
    has_zero: bool = True
    config: QuantizedConfig | None = CONFIG

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor | None]:
        torch.manual_seed(seed)
        (num_in, num_out), zero_point = self.features, None
        if self.group_size == 0:
            weight = torch.randint(-128, 128, (num_out, num_in)).to(torch.int8)
            scale = (0.5 + torch.rand(num_out)) / 128
        else:
            weight = torch.randint(256, (num_out, num_in // 2)).byte()
            scale = (0.5 + torch.rand(num_out, num_in // self.group_size)) / 8
            zero_point = torch.randint(16, scale.shape).byte().to(device) if self.has_zero else None
        floats = {"x": (self.num_rows, num_in), "bias": (num_out,), "dy": (self.num_rows, num_out)}
        tensors = {name: torch.randn(shape).to(device, self.dtype) for name, shape in floats.items()}
        return {**tensors, "weight": weight.to(device), "scale": scale.to(device, BFLOAT16), "zero_point": zero_point}


def by_kernel(
    case: Case, inputs: dict[str, Tensor | None], forward=quantized_forward, backward=quantized_backward
) -> dict[str, Tensor]:
    x, bias, dy, *codes = inputs.values()
    y = forward(x, *codes, bias, config=case.config)
    return {"y": y, "grad x": backward(dy, *codes, config=case.config)}


def by_reference(inputs: dict[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    x, bias, dy = (inputs[name].to(dtype) for name in ("x", "bias", "dy"))
    x.requires_grad_()
    y = reference.quantized_linear(x, inputs["weight"], inputs["scale"], zero_point=inputs["zero_point"], bias=bias)
    return {"y": y.detach(), "grad x": torch.autograd.grad(y, x, dy)[0]}


def measure(case: Case, device: torch.device, seeds: int = SEEDS, **launchers: Callable[..., object]) -> Contract:
    contract = Contract(case.dtype)
    for seed in range(seeds):
        inputs = case.inputs(device, seed)
        plain, golden = by_reference(inputs, case.dtype), by_reference(inputs, torch.float64)
        for name, value in by_kernel(case, inputs, **launchers).items():
            assert value.is_contiguous() and value.dtype == case.dtype
            kind = "gradient" if name.startswith("grad") else "output"
            contract.add(name, actual=value, plain=plain[name], golden=golden[name], kind=kind)
    return contract


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("group_size", [0, 32])
def test_contract(group_size: int, dtype: torch.dtype, device: torch.device, poison_empty: None) -> None:
    measure(Case(group_size, dtype=dtype), device, seeds=2).check()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("has_zero", [False, True])
def test_groups(group_size: int, has_zero: bool, device: torch.device, poison_empty: None) -> None:
    measure(Case(group_size, (2 * group_size, 24), 3, has_zero=has_zero), device, seeds=1).check()


@pytest.mark.parametrize("features", [(1, 1), (1, 24), (24, 1), (16, 32), (17, 33), (48, 8)])
def test_widths_around_a_tile(features: tuple[int, int], device: torch.device, poison_empty: None) -> None:
    measure(Case(0, features, 17), device, seeds=1).check()


@pytest.mark.parametrize("num_rows", [1, 40, 70])
@pytest.mark.parametrize("group_size", [0, 64])
def test_the_tiles_that_ship(num_rows: int, group_size: int, device: torch.device) -> None:
    measure(Case(group_size, (192, 136), num_rows, BFLOAT16, config=None), device, seeds=1).check()


def test_no_rows(device: torch.device) -> None:
    case = Case(32, num_rows=0)
    results = by_kernel(case, case.inputs(device, 0))
    assert results["y"].shape == (0, 40) and results["grad x"].shape == (0, 96)


@pytest.mark.parametrize("group_size", [0, 32])
def test_rows_may_be_strided(group_size: int, device: torch.device, poison_empty: None) -> None:
    case = Case(group_size, dtype=BFLOAT16)
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    strided = dict(inputs)
    for name in ("x", "dy"):
        tensor = inputs[name]
        holder = tensor.new_full((len(tensor), tensor.shape[-1] + 5), float("nan"))
        strided[name] = holder[..., 3 : 3 + tensor.shape[-1]].copy_(tensor)
    turned = {**inputs, **{name: inputs[name].t().contiguous().t() for name in ("x", "dy")}}
    expanded = {**inputs, "bias": inputs["bias"][:1].expand(40)}
    for changed in (strided, turned):
        for name, value in by_kernel(case, changed).items():
            assert torch.equal(value, expected[name]), name
    same = {**inputs, "bias": inputs["bias"][:1].repeat(40)}
    assert torch.equal(by_kernel(case, expanded)["y"], by_kernel(case, same)["y"])


@pytest.mark.parametrize("group_size", [0, 32])
def test_a_row_does_not_depend_on_the_others(group_size: int, device: torch.device) -> None:
    together, alone = Case(group_size, dtype=BFLOAT16), Case(group_size, num_rows=1, dtype=BFLOAT16)
    inputs = together.inputs(device, 0)
    results = by_kernel(together, inputs)
    one = {name: value[17:18] if name in ("x", "dy") else value for name, value in inputs.items()}
    for name, value in by_kernel(alone, one).items():
        assert torch.equal(value, results[name][17:18]), name


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_tiles_follow_the_rows(dtype: torch.dtype) -> None:
    rows = [product_config(number, dtype).block_rows for number in (1, 16, 17, 65, 100_000)]
    assert rows == sorted(rows) and rows[0] == 16 and (rows[-1] >= 64 or dtype == FLOAT32)


# --- faults -----------------------------------------------------------------------------------------------------------------------------

FAULTS = {
    "no mask at the last row": ("rows < num_rows, cols < NUM_COLS", "rows < num_rows + 1, cols < NUM_COLS"),
    "no mask at the last column": ("rows < num_rows, cols < NUM_COLS", "rows < num_rows, cols < NUM_COLS + 1"),
    "no mask at the last inner column": ("- done\n            x =", "- done + 1\n            x ="),
    "the codes stand still": ("            weight_tile += BLOCK_INNER\n", ""),
    "the codes of a group stand still": ("            weight_tile += HALF\n", ""),
    "x stands still": ("            low_tile += GROUP_SIZE\n", ""),
    "halves exchanged": ("return (codes & 15).to(tl.int32) - zero, (codes >> 4)", "return (codes >> 4).to(tl.int32) - zero, (codes & 15)"),
    "zero points of the first group": ("zero_ptr + group_of_cols + group,", "zero_ptr + group_of_cols,"),
    "scales of the first group": ("scale_ptr + group_of_cols + group,", "scale_ptr + group_of_cols,"),
    "no zero points": ("zero = tl.load(zero_ptr + groups, mask=is_code, other=0).to(tl.int32)", "zero = 8"),
    "scale of the first rows": ("scale_ptr + done + inner", "scale_ptr + inner"),
    "scales of the first rows of groups": ("            groups += BLOCK_INNER * NUM_GROUPS\n", ""),
    "the group of a byte is that of a column": ("(stored // HALF)[None, :]", "(stored // GROUP_SIZE)[None, :]"),
    "columns of the halves beside each other": ("cols = stored // HALF * GROUP_SIZE + stored % HALF", "cols = stored"),
    "too few programs": ("cdiv(weight.shape[1], config.block_cols), cdiv(dy", "weight.shape[1] // config.block_cols, cdiv(dy"),
}  # fmt: skip
FAULT_CASES = (
    Case(0, (40, 40), dtype=FLOAT16),
    Case(32, (96, 40), dtype=FLOAT16),
    Case(32, (160, 24), 3, dtype=FLOAT16),
)


def is_caught(device: torch.device, **launchers: Callable[..., object]) -> bool:
    """Whether the check that the good kernels pass says no: by the contract, or by an error of the interpreter."""
    try:
        for case in FAULT_CASES:
            measure(case, device, seeds=1, **launchers).check()
    except (ContractError, triton_interpreter.KernelFault):
        return True
    return False


def test_the_check_for_faults_passes_faithful_copies(device: torch.device, tmp_path: Path, poison_empty: None) -> None:
    assert not is_caught(device, **quantized_by(load_broken(tmp_path, "quantized_linear")))


# Faults write and read out of bounds: the interpreter sees that, a GPU would let it corrupt the other tests.
@pytest.mark.skipif(not triton_interpreter.installed(), reason="faulty kernels run in the interpreter only")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught(fault: str, device: torch.device, tmp_path: Path, poison_empty: None) -> None:
    assert is_caught(device, **quantized_by(load_broken(tmp_path, "quantized_linear", FAULTS[fault])))
