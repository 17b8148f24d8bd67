"""What attention promises beside its formula: edges, bits, backends, dropout, autocast, derivatives."""

from __future__ import annotations

import itertools
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from pytransformer import reference
from pytransformer.ops.attention import attention
from tests.ops.attention_cases import packed_qkv, qkv, starts

BACKENDS = ("reference", "torch", "triton")


def skip_packed_torch_on_a_gpu(backend, device):
    if backend == "torch" and device.type == "cuda":
        pytest.skip("scaled_dot_product_attention takes no packed sequences on a GPU")


def inputs(device, dtype=torch.float32, **sizes):
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in qkv(**sizes).items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_nothing_to_attend_to_gives_zero_and_no_gradient(backend, device):
    tensors = inputs(device, seqlen_q=3, seqlen_k=4)
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool, device=device)
    mask[0, :, 1] = False
    mask[1, :, :, 2] = False  # a key that nobody sees
    bias = torch.zeros(2, 1, 3, 4, device=device)
    bias[0, :, 2] = -torch.inf
    for options in ({"mask": mask}, {"bias": bias}, {"mask": mask, "bias": bias}):
        out = attention(**tensors, **options, backend=backend)
        dq, dk, dv = torch.autograd.grad(out, list(tensors.values()), torch.randn_like(out))
        for row in (1,) * ("mask" in options) + (2,) * ("bias" in options):
            assert out[0, row].eq(0).all()
            assert dq[0, row].eq(0).all()
        for gradient in (dq, dk, dv):
            assert gradient.isfinite().all()
        if "mask" in options:
            assert dk[1, 2].eq(0).all()
            assert dv[1, 2].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_finite_but_huge_negative_biases_averages(backend, device):
    tensors = inputs(device, seqlen_q=2, seqlen_k=5)
    bias = torch.full((2, 5), -1e9, device=device)
    out = attention(**tensors, bias=bias, backend=backend)
    torch.testing.assert_close(out, tensors["v"].mean(1, keepdim=True).expand_as(out), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_k"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (2, 0, 0)], ids=str)
def test_empty_tensors_give_empty_results_or_zeros(backend, batch, seqlen_q, seqlen_k, device):
    tensors = inputs(device, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=4, value_dim=24)
    out = attention(**tensors, causal=True, backend=backend)
    assert out.shape == (batch, seqlen_q, 4, 24)
    assert out.eq(0).all()
    for tensor, gradient in zip(tensors.values(), torch.autograd.grad(out.sum(), list(tensors.values()))):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("backend", ("reference", "triton"))
def test_without_keys_lse_is_minus_infinity_or_the_sink(backend, device):
    tensors = inputs(device, seqlen_q=3, seqlen_k=0)
    sinks = torch.tensor([0.5, -2.0], device=device, requires_grad=True)
    assert attention(**tensors, return_lse=True, backend=backend)[1].eq(-torch.inf).all()
    out, lse = attention(**tensors, sinks=sinks, return_lse=True, backend=backend)
    assert torch.equal(lse, sinks[:, None].expand(2, 2, 3))
    assert torch.equal(torch.autograd.grad(lse.sum() + out.sum(), sinks)[0], torch.full_like(sinks, 6.0))
    with torch.no_grad():
        assert attention(**tensors, backend=backend).eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_no_packed_sequences(backend, device):
    skip_packed_torch_on_a_gpu(backend, device)
    nothing = {name: torch.zeros(0, 2, 16, device=device) for name in "qkv"}
    none = torch.zeros(1, dtype=torch.int32, device=device)
    assert attention(**nothing, cu_seqlens_q=none, cu_seqlens_k=none, backend=backend).shape == (0, 2, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_give_what_each_gives_alone(backend, device):
    skip_packed_torch_on_a_gpu(backend, device)
    packed = {name: tensor.to(device) for name, tensor in packed_qkv([3, 1, 5], [3, 4, 9]).items()}
    out = attention(**packed, causal=True, backend=backend)
    rows = zip(packed["cu_seqlens_q"].tolist(), packed["cu_seqlens_k"].tolist())
    edges = list(rows)
    for (first_q, first_k), (last_q, last_k) in itertools.pairwise(edges):
        q, k, v = (
            packed["q"][None, first_q:last_q],
            packed["k"][None, first_k:last_k],
            packed["v"][None, first_k:last_k],
        )
        assert torch.equal(out[first_q:last_q], attention(q, k, v, causal=True, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_other_than_the_last_are_free(backend, device):
    """Heads before tokens, tokens reversed in memory order, and a broadcast batch, as views."""
    tensors = qkv(2, 5, 5, 2, 2)
    views = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2).to(device) for name, tensor in tensors.items()}
    views["k"] = views["k"][:1].expand(2, -1, -1, -1)
    expected = attention(**{name: view.contiguous() for name, view in views.items()}, backend=backend)
    actual = attention(**views, backend=backend)
    if backend == "triton":
        assert torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", ("reference", "triton"))
def test_dropout_is_reproducible_from_its_seed_and_torchs(backend, device):
    tensors = {name: tensor.to(device) for name, tensor in qkv().items()}

    def drop(seed):
        return attention(**tensors, dropout_p=0.5, dropout_seed=seed, backend=backend)

    assert torch.equal(drop(7), drop(torch.tensor([7, 0], device=device)))
    assert torch.equal(drop(2**64 - 1), drop(-1))
    assert not torch.equal(drop(7), drop(torch.tensor([7, 1], device=device)))
    torch.manual_seed(3)
    first, second = drop(None), drop(None)
    torch.manual_seed(3)
    assert torch.equal(first, drop(None))
    assert not torch.equal(first, second)
    assert attention(**tensors, dropout_p=1.0, backend=backend).eq(0).all()
    assert torch.equal(attention(**tensors, dropout_seed=7, backend=backend), attention(**tensors, backend=backend))


def test_the_gradient_drops_what_the_output_dropped(device):
    """out is linear in v, so <dv, v> = <dout, out> with one and the same mask."""
    for backend in ("reference", "triton"):
        tensors = inputs(device)
        out = attention(**tensors, dropout_p=0.5, backend=backend)
        dout = torch.randn_like(out)
        (dv,) = torch.autograd.grad(out, tensors["v"], dout)
        torch.testing.assert_close((dv * tensors["v"]).sum(), (dout * out).sum())


def test_integer_masks_mean_nonzero(device):
    tensors = {name: tensor.to(device) for name, tensor in qkv().items()}
    mask = torch.randint(0, 3, (7, 7), device=device)
    padding = torch.tensor([[1] * 7, [1, 1, 1, 2, 0, 0, 0]], device=device)
    for backend in BACKENDS:
        expected = attention(**tensors, mask=mask != 0, key_padding_mask=padding != 0, backend=backend)
        assert torch.equal(attention(**tensors, mask=mask, key_padding_mask=padding, backend=backend), expected)


def test_autocast_casts_q_k_v(device):
    tensors = inputs(device)
    half = {name: tensor.detach().bfloat16().requires_grad_() for name, tensor in tensors.items()}
    for backend in BACKENDS:
        with torch.autocast(device.type, torch.bfloat16):
            out = attention(**tensors, causal=True, backend=backend)
        expected = attention(**half, causal=True, backend=backend)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected)
        dout = torch.randn_like(out)
        actual_gradients = torch.autograd.grad(out, list(tensors.values()), dout)
        expected_gradients = torch.autograd.grad(expected, list(half.values()), dout)
        for actual, wanted in zip(actual_gradients, expected_gradients):
            assert actual.dtype == torch.float32
            # torch's kernels on a GPU add in any order.
            torch.testing.assert_close(actual, wanted.float(), rtol=1e-2, atol=1e-2)


def test_autocast_leaves_float64_alone(device):
    tensors = {name: tensor.to(device).double() for name, tensor in qkv().items()}
    with torch.autocast(device.type, torch.bfloat16):
        assert attention(**tensors).dtype == torch.float64


@pytest.mark.parametrize("backend", ("reference", "torch"))
def test_float64_is_for_golden_results(backend, device):
    tensors = {name: tensor.to(device).double() for name, tensor in qkv().items()}
    expected = reference.attention(**tensors, causal=True)
    torch.testing.assert_close(attention(**tensors, causal=True, backend=backend), expected, rtol=1e-12, atol=1e-12)
    assert attention(**tensors, return_lse=True, backend="reference")[1].dtype == torch.float64
    with pytest.raises(
        NotImplementedError,
        match="backend 'triton' cannot serve this call: float64 is served by torch and the reference",
    ):
        attention(**tensors, backend="triton")


def test_a_bias_that_needs_no_gradient_gets_none(device):
    bias = torch.randn(7, 7, device=device)
    for backend in BACKENDS:
        tensors = inputs(device)
        attention(**tensors, bias=bias, backend=backend).sum().backward()
        assert all(tensor.grad is not None for tensor in tensors.values())
        assert bias.grad is None


@pytest.mark.parametrize("backend", ("torch", "triton"))
def test_double_backward_raises(backend, device):
    tensors = inputs(device)
    out = attention(**tensors, causal=True, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"has no double backward|is not implemented"):
        torch.autograd.grad(dq.sum(), tensors["q"])


def test_the_reference_is_differentiable_as_often_as_wanted(device):
    tensors = inputs(device, torch.float64, batch=1, seqlen_q=2, seqlen_k=3, num_heads=1, num_kv_heads=1, head_dim=8)
    function = lambda q, k, v: attention(q, k, v, causal=True, backend="reference")  # noqa: E731
    assert torch.autograd.gradgradcheck(function, tuple(tensors.values()))


def test_the_same_bits_each_run(device):
    """Forward and all gradients of the kernels, through the public op."""
    tensors = inputs(device, num_heads=4)
    bias = torch.randn(1, 1, 7, 7, device=device, requires_grad=True)
    sinks = torch.randn(4, device=device, requires_grad=True)
    wanted = [*tensors.values(), bias, sinks]
    runs = []
    for _ in range(5 if device.type == "cpu" else 200):
        out, lse = attention(**tensors, bias=bias, sinks=sinks, causal=True, return_lse=True, backend="triton")
        runs.append((out, lse, *torch.autograd.grad(out.sum() + lse.sum(), wanted)))
    for run in runs[1:]:
        assert all(torch.equal(actual, first) for actual, first in zip(run, runs[0]))


def test_the_reference_serves_by_name_only(device):
    """Whatever the options, and without a word about score matrices: on a CPU torch goes over tiles where it has no function of its own."""
    tensors = {name: tensor.to(device) for name, tensor in qkv().items()}
    best = "triton" if device.type == "cuda" else "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in (
            {"causal": True},
            {"softcap": 2.0},
            {"sinks": torch.zeros(2, device=device)},
            {"return_lse": True},
        ):
            chosen = attention(**tensors, **options)
            torch.testing.assert_close(chosen, attention(**tensors, **options, backend=best), rtol=0, atol=0)
        doubles = {name: tensor.double() for name, tensor in tensors.items()}
        out = attention(**doubles, softcap=2.0, dropout_p=0.5, dropout_seed=1)
        assert torch.equal(out, attention(**doubles, softcap=2.0, dropout_p=0.5, dropout_seed=1, backend="torch"))


