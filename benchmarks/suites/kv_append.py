"""KV-cache append: decode sizes with QK-norm and RoPE fused, prefill, pages, quantised caches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.definitions import formulas
from pytransformer.benchmarks.definitions.cases import QUANTISED, AppendCase
from pytransformer.benchmarks.harness.rows import LARGEST_ERROR, Inputs, Row, Variant
from pytransformer.benchmarks.suites.common import Wanted, all_variants, generator, no_grad, normal

QUICK = (
    AppendCase(64, 1, 32, 8, 128, fused=True),
    AppendCase(1, 1, 32, 8, 128, fused=True),
    AppendCase(4, 4096, 32, 8, 128),
    AppendCase(4, 4096, 32, 8, 128, fused=True),
)
FULL = (
    AppendCase(64, 1, 32, 8, 128),
    AppendCase(1, 1, 32, 8, 128),
    AppendCase(64, 1, 32, 8, 128, True, 16),
    AppendCase(4, 4096, 32, 8, 128, False, 16),
    AppendCase(4, 4096, 32, 8, 128, True, 64),
    AppendCase(64, 1, 32, 8, 128, True, 0, "int8"),
    AppendCase(64, 1, 32, 8, 128, True, 16, "fp8"),
    AppendCase(4, 4096, 32, 8, 128, True, 0, "int8"),
    AppendCase(4, 4096, 32, 8, 128, True, 0, "fp8"),
    AppendCase(4, 4096, 32, 8, 128, False, 64, "int8"),
    AppendCase(256, 1, 32, 32, 128, True),
)
TINY = (
    AppendCase(2, 1, 4, 2, 32, fused=True),
    AppendCase(2, 8, 4, 2, 32),
    AppendCase(2, 8, 4, 2, 32, True, 16),
    AppendCase(2, 8, 4, 2, 32, False, 16),
    AppendCase(3, 5, 4, 2, 32, False, 8, "fp8"),
    AppendCase(3, 5, 4, 2, 32, True, 0, "int8"),
)
# One rounding to a code: e4m3 keeps 4 bits of mantissa; int8 codes a head of normal values (largest about 3 σ) in 127 steps.
CODE_ERROR = {"bf16": LARGEST_ERROR, "fp8": torch.finfo(torch.float8_e4m3fn).eps / 2, "int8": LARGEST_ERROR}
FP8_SCALE = 1 / 16


def rows(wanted: Wanted) -> Iterator[Row]:
    """Decode sizes and prefill of the targets, then pages and quantised caches."""
    for case in TINY if wanted.tiny else QUICK:
        yield _row(wanted, case, 0)
    for case in () if wanted.tiny else FULL:
        yield _row(wanted, case, 1)


def draw(case: AppendCase, device: torch.device, seed: int) -> Inputs:
    """k, v and caches that hold something already, sequences of different lengths."""
    pages = case.capacity // case.page_size if case.page_size else 0
    lead = (case.batch * pages, case.page_size) if pages else (case.batch, case.capacity)
    cache_shape = (*lead, case.num_kv_heads, case.head_dim)
    inputs: Inputs = {
        "k": normal(device, 8 * seed, case.batch, case.tokens, case.num_kv_heads, case.head_dim),
        "v": normal(device, 8 * seed + 1, case.batch, case.tokens, case.num_kv_heads, case.head_dim),
        "k_cache": torch.zeros(cache_shape, device=device, dtype=QUANTISED[case.cache_dtype]),
        "v_cache": torch.zeros(cache_shape, device=device, dtype=QUANTISED[case.cache_dtype]),
        "cache_seqlens": torch.arange(case.batch, device=device, dtype=torch.int32) % 17,
    }
    if case.fused:
        cos, sin = pytransformer.rope_tables(case.head_dim, case.capacity, device=device)
        weight = normal(device, 8 * seed + 4, case.head_dim)
        q = normal(device, 8 * seed + 5, case.batch, case.tokens, case.num_heads, case.head_dim)
        inputs.update(q=q, cos=cos, sin=sin, q_norm_weight=weight, k_norm_weight=weight)
    if pages:
        order = torch.randperm(lead[0], device=device, generator=generator(device, seed))
        inputs["block_table"] = order.view(case.batch, pages).to(torch.int32)
    for name in ("k_scale", "v_scale"):
        if case.cache_dtype == "int8":
            inputs[name] = torch.zeros(cache_shape[:-1], device=device)
        elif case.cache_dtype == "fp8":
            inputs[name] = torch.full((case.num_kv_heads,), FP8_SCALE, device=device)
    return inputs


def _golden(case: AppendCase, inputs: Inputs) -> Tensor:
    """Keys and values of the last sequence as float64: what was there (zeros), the new tokens in their place; and the new q behind them."""
    start = int(inputs["cache_seqlens"][-1])
    places = torch.arange(start, start + case.tokens, device=inputs["k"].device)
    k, v = inputs["k"][-1].double(), inputs["v"][-1].double()
    q = None
    if case.fused:
        cos, sin = inputs["cos"][places].double(), inputs["sin"][places].double()
        k = formulas.rotate(formulas.head_norm(k, inputs["k_norm_weight"].double()), cos, sin)
        q = formulas.head_norm(inputs["q"][-1].double(), inputs["q_norm_weight"].double())
        q = formulas.rotate(q, cos, sin)
    caches = torch.zeros(2, case.capacity, case.num_kv_heads, case.head_dim, dtype=torch.float64, device=k.device)
    caches[0, places], caches[1, places] = k, v
    return caches.flatten() if q is None else torch.cat((caches.flatten(), q.flatten()))


def _last_sequence(case: AppendCase, inputs: Inputs, kind: str) -> Tensor:
    cache = inputs[f"{kind}_cache"].to(torch.float64)
    if case.cache_dtype == "int8":
        cache = cache * inputs[f"{kind}_scale"][..., None].double()
    elif case.cache_dtype == "fp8":
        cache = cache * inputs[f"{kind}_scale"][:, None].double()
    if case.page_size:
        return cache[inputs["block_table"][-1].long()].flatten(0, 1)
    return cache[-1]


def _pick(case: AppendCase, result: tuple[Tensor | None, Inputs]) -> Tensor:
    q, inputs = result
    found = torch.stack([_last_sequence(case, inputs, kind) for kind in "kv"]).flatten()
    return found if q is None else torch.cat((found, q[-1].double().flatten()))


def _row(wanted: Wanted, case: AppendCase, priority: int) -> Row:
    names = (
        "k", "v", "k_cache", "v_cache", "cache_seqlens", "block_table", "q", "cos", "sin", "q_norm_weight", "k_norm_weight", "k_scale",
        "v_scale",
    )  # fmt: skip

    def ours(backend: str | None) -> Variant:
        def call(inputs: Inputs) -> Tensor | None:
            arguments = {name: inputs[name] for name in names if name in inputs}
            return pytransformer.kv_append(**arguments, backend=backend)

        return call

    def with_caches(call: Variant) -> Variant:
        return lambda inputs: (call(inputs), inputs)

    calls, notes = all_variants(wanted, "kv_append", case, ours)
    return Row(
        "kv_append",
        case.shape,
        0.0,
        case.moved_bytes,
        lambda device, seed: draw(case, device, seed),
        {name: no_grad(with_caches(call)) for name, call in calls.items()},
        lambda inputs: _golden(case, inputs),
        lambda result: _pick(case, result),
        notes=notes,
        priority=priority,
        largest_error=CODE_ERROR[case.cache_dtype],
    )
