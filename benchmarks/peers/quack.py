"""quack: norms, RoPE and cross-entropy on a linear head in CuTe DSL. Signatures as of quack-kernels 0.6.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.definitions.cases import LinearCrossEntropyCase, NormCase, RopeCase
from pytransformer.benchmarks.harness.rows import Inputs, Variant
from pytransformer.benchmarks.peers.base import Factory, Peer, kept


def _rms_norm(case: NormCase) -> Factory:
    def make() -> Variant:
        from quack import rmsnorm

        def call(inputs: Inputs) -> Any:
            if case.residual:
                return rmsnorm(inputs["x"], inputs["weight"], residual=inputs["residual"], eps=case.eps, prenorm=True)
            return rmsnorm(inputs["x"], inputs["weight"], eps=case.eps)

        return call

    return make


def _layer_norm(case: NormCase) -> Factory | None:
    if case.residual:
        return None

    def make() -> Variant:
        from quack.rmsnorm import layernorm_bwd, layernorm_fwd

        class LayerNorm(torch.autograd.Function):
            """The package has the two kernels and no autograd rule around them."""

            @staticmethod
            def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                out, rstd, mean = layernorm_fwd(x, weight, bias, case.eps, return_rstd=True, return_mean=True)
                ctx.save_for_backward(x, weight, rstd, mean)
                return out

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
                x, weight, rstd, mean = ctx.saved_tensors
                dx, dweight, dbias = layernorm_bwd(x, weight, gradients[0], rstd, mean)
                return dx, dweight, dbias

        def call(inputs: Inputs) -> Tensor:
            # Its weights must be float32.
            weight, bias = kept(inputs, "quack", lambda: [inputs[name].detach().float() for name in ("weight", "bias")])
            if not case.backward:
                return layernorm_fwd(inputs["x"], weight, bias, case.eps)
            return LayerNorm.apply(inputs["x"], inputs["weight"].float(), inputs["bias"].float())

        return call

    return make


def _rope(case: RopeCase) -> Factory:
    def make() -> Variant:
        from quack.rotary import apply_rotary_emb

        def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
            cos, sin = inputs["cos"], inputs["sin"]
            return apply_rotary_emb(inputs["q"], cos, sin), apply_rotary_emb(inputs["k"], cos, sin)

        return call

    return make


def _linear_cross_entropy(case: LinearCrossEntropyCase) -> Factory:
    def make() -> Variant:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        # tuned=False: its autotuner would take a share of the run's minutes; on Hopper it takes a pipeline of its own anyhow.
        return lambda inputs: chunked_linear_cross_entropy(
            inputs["x"], inputs["weight"], inputs["targets"], tuned=False
        )

    return make


PEER = Peer(
    "quack",
    "quack-kernels",
    "quack",
    {
        "rms_norm": _rms_norm,
        "layer_norm": _layer_norm,
        "rope": _rope,
        "linear_cross_entropy": _linear_cross_entropy,
    },
    needs=("cutlass", "tvm_ffi"),
    least_capability=(9, 0),
    notes={"layer_norm": "float32 weights", "rope": "two launches"},
)
