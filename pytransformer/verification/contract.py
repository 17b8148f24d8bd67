"""The accuracy contract: what `pytransformer verify` and the tests both judge a result by.

The golden result is the naive reference in float64. What is measured is the error of a kernel as a multiple of the error that plain,
unfused PyTorch of the same dtype makes on the same inputs, pooled over several seeds:

=========  ==================  ==================
dtype      outputs             gradients
=========  ==================  ==================
16-bit     max 2×, mean 1.1×   max 3×, mean 1.5×
float32    max 4×, mean 3×     max 4×, mean 3×
=========  ==================  ==================

The only allowance beside the multiple is 4·eps(float32)·max|golden|. This is the rule of flash-attention's tests with FlexAttention's
rule for the mean; no tolerance is chosen by hand, so a kernel cannot be made to pass by loosening one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

SEEDS = 8


@dataclass(frozen=True)
class Limits:
    """Allowed multiples of the plain implementation's error."""

    maximum: float
    mean: float


LIMITS: dict[tuple[str, str], Limits] = {
    ("16-bit", "output"): Limits(2.0, 1.1),
    ("16-bit", "gradient"): Limits(3.0, 1.5),
    ("float32", "output"): Limits(4.0, 3.0),
    ("float32", "gradient"): Limits(4.0, 3.0),
}
ALLOWANCE = 4 * torch.finfo(torch.float32).eps


def limits_for(dtype: torch.dtype, kind: str) -> Limits:
    """Limits for results computed from inputs of ``dtype``; ``kind`` is "output" or "gradient"."""
    width = "float32" if dtype == torch.float32 else "16-bit"
    return LIMITS[width, kind]


@dataclass
class Errors:
    """Errors of one result, pooled over seeds."""

    kind: str
    limits: Limits
    maximum: float = 0.0
    total: float = 0.0
    plain_maximum: float = 0.0
    plain_total: float = 0.0
    golden_maximum: float = 0.0
    count: int = 0
    fault: str = ""

    def add(self, actual: Tensor, plain: Tensor, golden: Tensor) -> None:
        """Adds one seed's result; infinities must stand exactly where the golden result has them."""
        if not (actual.shape == plain.shape == golden.shape):
            self.fault = (
                f"shapes differ: {tuple(actual.shape)}, plain {tuple(plain.shape)}, golden {tuple(golden.shape)}"
            )
            return
        actual, plain, golden = (t.detach().to("cpu", torch.float64) for t in (actual, plain, golden))
        finite = golden.isfinite()
        if not torch.equal(actual[~finite], golden[~finite]):
            self.fault = "an infinity of the golden result is not met"
            return
        if not bool(actual[finite].isfinite().all()):
            self.fault = f"{int((~actual[finite].isfinite()).sum())} values are NaN or infinite"
            return
        if not bool(finite.any()):
            return
        error = (actual - golden)[finite].abs()
        # A plain implementation that overflows gives no measure; its finite values still do.
        plain_error = (plain - golden)[finite].abs().nan_to_num(nan=0.0, posinf=0.0)
        self.maximum = max(self.maximum, float(error.max()))
        self.total += float(error.sum())
        self.plain_maximum = max(self.plain_maximum, float(plain_error.max()))
        self.plain_total += float(plain_error.sum())
        self.golden_maximum = max(self.golden_maximum, float(golden[finite].abs().max()))
        self.count += error.numel()

    def ratios(self) -> tuple[float, float]:
        """(max, mean) error as a fraction of what the contract allows: at most 1 passes."""
        allowance = ALLOWANCE * self.golden_maximum
        allowed_mean = self.limits.mean * self.plain_total / max(self.count, 1) + allowance
        allowed_maximum = self.limits.maximum * self.plain_maximum + allowance
        return _fraction(self.maximum, allowed_maximum), _fraction(self.total / max(self.count, 1), allowed_mean)

    @property
    def ratio(self) -> float:
        """The larger of the two ratios; infinite after a fault."""
        return math.inf if self.fault else max(self.ratios())


def _fraction(error: float, allowed: float) -> float:
    if error == 0.0:
        return 0.0
    return error / allowed if allowed > 0.0 else math.inf


class ContractError(AssertionError):
    """A result breaks the contract; the message lists each broken result with its figures."""


@dataclass
class Contract:
    """Collects results of one op over seeds and judges them.

    Args:
        dtype: dtype of the inputs, which selects the limits.

    Example::

        contract = Contract(torch.bfloat16)
        for seed in range(SEEDS):
            ...
            contract.add("out", actual=out, plain=plain_out, golden=golden_out)
            contract.add("dq", actual=q.grad, plain=plain_q.grad, golden=golden_q.grad, kind="gradient")
        contract.check()
    """

    dtype: torch.dtype
    results: dict[str, Errors] = field(default_factory=dict)

    def add(self, name: str, *, actual: Tensor, plain: Tensor, golden: Tensor, kind: str = "output") -> None:
        """Adds one seed's result ``name``. ``golden`` must be float64; ``kind`` is "output" or "gradient"."""
        if golden.dtype != torch.float64:
            raise TypeError(f"golden must be float64, not rounded back, got {golden.dtype}")
        errors = self.results.setdefault(name, Errors(kind, limits_for(self.dtype, kind)))
        errors.add(actual, plain, golden)

    def add_all(
        self,
        actual: Mapping[str, Tensor],
        plain: Mapping[str, Tensor],
        golden: Mapping[str, Tensor],
        kind: str = "output",
    ) -> None:
        """Adds several named results of one seed."""
        for name, value in actual.items():
            self.add(name, actual=value, plain=plain[name], golden=golden[name], kind=kind)

    @property
    def ratio(self) -> float:
        """The worst ratio of all results: at most 1 passes."""
        if not self.results:
            raise ContractError("nothing was compared")
        return max(errors.ratio for errors in self.results.values())

    def failures(self) -> list[str]:
        """One line for each result that breaks the contract."""
        lines = []
        for name, errors in self.results.items():
            if errors.fault:
                lines.append(f"{name}: {errors.fault}")
            elif errors.ratio > 1.0:
                maximum, mean = errors.ratios()
                lines.append(
                    f"{name}: max error {errors.maximum:.3e} is {maximum:.2f}× what is allowed (plain {errors.plain_maximum:.3e}), "
                    f"mean {errors.total / errors.count:.3e} is {mean:.2f}× (plain {errors.plain_total / errors.count:.3e})"
                )
        return lines

    def check(self) -> None:
        """Raises :class:`ContractError` unless every result is within the contract."""
        if not self.results:
            raise ContractError("nothing was compared")
        failures = self.failures()
        if failures:
            raise ContractError("; ".join(failures))
