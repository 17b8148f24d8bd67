"""The kernels of the grouped product against the reference: the contract, groups of all sizes, memory, and faults that must be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytransformer import reference, triton_interpreter
from pytransformer.kernels.grouped_linear import GroupedConfig, gradient_config, product_config
from pytransformer.verification import SEEDS, Contract, ContractError
from tests.support.broken_kernel import load_broken
from tests.support.launchers import grouped_backward, grouped_by, grouped_forward

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.usefixtures("without_overflow_checks")
# Small tiles: several of each kind in few rows, with a rest that no tile divides.
CONFIG, GRADIENT = GroupedConfig(16, 16, 16, 4, 2), GroupedConfig(16, 32, 16, 4, 2)
ROUTINGS = {
    "even": (16, 16),
    "ragged": (1, 17, 15),
    "some empty": (0, 5, 0, 0, 18, 0),
    "all in one": (0, 0, 33),
    "all in the first": (33, 0, 0),
    "one row": (0, 1, 0),
    "one group": (19,),
}


@dataclass(frozen=True)
class Case:
    """One call, forward and backward."""

    sizes: tuple[int, ...]
    features: tuple[int, int] = (20, 24)
    dtype: torch.dtype = FLOAT32
    config: GroupedConfig | None = CONFIG
    gradient: GroupedConfig | None = GRADIENT

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        (num_in, num_out), groups, total = self.features, len(self.sizes), sum(self.sizes)
        tensors = {
            "x": torch.randn(total, num_in),
            "weight": torch.randn(groups, num_out, num_in),
            "bias": torch.randn(groups, num_out),
            "dy": torch.randn(total, num_out),
        }
        return {name: tensor.to(device, self.dtype) for name, tensor in tensors.items()}

    def offsets(self, device: torch.device) -> Tensor:
        return torch.tensor((0, *self.sizes)).cumsum(0).to(device, torch.int32)


def by_kernel(
    case: Case, inputs: dict[str, Tensor], forward: Callable[..., Tensor] = grouped_forward, backward=grouped_backward
) -> dict[str, Tensor]:
    x, weight, bias, dy = inputs.values()
    offsets = case.offsets(x.device)
    y = forward(x, weight, offsets, bias, config=case.config)
    dx, dweight, dbias = backward(dy, x, weight, offsets, config=case.config, gradient=case.gradient)
    return {"y": y, "grad x": dx, "grad weight": dweight, "grad bias": dbias}


def by_reference(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}
    dy = leaves.pop("dy").detach()
    y = reference.grouped_linear(leaves["x"], leaves["weight"], case.offsets(dy.device), bias=leaves["bias"])
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"grad {name}": gradient for name, gradient in zip(leaves, gradients)}}


def measure(case: Case, device: torch.device, seeds: int = SEEDS, **launchers: Callable[..., object]) -> Contract:
    contract = Contract(case.dtype)
    for seed in range(seeds):
        inputs = case.inputs(device, seed)
        plain, golden = by_reference(case, inputs, case.dtype), by_reference(case, inputs, torch.float64)
        for name, value in by_kernel(case, inputs, **launchers).items():
            assert value.is_contiguous() and value.dtype == case.dtype
            kind = "gradient" if name.startswith("grad") else "output"
            contract.add(name, actual=value, plain=plain[name], golden=golden[name], kind=kind)
    return contract


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_contract(dtype: torch.dtype, device: torch.device, poison_empty: None) -> None:
    measure(Case((1, 0, 17, 4), dtype=dtype), device).check()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_groups_of_all_sizes(routing: str, dtype: torch.dtype, device: torch.device, poison_empty: None) -> None:
    measure(Case(ROUTINGS[routing], dtype=dtype), device, seeds=1).check()


@pytest.mark.parametrize("features", [(1, 1), (1, 24), (24, 1), (16, 32), (17, 33), (48, 8)])
def test_widths_around_a_tile(features: tuple[int, int], device: torch.device, poison_empty: None) -> None:
    measure(Case((3, 0, 18), features), device, seeds=1).check()


@pytest.mark.parametrize("sizes", [(5, 0, 3), (40, 60), (160, 0, 100)])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_the_tiles_that_ship(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    measure(Case(sizes, (72, 136), dtype, None, None), device, seeds=1).check()


def test_no_rows(device: torch.device) -> None:
    case = Case((0, 0))
    results = by_kernel(case, case.inputs(device, 0))
    assert results["y"].shape == (0, 24) and results["grad x"].shape == (0, 20)
    assert bool((results["grad weight"] == 0).all()) and bool((results["grad bias"] == 0).all())


def test_what_is_in_other_groups_stays_theirs(device: torch.device, poison_empty: None) -> None:
    """NaN in the rows, the weight and the gradient of one group, which shares tiles' edges with its neighbours."""
    case = Case((7, 9, 21), dtype=BFLOAT16)
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    rows = slice(7, 16)
    for name in ("x", "dy"):
        inputs[name][rows] = float("nan")
    inputs["weight"][1] = inputs["bias"][1] = float("nan")
    for name, value in by_kernel(case, inputs).items():
        own = [1] if name in ("grad weight", "grad bias") else list(range(7, 16))
        kept = [index for index in range(len(value)) if index not in own]
        assert torch.equal(value[kept], expected[name][kept]), name
        assert bool(value[own].isnan().all()), name


