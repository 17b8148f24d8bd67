"""What `pytransformer verify` computes: for each op a few calls that together use its main options.

A case draws its inputs, runs the public op with a backend, and runs the naive reference; everything else (dtypes, seeds, gradients,
judgement) is the same for all cases and stands in matrix.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pytransformer
from pytransformer import reference

Tensors = dict[str, Tensor]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: public name.
        name: what is special about this call.
        inputs: draws the tensors of the call for a size factor (1 on a CPU, larger on a GPU) in float32, from the global generator.
        actual: runs the public op on inputs of the dtype under test with a backend; returns named results.
        golden: the same by the reference, in the dtype of the inputs it is given.
        gradients: names of the inputs whose gradients are compared; empty for ops without one.
        exact: the results are promised bit for bit.
    """

    op: str
    name: str
    inputs: Callable[[int], Tensors]
    actual: Callable[[Mapping[str, Tensor], str], Tensors]
    golden: Callable[[Mapping[str, Tensor]], Tensors]
    gradients: tuple[str, ...] = ()
    exact: bool = False


def _qkv(batch: int, lengths: tuple[int, int], heads: tuple[int, int], dims: tuple[int, int]) -> Tensors:
    (length_q, length_k), (heads_q, heads_k), (dim, value_dim) = lengths, heads, dims
    return {
        "q": torch.randn(batch, length_q, heads_q, dim),
        "k": torch.randn(batch, length_k, heads_k, dim),
        "v": torch.randn(batch, length_k, heads_k, value_dim),
    }


def _attention(name: str, inputs: Callable[[int], Tensors], with_lse: bool = False, **options: object) -> Case:
    """An attention case; integer inputs (cu_seqlens) are passed by their own name."""

    def arguments(tensors: Mapping[str, Tensor]) -> dict[str, object]:
        return {**options, **{key: value for key, value in tensors.items() if key not in "qkv"}, "return_lse": with_lse}

    def results(out: Tensor | tuple[Tensor, Tensor]) -> Tensors:
        return {"out": out[0], "lse": out[1]} if isinstance(out, tuple) else {"out": out}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        q, k, v = (tensors[key] for key in "qkv")
        return results(pytransformer.attention(q, k, v, backend=backend, **arguments(tensors)))  # type: ignore[arg-type]

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        q, k, v = (tensors[key] for key in "qkv")
        return results(reference.attention(q, k, v, **arguments(tensors)))  # type: ignore[arg-type]

    return Case("attention", name, inputs, actual, golden, gradients=("q", "k", "v"))


def _packed_qkv(size: int) -> Tensors:
    bounds = torch.tensor([0, 1, 1, 18 * size, 40 * size], dtype=torch.int32)
    total = int(bounds[-1])
    qkv = _qkv(1, (total, total), (4, 2), (32, 32))
    return {**{name: value[0] for name, value in qkv.items()}, "cu_seqlens_q": bounds, "cu_seqlens_k": bounds.clone()}


