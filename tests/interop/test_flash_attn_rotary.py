"""apply_rotary_emb against its documented meaning, in place and not, with offsets and packed."""

from __future__ import annotations

import pytest
import torch

from pytransformer.interop.flash_attn import apply_rotary_emb
from pytransformer.ops.backend import use_backend
from pytransformer.verification import SEEDS, Contract
from tests.interop import flash_attn_meaning as meaning
from tests.support.draws import pool

CASES = {
    "half": {},
    "interleaved": {"interleaved": True},
    "partial": {"rotary_dim": 6},
    "partial, interleaved, offset": {"rotary_dim": 10, "interleaved": True, "offsets": 3},
    "an offset for each sequence": {"offsets": [4, 0, 7]},
    "packed": {"lengths": [2, 5, 1]},
    "packed, offsets": {"lengths": [3, 0, 4], "offsets": [1, 2, 5], "interleaved": True},
}
LENGTH = 12


def draw(case, dtype, seed, device):
    """x, cos, sin, the other arguments, and each sequence as (slice of x, its positions)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = case.get("lengths")
    x = torch.randn((3, 5, 2, 16) if lengths is None else (sum(lengths), 2, 16), generator=generator).to(device, dtype)
    angles = torch.rand(LENGTH, case.get("rotary_dim", 16) // 2, generator=generator).to(device) * 6.3
    offsets = case.get("offsets", 0)
    options = {"interleaved": case.get("interleaved", False)}
    options["seqlen_offsets"] = torch.tensor(offsets, device=device) if isinstance(offsets, list) else offsets
    begins = torch.tensor([0, *(lengths or [])]).cumsum(0).tolist()
    if lengths is not None:
        options |= {"cu_seqlens": torch.tensor(begins, device=device, dtype=torch.int32), "max_seqlen": max(lengths)}
    sequences = []
    for sequence in range(3):
        place = sequence if lengths is None else slice(begins[sequence], begins[sequence + 1])
        first = offsets[sequence] if isinstance(offsets, list) else offsets
        sequences.append((place, first + torch.arange(len(x[place]), device=device)))
    return x, angles.cos().to(dtype), angles.sin().to(dtype), options, sequences


def expect(x, cos, sin, options, sequences):
    rotated = torch.zeros_like(x)
    for place, positions in sequences:
        rotated[place] = meaning.rotate(x[place], cos, sin, positions, options["interleaved"])
    return rotated


@pytest.mark.parametrize(
    ("backend", "dtype"), [(None, torch.float32), (None, torch.bfloat16), ("triton", torch.float16)]
)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, backend, dtype, device):
    contract = Contract(dtype)

    def add(seed):
        x, cos, sin, options, sequences = draw(CASES[name], dtype, seed, device)
        results = []
        for kind in (None, dtype, torch.float64):
            leaf = x.to(kind or dtype).requires_grad_()
            tables = cos.to(kind or dtype), sin.to(kind or dtype)
            with use_backend(backend):
                out = (
                    apply_rotary_emb(leaf, *tables, **options)
                    if kind is None
                    else expect(leaf, *tables, options, sequences)
                )
                dout = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype)
                results.append((out, torch.autograd.grad(out, leaf, dout)[0]))
        (out, dx), (plain, plain_dx), (golden, golden_dx) = results
        contract.add("out", actual=out, plain=plain, golden=golden)
        contract.add("dx", actual=dx, plain=plain_dx, golden=golden_dx, kind="gradient")

    pool(contract, add, SEEDS if backend is None else 2).check()


@pytest.mark.parametrize("backend", [None, "triton"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_inplace_writes_into_x_and_returns_it(requires_grad, backend, device):
    """Also where a gradient is needed, and into a part of qkv."""
    x, cos, sin, options, _ = draw(CASES["partial"], torch.float32, 0, device)
    with use_backend(backend):
        expected = apply_rotary_emb(x, cos, sin, **options)
        leaf = torch.stack((x, x, x), 2).requires_grad_(requires_grad)
        qkv = leaf * 1
        q = qkv[:, :, 0]
        assert apply_rotary_emb(q, cos, sin, inplace=True, **options) is q
        assert torch.equal(qkv[:, :, 0], expected) and torch.equal(qkv[:, :, 1:], leaf[:, :, 1:])
        if requires_grad:
            (expected_gradient,) = torch.autograd.grad(
                apply_rotary_emb(x.requires_grad_(), cos, sin, **options).sum(), x
            )
            (gradient,) = torch.autograd.grad(qkv.sum(), leaf)
            assert torch.equal(gradient[:, :, 0], expected_gradient)
            assert torch.equal(gradient[:, :, 1:], torch.ones_like(gradient[:, :, 1:]))


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_a_leaf_variable_that_requires_grad_is_being_used_in_an_in_place_operation(backend, part, device):
    """flash_attn rotates a leaf, or a part of one, where it lies, and its own tests ask for the gradient of what it returns."""
    x, cos, sin, options, _ = draw(CASES["partial, interleaved, offset"], torch.float32, 0, device)
    leaf = (torch.stack((x, x), 2) if part else x.clone()).requires_grad_()
    cotangent = torch.randn_like(x)
    with use_backend(backend):
        apart = x.clone().requires_grad_()
        expected = apply_rotary_emb(apart, cos, sin, **options)
        (expected_gradient,) = torch.autograd.grad(expected, apart, cotangent)
        out = apply_rotary_emb(leaf[:, :, 1] if part else leaf, cos, sin, inplace=True, **options)
        out.backward(cotangent)
    memory, gradient = (leaf[:, :, 1], leaf.grad[:, :, 1]) if part else (leaf, leaf.grad)
    assert torch.equal(out, expected) and torch.equal(memory, expected)
    assert out.data_ptr() == memory.data_ptr()
    assert torch.equal(gradient, expected_gradient)
    if part:
        assert torch.equal(leaf[:, :, 0], x) and not leaf.grad[:, :, 0].any()


def test_what_saved_a_leaf_before_it_was_rotated_notices(device):
    x, cos, sin, options, _ = draw(CASES["half"], torch.float32, 0, device)
    leaf = x.requires_grad_()
    square = leaf * leaf
    apply_rotary_emb(leaf, cos, sin, inplace=True, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_inplace_where_the_last_dimension_is_not_contiguous(device):
    x, cos, sin, options, _ = draw(CASES["half"], torch.float32, 0, device)
    scattered = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert scattered.stride(-1) != 1
    expected = apply_rotary_emb(x, cos, sin, **options)
    assert torch.equal(apply_rotary_emb(scattered, cos, sin, **options), expected)
    assert apply_rotary_emb(scattered, cos, sin, inplace=True, **options) is scattered
    assert torch.equal(scattered, expected)


def test_int64_cu_seqlens_and_a_tensor_as_max_seqlen(device):
    x, cos, sin, options, _ = draw(CASES["packed"], torch.float32, 0, device)
    expected = apply_rotary_emb(x, cos, sin, **options)
    options |= {"cu_seqlens": options["cu_seqlens"].long(), "max_seqlen": torch.tensor(5, device=device)}
    assert torch.equal(apply_rotary_emb(x, cos, sin, **options), expected)


@pytest.mark.parametrize(
    ("inplace", "backend"),
    [(True, "torch"), (True, "triton"), (False, "torch"), pytest.param(False, "triton", marks=pytest.mark.slow)],
)
def test_fullgraph(inplace, backend, device):
    torch._dynamo.reset()
    x, cos, sin, options, _ = draw(CASES["an offset for each sequence"], torch.float32, 0, device)

    def function(x, cos, sin, offsets):
        return apply_rotary_emb(x, cos, sin, inplace=inplace, seqlen_offsets=offsets)

    with use_backend(backend):
        tensors = (cos, sin, options["seqlen_offsets"])
        eager, graph = x.clone(), x.clone()
        expected = function(eager, *tensors)
        assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(graph, *tensors), expected)
    assert torch.equal(graph, expected if inplace else x)


def test_mistakes_raise_what_flash_attn_raises(device):
    x, cos, sin, _, _ = draw(CASES["half"], torch.float32, 0, device)
    packed, starts = x[0], torch.tensor([0, 5], dtype=torch.int32, device=device)
    for error, words, arguments in (
        (AssertionError, "sin must have the shape of cos", (x, cos, sin[:-1])),
        (AssertionError, "rotary_dim must be at most head_dim", (x[..., :8], cos, sin)),
        (AssertionError, "a row for each of 5 positions", (x, cos[:4], sin[:4])),
        (AssertionError, r"8 \(seqlen_offsets\) \+ 5", (x, cos, sin, False, False, 8)),
        (
            AssertionError,
            "seqlen_offsets must be an int, or",
            (x, cos, sin, False, False, torch.zeros(2, device=device)),
        ),
        (AssertionError, "max_seqlen must be given", (packed, cos, sin, False, False, 0, starts)),
        (ValueError, "x must have 4 dimensions", (packed, cos, sin)),
        (ValueError, "cos must have 2 dimensions", (x, cos[None], sin[None])),
        (ValueError, "x must have 3 dimensions", (x, cos, sin, False, False, 0, starts, 5)),
        (ValueError, "seqlen_offsets must be at least 0", (x, cos, sin, False, False, -1)),
        (TypeError, "x must be a torch.Tensor", (None, cos, sin)),
        (NotImplementedError, "no gradient for cos", (x, cos.clone().requires_grad_(), sin)),
    ):
        with pytest.raises(error, match=words):
            apply_rotary_emb(*arguments)


def test_what_is_known_from_values_raises_on_a_cpu():
    """On a GPU nothing is read back: such positions are clamped there."""
    x, cos, sin, _, _ = draw(CASES["half"], torch.float32, 0, "cpu")
    with pytest.raises(ValueError, match="offsets must leave room in the 12 rows"):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([0, 8, 0]))
    with pytest.raises(ValueError, match=r"cu_seqlens must hold sequences \(max_seqlen\) from 0 to 4, got 5"):
        apply_rotary_emb(x[0], cos, sin, cu_seqlens=torch.tensor([0, 5]), max_seqlen=4)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        apply_rotary_emb(x[0], cos, sin, cu_seqlens=torch.tensor([0, 4]), max_seqlen=4)
