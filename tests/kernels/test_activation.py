"""The SwiGLU, GEGLU and GELU kernels against the reference: the contract, difficult values, memory, and faults that must be seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from pytransformer import reference, triton_interpreter
from pytransformer.kernels.activation import (
    BACKWARD_ELEMENTS,
    FORWARD_ELEMENTS,
    ActivationConfig,
    tile_config,
)
from pytransformer.verification import SEEDS, Contract, ContractError
from tests.support.broken_kernel import load_broken
from tests.support.draws import pool
from tests.support.launchers import activation_backward, activation_by, activation_forward

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
# How the kernel is given gate and up.
FORMS = ("packed", "two tensors", "not gated")
ALL_ACTIVATIONS = pytest.mark.parametrize("activation", ACTIVATIONS)
ALL_FORMS = pytest.mark.parametrize("form", FORMS)


@dataclass(frozen=True)
class Case:
    """One call, forward and backward. ``draw`` makes the gate from its shape; ``view`` lays a contiguous tensor out in another way."""

    rows: int
    cols: int
    activation: str = "silu"
    form: str = "packed"
    dtype: torch.dtype = FLOAT32
    config: ActivationConfig | None = None
    draw: Callable[..., Tensor] = lambda *shape: 2 * torch.randn(shape)
    view: Callable[[Tensor], Tensor] | None = None

    @property
    def gated(self) -> bool:
        return self.form != "not gated"

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """gate (with up behind it, or up of its own) and dout, on the device."""
        torch.manual_seed(seed)
        tensors = {"gate": self.draw(self.rows, self.cols), "dout": torch.randn(self.rows, self.cols)}
        if self.gated:
            tensors["up"] = torch.randn(self.rows, self.cols)
        if self.form == "packed":
            tensors["gate"] = torch.cat((tensors["gate"], tensors.pop("up")), dim=-1)
        return {name: tensor.to(device, self.dtype) for name, tensor in tensors.items()}


def by_kernel(
    case: Case, inputs: dict[str, Tensor], forward=activation_forward, backward=activation_backward
) -> dict[str, Tensor]:
    """Output and gradients of one call of the launchers."""
    viewed = {name: case.view(value) if case.view else value for name, value in inputs.items()}
    gate, up, dout = viewed["gate"], viewed.get("up"), viewed["dout"]
    options = {"activation": case.activation, "gated": case.gated, "config": case.config}
    out = forward(gate, up, **options)
    dgate, dup = backward(dout, gate, up, **options)
    assert out.is_contiguous() and out.dtype == gate.dtype and out.shape == dout.shape
    assert dgate.is_contiguous() and dgate.dtype == gate.dtype and dgate.shape == gate.shape
    assert (dup is None) == (up is None)
    results = {"out": out, "grad gate": dgate, "grad up": dup}
    return {
        name: value.reshape(inputs["gate" if "gate" in name else "dout"].shape)
        for name, value in results.items()
        if value is not None
    }


def by_reference(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype = FLOAT32) -> dict[str, Tensor]:
    """The same by the reference and autograd."""
    leaves = {name: value.detach().cpu().to(dtype).requires_grad_() for name, value in inputs.items()}
    dout = leaves.pop("dout")
    options = {} if case.activation == "silu" else {"approximate": "tanh" if "tanh" in case.activation else "none"}
    if case.form == "not gated" and case.activation == "silu":
        out = torch.nn.functional.silu(leaves["gate"])
    elif case.form == "not gated":
        out = reference.gelu(leaves["gate"], **options)
    else:
        out = (reference.swiglu if case.activation == "silu" else reference.geglu)(*leaves.values(), **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out.detach(), **{f"grad {name}": gradient for name, gradient in zip(leaves, gradients)}}


def measure(
    case: Case,
    device: torch.device,
    seeds: int = SEEDS,
    least: int | None = None,
    **launchers: Callable[..., object],
) -> Contract:
    """The contract of a case over some seeds; over ``least`` and all only in doubt where what is asked is which cells are read.

    What the kernel promises, float32 rounded once, is what it is compared with.
    """
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        inputs = case.inputs(device, seed)
        actual = by_kernel(case, inputs, **launchers)
        plain = {name: value.to(case.dtype) for name, value in by_reference(case, inputs).items()}
        golden = by_reference(case, inputs, torch.float64)
        assert actual.keys() == golden.keys()
        for name, value in actual.items():
            kind = "gradient" if name.startswith("grad") else "output"
            contract.add(name, actual=value, plain=plain[name], golden=golden[name], kind=kind)

    return pool(contract, add, least, seeds)


# --- the contract -----------------------------------------------------------------------------------------------------------------------


@ALL_ACTIVATIONS
@ALL_FORMS
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_contract(activation: str, form: str, dtype: torch.dtype, device: torch.device, poison_empty: None) -> None:
    measure(Case(5, 72, activation, form, dtype), device).check()


@ALL_FORMS
@pytest.mark.parametrize("cols", [1, 2, 7, 64, 100, 1023, 2049])
def test_contract_holds_at_every_width(cols: int, form: str, device: torch.device, poison_empty: None) -> None:
    # Odd widths: the second half of a packed row is nowhere aligned.
    measure(Case(1 if cols > 100 else 9, cols, "silu", form, BFLOAT16), device, least=1).check()


@ALL_FORMS
@pytest.mark.parametrize("rows", [1, 3, 4, 5])
def test_rows_and_columns_around_a_tile(rows: int, form: str, device: torch.device, poison_empty: None) -> None:
    measure(Case(rows, 40, "gelu_tanh", form, FLOAT16, ActivationConfig(4, 16)), device, least=1).check()


# --- difficult values -------------------------------------------------------------------------------------------------------------------


def _all_sizes(*shape: int) -> Tensor:
    """Both signs of every power of two that float32 has, subnormal ones included, and a dense range around 0."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    values = torch.cat((torch.exp2(exponents), torch.linspace(0, 20, math.prod(shape) // 2 - len(exponents))))
    return torch.cat((values, -values)).float().view(shape)


