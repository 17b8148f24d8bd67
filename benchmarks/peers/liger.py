"""Liger: norms, RoPE, gated activations, cross-entropy on a linear head. Signatures as of liger-kernel 0.8.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.definitions.cases import LinearCrossEntropyCase, NormCase, RopeCase
from pytransformer.benchmarks.harness.rows import Inputs, Variant
from pytransformer.benchmarks.peers.base import Factory, Peer, kept


def _rms_norm(case: NormCase) -> Factory:
    def make() -> Variant:
        from liger_kernel.transformers.functional import (
            liger_fused_add_rms_norm,
            liger_rms_norm,
        )

        # in_place=False: its default overwrites the gradient that comes in, which the other variants read too.
        def call(inputs: Inputs) -> Any:
            x, weight = inputs["x"], inputs["weight"]
            if case.residual:
                return liger_fused_add_rms_norm(x, inputs["residual"], weight, case.eps, in_place=False)
            return liger_rms_norm(x, weight, case.eps, in_place=False)

        return call

    return make


def _layer_norm(case: NormCase) -> Factory | None:
    if case.residual:
        return None

    def make() -> Variant:
        from liger_kernel.transformers.functional import liger_layer_norm

        return lambda inputs: liger_layer_norm(inputs["x"], inputs["weight"], inputs["bias"], case.eps)

    return make


def _rope(case: RopeCase) -> Factory:
    def make() -> Variant:
        from liger_kernel.transformers.functional import liger_rope

        def prepare(inputs: Inputs) -> list[Tensor]:
            # It rotates in place, so it gets copies, and wants the tables doubled and (batch, num_heads, seqlen, head_dim).
            q, k = (inputs[name].clone().transpose(1, 2) for name in ("q", "k"))
            cos, sin = (torch.cat((inputs[name],) * 2, -1)[None] for name in ("cos", "sin"))
            return [q, k, cos, sin]

        def call(inputs: Inputs) -> tuple[Tensor, Tensor]:
            q, k = liger_rope(*kept(inputs, "liger", lambda: prepare(inputs)))
            return q.transpose(1, 2), k.transpose(1, 2)

        return call

    return make


def _linear_cross_entropy(case: LinearCrossEntropyCase) -> Factory:
    def make() -> Variant:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return lambda inputs: liger_fused_linear_cross_entropy(inputs["x"], inputs["weight"], inputs["targets"])

    return make


def _gated(name: str) -> Any:
    def build(case: Any) -> Factory:
        def make() -> Variant:
            from liger_kernel.transformers import functional

            function = getattr(functional, f"liger_{name}")

            def call(inputs: Inputs) -> Tensor:
                gate, up = inputs["gate"], inputs["up"]
                if getattr(case, "backward", False):
                    # Its backward pass writes the gradients over what it saved, which must not be what the other variants read.
                    gate, up = gate.clone(), up.clone()
                return function(gate, up)

            return call

        return make

    return build


PEER = Peer(
    "liger",
    "liger-kernel",
    "liger_kernel",
    {
        "rms_norm": _rms_norm,
        "layer_norm": _layer_norm,
        "rope": _rope,
        "linear_cross_entropy": _linear_cross_entropy,
        "swiglu": _gated("swiglu"),
        "geglu": _gated("geglu"),
    },
    notes={
        "rope": "rotates in place, on copies of its own",
        "swiglu": "backward: overwrites what it saved, so that later rounds run on other values",
        "geglu": "GELU by tanh; backward: overwrites what it saved, so that later rounds run on other values",
    },
)
