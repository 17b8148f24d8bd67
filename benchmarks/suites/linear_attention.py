"""Causal linear attention, forward and backward: long sequences, batches, small and wide heads, a decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.definitions import formulas
from pytransformer.benchmarks.definitions.cases import LinearAttentionCase
from pytransformer.benchmarks.harness.rows import Inputs, Row, Variant
from pytransformer.benchmarks.suites.common import (
    Wanted,
    all_variants,
    backward_of,
    checked_rows,
    no_grad,
    normal,
)

# Keys whose gradients are checked: queries before them do not see them.
_LAST = 64
QUICK = (LinearAttentionCase(1, 8192, 32, 8, 128), LinearAttentionCase(1, 65536, 32, 8, 128))
FULL = (
    LinearAttentionCase(8, 2048, 16, 16, 128),
    LinearAttentionCase(8, 2048, 16, 16, 64),
    LinearAttentionCase(1, 8192, 8, 8, 256),
    LinearAttentionCase(1, 8192, 32, 8, 128, decay=True),
    LinearAttentionCase(1, 65536, 1, 1, 64),
)
TINY = (LinearAttentionCase(1, 70, 4, 2, 16), LinearAttentionCase(1, 70, 2, 2, 16, decay=True))


def rows(wanted: Wanted) -> Iterator[Row]:
    """Long sequences, then batches, widths and a decay; each forward and backward."""
    for cases, priority in ((TINY, 0),) if wanted.tiny else ((QUICK, 0), (FULL, 1)):
        for case in cases:
            for backward in (False, True):
                yield _row(wanted, LinearAttentionCase(**{**vars(case), "backward": backward}), priority)


def draw(case: LinearAttentionCase, device: torch.device, seed: int) -> Inputs:
    """q, k, v, and with a backward pass the gradient that comes in."""
    shape = (case.batch, case.seqlen)
    heads = {"q": case.num_heads, "k": case.num_kv_heads, "v": case.num_kv_heads}
    inputs: Inputs = {
        name: normal(device, 8 * seed + place, *shape, count, case.head_dim).requires_grad_(case.backward)
        for place, (name, count) in enumerate(heads.items())
    }
    if case.decay:
        inputs["decay"] = 1 - 2.0 ** -(5 + torch.arange(case.num_kv_heads, device=device, dtype=torch.float32))
    if case.backward:
        inputs["dout"] = normal(device, 8 * seed + 4, *shape, case.num_heads, case.head_dim)
    return inputs


def _ours(backend: str | None) -> Variant:
    def call(inputs: Inputs) -> Any:
        return pytransformer.linear_attention(
            inputs["q"], inputs["k"], inputs["v"], decay=inputs.get("decay"), backend=backend
        )

    return call


def _golden(case: LinearAttentionCase, inputs: Inputs) -> Tensor:
    """Checked rows in float64: of out, or of dq, to which no other row's dout adds."""
    tokens = checked_rows(case.seqlen, inputs["q"].device)
    q, k, v = (inputs[name].detach().double() for name in "qkv")
    if not case.backward:
        return formulas.linear_attention_rows(q, k, v, tokens, inputs.get("decay"))
    q.requires_grad_()
    with torch.enable_grad():
        out = formulas.linear_attention_rows(q, k, v, tokens, inputs.get("decay"))
    (dq,) = torch.autograd.grad(out, q, inputs["dout"][:, tokens].double())
    return torch.cat((dq[:, tokens].flatten(), _last_keys(case, inputs)))


def _last_keys(case: LinearAttentionCase, inputs: Inputs) -> Tensor:
    """dk and dv of the last keys, which the last queries alone see: all their rows, so that the float64 rows are few."""
    last = torch.arange(max(case.seqlen - _LAST, 0), case.seqlen, device=inputs["q"].device)
    q, k, v = (inputs[name].detach().double() for name in "qkv")
    k.requires_grad_()
    v.requires_grad_()
    with torch.enable_grad():
        out = formulas.linear_attention_rows(q, k, v, last, inputs.get("decay"))
    found = torch.autograd.grad(out, (k, v), inputs["dout"][:, last].double())
    return torch.cat([gradient[:, last].flatten() for gradient in found])


def _pick(case: LinearAttentionCase, result: Any) -> Tensor:
    if not case.backward:
        return result[:, checked_rows(case.seqlen, result.device)]
    dq, dk, dv = result
    rows = dq[:, checked_rows(case.seqlen, dq.device)]
    return torch.cat((rows.flatten(), dk[:, -_LAST:].flatten(), dv[:, -_LAST:].flatten()))


def _row(wanted: Wanted, case: LinearAttentionCase, priority: int) -> Row:
    calls, notes = all_variants(wanted, case.op, case, _ours)
    if case.backward:
        variants = {name: backward_of(name, call, ("q", "k", "v")) for name, call in calls.items()}
    else:
        variants = {name: no_grad(call) for name, call in calls.items()}
    return Row(
        case.row_op,
        case.shape,
        case.flop,
        case.moved_bytes,
        lambda device, seed: draw(case, device, seed),
        variants,
        lambda inputs: _golden(case, inputs),
        lambda result: _pick(case, result),
        notes=notes,
        priority=priority,
    )