@ALL_ACTIVATIONS
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_values_of_every_size(activation: str, dtype: torch.dtype, device: torch.device) -> None:
    largest = torch.finfo(dtype).max / 2
    case = Case(8, 256, activation, "not gated", dtype, draw=lambda *s: _all_sizes(*s).clamp(-largest, largest))
    gate = case.inputs(device, 0)["gate"]
    ones = torch.ones_like(gate)
    # Sorted by size: an absolute error that is small beside the largest values must not hide behind them.
    for low, high in ((0.0, 1e-4), (1e-4, 1.0), (1.0, 30.0), (30.0, math.inf)):
        chosen = gate[(gate.abs() >= low) & (gate.abs() < high)].view(1, -1)
        inputs = {"gate": chosen, "dout": ones[:1, :1].expand_as(chosen)}
        plain = {name: value.to(dtype) for name, value in by_reference(case, inputs).items()}
        contract = Contract(dtype)
        for name, value in by_kernel(case, inputs).items():
            # torch's tanh form overflows in its float32 gradient; the kernel's must not.
            golden = by_reference(case, inputs, torch.float64)[name]
            contract.add(name, actual=value, plain=plain[name], golden=golden, kind="gradient")
        contract.check()


@ALL_ACTIVATIONS
def test_tiny_values_keep_their_relative_accuracy(activation: str, device: torch.device) -> None:
    x = torch.tensor([[sign * 2.0**power for power in (-120, -60, -30, -14) for sign in (-1, 1)]], device=device)
    results = by_kernel(Case(1, 8, activation, "not gated"), {"gate": x, "dout": torch.ones_like(x)})
    # f(x) = x / 2 + O(x²), f'(x) = 1/2 + O(x).
    assert bool(((results["out"] / x - 0.5).abs() <= x.abs() + 2**-24).all())
    assert bool(((results["grad gate"] - 0.5).abs() <= x.abs() + 2**-24).all())


@ALL_ACTIVATIONS
@ALL_FORMS
def test_infinity_and_nan_stay_their_own(activation: str, form: str, device: torch.device) -> None:
    case = Case(3, 9, activation, form)
    inputs = case.inputs(device, 0)
    clean = by_kernel(case, inputs)
    special = torch.tensor([math.inf, -math.inf, math.nan], device=device)
    inputs["gate"][1, 3:6] = special
    if form != "not gated":
        ups = inputs["up"] if form == "two tensors" else inputs["gate"][:, 9:]
        ups[1, 3:6] = 2.0
        inputs["dout"][1, 3:6] = 1.0
    results = by_kernel(case, inputs)
    touched = torch.zeros(3, 9, dtype=torch.bool, device=device)
    touched[1, 3:6] = True
    assert results["out"][1, 3] == math.inf and bool(results["out"][1, 4:6].isnan().all())
    assert bool(results["grad gate"][1, 3:6].isnan().all())
    for name, value in results.items():
        untouched = ~(touched.repeat(1, value.shape[-1] // 9))
        assert torch.equal(value[untouched], clean[name][untouched]), name


# --- shapes and memory ------------------------------------------------------------------------------------------------------------------


@ALL_FORMS
@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (4, 0)])
def test_nothing_to_do(shape: tuple[int, ...], form: str, device: torch.device) -> None:
    dout = torch.empty(shape, device=device)
    gate = torch.cat((dout, dout), dim=-1) if form == "packed" else dout
    up = dout if form == "two tensors" else None
    options = {"activation": "silu", "gated": form != "not gated"}
    assert activation_forward(gate, up, **options).shape == shape
    dgate, dup = activation_backward(dout, gate, up, **options)
    assert dgate.shape == gate.shape and (dup is None if up is None else dup.shape == shape)


