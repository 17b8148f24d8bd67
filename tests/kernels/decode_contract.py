"""Random decode calls whose caches hold NaN wherever a kernel must not read, and their comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pytransformer import reference
from pytransformer.kernels.decode_attention.launcher import decode_attention_forward
from pytransformer.kernels.decode_attention.policy import DecodeConfig, decode_configs
from pytransformer.ops.decode_attention.call import DecodeCall
from pytransformer.verification import SEEDS, Contract
from tests.support.draws import pool

# Up to four splits of tiles of 16 keys: a hundred keys make every kind of boundary.
MAX_SPLITS = 4
EDGE_LENGTHS = (0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 140)


def small_configs(head_dim: int = 16, value_dim: int = 16) -> tuple[DecodeConfig, ...]:
    """The shipped row classes with small tiles and few splits; the widest class stays unsplit."""
    configs = decode_configs(head_dim, value_dim, 4, torch.device("cpu"))
    return tuple(
        replace(config, block_m=16, block_n=16, max_splits=min(config.max_splits, MAX_SPLITS)) for config in configs
    )


@dataclass(frozen=True)
class Decode:
    """Shapes and options of a call. ``page_size`` 0 is a contiguous cache; ``queries`` per sequence makes packed queries."""

    lengths: tuple[int, ...] = (100, 33)
    seqlen_q: int = 1
    heads: tuple[int, int] = (2, 1)
    dims: tuple[int, int] = (16, 16)
    dtype: torch.dtype = torch.float32
    capacity: int = 140
    page_size: int = 0
    queries: tuple[int, ...] | None = None
    cache_dtype: torch.dtype | None = None
    scale_per_token: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Inputs:
    """Arguments of one call, and the same call with a cache in which every unused cell is 0 instead of NaN."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]
    clean: dict[str, Tensor]


