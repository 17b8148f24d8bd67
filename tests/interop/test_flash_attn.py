"""flash_attn's dense and variable-length functions against its documented meaning, and what people tripped over."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pytransformer.interop import flash_attn
from pytransformer.ops.backend import use_backend
from pytransformer.verification import SEEDS, Contract
from tests.interop import flash_attn_meaning as meaning
from tests.support.draws import pool
from tests.support.snippets import run_snippets

# --- names, order, defaults: as the package has them ------------------------------------------------------------------------------------

EMPTY = inspect.Parameter.empty
OPTIONS = [
    ("dropout_p", 0.0), ("softmax_scale", None), ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0), ("alibi_slopes", None),
    ("deterministic", False), ("return_attn_probs", False),
]  # fmt: skip
PLACES = [("cu_seqlens_q", EMPTY), ("cu_seqlens_k", EMPTY), ("max_seqlen_q", EMPTY), ("max_seqlen_k", EMPTY)]
SIGNATURES = {
    "flash_attn_func": [("q", EMPTY), ("k", EMPTY), ("v", EMPTY), *OPTIONS],
    "flash_attn_kvpacked_func": [("q", EMPTY), ("kv", EMPTY), *OPTIONS],
    "flash_attn_qkvpacked_func": [("qkv", EMPTY), *OPTIONS],
    "flash_attn_varlen_func": [("q", EMPTY), ("k", EMPTY), ("v", EMPTY), *PLACES, *OPTIONS, ("block_table", None)],
    "flash_attn_varlen_kvpacked_func": [("q", EMPTY), ("kv", EMPTY), *PLACES, *OPTIONS],
    "flash_attn_varlen_qkvpacked_func": [("qkv", EMPTY), ("cu_seqlens", EMPTY), ("max_seqlen", EMPTY), *OPTIONS],
    "flash_attn_with_kvcache": [
        ("q", EMPTY), ("k_cache", EMPTY), ("v_cache", EMPTY), ("k", None), ("v", None), ("rotary_cos", None), ("rotary_sin", None),
        ("cache_seqlens", None), ("cache_batch_idx", None), ("cache_leftpad", None), ("block_table", None), ("softmax_scale", None),
        ("causal", False), ("window_size", (-1, -1)), ("softcap", 0.0), ("rotary_interleaved", True), ("alibi_slopes", None),
        ("num_splits", 0), ("return_softmax_lse", False),
    ],
    "apply_rotary_emb": [
        ("x", EMPTY), ("cos", EMPTY), ("sin", EMPTY), ("interleaved", False), ("inplace", False), ("seqlen_offsets", 0),
        ("cu_seqlens", None), ("max_seqlen", None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_that_of_flash_attn(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    assert [(each.name, each.default) for each in parameters.values()] == SIGNATURES[name]
    assert {each.kind for each in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert sorted(flash_attn.__all__) == sorted(SIGNATURES)


# --- the contract -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Lengths are (seqlen_q, seqlen_k) for a batch of two, or one such pair per packed sequence."""

    lengths: tuple[Any, ...] = (9, 9)
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (16, 16)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        return isinstance(self.lengths[0], tuple)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
CASES = {
    "plain": Case(),
    "causal": Case((7, 12), options={"causal": True}),
    "causal, more queries than keys": Case((9, 4), options={"causal": True}),
    "window": Case((10, 13), options={"window_size": (3, 2)}),
    "left window, causal": Case(options={"window_size": (4, -1), "causal": True}),
    "right window, any negative is unlimited": Case(options={"window_size": (-7, 1)}),
    "softcap, scale": Case(options={"softcap": 2.0, "softmax_scale": 0.7}),
    "alibi per head, one key head": Case((5, 11), (4, 1), options={"alibi_slopes": SLOPES, "causal": True}),
    "alibi per sequence": Case((6, 6), options={"alibi_slopes": torch.stack((SLOPES, SLOPES * 3)), "window_size": (2, 4)}),
    "head_dim 13": Case((5, 6), (3, 3), (13, 13), {"causal": True}),
    "head_dim 59, value 12": Case((4, 5), (2, 1), (59, 12)),
    "head_dim 300": Case((4, 5), (2, 1), (300, 300)),
    "head_dim 1": Case((4, 5), (2, 1), (1, 1), {"softcap": 1.0}),
    "packed": Case(((4, 4), (1, 1), (7, 7)), options={"causal": True}),
    "packed, other lengths of keys": Case(((3, 9), (8, 2), (5, 5)), options={"causal": True, "window_size": (3, 0)}),
    "packed, all options": Case(
        ((6, 6), (2, 5)), (4, 2), (20, 20), {"softcap": 3.0, "alibi_slopes": torch.stack((SLOPES, SLOPES * 2)), "causal": True}
    ),
}  # fmt: skip


