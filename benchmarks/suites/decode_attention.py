"""Decode attention: one new query per sequence against contiguous, paged and quantised caches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import pytransformer
from pytransformer.benchmarks.definitions.cases import QUANTISED, DecodeCase
from pytransformer.benchmarks.harness.rows import Inputs, Row, Variant
from pytransformer.benchmarks.suites.common import Wanted, all_variants, generator, no_grad, normal

QUICK = (
    DecodeCase(64, 4096, 32, 8, 128),
    DecodeCase(1, 32768, 32, 8, 128),
    DecodeCase(1, 1024, 32, 8, 128),
    DecodeCase(64, 4096, 32, 8, 128, 16),
    DecodeCase(1, 32768, 32, 8, 128, 16),
    DecodeCase(1, 1024, 32, 8, 128, 16),
)
BATCHES = (1, 8, 64, 256)
KEYS = (1024, 4096, 32768, 131072)
PAGE_SIZES = (1, 16, 64, 256)
# A cache of this size leaves room for a second input set and for what a peer keeps.
LARGEST_CACHE = 40e9
# A quantised value stands for this many times itself: normal data then uses the range of int8.
INT8_SCALE = 1 / 32


def _full() -> Iterator[DecodeCase]:
    for batch, keys in ((64, 4096), (1, 32768), (8, 8192)):
        for page_size in PAGE_SIZES:
            yield DecodeCase(batch, keys, 32, 8, 128, page_size)
        for dtype in ("fp8", "int8"):
            yield DecodeCase(batch, keys, 32, 8, 128, 0, dtype)
            yield DecodeCase(batch, keys, 32, 8, 128, 64, dtype)
    for kv_heads in (8, 32):
        for batch in BATCHES:
            for keys in KEYS:
                yield DecodeCase(batch, keys, 32, kv_heads, 128)
    yield DecodeCase(64, 4096, 64, 8, 64)  # gpt-oss
    yield DecodeCase(8, 8192, 16, 8, 256)  # Gemma


TINY = (
    DecodeCase(2, 128, 4, 2, 32),
    DecodeCase(2, 128, 4, 4, 32, 16),
    DecodeCase(2, 128, 4, 2, 32, 0, "fp8"),
    DecodeCase(2, 128, 4, 2, 32, 1, "int8"),
)


def rows(wanted: Wanted) -> Iterator[Row]:
    """The targets' rows, then pages and dtypes, then batch × length."""
    if wanted.tiny:
        yield from (_row(wanted, case, 0) for case in TINY)
        return
    seen = set(QUICK)
    yield from (_row(wanted, case, 0) for case in QUICK)
    for case in _full():
        if case not in seen and case.cache_bytes <= LARGEST_CACHE:
            seen.add(case)
            yield _row(wanted, case, 1)


def _quantised(device: torch.device, seed: int, shape: tuple[int, ...], name: str) -> Tensor:
    cache = normal(device, seed, *shape)
    if name == "int8":
        return (cache / INT8_SCALE).round().clamp(-127, 127).to(torch.int8)
    return cache.to(QUANTISED[name])


def draw(case: DecodeCase, device: torch.device, seed: int) -> Inputs:
    """q, caches in order or in shuffled pages, scales: one per key head for fp8, one per token and head for int8."""
    shape: tuple[int, ...] = (case.batch, case.keys, case.num_kv_heads, case.head_dim)
    if case.page_size:
        shape = (case.batch * case.keys // case.page_size, case.page_size, *shape[2:])
    inputs: Inputs = {
        "q": normal(device, 5 * seed, case.batch, 1, case.num_heads, case.head_dim),
        "k_cache": _quantised(device, 5 * seed + 1, shape, case.cache_dtype),
        "v_cache": _quantised(device, 5 * seed + 2, shape, case.cache_dtype),
        "cache_seqlens": torch.full((case.batch,), case.keys, dtype=torch.int32, device=device),
    }
    if case.cache_dtype != "bf16":
        scale_shape = shape[:-1] if case.cache_dtype == "int8" else (case.num_kv_heads,)
        for index, name in enumerate(("k_scale", "v_scale")):
            drawn = torch.rand(scale_shape, device=device, generator=generator(device, 5 * seed + 3 + index))
            inputs[name] = (0.5 + drawn) * (INT8_SCALE if case.cache_dtype == "int8" else 1.0)
    if case.page_size:
        pages = torch.randperm(shape[0], device=device, generator=generator(device, seed))
        inputs["block_table"] = pages.view(case.batch, -1).to(torch.int32)
    return inputs


def _last_keys(case: DecodeCase, inputs: Inputs, kind: str) -> Tensor:
    """float64 keys or values of the last sequence's last key head, in order."""
    cache: Tensor = inputs[f"{kind}_cache"]
    scale: Tensor | None = inputs.get(f"{kind}_scale")
    if scale is not None and scale.ndim == 1:
        scale = scale.expand(cache.shape[:-1])
    if case.page_size:
        pages = inputs["block_table"][-1].long()
        cache, scale = cache[pages].flatten(0, 1), None if scale is None else scale[pages].flatten(0, 1)
    else:
        cache, scale = cache[-1], None if scale is None else scale[-1]
    found = cache[:, -1].double()
    return found if scale is None else found * scale[:, -1, None].double()


def _golden(case: DecodeCase, inputs: Inputs) -> Tensor:
    k, v = (_last_keys(case, inputs, kind) for kind in "kv")
    return (k @ inputs["q"][-1, 0, -1].double() / math.sqrt(case.head_dim)).softmax(0) @ v


def _row(wanted: Wanted, case: DecodeCase, priority: int) -> Row:
    names = ("q", "k_cache", "v_cache", "cache_seqlens", "block_table", "k_scale", "v_scale")

    def ours(backend: str | None) -> Variant:
        def call(inputs: Inputs) -> object:
            arguments = {name: inputs[name] for name in names if name in inputs}
            return pytransformer.decode_attention(**arguments, backend=backend)

        return call

    calls, notes = all_variants(wanted, "decode_attention", case, ours)
    return Row(
        "decode_attention",
        case.shape,
        case.flop,
        case.moved_bytes,
        lambda device, seed: draw(case, device, seed),
        {name: no_grad(call) for name, call in calls.items()},
        lambda inputs: _golden(case, inputs),
        lambda out: out[-1, 0, -1],
        "read",
        notes,
        priority,
    )
