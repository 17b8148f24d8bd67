"""Any head_dim: no multiple of 8, above 256, one for v of its own; by every backend that can, and the reason of those that cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytransformer import reference
from pytransformer.ops import backend as backends
from pytransformer.ops.attention import CHOICE as ATTENTION
from pytransformer.ops.attention import attention
from pytransformer.ops.attention.call import AttentionCall
from pytransformer.ops.decode_attention import CHOICE as DECODE
from pytransformer.ops.decode_attention import decode_attention
from pytransformer.ops.decode_attention.call import DecodeCall
from pytransformer.ops.kv_append import CHOICE as APPEND
from pytransformer.ops.kv_append import kv_append
from pytransformer.ops.rope import rope
from pytransformer.verification import Contract, measure
from pytransformer.verification.cases import FLOATS
from tests.kernels.append_contract import PLACES, Append, assert_same, call_of, copies, draw, results_of, run_reference
from tests.kernels.decode_contract import Decode
from tests.ops import rope_cases
from tests.ops.attention_cases import case, qkv, starts
from tests.ops.test_attention_tiles import Memory
from tests.ops.test_decode_attention import check_contract
from tests.support.draws import pool

# (head_dim, value head_dim): below a multiple of 8, no divisor of anything, between two of them, above what the kernels' tiles hold.
DIMS = ((1, 1), (3, 3), (12, 20), (20, 12), (264, 264), (512, 512), (300, 12))
BY_KERNELS = tuple(dims for dims in DIMS if max(dims) <= 256)
OPTIONS = {
    "causal, GQA": ({}, {"causal": True}),
    "window, lse": ({}, {"window": (2, 1), "return_lse": True}),
    "dropout": ({"dropout_seed": torch.tensor([7, 3])}, {"dropout_p": 0.3}),
    "packed": ({"cu_seqlens_q": starts([5, 0, 4]), "cu_seqlens_k": starts([3, 2, 4])}, {"causal": True}),
}
# Dtypes take turns: the ops have tests of their own for every one.
EVERY = [
    pytest.param(dims, name, FLOATS[(row + column) % 3], id=f"{dims[0]}-{dims[1]}-{name}")
    for row, dims in enumerate(DIMS)
    for column, name in enumerate(OPTIONS)
]
# One option for each size: the interpreter takes its time.
INTERPRETED = [
    pytest.param(dims, name, dtype, id=f"{dims[0]}-{dims[1]}-{name}")
    for dims, name, dtype in zip(BY_KERNELS, OPTIONS, (*FLOATS, torch.float32))
]


def attention_case(dims, name):
    extra, options = OPTIONS[name]

    def inputs():
        tensors = qkv(1, 9, 9, 4, 2, *dims)
        return {**({key: value[0] for key, value in tensors.items()} if name == "packed" else tensors), **extra}

    return case(name, inputs, **options)


@pytest.mark.parametrize(("dims", "name", "dtype"), EVERY)
def test_attention_by_torch(dims, name, dtype, device):
    measure(attention_case(dims, name), dtype, "torch", device).check()


@pytest.mark.parametrize(("dims", "name", "dtype"), EVERY[::3])
def test_attention_by_the_reference(dims, name, dtype, device):
    measure(attention_case(dims, name), dtype, "reference", device).check()


@pytest.mark.parametrize(("dims", "name", "dtype"), INTERPRETED)
def test_attention_by_triton(dims, name, dtype, device):
    measure(attention_case(dims, name), dtype, "triton", device, seeds=2).check()


@pytest.mark.parametrize(
    ("backend", "dims", "page_size"),
    [
        *(("torch", dims, page_size) for dims in ((1, 3), (12, 20), (264, 512)) for page_size in (0, 3)),
        ("triton", (1, 3), 3),
        ("triton", (20, 12), 0),
    ],
)
def test_decode_attention(backend, dims, page_size, device):
    """The Triton kernel reads a cache as it is, which nothing pads."""
    dtype = torch.bfloat16 if page_size else torch.float32
    for seqlen_q, return_lse in ((1, False), (3, True)) if backend == "torch" else ((2, True),):
        decode = Decode(heads=(4, 2), dims=dims, seqlen_q=seqlen_q, dtype=dtype, page_size=page_size)
        check_contract(decode, backend, device, return_lse)


def append(call, backend):
    call = {**call, **copies(call)}
    return results_of(call, kv_append(**call, backend=backend))


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dims", [(1, 3), (13, 12), (264, 300)], ids=str)
def test_kv_append(dims, backend, device):
    """Copies are exact; with QK-norm and RoPE the contract holds. The Triton kernel takes any head_dim."""
    if backend == "torch" and device.type == "cuda":
        pytest.skip("places cannot be read back from a GPU")
    for place in ("contiguous", "pages-of-3"):
        call = draw(replace(PLACES[place], dims=dims, dtype=torch.bfloat16, with_q=True), 0, device)
        assert_same(append(call, backend), run_reference(call))
    if dims == (1, 3):  # no pair to rotate
        return
    contract = Contract(torch.float32)

    def add(seed):
        transformed = Append(dims=dims, with_q=True, norm=True, rotary_dim=12, interleaved=seed % 2 == 1)
        call = draw(transformed, seed, device)
        contract.add_all(append(call, backend), run_reference(call), run_reference(call, torch.float64))

    pool(contract, add, 2).check()  # both layouts of pairs


@pytest.mark.parametrize("backend", rope_cases.BACKENDS)
@pytest.mark.parametrize("head_dim", [9, 13, 301])
def test_rope_of_a_part_of_an_odd_head_dim(head_dim, backend, device):
    """8 features rotate; outputs and gradients."""
    contract, cpu = Contract(torch.float32), torch.device("cpu")

    def add(seed):
        torch.manual_seed(seed)
        tensors, options = rope_cases.draw(device, head_dim=head_dim), {"offsets": 3, "interleaved": seed % 2 == 1}
        actual = rope_cases.results(rope, tensors, torch.float32, device, backend=backend, **options)
        plain, golden = (
            rope_cases.results(reference.rope, tensors, dtype, cpu, **options)
            for dtype in (torch.float32, torch.float64)
        )
        for values, kind in zip(zip(actual, plain, golden), ("output", "gradient")):
            contract.add_all(*values, kind=kind)

    pool(contract, add, 2).check()  # both layouts of pairs


def test_the_scale_is_that_of_the_head_dim_before_padding(device):
    q, k, v = (tensor.to(device) for tensor in qkv(head_dim=12).values())
    for backend in ("triton", "torch"):
        given = attention(q, k, v, softmax_scale=12**-0.5, backend=backend)
        assert torch.equal(attention(q, k, v, backend=backend), given)


def test_results_keep_no_padding(device):
    q, k, v = (tensor.to(device).requires_grad_() for tensor in qkv(1, head_dim=12).values())
    out = attention(q, k, v, backend="triton")
    out.sum().backward()
    for result in (out, q.grad, k.grad, v.grad):
        assert result.untyped_storage().nbytes() == q.numel() * q.element_size()


@pytest.mark.parametrize("dims", [(3, 3), (300, 300), (264, 20)], ids=str)
@pytest.mark.parametrize("return_lse", [False, True], ids=["scaled_dot_product_attention", "tiles"])
def test_memory_on_a_cpu_grows_with_the_length_not_with_its_square(return_lse, dims):
    """Forward and backward by torch: no score matrix, which of 2000 tokens and 2 heads is 32 MB."""
    peaks = []
    for seqlen in (1000, 2000):
        sizes = ((2, dims[0]), (1, dims[0]), (1, dims[1]))
        q, k, v = (torch.randn(1, seqlen, *size, requires_grad=True) for size in sizes)
        with Memory() as memory:
            result = attention(q, k, v, causal=True, return_lse=return_lse, backend="torch")
            (result[0] if return_lse else result).sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] <= 2.1 * peaks[0]


def calls(dims):
    """A float16 call of each op that has limits, with the places of keys in its cache."""

    def zeros(dim):
        return torch.zeros(1, 4, 1, dim, dtype=torch.float16)

    k, v, lengths = zeros(dims[0]), zeros(dims[1]), torch.tensor([0], dtype=torch.int32)
    return {
        ATTENTION: AttentionCall(k, k, v),
        DECODE: DecodeCall(**{**dict.fromkeys(DecodeCall._fields), "q": k, "k_cache": k, "v_cache": v, "cache_seqlens": lengths}),
        APPEND: call_of(k, v, zeros(dims[0]), zeros(dims[1]), cache_seqlens=lengths),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dims", "chosen", "cuda_says"),
    [
        ((64, 40), ("triton", "triton", "cuda"), (None, None, None)),
        ((12, 20), ("triton", "triton", "triton"), (None, "multiple of 8, got 12 of q", "multiple of 8, got 12 of k")),
        ((16, 20), ("triton", "triton", "triton"), (None, "got 20 of v_cache", "got 20 of v")),
        ((264, 8), ("torch", "torch", "triton"), ("at most 256, got 264 of q", "got 264 of q", "got 264 of k")),
        ((8, 257), ("torch", "torch", "triton"), ("at most 256, got 257 of v", "got 257 of v_cache", "got 257 of v")),
    ],
)
def test_what_is_chosen_where_every_backend_runs(dims, chosen, cuda_says, monkeypatch):
    """As on a GPU with the extension; which says for what it is not chosen."""
    monkeypatch.setattr(backends, "unavailable", lambda backend, device_type: None)
    for (choice, call), name, reason in zip(calls(dims).items(), chosen, cuda_says):
        assert choice.select(call, "cuda") == name
        found = choice.why_not("cuda", call, "cuda")
        assert found is None if reason is None else reason in found


def test_a_named_backend_says_why_not(device):
    q, k, v = (tensor.to(device) for tensor in qkv(1, 2, 2, head_dim=8, value_dim=264).values())
    with pytest.raises(NotImplementedError, match=r"'triton' cannot serve .* a head_dim of at most 256, got 264 of v"):
        attention(q, k, v, backend="triton")
    cache, lengths = torch.zeros(1, 4, 1, 300, device=device), torch.tensor([3], dtype=torch.int32, device=device)
    with pytest.raises(NotImplementedError, match=r"'triton' cannot serve .* a head_dim of at most 256, got 300 of q"):
        decode_attention(cache[:, :1], cache, cache, lengths, backend="triton")
