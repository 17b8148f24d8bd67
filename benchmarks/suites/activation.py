"""SwiGLU, GEGLU and GELU, forward and backward, at the widths of Llama, Gemma and GPT-2; gate and up as two tensors or packed in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.definitions import formulas
from pytransformer.benchmarks.definitions.cases import ActivationCase
from pytransformer.benchmarks.harness.rows import Inputs, Row, Variant
from pytransformer.benchmarks.peers import kept
from pytransformer.benchmarks.suites.common import (
    Wanted,
    all_variants,
    backward_of,
    checked_rows,
    no_grad,
    normal,
    our_variants,
)

# (op, tokens, width): Llama 8B, Gemma 7B, GPT-2; then Llama 1B, Qwen 7B (its width is 37 · 512), short and decode-size calls.
QUICK = (("swiglu", 8192, 14336),)
FULL = (
    ("geglu", 8192, 24576),
    ("gelu", 16384, 3072),
    *(("swiglu", 16384, 8192), ("swiglu", 8192, 18944), ("swiglu", 32768, 14336), ("swiglu", 512, 14336)),
    *(("swiglu", 64, 14336), ("swiglu", 1, 14336), ("geglu", 2048, 24576), ("gelu", 8192, 16384)),
)
TINY = (("swiglu", 40, 96), ("geglu", 40, 96), ("gelu", 40, 96))


def rows(wanted: Wanted) -> Iterator[Row]:
    """Each op at its model's width, then the other widths and fewer tokens."""
    for priority, shapes in enumerate((TINY,) if wanted.tiny else (QUICK, FULL)):
        for op, tokens, width in shapes:
            for backward in (False, True) if tokens > 64 or wanted.tiny else (False,):
                yield _row(wanted, ActivationCase(op, tokens, width, backward), priority)


def _names(case: ActivationCase) -> tuple[str, ...]:
    return ("x",) if case.op == "gelu" else ("gate", "up")


def draw(case: ActivationCase, device: torch.device, seed: int) -> Inputs:
    """gate and up, or x; with a backward pass the gradient that comes in."""
    shape = (case.tokens, case.width)
    inputs: Inputs = {name: normal(device, 4 * seed + place, *shape) for place, name in enumerate(_names(case))}
    for tensor in inputs.values():
        tensor.requires_grad_(case.backward)
    if case.backward:
        inputs["dout"] = normal(device, 4 * seed + 2, *shape)
    return inputs


def _golden(case: ActivationCase, inputs: Inputs) -> Tensor:
    """float64 result of some rows, or the gradients of the inputs there side by side."""
    chosen = checked_rows(case.tokens, inputs[_names(case)[0]].device)
    leaves = [inputs[name].detach()[chosen].double().requires_grad_() for name in _names(case)]
    with torch.enable_grad():
        out = getattr(formulas, case.op)(*leaves)
    if not case.backward:
        return out.detach()
    return torch.cat(torch.autograd.grad(out, leaves, inputs["dout"][chosen].double()), dim=-1)


def _pick(case: ActivationCase, result: Any) -> Tensor:
    gradients = result if case.backward else (result,)
    chosen = checked_rows(case.tokens, gradients[0].device)
    return torch.cat([gradient[chosen] for gradient in gradients], dim=-1)


def _ours(case: ActivationCase, backend: str | None) -> Variant:
    function: Callable[..., Tensor] = getattr(pytransformer, case.op)
    return lambda inputs: function(*(inputs[name] for name in _names(case)), backend=backend)


def _packed_inputs(case: ActivationCase, inputs: Inputs) -> Inputs:
    """[gate; up] as one projection gives it, with the same gradient coming in."""
    packed = torch.cat((inputs["gate"], inputs["up"]), dim=-1).detach().requires_grad_(case.backward)
    return {"gate_and_up": packed, "dout": inputs.get("dout")}


def _packed_variants(wanted: Wanted, case: ActivationCase) -> dict[str, Variant]:
    """Ours on one tensor, as nn.FeedForward calls them: the same bytes, and the gradient is one tensor too."""
    function: Callable[..., Tensor] = getattr(pytransformer, case.op)

    def make(backend: str | None) -> Variant:
        forward: Variant = lambda inputs: function(inputs["gate_and_up"], backend=backend)  # noqa: E731
        run = backward_of(f"packed {backend}", forward, ("gate_and_up",)) if case.backward else no_grad(forward)
        return lambda inputs: run(kept(inputs, "packed", lambda: _packed_inputs(case, inputs)))

    return {f"{name} packed": variant for name, variant in our_variants(wanted.device, make).items()}


def _row(wanted: Wanted, case: ActivationCase, priority: int) -> Row:
    calls, notes = all_variants(wanted, case.op, case, lambda backend: _ours(case, backend))
    if case.backward:
        variants = {name: backward_of(name, call, _names(case)) for name, call in calls.items()}
    else:
        variants = {name: no_grad(call) for name, call in calls.items()}
    if case.op != "gelu":
        variants.update(_packed_variants(wanted, case))
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
