"""Mistakes raise what flash_attn raises for them: RuntimeError for what its own checks refuse, IndexError for missing dimensions."""

from __future__ import annotations

import pytest
import torch

from pytransformer.interop.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from pytransformer.ops.backend import use_backend


def tensors(device, *shape, dtype=torch.float32):
    return [torch.randn(shape, device=device, dtype=dtype) for _ in range(3)]


DENSE = {
    "IndexError: q must have 4 dimensions": lambda q, k, v: (q[0], k, v),
    "RuntimeError: k must have 4 dimensions": lambda q, k, v: (q, k[None], v),
    "TypeError: v must be a torch.Tensor, got None": lambda q, k, v: (q, k, None),
    "RuntimeError: k must have the dtype of q": lambda q, k, v: (q, k.half(), v),
    "RuntimeError: q must be of dtype float32 or": lambda q, k, v: (q.int(), k.int(), v.int()),
    "RuntimeError: k must have shape": lambda q, k, v: (q, k[:1], v),
    "RuntimeError: v must have shape": lambda q, k, v: (q, k, v[:, :2]),
    "RuntimeError: k must have shape .*head_dim of q": lambda q, k, v: (q, k[..., :8], v),
    "RuntimeError: the number of heads of q must be a multiple": lambda q, k, v: (q[:, :, :3], k[:, :, :2], v[:, :, :2]),
    "RuntimeError: q must have a head_dim of at least 1, got 0": lambda q, k, v: [x[..., :0] for x in (q, k, v)],
    "RuntimeError: dropout_p must be at least 0.0 and below 1.0, got 1.0": lambda q, k, v: (q, k, v, 1.0),
    "RuntimeError: dropout_p must be at least 0.0": lambda q, k, v: (q, k, v, -0.1),
    "RuntimeError: softmax_scale must be finite": lambda q, k, v: (q, k, v, 0.0, float("inf")),
    "RuntimeError: causal must be True or False": lambda q, k, v: (q, k, v, 0.0, None, "yes"),
    r"RuntimeError: window_size must be a pair \(left, right\)": lambda q, k, v: (q, k, v, 0.0, None, False, 4),
    r"RuntimeError: window_size\[1\] \(right\) must be an int": lambda q, k, v: (q, k, v, 0.0, None, False, (4, 0.5)),
    "RuntimeError: softcap must be a number": lambda q, k, v: (q, k, v, 0.0, None, False, (-1, -1), "30"),
    "RuntimeError: alibi_slopes must be of dtype float32, got bfloat16": lambda q, k, v: (
        q, k, v, 0.0, None, False, (-1, -1), 0.0, torch.ones(4, dtype=torch.bfloat16, device=q.device)
    ),
    "RuntimeError: alibi_slopes must have shape": lambda q, k, v: (
        q, k, v, 0.0, None, False, (-1, -1), 0.0, torch.ones(3, device=q.device)
    ),
    "RuntimeError: deterministic must be True or False": lambda q, k, v: (
        q, k, v, 0.0, None, False, (-1, -1), 0.0, None, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize("expected", DENSE)
def test_dense(expected, device):
    name, words = expected.split(": ", 1)
    with pytest.raises(
        {"RuntimeError": RuntimeError, "IndexError": IndexError, "TypeError": TypeError}[name], match=words
    ):
        flash_attn_func(*DENSE[expected](*tensors(device, 2, 3, 4, 16)))


def test_tensors_on_different_devices(device):
    q, k, v = tensors(device, 1, 3, 2, 16)
    with pytest.raises(RuntimeError, match="k must be on"):
        flash_attn_func(q, k.to("meta"), v)


def test_packed_tensors_that_hold_too_few_or_too_many(device):
    """flash_attn overlooks a fourth tensor in qkv."""
    starts = torch.tensor([0, 3], dtype=torch.int32, device=device)
    for count, error in ((1, IndexError), (4, RuntimeError)):
        dense = torch.zeros(1, 3, count, 2, 16, device=device)
        with pytest.raises(error, match="qkv must hold 3 tensors in dimension 2"):
            flash_attn_qkvpacked_func(dense)
        with pytest.raises(error, match="kv must hold 2 tensors in dimension 2"):
            flash_attn_kvpacked_func(dense[:, :, 0], dense)
        with pytest.raises(error, match="qkv must hold 3 tensors in dimension 1"):
            flash_attn_varlen_qkvpacked_func(dense[0], starts, 3)
        with pytest.raises(error, match="kv must hold 2 tensors in dimension 1"):
            flash_attn_varlen_kvpacked_func(dense[0, :, 0], dense[0], starts, starts, 3, 3)
    with pytest.raises(IndexError, match="qkv must have 5 dimensions"):
        flash_attn_qkvpacked_func(torch.zeros(3, 3, 2, 16, device=device))


def test_varlen(device):
    q, k, v = tensors(device, 5, 2, 16)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    for words, arguments in (
        ("cu_seqlens_q must be of dtype int32, got int64", (starts.long(), starts, 3, 3)),
        ("cu_seqlens_k must be a torch.Tensor, got None", (starts, None, 3, 3)),
        (r"cu_seqlens_k must have 3 entries \(batch \+ 1\)", (starts, starts[1:], 3, 3)),
        ("max_seqlen_q must be an int", (starts, starts, 3.0, 3)),
        ("cu_seqlens_q must be contiguous", (starts.repeat_interleave(2)[::2], starts, 3, 3)),
    ):
        with pytest.raises(RuntimeError, match=words):
            flash_attn_varlen_func(q, k, v, *arguments)
    with pytest.raises(IndexError, match="q must have 3 dimensions"):
        flash_attn_varlen_func(q[0], k, v, starts, starts, 3, 3)
    pages = torch.zeros(4, 2, 2, 16, device=device)
    for words, table in (
        ("block_table must be of dtype int32", torch.zeros(2, 2, dtype=torch.int64, device=device)),
        ("block_table must have shape", torch.zeros(3, 2, dtype=torch.int32, device=device)),
    ):
        with pytest.raises(RuntimeError, match=words):
            flash_attn_varlen_func(q, pages, pages, starts, starts, 3, 3, block_table=table)


def test_varlen_values_are_checked_where_reading_is_free():
    """A GPU is not made to wait for this: there PYTRANSFORMER_DEBUG=1 asks for it."""
    q, k, v = tensors("cpu", 5, 2, 16)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"max_seqlen_q must be at least the longest sequence \(3\), got 2"):
        flash_attn_varlen_func(q, k, v, starts, starts, 2, 3)
    with pytest.raises(RuntimeError, match=r"end at the number of tokens \(5\)"):
        flash_attn_varlen_func(q, k, v, starts, starts - 1, 3, 3)
    pages, table = torch.zeros(4, 2, 2, 16), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"cu_seqlens_k must hold sequences \(max_seqlen_k\) from 0 to 2, got 3"):
        flash_attn_varlen_func(q, pages, pages, starts, starts, 3, 2, block_table=table)


