"""Attention forward and backward: causal, bfloat16, against torch's SDPA with each of its GPU backends forced."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import pytransformer
from pytransformer.benchmarks.rows import Row
from pytransformer.benchmarks.suites.common import backward_of, no_grad, normal, ours

# (batch, seqlen, q heads, kv heads, head_dim): 16k tokens a call, then one long sequence, then GPT-2's heads.
FORWARD = (
    (2, 8192, 32, 8, 128),
    (16, 1024, 32, 8, 128),
    (4, 4096, 32, 8, 128),
    (16, 1024, 12, 12, 64),
    (1, 16384, 32, 8, 128),
)
BACKWARD = ((2, 8192, 32, 8, 128), (16, 1024, 32, 8, 128), (4, 4096, 32, 8, 128), (16, 1024, 12, 12, 64))
TINY = ((1, 64, 4, 2, 32),)
# The float64 check looks at this many query rows of one head; a whole head would need seqlen² numbers for every row.
CHECKED_ROWS = 64

Shape = tuple[int, int, int, int, int]


def rows(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Forward and backward in turn, most important first."""
    forward, backward = (TINY, TINY) if tiny else (FORWARD, BACKWARD)
    for index in range(max(len(forward), len(backward))):
        if index < len(forward):
            yield _forward_row(device, forward[index])
        if index < len(backward):
            yield _backward_row(device, backward[index])


def _sdpa(inputs: dict[str, Any]) -> Tensor:
    q, k, v = (inputs[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _forced(backend: SDPBackend) -> Any:
    def call(inputs: dict[str, Any]) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(inputs)

    return call


def _variants(device: torch.device) -> dict[str, Any]:
    variants: dict[str, Any] = {
        backend: lambda inputs, backend=backend: pytransformer.attention(
            inputs["q"], inputs["k"], inputs["v"], causal=True, backend=backend
        )
        for backend in ours(device)
    }
    if device.type == "cuda":
        variants["sdpa_flash"] = _forced(SDPBackend.FLASH_ATTENTION)
        variants["sdpa_cudnn"] = _forced(SDPBackend.CUDNN_ATTENTION)
    else:
        variants["sdpa"] = _sdpa
    return variants


def _inputs(shape: Shape, requires_grad: bool) -> Any:
    batch, seqlen, heads, kv_heads, dim = shape

    def draw(device: torch.device, seed: int) -> dict[str, Any]:
        inputs = {
            "q": normal(device, 4 * seed, batch, seqlen, heads, dim),
            "k": normal(device, 4 * seed + 1, batch, seqlen, kv_heads, dim),
            "v": normal(device, 4 * seed + 2, batch, seqlen, kv_heads, dim),
        }
        for tensor in inputs.values():
            tensor.requires_grad_(requires_grad)
        if requires_grad:
            inputs["dout"] = normal(device, 4 * seed + 3, batch, seqlen, heads, dim)
        return inputs

    return draw


def _probabilities(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Causal softmax of the given query rows of one head, in float64."""
    scores = q.double() @ k.double().T / math.sqrt(q.shape[-1])
    keys = torch.arange(k.shape[0], device=k.device)
    return scores.masked_fill(keys > positions[:, None], -math.inf).softmax(-1)


def _checked_rows(seqlen: int, device: torch.device) -> Tensor:
    return torch.linspace(0, seqlen - 1, min(seqlen, CHECKED_ROWS), device=device).long()


def _golden_forward(inputs: dict[str, Any]) -> Tensor:
    q, k, v = (inputs[name].detach()[0, :, 0] for name in "qkv")
    positions = _checked_rows(q.shape[0], q.device)
    return _probabilities(q[positions], k, positions) @ v.double()


def _golden_dq(inputs: dict[str, Any]) -> Tensor:
    q, k, v, dout = (inputs[name].detach()[0, :, 0] for name in ("q", "k", "v", "dout"))
    positions = _checked_rows(q.shape[0], q.device)
    p = _probabilities(q[positions], k, positions)
    dp = dout[positions].double() @ v.double().T
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return ds @ k.double() / math.sqrt(q.shape[-1])


def _work(shape: Shape) -> float:
    batch, seqlen, heads, _, dim = shape
    return 4 * batch * heads * seqlen * seqlen * dim / 2


def _bytes(shape: Shape, tensors_q: int, tensors_kv: int) -> float:
    batch, seqlen, heads, kv_heads, dim = shape
    return 2.0 * batch * seqlen * dim * (tensors_q * heads + tensors_kv * kv_heads)


def _label(shape: Shape) -> str:
    batch, seqlen, heads, kv_heads, dim = shape
    return f"causal B{batch} L{seqlen} H{heads}/{kv_heads} d{dim} bf16"


def _forward_row(device: torch.device, shape: Shape) -> Row:
    def pick(out: Tensor) -> Tensor:
        return out[0, _checked_rows(shape[1], out.device), 0]

    variants = {name: no_grad(call) for name, call in _variants(device).items()}
    return Row(
        "attention_forward",
        _label(shape),
        _work(shape),
        _bytes(shape, 2, 2),
        _inputs(shape, False),
        variants,
        _golden_forward,
        pick,
    )


def _backward_row(device: torch.device, shape: Shape) -> Row:
    def pick(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        dq = gradients[0]
        return dq[0, _checked_rows(shape[1], dq.device), 0]

    variants = {name: backward_of(name, call, ("q", "k", "v")) for name, call in _variants(device).items()}
    return Row(
        "attention_backward",
        _label(shape),
        2.5 * _work(shape),
        _bytes(shape, 4, 4),
        _inputs(shape, True),
        variants,
        _golden_dq,
        pick,
    )
