"""flash_attn_with_kvcache against its documented meaning: what is read, what is written, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from pytransformer.interop.flash_attn import flash_attn_with_kvcache
from pytransformer.ops.backend import use_backend
from pytransformer.verification import SEEDS, Contract
from tests.interop import flash_attn_meaning as meaning
from tests.support.draws import pool

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


@dataclass(frozen=True)
class Case:
    """``lengths``: slots in use before the call, left padding included. ``rows``: rows of the cache, or None = one per sequence."""

    lengths: tuple[int, ...] = (5, 11)
    seqlen_q: int = 1
    seqlen_new: int = 0
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    capacity: int = 18
    page_size: int = 0
    rotary_dim: int = 0
    leftpad: tuple[int, ...] = ()
    batch_idx: tuple[int, ...] = ()
    rows: int = 0
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "one token": Case(),
    "append one token": Case(seqlen_new=1),
    "a chunk, causal": Case(seqlen_q=4, seqlen_new=4, options={"causal": True}),
    "a chunk, not causal": Case(seqlen_q=4, seqlen_new=4),
    "first tokens": Case(lengths=(0, 0), seqlen_q=3, seqlen_new=3, options={"causal": True}),
    "more queries than keys": Case(lengths=(2, 1), seqlen_q=5, options={"causal": True}),
    "rotary, interleaved": Case(seqlen_q=3, seqlen_new=3, rotary_dim=16, options={"causal": True}),
    "rotary, half, partial": Case(
        seqlen_q=3, seqlen_new=3, rotary_dim=8, options={"causal": True, "rotary_interleaved": False}
    ),
    "rotary, all queries at one position": Case(seqlen_q=3, seqlen_new=3, rotary_dim=16),
    "rotary, window without causal": Case(seqlen_q=3, seqlen_new=3, rotary_dim=16, options={"window_size": (4, 2)}),
    "rotary, fewer new tokens than queries": Case(seqlen_q=4, seqlen_new=2, rotary_dim=16, options={"causal": True}),
    "rotary, half, fewer new tokens than queries": Case(
        seqlen_q=4, seqlen_new=2, rotary_dim=8, options={"causal": True, "rotary_interleaved": False}
    ),
    "rotary, half, all queries at one position": Case(
        seqlen_q=3, seqlen_new=2, rotary_dim=8, options={"rotary_interleaved": False}
    ),
    "window, more new tokens than queries": Case(seqlen_q=2, seqlen_new=4, options={"window_size": (3, 0)}),
    "leftpad": Case(seqlen_new=1, leftpad=(2, 5)),
    "leftpad, rotary, window": Case(
        seqlen_q=2, seqlen_new=2, rotary_dim=16, leftpad=(5, 3), options={"causal": True, "window_size": (3, -1)}
    ),
    "cache_batch_idx": Case(seqlen_q=2, seqlen_new=2, batch_idx=(3, 1), rows=5, options={"causal": True}),
    "a cache of more rows than sequences": Case(seqlen_new=1, rows=4),
    "softcap, scale, splits": Case(seqlen_new=1, options={"softcap": 2.0, "softmax_scale": 0.6, "num_splits": 3}),
    "alibi": Case(seqlen_q=3, seqlen_new=3, options={"alibi_slopes": torch.stack((SLOPES, SLOPES * 2)), "causal": True}),
    "head_dim 13": Case(seqlen_q=2, seqlen_new=2, dims=(13, 13), rotary_dim=12, options={"causal": True}),
    "head_dim 20, value 9": Case(seqlen_new=1, dims=(20, 9)),
    **{
        f"pages of {page_size}": Case(
            seqlen_q=3, seqlen_new=3, page_size=page_size, rotary_dim=16, capacity=capacity, options={"causal": True}
        )
        for page_size, capacity in ((1, 18), (3, 18), (16, 32), (256, 256))
    },
    "pages of 3, leftpad": Case(seqlen_new=1, page_size=3, leftpad=(4, 2)),
}  # fmt: skip


def draw(case: Case, dtype: torch.dtype, seed: int, device: torch.device) -> dict[str, Any]:
    """The arguments. Cells that hold no key of the sequences are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    batch, (heads, kv_heads), dims = len(case.lengths), case.heads, case.dims
    arguments: dict[str, Any] = {"q": normal(batch, case.seqlen_q, heads, dims[0])}
    if case.seqlen_new:
        for name, dim in zip("kv", dims):
            arguments[name] = normal(batch, case.seqlen_new, kv_heads, dim)
    if case.rotary_dim:
        angles = torch.rand(case.capacity, case.rotary_dim // 2, generator=generator) * 6.3
        arguments |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    rows = case.rows or batch
    row_of = case.batch_idx or range(batch)
    caches = {}
    for name, dim in zip(("k_cache", "v_cache"), dims):
        cache = torch.full((rows, case.capacity, kv_heads, dim), math.nan, dtype=dtype)
        for sequence, length in enumerate(case.lengths):
            first = case.leftpad[sequence] if case.leftpad else 0
            cache[row_of[sequence], first:length] = normal(length - first, kv_heads, dim)
        caches[name] = cache
    if case.page_size:
        per_row = case.capacity // case.page_size
        table = torch.randperm(batch * per_row + 2, generator=generator)[: batch * per_row].view(batch, per_row)
        for name, cache in caches.items():
            pages = torch.full((batch * per_row + 2, case.page_size, *cache.shape[2:]), math.nan, dtype=dtype)
            pages[table] = cache.view(batch, per_row, case.page_size, *cache.shape[2:])
            caches[name] = pages
        arguments["block_table"] = table.to(torch.int32)
    arguments |= caches | {"cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32)}
    if case.leftpad:
        arguments["cache_leftpad"] = torch.tensor(case.leftpad, dtype=torch.int32)
    if case.batch_idx:
        arguments["cache_batch_idx"] = torch.tensor(case.batch_idx, dtype=torch.int32)
    arguments |= case.options
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def expect(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """out, lse, what was written, and the caches of the documented meaning in ``dtype``."""
    floating = ("q", "k", "v", "k_cache", "v_cache", "rotary_cos", "rotary_sin")
    copies = {name: arguments[name].clone().to(dtype) for name in floating if name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in (*floating, "num_splits")}
    out, lse, written = meaning.with_kvcache(**copies, **rest)
    return {"out": out, "lse": lse, "written": written, "k_cache": copies["k_cache"], "v_cache": copies["v_cache"]}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def check_caches(
    arguments: dict[str, Any], before: dict[str, Tensor], written: list[tuple[int, int, int, int]]
) -> None:
    """New values are there (bit by bit where nothing rotates them), and every other cell has the bits it had."""
    for name, new in (("k_cache", "k"), ("v_cache", "v")):
        cache = arguments[name].clone()
        if written:
            rows, slots, sequences, tokens = (list(each) for each in zip(*written))
            if new == "v" or "rotary_cos" not in arguments:
                assert torch.equal(bits(cache[rows, slots]), bits(arguments[new][sequences, tokens]))
            cache[rows, slots] = before[name][rows, slots]
        assert torch.equal(bits(cache), bits(before[name]))


def check_contract(case: Case, dtype: torch.dtype, device: torch.device, least: int = SEEDS) -> None:
    contract = Contract(dtype)

    def add(seed: int) -> None:
        arguments = draw(case, dtype, seed, device)
        before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
        plain, golden = expect(arguments, dtype), expect(arguments, torch.float64)
        with_lse = bool(seed % 2)  # without it another backend may serve the call
        result = flash_attn_with_kvcache(**arguments, return_softmax_lse=with_lse)
        actual = dict(zip(("out", "lse"), result)) if with_lse else {"out": result}
        check_caches(arguments, before, golden["written"])
        if golden["written"]:
            rows, slots = ([each[axis] for each in golden["written"]] for axis in (0, 1))
            for cells in (actual := actual | {"new k": arguments["k_cache"]}, plain, golden):
                cells["new k"] = cells["new k" if cells is actual else "k_cache"][rows, slots]
        for name, value in actual.items():
            contract.add(name, actual=value, plain=plain[name], golden=golden[name])

    pool(contract, add, least).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_contract_and_exactly_the_new_cells_are_written(name, dtype, device):
    check_contract(CASES[name], dtype, device)


ON_TRITON = (
    "a chunk, causal", "rotary, all queries at one position", "rotary, fewer new tokens than queries", "leftpad, rotary, window",
    "cache_batch_idx", "softcap, scale, splits", "alibi", "head_dim 13", "pages of 1", "pages of 3, leftpad",
)  # fmt: skip


@pytest.mark.parametrize("name", ON_TRITON)
def test_contract_on_triton(name, device):
    with use_backend("triton"):
        check_contract(CASES[name], torch.float16, device, least=2)


# --- lengths in all forms ---------------------------------------------------------------------------------------------------------------


def test_lengths_as_an_int_and_as_none(device):
    arguments = draw(Case(lengths=(7, 7)), torch.float32, 0, device)
    expected = flash_attn_with_kvcache(**arguments)
    assert torch.equal(flash_attn_with_kvcache(**{**arguments, "cache_seqlens": 7}), expected)
    full = draw(Case(lengths=(18, 18), leftpad=(3, 0)), torch.float32, 0, device)
    expected = flash_attn_with_kvcache(**full)
    del full["cache_seqlens"]  # the whole cache
    assert torch.equal(flash_attn_with_kvcache(**full), expected)


def test_float32_tables_are_taken_beside_16_bit_q(device):
    arguments = draw(CASES["rotary, interleaved"], torch.bfloat16, 0, device)
    copies = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    expected = flash_attn_with_kvcache(**arguments)
    wide = {name: arguments[name].float() for name in ("rotary_cos", "rotary_sin")}
    assert torch.equal(flash_attn_with_kvcache(**{**arguments, **copies, **wide}), expected)
    assert torch.equal(bits(copies["k_cache"]), bits(arguments["k_cache"]))


# --- what people tripped over -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "triton"])
def test_left_padding_does_not_change_the_output(backend, device):
    """The same tokens, pushed to the right by padding, give the same bits: cache_seqlens counts slots, not keys."""
    case = Case(lengths=(6, 6), seqlen_q=2, seqlen_new=2, options={"causal": True, "window_size": (3, 0)})
    arguments = draw(case, torch.float32, 0, device)
    padded = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    for name in ("k_cache", "v_cache"):
        padded[name] = padded[name].roll(4, dims=1)
    padded |= {
        "cache_seqlens": arguments["cache_seqlens"] + 4,
        "cache_leftpad": torch.full((2,), 4, dtype=torch.int32, device=device),
    }
    with use_backend(backend):
        assert torch.equal(flash_attn_with_kvcache(**padded), flash_attn_with_kvcache(**arguments))


def test_decoding_token_by_token_equals_one_causal_chunk(device):
    """Appending one at a time with rotation fills the cache as one call does, bit for bit."""
    case = Case(lengths=(0, 0), seqlen_q=5, seqlen_new=5, rotary_dim=16, options={"causal": True})
    whole = draw(case, torch.float32, 0, device)
    steps = {name: value.clone() if isinstance(value, Tensor) else value for name, value in whole.items()}
    contract = Contract(torch.float32)
    golden, plain = expect(whole, torch.float64)["out"], expect(whole, torch.float32)["out"]
    contract.add("whole", actual=flash_attn_with_kvcache(**whole), plain=plain, golden=golden)
    outs = []
    for token in range(5):
        new = {name: steps[name][:, token : token + 1] for name in "qkv"}
        outs.append(flash_attn_with_kvcache(**{**steps, **new, "cache_seqlens": token}))
    contract.add("steps", actual=torch.cat(outs, 1), plain=plain, golden=golden)
    contract.check()
    assert all(torch.equal(bits(steps[name]), bits(whole[name])) for name in ("k_cache", "v_cache"))


def test_nothing_is_written_by_a_call_that_raises(device):
    arguments = draw(CASES["a chunk, causal"], torch.float32, 0, device)
    before = {name: arguments[name].clone() for name in ("k_cache", "v_cache")}
    for wrong in (
        {"alibi_slopes": torch.ones(3, device=device)}, {"window_size": (1,)}, {"softcap": math.nan}, {"num_splits": 129},
        {"softmax_scale": math.inf}, {"q": arguments["q"][..., :8]}, {"q": torch.zeros(2, 4, 3, 16, device=device)},
        {"cache_leftpad": torch.ones(3, dtype=torch.int32, device=device)}, {"return_softmax_lse": None}, {"causal": None},
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            flash_attn_with_kvcache(**{**arguments, **wrong})
    check_caches(arguments, before, [])


# --- torch.compile ----------------------------------------------------------------------------------------------------------------------


# The surface is traced alike over every backend, whose op is one node of the graph: all of them with the case of most options.
TRACED = (
    *(("leftpad, rotary, window", backend) for backend in ("torch", "reference", "triton")),
    ("a cache of more rows than sequences", "torch"),
    ("head_dim 13", "triton"),
    ("pages of 3", "reference"),
)


@pytest.mark.parametrize(("name", "backend"), TRACED)
def test_fullgraph_writes_the_cache(name, backend, device):
    if backend == "torch" and device.type == "cuda":
        backend = "reference"  # torch's own attention serves no cache on a GPU
    torch._dynamo.reset()
    eager = draw(CASES[name], torch.float32, 0, device)
    before = {cache: eager[cache].clone() for cache in ("k_cache", "v_cache")}
    graph = {key: value.clone() if isinstance(value, Tensor) else value for key, value in eager.items()}

    def step(k_cache, v_cache, **rest):
        return flash_attn_with_kvcache(k_cache=k_cache, v_cache=v_cache, **rest) + 0 * k_cache.nan_to_num().sum()

    with use_backend(backend):
        expected = step(**eager)
        actual = torch.compile(step, fullgraph=True, backend="aot_eager")(**graph)
    assert torch.equal(actual, expected)
    for cache, old in before.items():
        assert torch.equal(bits(graph[cache]), bits(eager[cache])) and not torch.equal(bits(old), bits(eager[cache]))