def starts(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def draw(case, dtype, seed, device):
    """q, k, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    if case.packed:
        shape_q, shape_k = (sum(pair[0] for pair in case.lengths),), (sum(pair[1] for pair in case.lengths),)
    else:
        shape_q, shape_k = ((2, length) for length in case.lengths)
    (heads, kv_heads), (dim, value_dim) = case.heads, case.dims
    shapes = (
        (*shape_q, heads, dim),
        (*shape_k, kv_heads, dim),
        (*shape_k, kv_heads, value_dim),
        (*shape_q, heads, value_dim),
    )
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def run(case, q, k, v, return_attn_probs=True, with_rest=False):
    """(out, lse) of the surface, lse only if asked for, and what comes third ``with_rest``."""
    options = {**on_device(case.options, q.device), "return_attn_probs": return_attn_probs}
    if case.packed:
        lengths_q, lengths_k = zip(*case.lengths)
        where = starts(lengths_q, q.device), starts(lengths_k, q.device), max(lengths_q), max(lengths_k)
        result = flash_attn.flash_attn_varlen_func(q, k, v, *where, **options)
    else:
        result = flash_attn.flash_attn_func(q, k, v, **options)
    if not return_attn_probs:
        return result, None
    out, lse, rest = result
    assert rest.dtype == q.dtype and lse.dtype == torch.float32
    assert rest.shape == (0,) or "dropout_p" in options
    return result if with_rest else (out, lse)


def expect(case, q, k, v):
    """(out, lse) of the documented meaning, in the dtype of q."""
    options = on_device(case.options, q.device)
    if case.packed:
        lengths_q, lengths_k = (list(lengths) for lengths in zip(*case.lengths))
        return meaning.varlen(q, k, v, lengths_q, lengths_k, **options)
    return meaning.dense(q, k, v, **options)


def on_device(options, device):
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def check_contract(case, dtype, device, least=SEEDS, without_lse=True):
    contract = Contract(dtype)

    def add(seed):
        *tensors, dout = draw(case, dtype, seed, device)
        results = {}
        functions = {"actual": (run, dtype), "plain": (expect, dtype), "golden": (expect, torch.float64)}
        if without_lse:  # another backend may serve the call
            functions["without lse"] = functools.partial(run, return_attn_probs=False), dtype
        for which, (function, kind) in functions.items():
            leaves = [tensor.to(kind).requires_grad_() for tensor in tensors]
            out, lse = function(case, *leaves)
            gradients = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout.to(kind))))
            results[which] = {"out": out} if lse is None else {"out": out, "lse": lse}, gradients
        for which in results.keys() - {"plain", "golden"}:
            for place, kind in enumerate(("output", "gradient")):
                for name, value in results[which][place].items():
                    plain, golden = results["plain"][place][name], results["golden"][place][name]
                    contract.add(f"{which} {name}", actual=value, plain=plain, golden=golden, kind=kind)

    pool(contract, add, least).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_contract(name, dtype, device):
    check_contract(CASES[name], dtype, device)


@pytest.mark.parametrize("name", ["causal", "head_dim 13", "packed, all options"])
def test_contract_on_triton(name, device):
    with use_backend("triton"):
        check_contract(CASES[name], torch.float16, device, least=2, without_lse=False)


# --- the packed forms -------------------------------------------------------------------------------------------------------------------


def results_of(function, leaves, *args, **options):
    out = function(*leaves, *args, **options)
    return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(0))]


@pytest.mark.parametrize("head_dim", [16, 10])
def test_packed_forms_have_the_bits_of_the_unpacked_and_one_gradient(head_dim, device):
    options = {"causal": True, "window_size": (3, 0), "softmax_scale": 0.3}
    qkv = torch.randn(2, 6, 3, 2, head_dim, device=device, requires_grad=True)
    q, k, v = (part.detach().requires_grad_() for part in qkv.unbind(2))
    kv = torch.stack((k, v), 2).detach().requires_grad_()
    out, dq, dk, dv = results_of(flash_attn.flash_attn_func, [q, k, v], **options)
    for actual, expected in (
        (results_of(flash_attn.flash_attn_qkvpacked_func, [qkv], **options), [out, torch.stack((dq, dk, dv), 2)]),
        (results_of(flash_attn.flash_attn_kvpacked_func, [q, kv], **options), [out, dq, torch.stack((dk, dv), 2)]),
    ):
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_packed_varlen_forms_have_the_bits_of_the_unpacked_and_one_gradient(device):
    lengths = [4, 1, 3]
    cu_seqlens = starts(lengths, device)
    qkv = torch.randn(8, 3, 2, 16, device=device, requires_grad=True)
    q, k, v = (part.detach().requires_grad_() for part in qkv.unbind(1))
    kv = torch.stack((k, v), 1).detach().requires_grad_()
    both = (cu_seqlens, cu_seqlens, 4, 4)
    out, dq, dk, dv = results_of(flash_attn.flash_attn_varlen_func, [q, k, v], *both, causal=True)
    for actual, expected in (
        (
            results_of(flash_attn.flash_attn_varlen_qkvpacked_func, [qkv], cu_seqlens, 4, causal=True),
            [out, torch.stack((dq, dk, dv), 1)],
        ),
        (
            results_of(flash_attn.flash_attn_varlen_kvpacked_func, [q, kv], *both, causal=True),
            [out, dq, torch.stack((dk, dv), 1)],
        ),
    ):
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


# --- varlen over pages ------------------------------------------------------------------------------------------------------------------


def paged_case(page_size, device, dtype=torch.float32, head_dim=16):
    """Queries (3, 1, 4) over keys (7, 1, 5) in shuffled pages among NaN: the arguments, and k and v packed."""
    lengths_q, lengths_k = [3, 1, 4], [7, 1, 5]
    q, k, v = (
        torch.randn(sum(n), heads, head_dim).to(dtype) for n, heads in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2))
    )
    per_row = -(-max(lengths_k) // page_size)
    places = torch.randperm(3 * per_row + 2)[: 3 * per_row].view(3, per_row)
    pages = []
    for packed in (k, v):
        cache = torch.full((3 * per_row + 2, page_size, 2, head_dim), math.nan, dtype=dtype)
        for row, part in enumerate(packed.split(lengths_k)):
            for slot, token in enumerate(part):
                cache[places[row, slot // page_size], slot % page_size] = token
        pages.append(cache.to(device))
    where = starts(lengths_q, device), starts(lengths_k, device), 4, 7
    return (
        (q.to(device), *pages, *where),
        places.to(device, torch.int32),
        (lengths_q, lengths_k),
        (k.to(device), v.to(device)),
    )


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
def test_varlen_with_a_block_table_of_any_page_size(page_size, backend, device):
    options = {"causal": True, "window_size": (4, 0)}
    contract = Contract(torch.float32)

    def add(seed):
        torch.manual_seed(seed)
        arguments, table, lengths, (k, v) = paged_case(page_size, device)
        with use_backend(backend):
            out, lse, _ = flash_attn.flash_attn_varlen_func(
                *arguments, **options, block_table=table, return_attn_probs=True
            )
        plain, golden = (
            meaning.varlen(arguments[0].to(dtype), k.to(dtype), v.to(dtype), *lengths, **options)
            for dtype in (torch.float32, torch.float64)
        )
        contract.add("out", actual=out, plain=plain[0], golden=golden[0])
        contract.add("lse", actual=lse, plain=plain[1], golden=golden[1])

    pool(contract, add, SEEDS if backend is None else 2).check()


def test_a_block_table_has_no_gradient_and_no_dropout(device):
    arguments, table, *_ = paged_case(4, device)
    with pytest.raises(RuntimeError, match=r"block_table is not differentiable, but q requires grad"):
        flash_attn.flash_attn_varlen_func(arguments[0].requires_grad_(), *arguments[1:], block_table=table)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"dropout_p must be 0.0 with block_table"):
        flash_attn.flash_attn_varlen_func(*arguments, dropout_p=0.1, block_table=table)


# --- what people tripped over -----------------------------------------------------------------------------------------------------------


def visible(seqlen_q, seqlen_k, device, **options):
    """Which keys each query reads: the weights, by values that are unit vectors."""
    q, k = (torch.randn(1, length, 1, 16, device=device) for length in (seqlen_q, seqlen_k))
    v = torch.eye(seqlen_k, device=device)[None, :, None]
    return (flash_attn.flash_attn_func(q, k, v, **options)[0, :, 0] > 0).int().tolist()


def test_causal_is_aligned_bottom_right_not_top_left(device):
    """The two pictures of flash_attn's documentation."""
    assert visible(2, 5, device, causal=True) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert visible(5, 2, device, causal=True) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]


