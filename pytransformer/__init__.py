"""Fused GPU kernels for transformers, in Triton and CUDA C++, and a thin PyTorch model on top of them.

Everything is loaded on first use: ``import pytransformer`` costs next to nothing beyond ``import torch``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytransformer._version import __version__
from pytransformer.model import generator as _generator

_EXPORTS = {
    "attention": "pytransformer.ops.attention",
    "decode_attention": "pytransformer.ops.decode_attention",
    "linear_attention": "pytransformer.ops.linear_attention",
    "rope": "pytransformer.ops.rope",
    "rope_tables": "pytransformer.ops.rope",
    "layer_norm": "pytransformer.ops.norm",
    "rms_norm": "pytransformer.ops.norm",
    "kv_append": "pytransformer.ops.kv_append",
    "linear_cross_entropy": "pytransformer.ops.linear_cross_entropy",
    "grouped_linear": "pytransformer.ops.grouped_linear",
    "quantized_linear": "pytransformer.ops.quantized_linear",
    "swiglu": "pytransformer.ops.activation",
    "geglu": "pytransformer.ops.activation",
    "gelu": "pytransformer.ops.activation",
    "use_backend": "pytransformer.ops.backend",
    "backends": "pytransformer.ops.overview",
    "warmup": "pytransformer.precompile",
    "TransformerConfig": "pytransformer.model.config",
    "Transformer": "pytransformer.model.transformer",
    "load": "pytransformer.model.checkpoint",
    "save": "pytransformer.model.checkpoint",
}

# Packages and modules that are there after a bare ``import pytransformer``, as `pytransformer.nn.patch(model)`.
_MODULES = frozenset(
    {
        "benchmarks", "block_masks", "cli", "extension", "flops", "generation", "gluon_interpreter", "interop", "kernels", "model", "nn",
        "ops", "precompile", "reference", "text", "training", "triton_interpreter", "verification",
    }
)  # fmt: skip

__all__ = [
    "Transformer",
    "TransformerConfig",
    "__version__",
    "attention",
    "backends",
    "decode_attention",
    "geglu",
    "gelu",
    "grouped_linear",
    "kv_append",
    "layer_norm",
    "linear_attention",
    "linear_cross_entropy",
    "load",
    "quantized_linear",
    "rms_norm",
    "rope",
    "rope_tables",
    "save",
    "swiglu",
    "use_backend",
    "warmup",
]

if TYPE_CHECKING:
    from pytransformer import benchmarks as benchmarks
    from pytransformer import block_masks as block_masks
    from pytransformer import cli as cli
    from pytransformer import extension as extension
    from pytransformer import flops as flops
    from pytransformer import generation as generation
    from pytransformer import gluon_interpreter as gluon_interpreter
    from pytransformer import interop as interop
    from pytransformer import kernels as kernels
    from pytransformer import model as model
    from pytransformer import nn as nn
    from pytransformer import ops as ops
    from pytransformer import precompile as precompile
    from pytransformer import reference as reference
    from pytransformer import text as text
    from pytransformer import training as training
    from pytransformer import triton_interpreter as triton_interpreter
    from pytransformer import verification as verification
    from pytransformer.model.checkpoint import load, save
    from pytransformer.model.config import TransformerConfig
    from pytransformer.model.transformer import Transformer
    from pytransformer.ops.activation import geglu, gelu, swiglu
    from pytransformer.ops.attention import attention
    from pytransformer.ops.backend import use_backend
    from pytransformer.ops.decode_attention import decode_attention
    from pytransformer.ops.grouped_linear import grouped_linear
    from pytransformer.ops.kv_append import kv_append
    from pytransformer.ops.linear_attention import linear_attention
    from pytransformer.ops.linear_cross_entropy import linear_cross_entropy
    from pytransformer.ops.norm import layer_norm, rms_norm
    from pytransformer.ops.overview import backends
    from pytransformer.ops.quantized_linear import quantized_linear
    from pytransformer.ops.rope import rope, rope_tables
    from pytransformer.precompile import warmup


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pytransformer.{name}")  # which also makes it an attribute
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pytransformer' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_MODULES})


def _find_generate() -> Callable[..., Any]:
    from pytransformer.generation import generate

    return generate


_generator.find_generate = _find_generate
