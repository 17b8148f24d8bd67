"""Random calls of the norm kernels, and the contract of their outputs and gradients; for Triton's launchers and those of the extension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.kernels.norm.forward import NormConfig
from pytransformer.verification import SEEDS, Contract
from tests.support.draws import pool
from tests.support.launchers import norm_backward, norm_forward

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
BOTH = pytest.mark.parametrize("is_rms", [False, True], ids=["layer_norm", "rms_norm"])


@dataclass(frozen=True)
class Case:
    """One call, forward and backward. ``draw`` makes x from its shape; ``view`` lays a contiguous tensor out in another way."""

    rows: int
    cols: int
    is_rms: bool
    dtype: torch.dtype = FLOAT32
    weight_dtype: torch.dtype | None = FLOAT32
    residual_dtype: torch.dtype | None = None
    has_bias: bool = True
    weight_offset: float = 0.0
    forward_config: NormConfig | None = None
    backward_config: NormConfig | None = None
    draw: Callable[..., Tensor] = torch.randn
    view: Callable[[Tensor], Tensor] | None = None

    def inputs(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """x, dy and whatever else the case has, on the device."""
        torch.manual_seed(seed)
        drawn = {
            "x": self.draw(self.rows, self.cols).to(self.dtype),
            "dy": torch.randn(self.rows, self.cols).to(self.dtype),
        }
        if self.weight_dtype is not None:
            drawn["weight"] = (torch.randn(self.cols) + 0.5).to(self.weight_dtype)
            if self.has_bias and not self.is_rms:
                drawn["bias"] = torch.randn(self.cols).to(self.weight_dtype)
        if self.residual_dtype is not None:
            drawn["residual"] = torch.randn(self.rows, self.cols).to(self.residual_dtype)
            drawn["ds"] = torch.randn(self.rows, self.cols).to(self.residual_dtype)
        return {name: tensor.to(device) for name, tensor in drawn.items()}


def by_kernel(case: Case, inputs: dict[str, Tensor], forward=norm_forward, backward=norm_backward) -> dict[str, Tensor]:
    """Outputs and gradients of one call of the launchers."""
    viewed = {name: case.view(value) if case.view and value.dim() == 2 else value for name, value in inputs.items()}
    x, weight, bias, residual = (viewed.get(name) for name in ("x", "weight", "bias", "residual"))
    options = {"eps": 1e-5, "is_rms": case.is_rms, "weight_offset": case.weight_offset, "config": case.forward_config}
    y, s, mean, rstd = forward(x, weight, bias, residual, **options)
    assert y.is_contiguous() and y.dtype == x.dtype and rstd.dtype == FLOAT32 and rstd.shape == x.shape[:-1]
    assert (s is None) == (residual is None) and (mean is None) == case.is_rms
    ds, dweight, dbias = backward(
        *(viewed["dy"], viewed.get("ds"), x if s is None else s, weight, mean, rstd),
        weight_offset=case.weight_offset,
        dbias_dtype=None if bias is None else bias.dtype,
        config=case.backward_config,
    )
    results = {"y": y, "s": s, "grad s": ds, "grad weight": dweight, "grad bias": dbias}
    return {name: value for name, value in results.items() if value is not None}


def by_reference(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same by the reference and autograd; in float64 if so asked."""
    leaves = {name: value.detach().cpu().to(dtype or value.dtype).requires_grad_() for name, value in inputs.items()}
    options = {"eps": 1e-5, "residual": leaves.get("residual")}
    if case.is_rms:
        out = reference.rms_norm(leaves["x"], leaves.get("weight"), weight_offset=case.weight_offset, **options)
    else:
        out = reference.layer_norm(leaves["x"], leaves.get("weight"), leaves.get("bias"), **options)
    y, s = out if isinstance(out, tuple) else (out, None)
    outputs = {"y": y} if s is None else {"y": y, "s": s}
    output_gradients = [leaves["dy"]] if s is None else [leaves["dy"], leaves["ds"]]
    # The kernels return the gradient of s, whose dtype is the residual's; the op rounds it to x's.
    wanted = {"grad s": leaves.get("residual", leaves["x"])}
    wanted.update({f"grad {name}": leaves[name] for name in ("weight", "bias") if name in leaves})
    gradients = torch.autograd.grad(list(outputs.values()), list(wanted.values()), output_gradients)
    return {name: value.detach() for name, value in outputs.items()} | dict(zip(wanted, gradients))


def measure(
    case: Case,
    device: torch.device,
    seeds: int = SEEDS,
    least: int | None = None,
    **launchers: Callable[..., object],
) -> Contract:
    """The contract of a case over some seeds; over ``least`` and all only in doubt where what is asked is which cells are read."""
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        inputs = case.inputs(device, seed)
        actual = by_kernel(case, inputs, **launchers)
        plain, golden = by_reference(case, inputs), by_reference(case, inputs, torch.float64)
        assert actual.keys() == golden.keys()
        for name, value in actual.items():
            assert value.dtype == plain[name].dtype, name
            kind = "gradient" if name.startswith("grad") else "output"
            contract.add(name, actual=value, plain=plain[name], golden=golden[name], kind=kind)

    return pool(contract, add, least, seeds)


def _head_of_qkv(tensor: Tensor) -> Tensor:
    """(rows, cols) as 2 of 4 heads in a fused projection: two strides are needed to walk it."""
    holder = tensor.new_full((tensor.shape[0] // 2, 4, tensor.shape[1]), float("nan"))
    holder[:, 1:3] = tensor.view(-1, 2, tensor.shape[1])
    return holder[:, 1:3]


def _unaligned(tensor: Tensor) -> Tensor:
    holder = tensor.new_full((tensor.numel() + 1,), float("nan"))
    holder[1:] = tensor.flatten()
    return holder[1:].view(tensor.shape)


def _padded_rows(tensor: Tensor) -> Tensor:
    holder = tensor.new_full((tensor.shape[0], tensor.shape[1] + 3), float("nan"))
    holder[:, :-3] = tensor
    return holder[:, :-3]


def _swapped(tensor: Tensor) -> Tensor:
    """Leading dimensions that no two strides walk in order."""
    batch = tensor.view(2, 2, tensor.shape[0] // 4, tensor.shape[1])
    return batch.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)


LAYOUTS = {
    "heads of qkv": _head_of_qkv,
    "unaligned": _unaligned,
    "padded rows": _padded_rows,
    "permuted": _swapped,
    "columns strided": lambda tensor: tensor.t().contiguous().t(),
}