def test_window_is_not_off_by_one(device):
    """Both ends are inclusive: (1, 0) reads two keys."""
    assert visible(4, 4, device, window_size=(1, 0)) == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(2, 5, device, window_size=(1, 1)) == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert visible(3, 3, device, window_size=(0, 0)) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_a_row_that_sees_nothing_gives_zeros_and_no_nan_in_the_gradient(device):
    q, k, v = (torch.randn(1, length, 2, 16, device=device, requires_grad=True) for length in (5, 2, 2))
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.equal(out[:, :3], torch.zeros_like(out[:, :3]))
    assert bool((lse[..., :3] == -math.inf).all()) and bool(lse[..., 3:].isfinite().all())
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert torch.equal(gradients[0][:, :3], torch.zeros_like(q[:, :3]))


def test_padding_of_the_head_dim_does_not_change_the_scale(device):
    """1 / sqrt(13), not 1 / sqrt(16)."""
    q, k, v = (torch.randn(1, 4, 2, 13, device=device) for _ in range(3))
    asked = flash_attn.flash_attn_func(q, k, v, softmax_scale=13**-0.5)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v), asked) and asked.shape == q.shape


def test_last_dimension_need_not_be_contiguous(device):
    q, k, v = (torch.randn(1, 5, 16, 2, device=device).transpose(2, 3) for _ in range(3))
    expected = flash_attn.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(flash_attn.flash_attn_func(q, k, v), expected)


