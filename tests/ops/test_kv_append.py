"""kv_append as a public op: every backend writes the same cells, every error message, torch's machinery around mutation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import pytransformer
from pytransformer.ops import checks
from pytransformer.ops.backend import use_backend
from pytransformer.ops.kv_append import CHOICE, kv_append
from pytransformer.verification import SEEDS, Contract
from tests.kernels.append_contract import (
    PLACES,
    SENTINEL,
    Append,
    assert_same,
    copies,
    draw,
    results_of,
    run_reference,
)

BACKENDS = ("triton", "torch", "reference")
# The reference reaches torch's machinery as 'triton' does, through the registered op.
IN_THE_MACHINERY = ("triton", "torch", pytest.param("reference", marks=pytest.mark.slow))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refuses(backend: str, device: torch.device) -> bool:
    """On a GPU the torch backend would have to read places back."""
    return backend == "torch" and device.type == "cuda"


def run(call: dict[str, Any], backend: str | None) -> dict[str, Tensor]:
    """Results of the op on copies of what it writes to."""
    call = {**call, **copies(call)}
    return results_of(call, kv_append(**call, backend=backend))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("place", PLACES)
def test_copies_are_exact_and_nothing_else_is_written(place, backend, device):
    call = draw(replace(PLACES[place], dtype=torch.bfloat16, with_q=True), 0, device)
    if refuses(backend, device):
        with pytest.raises(NotImplementedError, match="places to write to cannot be read back"):
            run(call, backend)
        return
    results = run(call, backend)
    assert_same(results, run_reference(call))
    assert results["new_q"].data_ptr() != call["q"].data_ptr()
    untouched = run_reference(call)["v_cache"] == SENTINEL
    assert bool((results["v_cache"][untouched] == SENTINEL).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", ["contiguous", "packed-pages", "slots"])
def test_norm_and_rope(place, dtype, device):
    # The kernel's own tests take every dtype and place.
    for backend in BACKENDS if (dtype, place) == (torch.bfloat16, "slots") else ("torch", "reference"):
        if refuses(backend, device):
            continue
        contract = Contract(dtype)
        interleaved = place == "slots"
        case = replace(PLACES[place], dtype=dtype, with_q=True, norm=True, rotary_dim=16, interleaved=interleaved)
        for seed in range(SEEDS):
            call = draw(case, seed, device)
            contract.add_all(run(call, backend), run_reference(call), run_reference(call, torch.float64))
        contract.check()


@pytest.mark.parametrize("scale_per_token", [False, True], ids=["per-head", "per-token"])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised(cache_dtype, scale_per_token, device):
    case = replace(PLACES["pages-of-3"], cache_dtype=cache_dtype, scale_per_token=scale_per_token)
    call = draw(case, 1, device)
    for backend in ("triton", "torch", "reference", None):
        assert_same(run(call, backend), run_reference(call))


@pytest.mark.parametrize("places", PLACES)
def test_torch_quantises_as_the_reference_does(places, device):
    """Wherever the places come from: the very codes and scales."""
    case = replace(PLACES[places], cache_dtype=torch.float8_e4m3fn, scale_per_token=True)
    call = draw(case, 3, device)
    assert_same(run(call, "torch"), run_reference(call))


def test_positions_of_one_row_serve_all_sequences(device):
    call = draw(Append(rotary_dim=16, with_q=True), 2, device)
    row = torch.tensor([4, 2, 9], device=device)
    for backend in ("triton", "reference"):
        assert_same(run({**call, "positions": row}, backend), run({**call, "positions": row.expand(3, 3)}, backend))


def test_positions_of_skipped_tokens_may_be_anything(device, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)
    call = draw(replace(PLACES["slots"], rotary_dim=8, with_q=True), 3, device)
    call["positions"][call["slot_mapping"].view(3, 3) < 0] = 10**6
    for backend in BACKENDS:
        if not refuses(backend, device):
            run(call, backend)


def test_an_append_and_its_decode(device):
    """What is appended token by token is what decode_attention reads."""
    k, v = torch.randn(2, 6, 2, 16, device=device), torch.randn(2, 6, 2, 16, device=device)
    k_cache, v_cache = torch.full((2, 2, 8, 2, 16), torch.nan, device=device)
    for step in range(6):
        lengths = torch.full((2,), step, dtype=torch.int32, device=device)
        assert kv_append(k[:, step : step + 1], v[:, step : step + 1], k_cache, v_cache, cache_seqlens=lengths) is None
    q = torch.randn(2, 6, 4, 16, device=device)
    out = pytransformer.decode_attention(q, k_cache, v_cache, lengths + 1)
    contract = Contract(torch.float32)
    plain, golden = (
        pytransformer.reference.attention(*(tensor.to(dtype) for tensor in (q, k, v)), causal=True)
        for dtype in (torch.float32, torch.float64)
    )
    contract.add("out", actual=out, plain=plain, golden=golden)
    contract.check()


# --- Errors ------------------------------------------------------------------------------------------------------------------------------


def base(device: torch.device, **changes: Any) -> dict[str, Any]:
    """A valid call of two sequences with two new tokens, then changed; None removes."""
    call = {
        "k": torch.randn(2, 2, 2, 16), "v": torch.randn(2, 2, 2, 24),
        "k_cache": torch.zeros(2, 12, 2, 16), "v_cache": torch.zeros(2, 12, 2, 24), "cache_seqlens": int32(3, 10),
    }  # fmt: skip
    call = {**call, **changes}
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in call.items()}


def pages(**changes: Any) -> dict[str, Any]:
    caches = {"k_cache": torch.zeros(9, 4, 2, 16), "v_cache": torch.zeros(9, 4, 2, 24)}
    return {**caches, "block_table": torch.tensor([[3, 1, 0], [5, 8, 7]], dtype=torch.int32), **changes}


def slots(*values: int, **changes: Any) -> dict[str, Any]:
    return {**pages(), "block_table": None, "cache_seqlens": None, "slot_mapping": torch.tensor(values), **changes}


def packed(*starts: int, **changes: Any) -> dict[str, Any]:
    return {"k": torch.randn(4, 2, 16), "v": torch.randn(4, 2, 24), "cu_seqlens": int32(*starts), **changes}


def tables(length: int = 12, half: int = 8) -> dict[str, Tensor]:
    return {"cos": torch.ones(length, half), "sin": torch.zeros(length, half)}


def quantised(dtype: torch.dtype = torch.int8, **changes: Any) -> dict[str, Any]:
    caches = {"k_cache": torch.zeros(2, 12, 2, 16).to(dtype), "v_cache": torch.zeros(2, 12, 2, 24).to(dtype)}
    return {**caches, "k_scale": torch.ones(2), "v_scale": torch.ones(2), **changes}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


F = torch.randn
ERRORS = [
    ({"k": 3}, TypeError, "k must be a torch.Tensor, got 3"),
    ({"k": F(2, 2)}, ValueError, r"k must have 4 dimensions: \(batch, seqlen_new, num_kv_heads, head_dim\), got shape \(2, 2\)"),
    ({"k": F(2, 2, 2, 16).int()}, TypeError, "k must be of dtype float32 or float16 or bfloat16 or float64, got int32"),
    ({"k": F(2, 2, 0, 16), "v": F(2, 2, 0, 24)}, ValueError, "k must have at least one head"),
    ({"k": F(2, 2, 2, 0)}, ValueError, "k must have a head_dim of at least 1, got 0"),
    ({"k": F(2, 2, 16, 2).transpose(2, 3)}, ValueError, "k must be contiguous in its last dimension"),
    ({"v": F(2, 2, 2, 24).half()}, TypeError, r"v must have the dtype of k \(float32\), got float16"),
    ({"v": F(2, 3, 2, 24)}, ValueError, r"v must have shape \(as k, value head_dim\) = \(2, 2, 2, any\), got \(2, 3, 2, 24\)"),
    ({"v": F(2, 2, 2, 0), "v_cache": F(2, 12, 2, 0)}, ValueError, "v must have a head_dim of at least 1, got 0"),
    ({"k_cache": F(12, 2, 16)}, ValueError, "k_cache must have 4 dimensions"),
    ({"k_cache": F(2, 12, 2, 16).half()}, TypeError, r"k_cache must have the dtype of k \(float32\), or be quantised .* got float16"),
    ({"k_cache": F(2, 12, 3, 16)}, ValueError, r"k_cache must have the heads and head_dim of k, \(2, 16\), got shape \(2, 12, 3, 16\)"),
    ({"v_cache": F(2, 12, 2, 16)}, ValueError, r"v_cache must have the heads and head_dim of v, \(2, 24\), got shape"),
    ({"v_cache": F(2, 11, 2, 24)}, ValueError, r"v_cache must have shape .* = \(2, 12, 2, any\), got \(2, 11, 2, 24\)"),
    ({"k_cache": F(1, 12, 2, 16).expand(2, -1, -1, -1)}, ValueError, "k_cache is written to, so it must not be expanded"),
    ({"k_cache": F(2, 12, 2, 32)[..., ::2]}, ValueError, "k_cache must be contiguous in its last dimension"),
    (quantised(v_cache=torch.zeros(2, 12, 2, 24).to(torch.float8_e4m3fn)), TypeError, r"v_cache must have the dtype of k_cache \(int8\)"),
    ({"k_scale": F(2)}, ValueError, "k_scale is for quantised caches"),
    (quantised(k_scale=None), ValueError, "k_scale must be given with caches of int8"),
    (quantised(v_scale=torch.ones(3)), ValueError, r"v_scale must have shape \(num_kv_heads\) = \(2,\) or that of the cache"),
    (quantised(v_scale=torch.ones(2, 12, 2)), ValueError, r"both be per head \(read\) or both per token \(written\)"),
    ({"cache_seqlens": None}, ValueError, "give cache_seqlens or slot_mapping, which say where to write; got neither"),
    ({"slot_mapping": torch.arange(4)}, ValueError, "give cache_seqlens or slot_mapping, which say where to write; got both"),
    ({"cache_seqlens": torch.tensor([3, 10])}, TypeError, "cache_seqlens must be of dtype int32, got int64"),
    ({"cache_seqlens": int32(1, 2, 3)}, ValueError, r"cache_seqlens must have shape \(batch\) = \(2\), got \(3,\)"),
    ({"k": F(4, 2, 16), "v": F(4, 2, 24)}, ValueError, r"cu_seqlens must be given with packed k of shape \(4, 2, 16\) and cache_seqlens"),
    (packed(0, 4), ValueError, r"cu_seqlens must have 3 entries \(batch \+ 1\)"),
    ({"cu_seqlens": int32(0, 2, 4)}, ValueError, r"k must have 3 dimensions: \(total, num_kv_heads, head_dim\)"),
    ({"k_cache": F(3, 12, 2, 16), "v_cache": F(3, 12, 2, 24)}, ValueError,
     "k_cache must have batch = 2 rows unless block_table, cache_batch_idx or"),
    ({"k_cache": F(2, 0, 2, 16), "v_cache": F(2, 0, 2, 24)}, ValueError, r"k_cache must have room for tokens, got shape \(2, 0, 2, 16\)"),
    ({"cache_batch_idx": int32(0)}, ValueError, r"cache_batch_idx must be contiguous, of shape \(batch\) = \(2\), got \(1,\)"),
    (pages(cache_batch_idx=int32(0, 1)), ValueError, "cache_batch_idx is for contiguous caches: with block_table each"),
    (pages(block_table=F(2, 3)), TypeError, "block_table must be of dtype int32, got float32"),
    (pages(block_table=torch.zeros(1, 3, dtype=torch.int32)), ValueError, r"block_table must have shape \(batch, max_pages\) = \(2, any\)"),
    (slots(0, 1, 2), ValueError, r"slot_mapping must have one entry per token, shape \(2, 2\), got \(3,\)"),
    (slots(0, 1, 2, 3, slot_mapping=int32(0, 1, 2, 3)), TypeError, "slot_mapping must be of dtype int64, got int32"),
    (slots(0, 1, 2, 3, **{"block_table": pages()["block_table"]}), ValueError, "block_table goes with cache_seqlens"),
    (slots(0, 1, 2, 3, cache_batch_idx=int32(0, 1)), ValueError, "cache_batch_idx goes with cache_seqlens"),
    (slots(0, 1, 2, 3, **tables()), ValueError, "positions must be given with slot_mapping and cos"),
    ({"cos": F(12, 8)}, ValueError, "cos and sin go together: cos is given, sin is None"),
    ({"sin": F(12, 8)}, ValueError, "cos and sin go together: sin is given, cos is None"),
    ({**tables(), "cos": F(12, 8).half()}, TypeError, "cos must be of dtype float32, got float16"),
    ({**tables(), "sin": F(12, 4)}, ValueError, r"sin must have shape of cos = \(12, 8\), got \(12, 4\)"),
    (tables(half=12), ValueError, r"rotary_dim from 2 to the head_dim of k \(16\), got \(12, 12\)"),
    (tables(length=0), ValueError, r"cos must have a row for each position, got shape \(0, 8\)"),
    ({"positions": torch.zeros(2, 3, dtype=torch.int64)}, ValueError,
     r"positions must have one entry per token, shape \(2, 2\), got \(2, 3\)"),
    ({"positions": F(2, 2)}, TypeError, "positions must be of dtype int32 or int64, got float32"),
    ({"interleaved": 1}, TypeError, "interleaved must be True or False, got 1"),
    ({"q": F(2, 2, 0, 16)}, ValueError, "q must have at least one head"),
    ({"q": F(2, 3, 4, 16)}, ValueError, r"q must have shape .* = \(2, 2, any, 16\), got \(2, 3, 4, 16\)"),
    ({"q": F(2, 2, 4, 16).half()}, TypeError, r"q must have the dtype of k \(float32\), got float16"),
    ({"q_norm_weight": F(16)}, ValueError, "q_norm_weight is given without q"),
    ({"k_norm_weight": F(8)}, ValueError, r"k_norm_weight must have shape \(head_dim\) = \(16\), got \(8,\)"),
    ({"norm_eps": -1.0}, ValueError, "norm_eps must be at least 0.0, got -1.0"),
    ({"norm_weight_offset": float("inf")}, ValueError, "norm_weight_offset must be finite, got inf"),
    ({"backend": "numpy"}, ValueError, "backend must be one of 'cuda', 'triton', 'torch', 'reference', got 'numpy'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_error(changes, error, message, device):
    call = base(device, **changes)
    before = {name: call[name].clone() for name in ("k_cache", "v_cache")}
    with pytest.raises(error, match=message):
        kv_append(**call)
    for name, value in before.items():
        assert torch.equal(call[name].float(), value.float())


VALUES = [
    ({"cache_seqlens": int32(3, 11)},
     r"cache_seqlens must be from 0 to 10, so that 2 new tokens fit into the capacity of 12, got 11 for sequence 1"),
    ({"cache_seqlens": int32(-1, 3)}, "got -1 for sequence 0"),
    (packed(0, 1, 4, cache_seqlens=int32(3, 10)), "cache_seqlens must be from 0 to 9, so that 3 new tokens fit .* got 10 for sequence 1"),
    (packed(0, 5, 4), r"cu_seqlens must start at 0, never decrease and end at the number of tokens \(4\), got \[0, 5, 4\]"),
    ({"cache_batch_idx": int32(0, 2)}, r"cache_batch_idx must hold rows of the cache from 0 to 1, got 2 at index \[1\]"),
    ({"cache_batch_idx": int32(1, 1)}, r"cache_batch_idx must name each row once, got \[1, 1\]"),
    (pages(block_table=torch.tensor([[9, 1, 0], [5, 8, 7]], dtype=torch.int32)),
     r"block_table must hold pages from 0 to 8 where new tokens go, got 9 at index \[0, 0\]"),
    (pages(block_table=torch.tensor([[3, 1, 0], [5, 8, -1]], dtype=torch.int32)), r"got -1 at index \[1, 2\]"),
    (slots(0, 1, 2, 36), r"slot_mapping must hold slots \(negative = skip\) from -1 to 35, got 36 at index \[3\]"),
    (slots(0, 7, -1, 7), "slot_mapping must name each slot once, got slot 7 more than once"),
    (slots(0, 1, 2, 3, **tables(), positions=torch.tensor([0, 1, 2, 12])), "positions must hold rows of cos and sin from 0 to 11, got 12"),
    ({**tables(), "positions": torch.tensor([[0, 1], [2, -1]])}, "positions must hold rows of cos and sin from 0 to 11, got -1"),
    (tables(length=11), r"cos must have a row for each position: sequence 1 reaches 12, got shape \(11, 8\)"),
    (quantised(v_scale=torch.tensor([float("nan"), 1.0])), "v_scale must not contain NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), VALUES, ids=[message[:60] for _, message in VALUES])
def test_values_are_checked_where_reading_is_free(changes, message, device, monkeypatch):
    """Always on a CPU; on a GPU with the debug switch."""
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(ValueError, match=message):
        kv_append(**base(device, **changes))


def test_it_has_no_gradient(device):
    call = base(device, q=F(2, 2, 4, 16), k_norm_weight=F(16), q_norm_weight=F(16))
    for name in ("k", "v", "q", "k_cache", "k_norm_weight"):
        changed = {**call, name: call[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError, match=f"kv_append is not differentiable, but {name} requires grad"):
            kv_append(**changed)
        with torch.no_grad():
            assert not kv_append(**changed).requires_grad


# --- Backends and torch's machinery -------------------------------------------------------------------------------------------------------


def test_choice(device):
    call = base(device)
    best = "triton" if device.type == "cuda" else "torch"
    assert_same(run(call, None), run(call, best))
    with use_backend("reference"):
        assert_same(run(call, None), run(call, "reference"))
    double = {name: value.double() if value.is_floating_point() else value for name, value in call.items()}
    with pytest.raises(NotImplementedError, match=r"kv_append: backend 'triton' cannot serve this call: .*float64"):
        run(double, "triton")
    assert run(double, "reference")["k_cache"].dtype == torch.float64
    assert CHOICE.report(device.type)["triton"] == "serves, except float64"


def test_autocast_follows_the_cache(device):
    call = base(device, q=F(2, 2, 4, 16))
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = run({**half, "k": call["k"], "v": call["v"], "q": call["q"]}, None)
    assert_same(actual, run(half, None))


def test_saved_tensors_notice_the_write(device):
    """A cache that some backward pass needs unchanged: torch's version counter moves, on every backend."""
    for backend in BACKENDS:
        if not refuses(backend, device):
            call = base(device)
            weight = torch.ones((), device=device, requires_grad=True)
            loss = (call["k_cache"] * weight).sum()
            with torch.no_grad():
                kv_append(**call, backend=backend)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def _registered(call: dict[str, Any], backend: str) -> tuple[Any, tuple[Any, ...]]:
    from pytransformer.ops.kv_append.call import AppendCall, check_kv_append, scales_are_written

    options = {"interleaved": False, "norm_eps": 1e-6, "norm_weight_offset": 0.0}
    checked = check_kv_append(AppendCall(**(dict.fromkeys(AppendCall._fields) | options | call)))
    ops = torch.ops.pytransformer
    return (ops.kv_append_scaled if scales_are_written(checked) else ops.kv_append).default, (*checked, backend)