def draw(case: Decode, seed: int, device: torch.device) -> Inputs:
    """Random inputs of a case; whatever no query may read is NaN (or the highest code of a quantised cache, with a NaN scale)."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = case.heads
    batch, longest = len(case.lengths), max(case.capacity, 1)
    rows = sum(case.queries) if case.queries is not None else batch * case.seqlen_q
    q = torch.randn(rows, num_heads, case.dims[0], generator=generator).to(case.dtype)
    options = {name: value(generator) if callable(value) else value for name, value in case.options.items()}
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    tensors = {"q": q if case.queries is not None else q.unflatten(0, (batch, case.seqlen_q))}
    if case.queries is not None:
        starts = torch.tensor([0, *case.queries]).cumsum(0)
        options["cu_seqlens_q"] = starts.to(device, torch.int32)
    leftpads = options["cache_leftpad"].tolist() if "cache_leftpad" in options else [0] * batch

    used = torch.zeros(batch, longest, dtype=torch.bool)
    for sequence, (length, leftpad) in enumerate(zip(case.lengths, leftpads)):
        used[sequence, leftpad : leftpad + length] = True
    clean = dict(tensors)
    for name, dim in zip("kv", case.dims):
        values = torch.randn(batch, longest, num_kv_heads, dim, generator=generator) * (2.0 if name == "k" else 1.0)
        _add_cache(case, name, values, used, tensors, clean, generator)
    tensors["cache_seqlens"] = clean["cache_seqlens"] = torch.tensor(case.lengths, dtype=torch.int32)
    if case.page_size:
        _make_pages(case, used, tensors, clean, generator)
    tensors, clean = ({key: value.to(device) for key, value in part.items()} for part in (tensors, clean))
    return Inputs(tensors, options, clean)


def _add_cache(
    case: Decode, name: str, values: Tensor, used: Tensor, tensors: dict[str, Tensor], clean: dict[str, Tensor],
    generator: torch.Generator,
) -> None:  # fmt: skip
    unused = ~used[:, :, None, None]
    if case.cache_dtype is None:
        values = values.to(case.dtype)
        clean[f"{name}_cache"] = values.masked_fill(unused, 0.0)
        tensors[f"{name}_cache"] = values.masked_fill(unused, float("nan"))
        return
    shape = values.shape[:-1] if case.scale_per_token else (values.shape[2],)
    highest = 127.0 if case.cache_dtype == torch.int8 else 448.0
    scale = (torch.rand(shape, generator=generator) + 0.5) * 4.0 / highest
    codes = (values / scale[..., None]).clamp(-highest, highest)
    codes = codes.round() if case.cache_dtype == torch.int8 else codes
    clean[f"{name}_cache"] = codes.masked_fill(unused, 0.0).to(case.cache_dtype)
    tensors[f"{name}_cache"] = codes.masked_fill(unused, float("nan") if highest == 448.0 else highest).to(
        case.cache_dtype
    )
    clean[f"{name}_scale"] = tensors[f"{name}_scale"] = scale
    if case.scale_per_token:
        tensors[f"{name}_scale"] = scale.masked_fill(unused[..., 0], float("nan"))


def _make_pages(
    case: Decode, used: Tensor, tensors: dict[str, Tensor], clean: dict[str, Tensor], generator: torch.Generator
) -> None:
    """Cuts the rows into pages in random order, with pages of NaN between, and table entries that do not exist where nobody reads."""
    batch, capacity = used.shape
    per_row = -(-capacity // case.page_size)
    spare = 3
    places = torch.randperm(batch * per_row + spare, generator=generator)[: batch * per_row].view(batch, per_row)
    for part in (tensors, clean):
        for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
            if name not in part or part[name].ndim == 1:
                continue
            row = part[name]
            raw = row.view(torch.uint8) if row.dtype == torch.float8_e4m3fn else row
            padded = raw.new_zeros((batch, per_row * case.page_size, *raw.shape[2:]))
            padded[:, :capacity] = raw
            poison = float("nan") if part is tensors and row.is_floating_point() and raw.is_floating_point() else 0
            pages = raw.new_full((batch * per_row + spare, case.page_size, *raw.shape[2:]), poison)
            pages[places.flatten()] = padded.view(-1, case.page_size, *raw.shape[2:])
            part[name] = pages.view(row.dtype)
    table = places.to(torch.int32)
    clean["block_table"] = table
    page_used = torch.zeros(batch, per_row * case.page_size, dtype=torch.bool)
    page_used[:, :capacity] = used
    tensors["block_table"] = torch.where(page_used.view(batch, per_row, -1).any(-1), table, 10**6)


def call_of(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **options: Any) -> DecodeCall:
    """A call as launchers take it, of arguments that are as the checks leave them; mask and bias have four dimensions."""
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "cache_seqlens": cache_seqlens}
    defaults = {
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": True,
        "window": (-1, -1),
        "softcap": 0.0,
        "num_splits": 0,
        "return_lse": True,
    }
    return DecodeCall(**{**dict.fromkeys(DecodeCall._fields), **defaults, **tensors, **options})


def run(inputs: Inputs, case: Decode, **changes: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of the launcher on the poisoned inputs, with small tiles unless ``configs`` says otherwise."""
    options = {**inputs.options, **changes}
    configs = options.pop("configs", small_configs(*case.dims))
    return decode_attention_forward(call_of(**inputs.tensors, **options), configs=configs)


def golden(inputs: Inputs, case: Decode, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(out, lse) of the naive reference in ``dtype`` on the clean inputs."""
    kept = ("cache_seqlens", "block_table", "k_scale", "v_scale")
    quantised = case.cache_dtype is not None
    tensors = {
        name: value if name in kept or (quantised and name.endswith("_cache")) else value.to(dtype)
        for name, value in inputs.clean.items()
    }
    result = reference.decode_attention(**tensors, **inputs.options, return_lse=True)
    assert isinstance(result, tuple)
    return result


def check_contract(
    case: Decode, device: torch.device, lengths: Sequence[tuple[int, ...]] = (), *,
    alter: Callable[[Inputs, int], None] | None = None, least: int = SEEDS, **changes: Any,
) -> None:  # fmt: skip
    """Pools the errors of a case over the seeds.

    Args:
        case: what is called.
        device: of the tensors.
        lengths: other lengths for each seed in turn.
        alter: changes what is drawn.
        least: draws that are pooled in any case; fewer than the contract's where what is asked is which cells are read, not how sums round.
        changes: other arguments of the launcher.
    """
    contract = Contract(case.dtype)

    def add(seed: int) -> None:
        drawn = replace(case, lengths=lengths[seed % len(lengths)]) if lengths else case
        inputs = draw(drawn, seed, device)
        if alter is not None:
            alter(inputs, seed)
        exact, plain = golden(inputs, drawn, torch.float64), golden(inputs, drawn, drawn.dtype)
        actual = run(inputs, drawn, **changes)
        for place, name in enumerate(("out", "lse")):
            contract.add(name, actual=actual[place], plain=plain[place], golden=exact[place])

    pool(contract, add, least).check()
