"""Triton's own tutorials: fused attention and layer norm. Their files are in no package; they are read from the folder of peers.

Needed there: ``triton-tutorials/06-fused-attention.py`` and ``05-layer-norm.py`` of the Triton release that is installed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytransformer.benchmarks.definitions.cases import AttentionCase, NormCase
from pytransformer.benchmarks.harness.rows import Inputs, Variant
from pytransformer.benchmarks.peers.base import Factory, Peer, kept, loose_file

ATTENTION = "triton-tutorials/06-fused-attention.py"
LAYER_NORM = "triton-tutorials/05-layer-norm.py"


@functools.cache
def load(path: Path) -> types.ModuleType:
    """A tutorial as a module, without the bare calls at its end, which would test and benchmark it."""
    source = path.read_text()
    tree = ast.parse(source, str(path))
    tree.body = [node for node in tree.body if not _is_a_call(node) and not _is_decorated_for_tests(node)]
    module = types.ModuleType(f"triton_tutorial_{path.stem.replace('-', '_')}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


def _is_a_call(node: ast.stmt) -> bool:
    return (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or (
        isinstance(node, ast.If) and ("__main__" in ast.unparse(node.test))
    )


def _is_decorated_for_tests(node: ast.stmt) -> bool:
    """Its tests need pytest, its benchmarks matplotlib; neither is wanted."""
    if isinstance(node, ast.FunctionDef):
        return any(word in ast.unparse(mark) for mark in node.decorator_list for word in ("pytest", "perf_report"))
    return isinstance(node, ast.Import) and node.names[0].name in ("pytest",)


def _attention(case: AttentionCase) -> Factory | None:
    # `deterministic` its backward pass always is; it has no other option.
    if case.options - {"deterministic"} or case.is_grouped or case.seqlen % 128 or case.head_dim not in (64, 128, 256):
        return None

    def make() -> Variant:
        module = load(loose_file(ATTENTION))
        known = list(inspect.signature(module._attention.forward).parameters)[1:]
        # Releases differ in what follows the scale: USE_TMA, warp_specialize, or nothing. On Hopper warps are not specialised.
        extra = [False for name in known[5:] if name == "warp_specialize"]

        def call(inputs: Inputs) -> Tensor:
            q, k, v = _as_it_wants_them(inputs)
            out: Tensor = module.attention(q, k, v, case.causal, 1 / math.sqrt(case.head_dim), *extra)
            if not out.requires_grad:
                return out.transpose(1, 2)
            out.register_hook(lambda gradient: gradient.contiguous())
            return out.transpose(1, 2).to(inputs["q"].dtype)

        return call

    return make


def _as_it_wants_them(inputs: Inputs) -> list[Tensor]:
    """q, k, v as (batch, num_heads, seqlen, head_dim), contiguous, in float16; where there are gradients, by way of the originals."""
    if inputs["q"].requires_grad and torch.is_grad_enabled():
        return [inputs[name].transpose(1, 2).contiguous().half() for name in "qkv"]
    return kept(inputs, "triton_tutorial", lambda: [inputs[name].transpose(1, 2).contiguous().half() for name in "qkv"])


def _layer_norm(case: NormCase) -> Factory | None:
    if case.residual or 2 * case.width > 65536:
        return None

    def make() -> Variant:
        module = load(loose_file(LAYER_NORM))

        def call(inputs: Inputs) -> Any:
            return module.layer_norm(inputs["x"], (case.width,), inputs["weight"], inputs["bias"], case.eps)

        return call

    return make


ATTENTION_PEER = Peer(
    "triton_tutorial",
    "triton",
    "triton",
    {"attention": _attention},
    file=ATTENTION,
    notes={
        "attention": "in float16, for which it is written; autotuned at its first call; its backward pass pays for copies into its layout"
    },
)
LAYER_NORM_PEER = Peer("triton_tutorial", "triton", "triton", {"layer_norm": _layer_norm}, file=LAYER_NORM)