def test_rows_and_weights_may_be_strided(device: torch.device, poison_empty: None) -> None:
    case = Case((4, 0, 19), dtype=BFLOAT16)
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    strided = {}
    for name, tensor in inputs.items():
        holder = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), float("nan"))
        strided[name] = holder[..., 3 : 3 + tensor.shape[-1]].copy_(tensor)
    strided["bias"] = inputs["bias"].t().contiguous().t()
    for changed in (strided, {**inputs, "dy": inputs["dy"].t().contiguous().t()}):
        for name, value in by_kernel(case, changed).items():
            assert torch.equal(value, expected[name]), name


def test_a_gradient_of_an_expanded_tensor(device: torch.device) -> None:
    case = Case((4, 0, 19))
    inputs = case.inputs(device, 0)
    inputs["dy"] = torch.ones((), device=device).expand_as(inputs["dy"])
    expected = by_kernel(case, {**inputs, "dy": inputs["dy"].contiguous()})
    for name, value in by_kernel(case, inputs).items():
        assert torch.equal(value, expected[name]), name


def test_only_what_is_wanted_is_computed(device: torch.device) -> None:
    case = Case((4, 6))
    x, weight, _, dy = case.inputs(device, 0).values()
    for index, name in enumerate(("want_dx", "want_dweight", "want_dbias")):
        wanted = dict.fromkeys(("want_dx", "want_dweight", "want_dbias"), False) | {name: True}
        found = grouped_backward(dy, x, weight, case.offsets(device), **wanted)
        assert [each is not None for each in found] == [place == index for place in range(3)]


def offsets_beyond_2_to_31(device: torch.device, **launchers: Callable[..., object]) -> bool:
    """Whether rows and weights are found that lie more than 2³¹ elements away. Only the pages where they begin are ever touched."""
    case = Case((1, 2), (16, 16), BFLOAT16)
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    holder = torch.empty(2**32 + 4096, dtype=BFLOAT16, device=device)
    for place, name in enumerate(("x", "dy")):
        inputs[name] = holder.as_strided((3, 16), (2**31 - 16, 1), 64 * place).copy_(inputs[name])
    inputs["weight"] = holder.as_strided((2, 16, 16), (2**31 + 1024, 32, 1), 256).copy_(inputs["weight"])
    return all(torch.equal(value, expected[name]) for name, value in by_kernel(case, inputs, **launchers).items())


def test_rows_and_weights_beyond_2_to_31_elements(device: torch.device) -> None:
    if triton_interpreter.installed():
        triton_interpreter.install()  # which checks each integer operation for overflow
    assert offsets_beyond_2_to_31(device)


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    together, alone = Case((3, 9), dtype=BFLOAT16), Case((0, 1), dtype=BFLOAT16)
    inputs = together.inputs(device, 0)
    y = by_kernel(together, inputs)["y"]
    one = {name: value[5:6] if name in ("x", "dy") else value for name, value in inputs.items()}
    assert torch.equal(by_kernel(alone, one)["y"], y[5:6])


