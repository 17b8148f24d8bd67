"""Random KV-append calls, their results as a dictionary, and the reference's results for the same call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.ops.kv_append.call import AppendCall

SENTINEL = 77.0  # what every cell holds before; exact in all dtypes


@dataclass(frozen=True)
class Append:
    """Shapes and options of a call. ``counts`` per sequence makes packed tokens; ``slots`` a slot mapping."""

    lengths: tuple[int, ...] = (0, 9, 4)
    seqlen: int = 3
    heads: tuple[int, int] = (3, 2)
    dims: tuple[int, int] = (16, 24)
    dtype: torch.dtype = torch.float32
    capacity: int = 12
    page_size: int = 0
    counts: tuple[int, ...] | None = None
    slots: tuple[int, ...] | None = None
    rotary_dim: int = 0
    interleaved: bool = False
    norm: bool = False
    with_q: bool = False
    cache_dtype: torch.dtype | None = None
    scale_per_token: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def draw(case: Append, seed: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a call; caches (and per-token scales) hold the sentinel."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    batch = len(case.lengths)
    leading = (batch, case.seqlen) if case.counts is None else (sum(case.counts),)
    pages = batch * -(-case.capacity // max(case.page_size, 1)) + 1
    places = (pages, case.page_size) if case.page_size else (batch, case.capacity)
    arguments: dict[str, Any] = {
        "k": normal(*leading, case.heads[1], case.dims[0]),
        "v": normal(*leading, case.heads[1], case.dims[1]),
        "k_cache": torch.full((*places, case.heads[1], case.dims[0]), SENTINEL).to(case.cache_dtype or case.dtype),
        "v_cache": torch.full((*places, case.heads[1], case.dims[1]), SENTINEL).to(case.cache_dtype or case.dtype),
        **case.options,
    }
    if case.slots is not None:
        arguments["slot_mapping"] = torch.tensor(case.slots)
        arguments["positions"] = torch.randint(0, 30, leading, generator=generator)
    else:
        arguments["cache_seqlens"] = torch.tensor(case.lengths, dtype=torch.int32)
        if case.page_size:
            per_row = -(-case.capacity // case.page_size)
            table = torch.randperm(pages, generator=generator)[: batch * per_row].view(batch, per_row)
            arguments["block_table"] = table.to(torch.int32)
    if case.counts is not None and case.slots is None:
        arguments["cu_seqlens"] = torch.tensor([0, *case.counts]).cumsum(0).to(torch.int32)
    if case.with_q:
        arguments["q"] = normal(*leading, case.heads[0], case.dims[0])
    if case.rotary_dim:
        arguments["cos"], arguments["sin"] = reference.rope_tables(case.rotary_dim, 30)
        arguments["interleaved"] = case.interleaved
    if case.norm:
        arguments["k_norm_weight"] = normal(case.dims[0])
        arguments["q_norm_weight"] = normal(case.dims[0]) if case.with_q else None
        arguments["norm_weight_offset"] = 1.0
    if case.cache_dtype is not None:
        for name, cache in (("k_scale", arguments["k_cache"]), ("v_scale", arguments["v_cache"])):
            scale = torch.rand(case.heads[1], generator=generator) * 0.02 + 0.004
            arguments[name] = torch.full(cache.shape[:-1], SENTINEL) if case.scale_per_token else scale
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def call_of(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> AppendCall:
    """A call as the launcher takes it, of arguments that are as the checks leave them but for the shape of positions."""
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    defaults = {"interleaved": False, "norm_eps": 1e-6, "norm_weight_offset": 0.0}
    for name in ("slot_mapping", "positions"):
        if options.get(name) is not None:
            options[name] = options[name].reshape(-1)
    return AppendCall(**{**dict.fromkeys(AppendCall._fields), **defaults, **tensors, **options})


def run_reference(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The same by the reference; with ``dtype`` floating tensors are converted first."""
    arguments = {**arguments, **copies(arguments)}
    for name, value in arguments.items():
        quantised = name.endswith("_cache") and "k_scale" in arguments
        if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() and not quantised:
            arguments[name] = value.to(dtype)
    return results_of(arguments, reference.kv_append(**arguments))


def copies(arguments: dict[str, Any]) -> dict[str, Tensor]:
    return {name: arguments[name].clone() for name in ("k_cache", "v_cache", "k_scale", "v_scale") if name in arguments}


def results_of(arguments: dict[str, Any], new_q: Tensor | None) -> dict[str, Tensor]:
    results = {name: arguments[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale") if name in arguments}
    return results if new_q is None else {**results, "new_q": new_q}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        raw, wanted = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (value, expected[name]))
        assert torch.equal(raw, wanted), name


# Every way to say where tokens go.
PLACES = {
    "contiguous": Append(),
    "one-token": Append(seqlen=1),
    "cache-rows": Append(options={"cache_batch_idx": torch.tensor([2, 0, 1], dtype=torch.int32)}),
    "pages-of-1": Append(page_size=1),
    "pages-of-3": Append(page_size=3),
    "pages-of-16": Append(page_size=16, capacity=32),
    "packed": Append(counts=(5, 0, 2)),
    "packed-pages": Append(counts=(1, 3, 8), page_size=4),
    "packed-starting-empty": Append(counts=(0, 0, 4)),
    "slots": Append(page_size=4, slots=(3, 0, -1, 39, 17, 16, 5, -7, 30)),
    "packed-slots": Append(counts=(3, 2), lengths=(0, 0), page_size=4, slots=(3, 0, -1, 8, 17)),
}
