"""The options of decode_attention as factors of a covering array, and a row of the array as a call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pytransformer.ops.decode_attention import decode_attention
from pytransformer.verification import SEEDS, Contract
from tests.combinations.pairwise import Impossible, Row, covering_array
from tests.kernels.decode_contract import Decode, Inputs, draw, golden
from tests.support.draws import pool

FACTORS: dict[str, tuple[str, ...]] = {
    "dtype": ("bfloat16", "float32", "float16"),
    "cache": (
        "q's dtype",
        "int8, scale per head",
        "int8, scale per token",
        "float8_e4m3fn, scale per head",
        "float8_e4m3fn, scale per token",
    ),
    "layout": ("contiguous", "page_size 1", "page_size 3", "page_size 16"),
    "queries": ("one", "several", "packed", "packed, max_seqlen_q given"),
    "visible": ("causal", "all", "causal, window", "window"),
    "cache_seqlens": ("several splits", "one tile", "0 and full"),
    "heads": ("GQA 4:2", "MHA", "GQA 4:1", "MQA 3:1"),
    "head_dim": ("64", "8", "40", "96", "128"),
    "value head_dim": ("same", "other"),
    "cache_batch_idx": ("none", "given"),
    "cache_leftpad": ("none", "given"),
    "softcap": ("none", "given"),
    "mask": ("none", "boolean, full", "integer, (keys)"),
    "bias": ("none", "full", "(1, heads, 1, keys)", "-inf, whole rows too"),
    "alibi_slopes": ("none", "(heads)", "(batch, heads)"),
    "sinks": ("none", "given"),
    "return_lse": ("no", "yes"),
    "num_splits": ("0", "1", "2"),
    "strides": ("contiguous", "heads before tokens"),
}
RULES = (
    Impossible(
        {"cache_batch_idx": ("given",), "layout": FACTORS["layout"][1:]},
        "cache_batch_idx names rows of a contiguous cache; pages are found by block_table alone, and both together are a ValueError",
    ),
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTISED = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
CAPACITY = 72
# Tiles of 16 keys, splits of 32: up to three splits.
LENGTHS = {"several splits": (70, 33), "one tile": (9, 16), "0 and full": (0, CAPACITY)}
LEFTPADS = {"several splits": (11, 5), "one tile": (5, 11), "0 and full": (0, 11)}
HEADS = {"MHA": (2, 2), "GQA 4:1": (4, 1), "GQA 4:2": (4, 2), "MQA 3:1": (3, 1)}
VISIBLE: dict[str, dict[str, Any]] = {
    "causal": {},
    "all": {"causal": False},
    "causal, window": {"window": (20, -1)},
    "window": {"causal": False, "window": (15, 2)},
}
QUERIES = 3
PACKED = (1, QUERIES)


def rows() -> list[Row]:
    """The covering array."""
    return covering_array(FACTORS, RULES)


Draw = Callable[[torch.Generator], Tensor]


def _random_mask(*shape: int) -> Draw:
    def make(generator: torch.Generator) -> Tensor:
        mask = torch.rand(shape, generator=generator) > 0.3
        if len(shape) == 4:
            mask[-1, -1, 0] = False
        return mask if len(shape) == 4 else mask.to(torch.uint8) * 3

    return make


def _random_bias(dtype: torch.dtype, infinities: bool, *shape: int) -> Draw:
    def make(generator: torch.Generator) -> Tensor:
        bias = torch.randn(shape, generator=generator)
        if infinities:
            bias[torch.rand(shape, generator=generator) < 0.25] = -math.inf
            bias[-1, 0, -1] = -math.inf
        return bias.to(dtype)

    return make


def _options(row: Mapping[str, str]) -> dict[str, Any]:
    num_heads, batch, dtype = HEADS[row["heads"]][0], 2, DTYPES[row["dtype"]]
    rows_q = 1 if row["queries"] == "one" else QUERIES
    full = (batch, num_heads, rows_q, CAPACITY)
    levels: dict[str, dict[str, Any]] = {
        "softcap": {"given": {"softcap": 1.5}},
        "mask": {
            "boolean, full": {"mask": _random_mask(*full)},
            "integer, (keys)": {"mask": _random_mask(CAPACITY)},
        },
        "bias": {
            "full": {"bias": _random_bias(dtype, False, *full)},
            "(1, heads, 1, keys)": {"bias": _random_bias(dtype, False, 1, num_heads, 1, CAPACITY)},
            "-inf, whole rows too": {"bias": _random_bias(dtype, True, *full)},
        },
        "alibi_slopes": {
            "(heads)": {"alibi_slopes": lambda generator: torch.rand(num_heads, generator=generator)},
            "(batch, heads)": {"alibi_slopes": lambda generator: torch.rand(batch, num_heads, generator=generator)},
        },
        "sinks": {"given": {"sinks": lambda generator: torch.randn(num_heads, generator=generator)}},
        "cache_leftpad": {"given": {"cache_leftpad": torch.tensor(LEFTPADS[row["cache_seqlens"]], dtype=torch.int32)}},
    }
    options = dict(VISIBLE[row["visible"]])
    for factor, choices in levels.items():
        options.update(choices.get(row[factor], {}))
    return options


def case_of(row: Mapping[str, str]) -> Decode:
    """Shapes and options of a row."""
    head_dim = int(row["head_dim"])
    cache, _, scale = row["cache"].partition(", scale per ")
    lengths = LENGTHS[row["cache_seqlens"]]
    leftpad = max(LEFTPADS[row["cache_seqlens"]]) if row["cache_leftpad"] == "given" else 0
    return Decode(
        lengths=lengths,
        seqlen_q=1 if row["queries"] == "one" else QUERIES,
        heads=HEADS[row["heads"]],
        dims=(head_dim, head_dim if row["value head_dim"] == "same" else {8: 24, 40: 8}.get(head_dim, 40)),
        dtype=DTYPES[row["dtype"]],
        capacity=CAPACITY + leftpad,
        page_size=0 if row["layout"] == "contiguous" else int(row["layout"].removeprefix("page_size ")),
        queries=PACKED if row["queries"].startswith("packed") else None,
        cache_dtype=QUANTISED.get(cache),
        scale_per_token=scale == "token",
        options=_options(row),
    )


def inputs_of(row: Mapping[str, str], seed: int, device: torch.device) -> Inputs:
    """Random arguments of a row for the op; what no query may read is NaN."""
    inputs = draw(case_of(row), seed, device)
    if row["cache_batch_idx"] == "given":
        places = torch.tensor([3, 1], dtype=torch.int32, device=device)
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            if name in inputs.tensors and inputs.tensors[name].ndim > 1:
                inputs.tensors[name] = _among_others(inputs.tensors[name], places)
        inputs.tensors["cache_batch_idx"] = places
    if row["strides"] != "contiguous":
        for name in ("q", "k_cache", "v_cache"):
            tensor = inputs.tensors[name]
            inputs.tensors[name] = tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    return inputs


def _among_others(cache: Tensor, places: Tensor) -> Tensor:
    """The rows of a cache at ``places`` in one of five; the others are copies that would change the result if they were read."""
    raw = cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache
    moved = raw.flip(0)[[0, 1, 0, 1, 0]].clone()
    moved[places.long()] = raw
    return moved.view(cache.dtype)


def run_op(row: Mapping[str, str], inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """out, and lse where the row asks for it, of the public op."""
    result = decode_attention(
        **inputs.tensors,
        **inputs.options,
        max_seqlen_q=QUERIES if row["queries"].endswith("given") else None,
        num_splits=int(row["num_splits"]),
        return_lse=row["return_lse"] == "yes",
        backend=backend,
    )
    return dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,)))


def contract_of(
    row: Mapping[str, str], backend: str, device: torch.device, repeated: bool = True, least: int = SEEDS // 2
) -> Contract:
    """Errors of the op, pooled, beside plain PyTorch's.

    Args:
        row: what is called.
        backend: of the op.
        device: of the tensors.
        repeated: whether the first call is made twice, for the same bits.
        least: calls that are pooled in any case. Each has two sequences that are drawn independently, so half as many calls pool as
            many draws as the contract asks for; fewer are for tests that go over many rows.
    """
    case = case_of(row)
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        inputs = inputs_of(row, seed, device)
        exact, plain = golden(inputs, case, torch.float64), golden(inputs, case, case.dtype)
        outputs = run_op(row, inputs, backend)
        if seed == 0 and repeated:
            for name, value in run_op(row, inputs, backend).items():
                assert torch.equal(value, outputs[name]), f"{name} differs between two runs"
        for place, (name, value) in enumerate(outputs.items()):
            contract.add(name, actual=value, plain=plain[place], golden=exact[place])

    return pool(contract, add, least, SEEDS // 2)