def test_the_same_bits_each_run(device: torch.device) -> None:
    case = Case((9, 0, 30), dtype=BFLOAT16)
    inputs = case.inputs(device, 0)
    first = by_kernel(case, inputs)
    for _ in range(3 if triton_interpreter.installed() else 200):
        assert all(torch.equal(value, first[name]) for name, value in by_kernel(case, inputs).items())


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_tiles_follow_the_mean_size_of_a_group(dtype: torch.dtype) -> None:
    rows = [product_config(total, 8, dtype).block_rows for total in (1, 8 * 16, 8 * 17, 8 * 65, 100_000)]
    assert rows == sorted(rows) and rows[0] == 16 and rows[-1] >= 64
    for config in (product_config(100_000, 8, dtype), gradient_config(dtype)):
        # Of the factors, by stage; the least that a supported part has is 99 KB.
        bytes_of_stage = (config.block_rows + config.block_cols) * config.block_inner * dtype.itemsize
        assert bytes_of_stage * config.num_stages <= 99 * 1024


# --- faults -----------------------------------------------------------------------------------------------------------------------------

MASKS = "is_row, is_col = rows < end, cols < NUM_COLS\n        x_tile"
FAULTS = {
    "no mask at the group's last row": (MASKS, MASKS.replace("< end", "< end + 1")),
    "no mask at the last column": (MASKS, MASKS.replace("NUM_COLS", "NUM_COLS + 1")),
    "no mask at the last inner column": ("is_inner = inner < NUM_INNER - done", "is_inner = inner < NUM_INNER - done + 1"),
    "tiles of a group counted wrongly": ("(ends - starts + BLOCK_ROWS - 1) // BLOCK_ROWS", "(ends - starts) // BLOCK_ROWS"),
    "the tile of the group before": ("inside & (tiles_up_to <= tile)", "inside & (tiles_up_to < tile)"),
    "rows from the first group's start": ("rows = start + (tile - first_of_group)", "rows = (tile - first_of_group)"),
    "bias of the first group": ("bias_ptr + group.to(tl.int64) * stride_bias_group", "bias_ptr"),
    "weight of the first group": ("weight_ptr + group.to(tl.int64) * stride_weight_group", "weight_ptr"),
    "the rows of x stand still": ("            x_tile += BLOCK_INNER\n", ""),
    "too few tiles": ("config.block_rows + min(num_groups, x.shape[0])", "config.block_rows + 1"),
    "dweight reads the next group's rows": ("tl.arange(0, BLOCK_INNER) < end - first", "tl.arange(0, BLOCK_INNER) < end - first + 1"),
    "dweight of the first rows": ("start.to(tl.int64) + tl.arange", "start.to(tl.int64) * 0 + tl.arange"),
    "dbias reads the next group's rows": ("is_inside = (rows < end - first)[:, None]", "is_inside = (rows < end - first + 1)[:, None]"),
}  # fmt: skip
FAULT_CASES = (Case((5, 0, 19, 3), dtype=FLOAT16),)


def is_caught(device: torch.device, **launchers: Callable[..., object]) -> bool:
    """Whether the check that the good kernels pass says no: by the contract, or by an error of the interpreter."""
    try:
        for case in FAULT_CASES:
            measure(case, device, seeds=1, **launchers).check()
    except (ContractError, triton_interpreter.KernelFault):
        return True
    return False


def test_the_check_for_faults_passes_faithful_copies(device: torch.device, tmp_path: Path, poison_empty: None) -> None:
    assert not is_caught(device, **grouped_by(load_broken(tmp_path, "grouped_linear")))


# Faults write and read out of bounds: the interpreter sees that, a GPU would let it corrupt the other tests.
@pytest.mark.skipif(not triton_interpreter.installed(), reason="faulty kernels run in the interpreter only")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught(fault: str, device: torch.device, tmp_path: Path, poison_empty: None) -> None:
    assert is_caught(device, **grouped_by(load_broken(tmp_path, "grouped_linear", FAULTS[fault])))


@pytest.mark.skipif(not triton_interpreter.installed(), reason="faulty kernels run in the interpreter only")
def test_a_fault_in_offsets_is_caught(device: torch.device, tmp_path: Path) -> None:
    from triton.runtime.errors import InterpreterError

    good = "x_ptr + rows.to(tl.int64)[:, None] * stride_x_row"
    broken = load_broken(tmp_path, "grouped_linear", (good, good.replace(".to(tl.int64)", "")))
    triton_interpreter.install()
    with pytest.raises(InterpreterError, match="int32 overflow detected"):
        offsets_beyond_2_to_31(device, **grouped_by(broken))