def test_tf32_only_where_torch_allows_it():
    from pytransformer.ops.precision import allows_tf32

    assert not allows_tf32(torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert allows_tf32(torch.float32) and not allows_tf32(torch.bfloat16)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert not allows_tf32(torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@st.composite
def calls(draw):
    """Shapes and options that both torch and the reference serve."""
    kv_heads = draw(st.sampled_from([1, 2]))
    heads = kv_heads * draw(st.sampled_from([1, 3]))
    packed = draw(st.booleans())
    batch = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(0, 9), min_size=batch, max_size=batch)
    lengths_q, lengths_k = (
        (draw(lengths), draw(lengths)) if packed else ([draw(st.integers(1, 9))], [draw(st.integers(1, 9))])
    )
    size_q, size_k = max(lengths_q), max(lengths_k)
    options = {"causal": draw(st.booleans()), "window": draw(st.tuples(st.integers(-1, 5), st.integers(-1, 5)))}
    broadcast = lambda: [draw(st.sampled_from([1, size])) for size in (batch, heads, size_q, size_k)]  # noqa: E731
    shapes = {}
    if draw(st.booleans()):
        shapes["mask"] = broadcast()
    if draw(st.booleans()):
        shapes["bias"] = broadcast()
    if draw(st.booleans()):
        shapes["key_padding_mask"] = [batch, size_k]
    if draw(st.booleans()):
        shapes["alibi_slopes"] = draw(st.sampled_from([[heads], [batch, heads]]))
    value_dim = draw(st.sampled_from([8, 16]))
    return (
        (heads, kv_heads, value_dim, packed, batch, lengths_q, lengths_k),
        options,
        shapes,
        draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, deadline=None)
# No sequence has both queries and keys.
@example(((1, 1, 8, True, 2, [0, 1], [1, 0]), {"causal": False, "window": (0, 0)}, {}, 0))
@given(calls())
def test_torch_agrees_with_the_reference_on_any_call(call):
    """In float64, where only a wrong formula can make a difference."""
    (heads, kv_heads, value_dim, packed, batch, lengths_q, lengths_k), options, shapes, seed = call
    torch.manual_seed(seed)
    sizes = ((sum(lengths_q),), (sum(lengths_k),)) if packed else ((batch, lengths_q[0]), (batch, lengths_k[0]))
    tensors = {
        "q": torch.randn(*sizes[0], heads, 8, dtype=torch.float64, requires_grad=True),
        "k": torch.randn(*sizes[1], kv_heads, 8, dtype=torch.float64, requires_grad=True),
        "v": torch.randn(*sizes[1], kv_heads, value_dim, dtype=torch.float64, requires_grad=True),
    }
    if packed:
        options = {**options, "cu_seqlens_q": starts(lengths_q), "cu_seqlens_k": starts(lengths_k)}
    for name, shape in shapes.items():
        drawn = torch.randn(shape, dtype=torch.float64)
        options[name] = drawn > -0.5 if name.endswith("mask") else drawn
    results = []
    for backend in ("torch", "reference"):
        out = attention(**tensors, **options, backend=backend)
        dout = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
        gradients = torch.autograd.grad(out, list(tensors.values()), dout)
        results.append((out, *gradients))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("used", [0, 1], ids=["out alone", "lse alone"])
def test_one_of_two_outputs_may_go_unused(used, device):
    """Autograd brings no gradient for the other one, and none of zeros is made."""
    q, k, v = (torch.randn(1, 9, 2, 16, device=device, requires_grad=True) for _ in range(3))
    results = []
    for backend in ("triton", "reference"):
        output = attention(q, k, v, causal=True, return_lse=True, backend=backend)[used]
        results.append(torch.autograd.grad(output.sin().sum(), (q, k, v), materialize_grads=True))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)