def _surrounded(tensor: Tensor, before: int, behind: int) -> Tensor:
    """The tensor's values amid NaN, so that each row starts ``before`` elements into a longer one."""
    rows, cols = tensor.shape
    holder = tensor.new_full((rows, before + cols + behind), float("nan"))
    holder[:, before : before + cols] = tensor
    return holder[:, before : before + cols]


def _two_strides(tensor: Tensor) -> Tensor:
    """Rows in groups of two, as heads of a fused projection lie."""
    holder = tensor.new_full((tensor.shape[0] // 2, 4, tensor.shape[1]), float("nan"))
    holder[:, 1:3] = tensor.view(-1, 2, tensor.shape[1])
    return holder[:, 1:3]


def _permuted(tensor: Tensor) -> Tensor:
    """Leading dimensions that no two strides walk in order."""
    batch = tensor.view(2, 2, tensor.shape[0] // 4, tensor.shape[1])
    return batch.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)


LAYOUTS = {
    "padded rows": lambda tensor: _surrounded(tensor, 0, 8),
    "unaligned": lambda tensor: _surrounded(tensor, 3, 2),
    "two strides": _two_strides,
    "permuted": _permuted,
    "columns strided": lambda tensor: tensor.t().contiguous().t(),
}


@ALL_FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_free(layout: str, form: str, device: torch.device, poison_empty: None) -> None:
    case = Case(12, 24, "silu", form, BFLOAT16, ActivationConfig(4, 16))
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    for name, value in by_kernel(replace(case, view=LAYOUTS[layout]), inputs).items():
        assert torch.equal(value, expected[name]), name


@ALL_FORMS
@pytest.mark.parametrize("layout", ["padded rows", "unaligned", "columns strided"])
def test_one_tensor_may_be_strided_and_the_others_not(layout: str, form: str, device: torch.device) -> None:
    case = Case(12, 24, "silu", form, BFLOAT16)
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    for strided in inputs:
        results = by_kernel(case, {**inputs, strided: LAYOUTS[layout](inputs[strided])})
        for name, value in results.items():
            assert torch.equal(value, expected[name]), (strided, name)


@ALL_FORMS
def test_expanded_inputs(form: str, device: torch.device) -> None:
    case = Case(6, 48, "gelu", form)
    inputs = {name: value[:1].expand_as(value) for name, value in case.inputs(device, 0).items()}
    inputs["dout"] = torch.ones((), device=device).expand(6, 48)
    expected = by_kernel(case, {name: value.contiguous() for name, value in inputs.items()})
    for name, value in by_kernel(case, inputs).items():
        assert torch.equal(value, expected[name]), name


@ALL_FORMS
def test_rows_lie_beyond_2_to_31_elements(form: str, device: torch.device) -> None:
    # Of the 4 GB only the pages of the two rows at its ends are ever touched.
    holder = torch.empty(2**31 + 2048, dtype=BFLOAT16, device=device)
    case = Case(2, 80, "silu", form, BFLOAT16)
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    for place, (name, value) in enumerate(inputs.items()):
        inputs[name] = holder.as_strided(value.shape, (2**31 + 512, 1), 256 * place).copy_(value)
    for name, value in by_kernel(case, inputs).items():
        assert torch.equal(value, expected[name]), name


def rows_of_small_strides_beyond_2_to_31(device: torch.device, **launchers: Callable[..., object]) -> bool:
    """Whether 32-bit strides lead to the right rows at 64-bit offsets. Only the pages where rows begin are ever touched."""
    holder = torch.empty(2**31 + 2048, dtype=BFLOAT16, device=device)
    case = Case(3, 80, "silu", "not gated", BFLOAT16)
    inputs = case.inputs(device, 0)
    expected = by_kernel(case, inputs)
    inputs["gate"] = holder.as_strided((3, 80), (2**30, 1)).copy_(inputs["gate"])
    results = by_kernel(case, inputs, **launchers)
    return all(torch.equal(value, expected[name]) for name, value in results.items())


def test_rows_of_small_strides_beyond_2_to_31_elements(device: torch.device) -> None:
    assert rows_of_small_strides_beyond_2_to_31(device)


def test_a_row_does_not_depend_on_the_others(device: torch.device) -> None:
    case = Case(5, 24, "gelu", "packed", BFLOAT16)
    inputs = case.inputs(device, 0)
    together = by_kernel(case, inputs)
    for name, value in by_kernel(case, {name: value[3:4] for name, value in inputs.items()}).items():
        assert torch.equal(together[name][3:4], value), name


# --- launch policy ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cols", [1, 3, 64, 100, 500, 1000, 1024, 2048, 5632, 5000, 11008, 14336, 18944, 131072])
def test_tiles_are_full(cols: int) -> None:
    for elements in (FORWARD_ELEMENTS, BACKWARD_ELEMENTS):
        config = tile_config(cols, elements)
        assert config.block_rows * config.block_cols == elements
        assert config.block_cols & (config.block_cols - 1) == 0
        # Widths of models are divided without a rest.
        assert cols % config.block_cols == 0 or cols % 64


# --- faults -----------------------------------------------------------------------------------------------------------------------------

FAULTS = {
    "no mask at the row's end": ("& (cols < NUM_COLS)", "& (cols < NUM_COLS + 1)"),
    "no mask at the last row": ("(rows < num_rows)[:, None]", "(rows < num_rows + 1)[:, None]"),
    "tiles of a row counted wrongly": ("(NUM_COLS + BLOCK_COLS - 1) // BLOCK_COLS", "(NUM_COLS + BLOCK_COLS - 1) // BLOCK_COLS - 1"),
    "multiplied with the gate": ("out *= up", "out *= gate"),
    "gradient of up not written": ("tl.store(dgate_tile + NUM_COLS, (dout", "tl.store(dgate_tile, (dout"),
    "packed gradients overlap": ("rows[:, None] * (2 * NUM_COLS) + cols", "rows[:, None] * NUM_COLS + cols"),
    "gate's rows taken for dout's": ("stride_dout_group, stride_dout_row, GROUPED", "stride_gate_group, stride_gate_row, GROUPED"),
    "slope without its second term": ("slope = sigmoid + x *", "slope = sigmoid + 0.0 *"),
    "sigmoid of one sign": ("tl.where(x >= 0, 1.0, decay)", "1.0"),
    "wrong slope of tanh": ("0.134145", "0.044715"),
    "wrong constant of the normal distribution": ("0.3989422804014327", "0.4"),
}  # fmt: skip


def _is_caught(case: Case, device: torch.device, **launchers: Callable[..., object]) -> bool:
    """Whether the check that the good kernels pass says no: by the contract, or by an error of the interpreter."""
    try:
        measure(case, device, seeds=1, **launchers).check()  # faults are gross
    except (ContractError, triton_interpreter.KernelFault):
        return True
    return False


FAULT_CASES = {
    activation: Case(7, 41, activation, "packed", FLOAT16, ActivationConfig(4, 16)) for activation in ACTIVATIONS
}


def test_the_check_for_faults_passes_faithful_copies(device: torch.device, tmp_path: Path, poison_empty: None) -> None:
    copy = load_broken(tmp_path, "activation")
    for case in FAULT_CASES.values():
        assert not _is_caught(case, device, **activation_by(copy))


# Faults write and read out of bounds: the interpreter sees that, a GPU would let it corrupt the other tests.
@pytest.mark.skipif(not triton_interpreter.installed(), reason="faulty kernels run in the interpreter only")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_kernel_is_caught(fault: str, device: torch.device, tmp_path: Path, poison_empty: None) -> None:
    broken = load_broken(tmp_path, "activation", FAULTS[fault])
    activation = "gelu_tanh" if "tanh" in fault else "gelu" if "normal" in fault else "silu"
    assert _is_caught(FAULT_CASES[activation], device, **activation_by(broken))


@pytest.mark.skipif(not triton_interpreter.installed(), reason="faulty kernels run in the interpreter only")
def test_a_fault_in_offsets_is_caught(device: torch.device, tmp_path: Path) -> None:
    good = "gate_offsets = row_offsets(rows, rows_per_group"
    broken = load_broken(tmp_path, "activation", (good, good.replace("(rows,", "(rows.to(tl.int32),")))
    with pytest.raises(InterpreterError, match="int32 overflow detected"):
        rows_of_small_strides_beyond_2_to_31(device, forward=activation_by(broken)["forward"])
