"""Attention in float64 for a few query rows, with every option: what the benchmark rows are compared with.

The last sequence and the last head are looked at, where a wrong offset shows most. dk and dv need every query of the group, so those go
through in chunks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pytransformer.benchmarks.definitions.cases import AttentionCase
from pytransformer.benchmarks.harness.rows import Inputs
from pytransformer.benchmarks.suites.common import checked_rows
from pytransformer.reference.philox import dropout_threshold, philox_4x32

# Scores held at once: 128 MB of float64.
CHUNK_ELEMENTS = 2**24


def forward(case: AttentionCase, inputs: Inputs) -> Tensor:
    """(rows, head_dim): the checked rows of the last head of the last sequence."""
    q, k, v = (_last_sequence(case, inputs[name])[:, -1] for name in "qkv")
    rows = checked_rows(len(q), q.device)
    return _attend(case, inputs, q[rows].double(), k.double(), v.double(), rows, case.num_heads - 1)


def pick_forward(case: AttentionCase, out: Tensor) -> Tensor:
    """The same part of a result."""
    sequence = _last_sequence(case, out)
    return sequence[checked_rows(len(sequence), out.device), -1]


def backward(case: AttentionCase, inputs: Inputs) -> Tensor:
    """(3 · rows, head_dim): dq of the last head, then dk and dv of the last key head, at the checked rows."""
    q, k, v, dout = (_last_sequence(case, inputs[name]) for name in ("q", "k", "v", "dout"))
    length, group = len(q), case.num_heads // case.num_kv_heads
    key, value = (tensor[:, -1].double().requires_grad_() for tensor in (k, v))
    dq: list[Tensor] = []
    dk, dv = torch.zeros_like(key), torch.zeros_like(value)
    chunk = max(1, CHUNK_ELEMENTS // length)
    for head in range(case.num_heads - group, case.num_heads):
        dq = []
        for rows in torch.arange(length, device=q.device).split(chunk):
            query = q[rows, head].double().requires_grad_()
            with torch.enable_grad():
                out = _attend(case, inputs, query, key, value, rows, head)
                found = torch.autograd.grad(out, (query, key, value), dout[rows, head].double())
            dq.append(found[0])
            dk += found[1]
            dv += found[2]
    rows = checked_rows(length, q.device)
    return torch.cat([gradient.detach()[rows] for gradient in (torch.cat(dq), dk, dv)])


def pick_backward(case: AttentionCase, gradients: tuple[Tensor, ...]) -> Tensor:
    """The same part of (dq, dk, dv, …)."""
    return torch.cat([pick_forward(case, gradient) for gradient in gradients[:3]])


def _last_sequence(case: AttentionCase, tensor: Tensor) -> Tensor:
    """(seqlen, num_heads, head_dim)."""
    tensor = tensor.detach()
    return tensor[-case.lengths[-1] :] if case.lengths else tensor[-1]


def _attend(
    case: AttentionCase, inputs: Inputs, query: Tensor, key: Tensor, value: Tensor, rows: Tensor, head: int
) -> Tensor:
    """Query rows (rows, head_dim) of one head over all keys of their sequence."""
    scores = query @ key.T / math.sqrt(case.head_dim)
    keys = torch.arange(len(key), device=key.device)
    distance = rows[:, None] - keys
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if case.bias:
        scores = scores + inputs["bias"][0, head, rows, : len(key)].double()
    if case.alibi:
        scores = scores - inputs["alibi_slopes"][head].double() * distance.abs()
    left, right = case.window[0], 0 if case.causal else case.window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    if case.blocks:
        size = case.blocks[0]
        hidden |= ~inputs["block_mask"][0, 0][(rows // size)[:, None], keys // size]
    scores = scores.masked_fill(hidden, -math.inf)
    if case.sinks:
        sink = inputs["sinks"].detach()[head].double().expand(len(rows), 1)
        weights = torch.cat((scores, sink), -1).softmax(-1)[:, :-1]
    else:
        weights = scores.softmax(-1)
    if case.dropout_p:
        weights = weights * _kept(case, inputs, rows, len(key), head) / (1 - case.dropout_p)
    return weights @ value


def _kept(case: AttentionCase, inputs: Inputs, rows: Tensor, num_keys: int, head: int) -> Tensor:
    """Where dropout keeps a weight: the counters of `reference.philox`, for these rows only."""
    seed, offset = inputs["dropout_seed"].unbind()
    low = 0xFFFFFFFF
    groups = torch.arange((num_keys + 3) // 4, device=rows.device)
    batch_head = torch.tensor((case.batch - 1) * case.num_heads + head, device=rows.device)
    words = philox_4x32((groups, rows[:, None], batch_head, offset & low), (seed & low, (seed >> 32) & low))
    stacked = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[..., :num_keys]
    return (stacked >= dropout_threshold(case.dropout_p)).double()
