"""transformers: the modules of its Llama as they run in eager mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.definitions.cases import NormCase, RopeCase
from pytransformer.benchmarks.harness.rows import Inputs, Variant
from pytransformer.benchmarks.peers.base import Factory, Peer, kept


def _rms_norm(case: NormCase) -> Factory | None:
    if case.residual:
        return None

    def make() -> Variant:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        module = LlamaRMSNorm(case.width, eps=case.eps)

        def call(inputs: Inputs) -> Tensor:
            return torch.func.functional_call(module, {"weight": inputs["weight"]}, (inputs["x"],))

        return call

    return make


def _rope(case: RopeCase) -> Factory:
    def make() -> Variant:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        def prepare(inputs: Inputs) -> list[Tensor]:
            # As the model makes them: doubled, in the dtype of q.
            return [torch.cat((inputs[name],) * 2, -1)[None].to(inputs["q"].dtype) for name in ("cos", "sin")]

        def call(inputs: Inputs) -> Any:
            cos, sin = kept(inputs, "transformers", lambda: prepare(inputs))
            q, k = apply_rotary_pos_emb(inputs["q"].transpose(1, 2), inputs["k"].transpose(1, 2), cos, sin)
            return q.transpose(1, 2), k.transpose(1, 2)

        return call

    return make


PEER = Peer(
    "transformers",
    "transformers",
    "transformers",
    {"rms_norm": _rms_norm, "rope": _rope},
    least_capability=None,
    notes={"rope": "tables in bfloat16, as the model makes them"},
)