@pytest.mark.parametrize("backend", IN_THE_MACHINERY)
def test_opcheck(backend, device):
    if refuses(backend, device):
        return
    scaled = quantised(k_scale=torch.zeros(2, 12, 2), v_scale=torch.zeros(2, 12, 2))
    calls = [base(device, q=F(2, 2, 4, 16), **tables()), base(device, **slots(0, 9, -1, 3))]
    calls += [base(device, **scaled)] if backend != "torch" else []
    for call in calls:
        torch.library.opcheck(*_registered(call, backend))


@pytest.mark.parametrize("backend", IN_THE_MACHINERY)
def test_compile(backend, device):
    """One graph for changing sizes; the caches are changed in place, as in eager mode, bit by bit."""
    if refuses(backend, device):
        return
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k, v, k_cache, v_cache, lengths, cos, sin):
        new_q = kv_append(k * 2, v, k_cache, v_cache, cache_seqlens=lengths, q=q, cos=cos, sin=sin, backend=backend)
        return new_q + 1, k_cache.sum()

    cos, sin = (table.to(device) for table in pytransformer.rope_tables(16, 40))
    for batch, seqlen, capacity in ((3, 5, 20), (5, 3, 31)):
        q, k, v = (torch.randn(batch, seqlen, heads, 16, device=device) for heads in (4, 2, 2))
        caches = torch.zeros(2, 2, batch, capacity, 2, 16, device=device)
        lengths = torch.arange(batch, dtype=torch.int32, device=device)
        new_q, total = compiled(q, k, v, caches[0, 0], caches[0, 1], lengths, cos, sin)
        expected = kv_append(
            k * 2, v, caches[1, 0], caches[1, 1], cache_seqlens=lengths, q=q, cos=cos, sin=sin, backend=backend
        )
        assert torch.equal(new_q, expected + 1)
        assert torch.equal(caches[0], caches[1])
        assert torch.equal(total, caches[1, 0].sum())
    assert sum("pytransformer.kv_append" in graph.code for graph in counter.graphs) == 1
    torch._dynamo.reset()


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        call = base(torch.device("cpu"), q=F(2, 2, 4, 16), **tables())
        call = {
            name: mode.from_tensor(value) if not hasattr(value, "fake_mode") else value for name, value in call.items()
        }
        new_q = kv_append(**call)
        assert new_q is not None
        assert new_q.shape == (2, 2, 4, 16)
        assert new_q.is_contiguous()
