"""LayerNorm and RMSNorm, forward and backward, with and without a residual, up to 128k wide; QK-norm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.definitions import formulas
from pytransformer.benchmarks.definitions.cases import NormCase
from pytransformer.benchmarks.harness.rows import Inputs, Row, Variant
from pytransformer.benchmarks.suites.common import Wanted, all_variants, backward_of, no_grad, normal

OPS = ("rms_norm", "layer_norm")
QUICK = ((8192, 4096), (32768, 8192))
# The same 512 MB of x at every width beyond a block's registers: is there a cliff?
WIDE = ((16384, 16384), (8192, 32768), (4096, 65536), (2048, 131072))
CHECKED_TOKENS = 8
CHECKED_COLUMNS = 64


def _full() -> Iterator[NormCase]:
    for backward in (False, True):
        for op in OPS:
            for tokens, width in WIDE:
                yield NormCase(op, tokens, width, backward=backward)
    for tokens, width in QUICK:
        for op in OPS:
            for backward in (False, True):
                yield NormCase(op, tokens, width, residual=True, backward=backward)
    for backward in (False, True):
        # Each of 32 + 8 heads of 8k tokens.
        yield NormCase("rms_norm", 8192 * 40, 128, backward=backward, name="QK-norm")
    for tokens, width in ((16384, 768), (16384, 2048), (64, 4096), (1, 4096)):
        for op in OPS:
            yield NormCase(op, tokens, width)
            if tokens > 64:
                yield NormCase(op, tokens, width, backward=True)


def rows(wanted: Wanted) -> Iterator[Row]:
    """The targets' rows and one very wide one, then the widths, residuals and QK-norm."""
    if wanted.tiny:
        for op in OPS:
            for residual in (False, True):
                for backward in (False, True):
                    yield _row(wanted, NormCase(op, 40, 256, residual, backward), 0)
        yield _row(wanted, NormCase("rms_norm", 64, 32, name="QK-norm"), 0)
        return
    for tokens, width in QUICK:
        for op in OPS:
            for backward in (False, True):
                yield _row(wanted, NormCase(op, tokens, width, backward=backward), 0)
    quick = NormCase("rms_norm", 2048, 131072)
    yield _row(wanted, quick, 0)
    yield from (_row(wanted, case, 1) for case in _full() if case != quick)


def _ours(case: NormCase, backend: str | None) -> Variant:
    def call(inputs: Inputs) -> Any:
        options: dict[str, Any] = {"eps": case.eps, "residual": inputs.get("residual"), "backend": backend}
        if case.op == "rms_norm":
            return pytransformer.rms_norm(inputs["x"], inputs["weight"], **options)
        return pytransformer.layer_norm(inputs["x"], inputs["weight"], inputs["bias"], **options)

    return call


def draw(case: NormCase, device: torch.device, seed: int) -> Inputs:
    """x, weights, and with a backward pass the gradients that come in (of y, and of the sum)."""
    shape = (case.tokens, case.width)
    inputs: Inputs = {"x": normal(device, 8 * seed, *shape), "weight": normal(device, 8 * seed + 1, case.width)}
    if case.op == "layer_norm":
        inputs["bias"] = normal(device, 8 * seed + 2, case.width)
    if case.residual:
        inputs["residual"] = normal(device, 8 * seed + 3, *shape)
    for tensor in inputs.values():
        tensor.requires_grad_(case.backward)
    if case.backward:
        inputs["dout"] = normal(device, 8 * seed + 4, *shape)
        if case.residual:
            inputs["dsum"] = normal(device, 8 * seed + 5, *shape)
    return inputs


def _golden(case: NormCase, inputs: Inputs) -> Tensor:
    """float64 result of the first rows; backward also of dweight's first columns, which sum over every row."""
    tokens = CHECKED_TOKENS
    residual = inputs["residual"].detach() if case.residual else None
    total = inputs["x"].detach()
    if residual is not None:
        total = (total.float() + residual.float()).to(residual.dtype)
    weight = inputs["weight"].detach().double()
    bias = inputs["bias"].detach().double() if "bias" in inputs else None
    first = total[:tokens].double().requires_grad_(case.backward)
    with torch.enable_grad():
        out = formulas.norm(first, weight, bias, None, centred=case.op == "layer_norm", eps=case.eps)
    assert isinstance(out, Tensor)
    if not case.backward:
        return out if residual is None else torch.cat((out, total[:tokens].double()))
    dx = torch.autograd.grad(out, first, inputs["dout"][:tokens].double())[0]
    if residual is not None:
        dx = dx + inputs["dsum"][:tokens].double()
    return torch.cat((dx.flatten(), _scaled(case, _dweight(case, total, inputs["dout"]))))


def _dweight(case: NormCase, total: Tensor, dout: Tensor) -> Tensor:
    """Its first columns, summed over all rows in chunks."""
    columns = min(CHECKED_COLUMNS, case.width)
    found = torch.zeros(columns, dtype=torch.float64, device=total.device)
    for x, gradient in zip(total.split(1024), dout.split(1024)):
        normalised = formulas.norm(
            x.double(), x.new_ones((), dtype=torch.float64), None, None, centred=case.op == "layer_norm", eps=case.eps
        )
        assert isinstance(normalised, Tensor)
        found += (gradient[:, :columns].double() * normalised[:, :columns]).sum(0)
    return found


def _scaled(case: NormCase, dweight: Tensor) -> Tensor:
    """To the size of dx: a sum over the tokens grows with their square root, and an error in either part must show in the norm of both."""
    return dweight / case.tokens**0.5


def _pick(case: NormCase, result: Any) -> Tensor:
    tokens = CHECKED_TOKENS
    if case.backward:
        dx, dweight = result[0], result[1]
        return torch.cat((dx[:tokens].flatten().double(), _scaled(case, dweight[:CHECKED_COLUMNS].double())))
    if case.residual:
        return torch.cat((result[0][:tokens], result[1][:tokens]))
    return result[:tokens]


def _row(wanted: Wanted, case: NormCase, priority: int) -> Row:
    calls, notes = all_variants(wanted, case.op, case, lambda backend: _ours(case, backend))
    if case.backward:
        leaves = [name for name in ("x", "weight", "bias", "residual") if name != "bias" or case.op == "layer_norm"]
        leaves = [name for name in leaves if name != "residual" or case.residual]
        gradients = ("dout", "dsum") if case.residual else ("dout",)
        variants = {name: backward_of(name, call, leaves, gradients) for name, call in calls.items()}
    else:
        variants = {name: no_grad(call) for name, call in calls.items()}
    return Row(
        case.row_op,
        case.shape,
        0.0,
        case.moved_bytes,
        lambda device, seed: draw(case, device, seed),
        variants,
        lambda inputs: _golden(case, inputs),
        lambda result: _pick(case, result),
        notes=notes,
        priority=priority,
    )