def test_a_gradient_flows_through_the_lse(device):
    """flash_attn drops it silently; here merging partial results by lse trains."""
    q, k, v = (torch.randn(1, 4, 2, 16, device=device, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def gradient(function):
        lse = function(q, k, v)[1]
        return torch.autograd.grad(lse.double().square().sum(), q)[0]

    contract = Contract(torch.float32)
    plain = torch.autograd.grad(meaning.dense(q.float(), k.float(), v.float())[1].square().sum(), q)[0]
    actual = torch.autograd.grad(
        flash_attn.flash_attn_func(q.float(), k.float(), v.float(), return_attn_probs=True)[1].square().sum(), q
    )[0]
    contract.add("dq", actual=actual, plain=plain, golden=gradient(meaning.dense), kind="gradient")
    contract.check()


def test_deterministic_is_handed_on_and_otherwise_left_to_torch(monkeypatch, device):
    from pytransformer.interop.flash_attn import functions

    seen = []
    true_attention = functions.attention

    def spy(*args, **options):
        seen.append(options["deterministic"])
        return true_attention(*args, **options)

    monkeypatch.setattr(functions, "attention", spy)
    q = torch.randn(1, 3, 2, 16, device=device)
    flash_attn.flash_attn_func(q, q, q)
    flash_attn.flash_attn_func(q, q, q, deterministic=True)
    assert seen == [None, True]


# --- dropout ----------------------------------------------------------------------------------------------------------------------------


def with_unit_values(case, seed, device):
    """q, k of a case, and values that turn the output into the weights: keys of a sequence count from 0."""
    q, k, *_ = draw(case, torch.float32, seed, device)
    lengths = [pair[1] for pair in case.lengths] if case.packed else [case.lengths[1]] * 2
    units = torch.eye(max(lengths), device=device)
    return q, k, torch.cat([units[:length] for length in lengths]).view(*k.shape[:-2], 1, -1).expand(*k.shape[:-1], -1)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_drops_the_asked_share_scales_the_rest_and_follows_the_seed(packed, device):
    lengths = ((24, 40), (31, 17), (9, 9)) if packed else (40, 40)
    case = Case(lengths, options={"alibi_slopes": SLOPES, "softcap": 4.0, "causal": not packed})
    arguments = with_unit_values(case, 0, device)
    dropping = dataclasses.replace(case, options=case.options | {"dropout_p": 0.25})

    def weights(seed, **options):
        torch.manual_seed(seed)
        return run(dropping, *arguments, **options)

    out, lse, signed = weights(0, with_rest=True)
    assert torch.equal(weights(0, return_attn_probs=False)[0], out) and not torch.equal(weights(1)[0], out)
    golden, plain = (
        expect(case, *(tensor.to(dtype) for tensor in arguments)) for dtype in (torch.float64, torch.float32)
    )
    # Half of a causal square is hidden; what is seen and not dropped is not zero.
    seen, kept = golden[0] != 0, out != 0
    share = float(kept.sum() / seen.sum())
    # The share is binomial: five standard deviations.
    assert abs(share - 0.75) < 5 * math.sqrt(0.25 * 0.75 / int(seen.sum()))
    contract = Contract(torch.float32)
    contract.add("kept", actual=out[kept], plain=plain[0][kept] / 0.75, golden=golden[0][kept] / 0.75)
    contract.add("lse", actual=lse, plain=plain[1], golden=golden[1])
    # S_dmask: the weights before dropout, negative where they were dropped.
    if packed:
        assert signed.shape == (3, 4, 31, 40) and torch.equal(signed[2, :, 9:], torch.zeros_like(signed[2, :, 9:]))
        signed = torch.cat([signed[row, :, : pair[0]] for row, pair in enumerate(lengths)], 1).transpose(0, 1)
    else:
        assert signed.shape == (2, 4, 40, 40)
        signed = signed.transpose(1, 2)
    contract.add("S_dmask", actual=signed.abs(), plain=plain[0], golden=golden[0])
    contract.check()
    assert torch.equal(signed > 0, kept)


# --- torch.compile ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=pytest.mark.slow)])
def test_fullgraph_forward_and_backward_with_dynamic_lengths(backend, device):
    torch._dynamo.reset()

    def function(q, k, v, cu_seqlens, max_seqlen, qkv):
        packed, lse, _ = flash_attn.flash_attn_varlen_func(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True, return_attn_probs=True
        )
        return packed, lse, flash_attn.flash_attn_qkvpacked_func(qkv, softcap=2.0, window_size=(3, 1))

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    with use_backend(backend):
        for lengths in ([3, 4], [5, 6]):
            q, k, v = (torch.randn(sum(lengths), 2, 13, device=device, requires_grad=True) for _ in range(3))
            qkv = torch.randn(1, sum(lengths), 3, 2, 16, device=device, requires_grad=True)
            arguments = (q, k, v, starts(lengths, device), max(lengths), qkv)
            results = []
            for each in (function, compiled):
                outputs = each(*arguments)
                results.append((*outputs, *torch.autograd.grad([out.sum() for out in outputs], (q, k, v, qkv))))
            for eager, other in zip(*results, strict=True):
                # On a GPU torch's own kernels add in any order.
                torch.testing.assert_close(eager, other, **({} if eager.is_cuda else {"rtol": 0.0, "atol": 0.0}))


# --- the guide --------------------------------------------------------------------------------------------------------------------------


def test_the_snippets_of_the_guide_run():
    assert run_snippets(Path(__file__).parents[2] / "docs" / "flash-attn.md") >= 5