def test_max_seqlen_may_be_a_tensor_or_none(device):
    """Code that takes it from ``seqlens.max()`` works with flash_attn as well."""
    q, k, v = tensors(device, 5, 2, 16)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    expected = flash_attn_varlen_func(q, k, v, starts, starts, 3, 3, causal=True)
    for longest in (torch.tensor(3, device=device), None):
        assert torch.equal(flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True), expected)


def kvcache_arguments(device):
    q, k, v = tensors(device, 2, 1, 2, 16)
    k_cache, v_cache, _ = tensors(device, 2, 8, 2, 16)
    lengths = torch.tensor([3, 5], dtype=torch.int32, device=device)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": lengths}


INT32 = {"dtype": torch.int32}
KVCACHE = {
    "k and v go together: k is given, v is None": {"v": None},
    "k and v go together: v is given, k is None": {"k": None},
    "cache_seqlens must be given with k and v": {"cache_seqlens": None},
    "k_cache must have the dtype of q": {"k_cache": torch.zeros(2, 8, 2, 16, dtype=torch.bfloat16)},
    "quantised caches, with k_scale": {"k_cache": torch.zeros(2, 8, 2, 16, dtype=torch.int8)},
    "k must have the dtype of q": {"k": torch.zeros(2, 1, 2, 16, dtype=torch.float16)},
    "k must have shape": {"k": torch.zeros(2, 1, 1, 16)},
    "v must have shape": {"v": torch.zeros(2, 2, 2, 16)},
    "v_cache must have shape": {"v_cache": torch.zeros(2, 9, 2, 16)},
    "q must have shape": {"q": torch.zeros(2, 1, 2, 24)},
    "the number of heads of q must be a multiple": {"q": torch.zeros(2, 1, 3, 16)},
    "k_cache must have a row for each of 2 sequences": {
        "k_cache": torch.zeros(1, 8, 2, 16), "v_cache": torch.zeros(1, 8, 2, 16),
    },
    "cache_seqlens must be of dtype int32": {"cache_seqlens": torch.tensor([3, 5])},
    "cache_seqlens must have shape": {"cache_seqlens": torch.tensor([3], **INT32)},
    "cache_seqlens must be an int": {"cache_seqlens": 3.0},
    "cache_batch_idx must be of dtype int32": {"cache_batch_idx": torch.tensor([0, 1])},
    "cache_leftpad must be of dtype int32": {"cache_leftpad": torch.tensor([0, 1])},
    "block_table must be of dtype int32": {"block_table": torch.zeros(2, 1, dtype=torch.int64)},
    "block_table must have shape": {"block_table": torch.zeros(1, 1, **INT32)},
    "cache_batch_idx is for contiguous caches": {
        "block_table": torch.zeros(2, 1, **INT32), "cache_batch_idx": torch.tensor([0, 1], **INT32),
    },
    r"q must have at most as many rows as the cache has slots \(8\), got 9": {"q": torch.zeros(2, 9, 2, 16)},
    "rotary_sin is None": {"rotary_cos": torch.zeros(8, 8)},
    "rotary_cos is None": {"rotary_sin": torch.zeros(8, 8)},
    "k and v must be given with them": {
        "k": None, "v": None, "rotary_cos": torch.zeros(8, 8), "rotary_sin": torch.zeros(8, 8),
    },
    "rotary_cos must be of dtype": {"rotary_cos": torch.zeros(8, 8).half(), "rotary_sin": torch.zeros(8, 8).half()},
    "rotary_sin must have shape": {"rotary_cos": torch.zeros(8, 8), "rotary_sin": torch.zeros(8, 4)},
    "rotary_dim must be at most head_dim": {"rotary_cos": torch.zeros(8, 12), "rotary_sin": torch.zeros(8, 12)},
    r"rotary_cos must have a row for each slot of the cache \(8\)": {
        "rotary_cos": torch.zeros(7, 8), "rotary_sin": torch.zeros(7, 8),
    },
    "num_splits must be at most 128": {"num_splits": 129},
    "alibi_slopes must be of dtype float32": {"alibi_slopes": torch.ones(2).half()},
    "rotary_interleaved must be True or False": {"rotary_interleaved": 1},
}  # fmt: skip


