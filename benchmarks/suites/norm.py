"""LayerNorm and RMSNorm, forward and backward, against torch's functions and torch.compile of the plain formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.rows import Row
from pytransformer.benchmarks.suites.common import backward_of, no_grad, normal, ours

SHAPES = ((8192, 4096), (32768, 8192), (1024, 65536))
TINY = ((32, 256),)
EPS = 1e-6


def rows(device: torch.device, tiny: bool) -> Iterator[Row]:
    """Both norms, forward and backward, at each shape."""
    for tokens, width in TINY if tiny else SHAPES:
        for op in ("rms_norm", "layer_norm"):
            yield _row(device, op, tokens, width, backward=False)
            yield _row(device, op, tokens, width, backward=True)


def _ours(op: str, backend: str) -> Any:
    function = getattr(pytransformer, op)
    return lambda inputs: function(inputs["x"], inputs["weight"], eps=EPS, backend=backend)


def _torch(op: str) -> Any:
    function = F.rms_norm if op == "rms_norm" else F.layer_norm
    return lambda inputs: function(inputs["x"], inputs["x"].shape[-1:], inputs["weight"], eps=EPS)


def _plain(x: Tensor, weight: Tensor, centred: bool) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def _compiled(op: str) -> Any:
    compiled = torch.compile(_plain, dynamic=False)
    return lambda inputs: compiled(inputs["x"], inputs["weight"], op == "layer_norm")


def _inputs(tokens: int, width: int, backward: bool) -> Any:
    def draw(device: torch.device, seed: int) -> dict[str, Any]:
        inputs: dict[str, Any] = {
            "x": normal(device, 3 * seed, tokens, width).requires_grad_(backward),
            "weight": normal(device, 3 * seed + 1, width).requires_grad_(backward),
        }
        if backward:
            inputs["dout"] = normal(device, 3 * seed + 2, tokens, width)
        return inputs

    return draw


def _golden(op: str, backward: bool) -> Any:
    """float64 result of the first eight rows (dx does not depend on other rows)."""

    def golden(inputs: dict[str, Any]) -> Tensor:
        x = inputs["x"].detach()[:8].double().requires_grad_(backward)
        out = _plain(x, inputs["weight"].detach().double(), op == "layer_norm")
        if not backward:
            return out
        return torch.autograd.grad(out, x, inputs["dout"][:8].double())[0]

    return golden


def _row(device: torch.device, op: str, tokens: int, width: int, backward: bool) -> Row:
    calls: dict[str, Any] = {backend: _ours(op, backend) for backend in ours(device)}
    calls["torch_function"] = _torch(op)
    if device.type == "cuda":
        calls["torch_compile"] = _compiled(op)
    if backward:
        variants = {name: backward_of(name, call, ("x", "weight")) for name, call in calls.items()}
    else:
        variants = {name: no_grad(call) for name, call in calls.items()}
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    moved = 2.0 * tokens * width * (3 if backward else 2)
    name = f"{op}_{'backward' if backward else 'forward'}"
    pick = (lambda gradients: gradients[0][:8]) if backward else (lambda out: out[:8])
    return Row(
        name,
        f"{tokens}×{width} bf16",
        0.0,
        moved,
        _inputs(tokens, width, backward),
        variants,
        _golden(op, backward),
        pick,
    )