def _blocks(size: int) -> Tensors:
    """Blocks of 16 tokens, a ragged last one; each head has its own mask."""
    count = -(-41 * size // 16)
    block_mask = (torch.rand(1, 4, count, count) < 0.5) | torch.eye(count, dtype=torch.bool)
    return {**_qkv(2, (41 * size, 41 * size), (4, 2), (32, 32)), "block_mask": block_mask}


def _decode(name: str, inputs: Callable[[int], Tensors], **options: object) -> Case:
    def split(tensors: Mapping[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, object]]:
        positional = tuple(tensors[key] for key in ("q", "k_cache", "v_cache", "cache_seqlens"))
        extra = {"block_table": tensors["block_table"]} if "block_table" in tensors else {}
        return positional, {**options, **extra}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        positional, keywords = split(tensors)
        with torch.no_grad():
            return {"out": pytransformer.decode_attention(*positional, backend=backend, **keywords)}  # type: ignore

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        positional, keywords = split(tensors)
        with torch.no_grad():
            return {"out": reference.decode_attention(*positional, **keywords)}  # type: ignore

    return Case("decode_attention", name, inputs, actual, golden)


def _contiguous_cache(size: int) -> Tensors:
    capacity = 320 * size
    lengths = torch.tensor([1, 97 * size, capacity], dtype=torch.int32)
    return {
        "q": torch.randn(3, 1, 4, 64),
        "k_cache": torch.randn(3, capacity, 2, 64),
        "v_cache": torch.randn(3, capacity, 2, 64),
        "cache_seqlens": lengths,
    }


def _paged_cache(size: int) -> Tensors:
    pages, page_size, width = 24 * size, 16, 10 * size
    table = torch.randperm(pages)[: 2 * width].view(2, width).to(torch.int32)
    return {
        "q": torch.randn(2, 3, 4, 32),
        "k_cache": torch.randn(pages, page_size, 1, 32),
        "v_cache": torch.randn(pages, page_size, 1, 32),
        "cache_seqlens": torch.tensor([37 * size, width * page_size], dtype=torch.int32),
        "block_table": table,
    }


def _linear(name: str, seqlen: int, **options: object) -> Case:
    def inputs(size: int) -> Tensors:
        return _qkv(2, (seqlen * size, seqlen * size), (4, 2), (32, 24))

    def results(out: Any) -> Tensors:
        output, (state, normalizer) = out
        return {"out": output, "S": state, "z": normalizer}

    def placed(tensors: Mapping[str, Tensor]) -> dict[str, object]:
        device, dtype = tensors["q"].device, torch.promote_types(tensors["q"].dtype, torch.float32)
        found = {key: value.to(device, dtype) if isinstance(value, Tensor) else value for key, value in options.items()}
        return {**found, "return_state": True}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        return results(pytransformer.linear_attention(**tensors, backend=backend, **placed(tensors)))  # type: ignore[arg-type]

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        return results(reference.linear_attention(**tensors, **placed(tensors)))  # type: ignore[arg-type]

    return Case("linear_attention", name, inputs, actual, golden, gradients=("q", "k", "v"))


def _rope(name: str, rotary_dim: int, **options: object) -> Case:
    def inputs(size: int) -> Tensors:
        cos, sin = pytransformer.rope_tables(rotary_dim, 64 * size)
        return {"q": torch.randn(2, 19 * size, 4, 64), "k": torch.randn(2, 19 * size, 2, 64), "cos": cos, "sin": sin}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        q, k = pytransformer.rope(**tensors, backend=backend, **options)  # type: ignore[arg-type]
        assert k is not None
        return {"q_out": q, "k_out": k}

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        q, k = reference.rope(**tensors, **options)  # type: ignore[arg-type]
        assert k is not None
        return {"q_out": q, "k_out": k}

    return Case("rope", name, inputs, actual, golden, gradients=("q", "k"))


def _norm(op: str, name: str, columns: int, *, bias: bool = False, residual: bool = False, **options: object) -> Case:
    def inputs(size: int) -> Tensors:
        tensors = {"x": torch.randn(9 * size, columns) + 0.5, "weight": torch.rand(columns) + 0.5}
        if bias:
            tensors["bias"] = torch.randn(columns)
        if residual:
            tensors["residual"] = torch.randn(9 * size, columns)
        return tensors

    def results(out: Tensor | tuple[Tensor, Tensor]) -> Tensors:
        return {"out": out[0], "sum": out[1]} if isinstance(out, tuple) else {"out": out}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        return results(getattr(pytransformer, op)(**tensors, backend=backend, **options))

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        return results(getattr(reference, op)(**tensors, **options))

    names = ["x", "weight", *(["bias"] if bias else []), *(["residual"] if residual else [])]
    return Case(op, name, inputs, actual, golden, gradients=tuple(names))


def _append(name: str, inputs: Callable[[int], Tensors], exact: bool) -> Case:
    def run(function: Callable[..., Tensor | None], tensors: Mapping[str, Tensor]) -> Tensors:
        # The op writes in place: each run gets caches of its own.
        arguments = {key: value.clone() if key.endswith("_cache") else value for key, value in tensors.items()}
        with torch.no_grad():
            q = function(**arguments)
        results = {"k_cache": arguments["k_cache"], "v_cache": arguments["v_cache"]}
        return results if q is None else {**results, "q_out": q}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        return run(lambda **arguments: pytransformer.kv_append(**arguments, backend=backend), tensors)

    return Case("kv_append", name, inputs, actual, lambda tensors: run(reference.kv_append, tensors), exact=exact)


def _append_contiguous(size: int) -> Tensors:
    tokens = 3 * size
    return {
        "k": torch.randn(2, tokens, 2, 64),
        "v": torch.randn(2, tokens, 2, 64),
        "k_cache": torch.randn(2, 40 * size, 2, 64),
        "v_cache": torch.randn(2, 40 * size, 2, 64),
        "cache_seqlens": torch.tensor([0, 21 * size], dtype=torch.int32),
    }


def _append_paged(size: int) -> Tensors:
    cos, sin = pytransformer.rope_tables(64, 64 * size)
    return {
        "k": torch.randn(2, 3, 2, 64),
        "v": torch.randn(2, 3, 2, 64),
        "k_cache": torch.randn(12, 8 * size, 2, 64),
        "v_cache": torch.randn(12, 8 * size, 2, 64),
        "cache_seqlens": torch.tensor([5, 15 * size], dtype=torch.int32),
        "block_table": torch.randperm(12)[:8].view(2, 4).to(torch.int32),
        "q": torch.randn(2, 3, 4, 64),
        "cos": cos,
        "sin": sin,
        "q_norm_weight": torch.rand(64) + 0.5,
        "k_norm_weight": torch.rand(64) + 0.5,
    }


def _cross_entropy(name: str, **options: object) -> Case:
    def inputs(size: int) -> Tensors:
        targets = torch.randint(0, 103, (24 * size,))
        targets[::5] = -100
        return {"x": torch.randn(24 * size, 32), "weight": 0.2 * torch.randn(103, 32), "targets": targets}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        return {"loss": pytransformer.linear_cross_entropy(**tensors, backend=backend, **options)}  # type: ignore[arg-type]

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        return {"loss": reference.linear_cross_entropy(**tensors, **options)}  # type: ignore[arg-type]

    return Case("linear_cross_entropy", name, inputs, actual, golden, gradients=("x", "weight"))


def _grouped(name: str, *ends: int) -> Case:
    def inputs(size: int) -> Tensors:
        offsets = size * torch.tensor((0, *ends), dtype=torch.int32)
        groups, total = len(ends), int(offsets[-1])
        weights = {"weight": torch.randn(groups, 40, 24), "bias": torch.randn(groups, 40)}
        return {"x": torch.randn(total, 24), **weights, "offsets": offsets}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        return {"y": pytransformer.grouped_linear(**tensors, backend=backend)}

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        return {"y": reference.grouped_linear(**tensors)}

    return Case("grouped_linear", name, inputs, actual, golden, gradients=("x", "weight", "bias"))


def _quantized(name: str, bits: int) -> Case:
    def inputs(size: int) -> Tensors:
        x, bias = torch.randn(11 * size, 64), torch.randn(40)
        if bits == 8:
            codes = torch.randint(-127, 128, (40, 64), dtype=torch.int8)
            return {"x": x, "weight": codes, "scale": torch.rand(40) / 64, "bias": bias}
        codes, zero_point = torch.randint(256, (40, 32)).byte(), torch.randint(16, (40, 2)).byte()
        return {"x": x, "weight": codes, "scale": torch.rand(40, 2) / 8, "zero_point": zero_point, "bias": bias}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        return {"y": pytransformer.quantized_linear(**tensors, backend=backend)}

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        return {"y": reference.quantized_linear(**tensors)}

    return Case("quantized_linear", name, inputs, actual, golden, gradients=("x", "bias"))


def _activation(op: str, name: str, *inputs: str, columns: int, **options: object) -> Case:
    def draw(size: int) -> Tensors:
        return {key: 2 * torch.randn(9 * size, columns) for key in inputs}

    def actual(tensors: Mapping[str, Tensor], backend: str) -> Tensors:
        return {"out": getattr(pytransformer, op)(**tensors, backend=backend, **options)}

    def golden(tensors: Mapping[str, Tensor]) -> Tensors:
        return {"out": getattr(reference, op)(**tensors, **options)}

    return Case(op, name, draw, actual, golden, gradients=inputs)


CASES: tuple[Case, ...] = (
    _attention("causal, GQA 2", lambda size: _qkv(1, (37 * size, 37 * size), (4, 2), (64, 64)), causal=True),
    _attention(
        "window, Lq ≠ Lk, lse", lambda size: _qkv(2, (18 * size, 41 * size), (2, 2), (32, 32)), True, window=(9, 2)
    ),
    _attention("full, head_dim 40, dv 24", lambda size: _qkv(1, (21 * size, 150 * size), (2, 1), (40, 24))),
    _attention("packed, causal", _packed_qkv, causal=True),
    _attention("block mask by head, causal, GQA 2", _blocks, causal=True, block_size=16),
    _decode("contiguous, GQA 2", _contiguous_cache),
    _decode("paged, 3 queries, window", _paged_cache, window=(100, 0)),
    _linear("causal, GQA 2, decay", 70, decay=torch.tensor([0.95, 0.5])),
    _linear("full", 21, causal=False),
    _rope("half", 64),
    _rope("interleaved, partial, offset", 32, interleaved=True, offsets=7),
    _norm("layer_norm", "bias", 200, bias=True),
    _norm("layer_norm", "residual", 384, bias=True, residual=True),
    _norm("rms_norm", "plain", 200),
    _norm("rms_norm", "residual, offset 1", 384, residual=True, weight_offset=1.0),
    _append("contiguous", _append_contiguous, exact=True),
    _append("paged, RoPE, QK-norm", _append_paged, exact=False),
    _cross_entropy("mean, ignore_index"),
    _cross_entropy("smoothing, softcap, z-loss", label_smoothing=0.1, softcap=5.0, z_loss=1e-3, reduction="sum"),
    _grouped("ragged, an empty group", 5, 5, 22),
    _grouped("all rows in one group", 0, 0, 19),
    _quantized("int8", 8),
    _quantized("int4, zero points", 4),
    _activation("swiglu", "gate and up in one", "gate", columns=400),
    _activation("geglu", "two tensors", "gate", "up", columns=200),
    _activation("gelu", "tanh", "x", columns=384, approximate="tanh"),
)