@pytest.mark.parametrize("words", KVCACHE)
def test_kvcache(words, device):
    wrong = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in KVCACHE[words].items()
    }
    with pytest.raises(RuntimeError, match=words):
        flash_attn_with_kvcache(**{**kvcache_arguments(device), **wrong})


def test_kvcache_dimensions_and_layout(device):
    arguments = kvcache_arguments(device)
    scattered = torch.zeros(2, 8, 16, 2, device=device).transpose(2, 3)
    with pytest.raises(AssertionError, match="v_cache must have a contiguous last dimension"):
        flash_attn_with_kvcache(**{**arguments, "v_cache": scattered})
    with pytest.raises(IndexError, match="q must have 4 dimensions"):
        flash_attn_with_kvcache(**{**arguments, "q": arguments["q"][0]})
    with pytest.raises(TypeError, match=r"k_cache must be a torch\.Tensor"):
        flash_attn_with_kvcache(**{**arguments, "k_cache": None})


def test_kvcache_under_grad(device):
    """flash_attn returns a result without gradient there, silently."""
    arguments = kvcache_arguments(device)
    for name in ("q", "k", "k_cache"):
        with pytest.raises(
            RuntimeError, match=f"flash_attn_with_kvcache is not differentiable, but {name} requires grad"
        ):
            flash_attn_with_kvcache(**{**arguments, name: arguments[name].clone().requires_grad_()})
    with torch.no_grad():
        flash_attn_with_kvcache(**{**arguments, "q": arguments["q"].requires_grad_()})


def test_kvcache_values_are_checked_where_reading_is_free():
    arguments = kvcache_arguments("cpu")
    for words, wrong in (
        ("cache_seqlens must hold lengths that leave room for 1 new tokens from 0 to 7, got 8", {"cache_seqlens": 8}),
        (
            "cache_seqlens - cache_leftpad must hold keys from 0 to 8, got -1",
            {"cache_leftpad": torch.tensor([0, 6], dtype=torch.int32)},
        ),
        (
            "cache_batch_idx must name each row once",
            {"cache_batch_idx": torch.tensor([1, 1], dtype=torch.int32)},
        ),
        (
            "block_table must hold pages from 0 to 1",
            {"block_table": torch.tensor([[0], [2]], dtype=torch.int32)},
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            flash_attn_with_kvcache(**{**arguments, **wrong})


def test_a_backend_that_cannot_serve_is_refused_by_a_runtime_error(device):
    q, k, v = tensors(device, 1, 3, 2, 16, dtype=torch.float64)
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' cannot serve this call: float64"):
        flash_attn_func(q, k, v)
