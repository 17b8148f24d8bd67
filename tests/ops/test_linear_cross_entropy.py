"""linear_cross_entropy against the reference and torch, without ever holding all logits."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from pytransformer import reference
from pytransformer.ops import checks
from pytransformer.ops.linear_cross_entropy import by_torch, by_triton, linear_cross_entropy
from pytransformer.ops.linear_cross_entropy.by_torch import tokens_per_chunk
from pytransformer.ops.linear_cross_entropy.by_triton import tokens_per_buffer
from pytransformer.ops.linear_cross_entropy.call import Options, Wanted
from pytransformer.verification import measure
from pytransformer.verification.cases import FLOATS, Case

VOCAB, HIDDEN = 53, 24
FUSED = ("triton", "torch")
BACKENDS = (*FUSED, "reference")
OPTIONS = {
    "plain": {},
    "sum, bias": {"reduction": "sum", "bias": True},
    "none, everything": {"reduction": "none", "bias": True, "label_smoothing": 0.1, "softcap": 4.0, "z_loss": 1e-2},
    "mean, everything": {"bias": True, "label_smoothing": 0.1, "softcap": 4.0, "z_loss": 1e-2},
    "ignored by another number": {"ignore_index": 3, "label_smoothing": 1.0},
}

# In the quick tests the interpreter takes each option with one dtype, taking turns: the kernel has tests of its own for every one.
EVERY = [
    pytest.param(
        *(name, dtype, backend),
        id=f"{name}-{dtype}-{backend}",
        marks=[pytest.mark.slow] if backend == "triton" and dtype != turn else [],
    )
    for name, turn in zip(OPTIONS, itertools.cycle(FLOATS))
    for dtype in FLOATS
    for backend in BACKENDS
]


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks, the last one not full."""
    monkeypatch.setattr(by_torch, "LOGITS_PER_CHUNK", {"cpu": 64 * VOCAB, "cuda": 64 * VOCAB})
    monkeypatch.setattr(by_torch, "MIN_TOKENS_PER_CHUNK", 64)
    monkeypatch.setattr(by_triton, "BUFFER_BYTES", 0)
    monkeypatch.setattr(by_triton, "ROWS_OF_A_TILE", 16)


def draw(tokens=(3, 50), bias=False, device=None, dtype=torch.float32, ignored=True):
    tensors = {
        "x": torch.randn(*tokens, HIDDEN),
        "weight": 0.4 * torch.randn(VOCAB, HIDDEN),
        "targets": torch.randint(0, VOCAB, tokens),
    }
    if ignored:
        tensors["targets"].view(-1)[::5] = -100
    if bias:
        tensors["bias"] = torch.randn(VOCAB)
    return {
        name: tensor.to(device) if name == "targets" else tensor.to(device, dtype).requires_grad_()
        for name, tensor in tensors.items()
    }


def differentiable(tensors):
    return [tensor for name, tensor in tensors.items() if name != "targets"]


@pytest.mark.parametrize(("name", "dtype", "backend"), EVERY)
def test_within_the_contract(name, dtype, backend, device, small_chunks):
    options = dict(OPTIONS[name])
    has_bias = options.pop("bias", False)

    tokens = (3, 6) if backend == "triton" else (3, 50)  # interpreted, a buffer of 16 tokens and one that is not full

    def inputs(size):
        drawn = draw(tokens, bias=has_bias, ignored="ignore_index" not in options)
        return {key: tensor.detach() for key, tensor in drawn.items()}

    case = Case(
        "linear_cross_entropy",
        name,
        inputs,
        lambda tensors, backend: {"loss": linear_cross_entropy(**tensors, **options, backend=backend)},
        lambda tensors: {"loss": reference.linear_cross_entropy(**tensors, **options)},
        ("x", "weight", "bias") if has_bias else ("x", "weight"),
    )
    measure(case, dtype, backend, device).check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_it_is_cross_entropy_of_the_linear_layers_logits(reduction, backend, device, small_chunks):
    tensors = draw(bias=True, device=device)
    logits = F.linear(tensors["x"], tensors["weight"], tensors["bias"]).flatten(0, 1)
    expected = F.cross_entropy(logits, tensors["targets"].flatten(), label_smoothing=0.1, reduction=reduction)
    loss = linear_cross_entropy(**tensors, label_smoothing=0.1, reduction=reduction, backend=backend)
    torch.testing.assert_close(loss.flatten(), expected.flatten())
    wanted = differentiable(tensors)
    for actual, golden in zip(torch.autograd.grad(loss.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)):
        torch.testing.assert_close(actual, golden)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [4, 0])
def test_no_token_that_counts_gives_nan_and_zero_gradients(backend, tokens, device):
    tensors = draw((tokens,), device=device)
    tensors["targets"].fill_(-100)
    loss = linear_cross_entropy(**tensors, backend=backend)
    assert loss.isnan()
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(loss, differentiable(tensors)))
    assert linear_cross_entropy(**tensors, reduction="sum", backend=backend) == 0
    assert linear_cross_entropy(**tensors, reduction="none", backend=backend).shape == (tokens,)


@pytest.mark.parametrize("backend", FUSED)
def test_the_logits_are_never_held_together(backend, device, small_chunks):
    """No tensor of tokens × vocab elements appears, forward or backward, for any reduction."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                # The interpreter copies arguments as bytes.
                counts = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
                largest = max(largest, tensor.numel() if counts else 0)
            return result

    tensors = draw((4, 30), device=device)
    x, weight, targets = tensors["x"].detach().flatten(0, 1), tensors["weight"].detach(), tensors["targets"].flatten()
    rows_of_chunk = 16 if backend == "triton" else 64
    with Watch():
        for want_dx in (True, False):
            wanted, options = Wanted(want_dx, True, False), Options(-100, 0.0, 0.0, 0.0)
            work = by_triton if backend == "triton" else by_torch
            losses = work.losses_and_gradients(x, weight, targets, None, None, wanted, options)[0]
            assert losses.shape == (120,)
    assert rows_of_chunk * VOCAB <= largest <= max(rows_of_chunk * 64, 120 * HIDDEN)


def test_chunks_are_of_useful_sizes():
    assert tokens_per_chunk(2048, "cpu") == 1024
    assert tokens_per_chunk(50257, "cpu") == by_torch.MIN_TOKENS_PER_CHUNK
    assert tokens_per_chunk(50257, "cuda") % 64 == 0
    assert tokens_per_chunk(50257, "cuda") > 2000


@pytest.mark.parametrize("tokens", [0, 1, 128, 129, 8192, 100_000])
@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(1, 8), (50257, 768), (131072, 4096)])
def test_the_buffer_for_triton_is_filled_evenly(tokens, vocab_size, hidden_size):
    weight = torch.empty(vocab_size, hidden_size, dtype=torch.bfloat16, device="meta")
    for wants_dweight in (False, True):
        step = tokens_per_buffer(tokens, weight, wants_dweight)
        allowed = max(by_triton.BUFFER_BYTES, weight.nbytes if wants_dweight else 0)
        assert step % 128 == 0
        assert step * vocab_size * 2 <= allowed
        chunks_needed = -(-tokens * vocab_size * 2 // allowed)
        assert -(-tokens // step) <= chunks_needed + 1
    assert tokens_per_buffer(8192, torch.empty(131072, 4096, dtype=torch.bfloat16, device="meta"), True) == 4096


@pytest.mark.parametrize("missing", ["x", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients_are_computed(missing, reduction, device):
    tensors = draw(bias=True, device=device)
    tensors[missing] = tensors[missing].detach()
    linear_cross_entropy(**tensors, reduction=reduction).sum().backward()
    for name in ("x", "weight", "bias"):
        assert (tensors[name].grad is None) == (name == missing)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_do_not_underflow_before_the_loss_scale(reduction, device):
    """Of 4096 tokens, a mean's gradients are about 1e-7, less than float16 holds; scaled by 65536 they are not."""
    tensors = draw((4096,), device=device, dtype=torch.float16, ignored=False)
    golden = {
        name: tensor if name == "targets" else tensor.detach().double().requires_grad_()
        for name, tensor in tensors.items()
    }
    results = []
    for arguments in (tensors, golden):
        loss = linear_cross_entropy(**arguments, reduction=reduction).mean()
        results.append(torch.autograd.grad(loss * 65536, arguments["x"])[0].double())
    torch.testing.assert_close(*results, rtol=0.05, atol=0.02 * float(results[1].abs().max()))


def test_large_logits_stay_finite(device):
    tensors = draw((8,), device=device)
    loss = linear_cross_entropy(
        (tensors["x"] * 1e4).detach().requires_grad_(), tensors["weight"], tensors["targets"], z_loss=1e-4
    )
    assert loss.isfinite()


def test_autocast_is_that_of_a_linear_layer(device):
    tensors = draw(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(**tensors)
    half = {name: tensor if name == "targets" else tensor.detach().bfloat16() for name, tensor in tensors.items()}
    assert loss.dtype == torch.float32
    assert torch.equal(loss, linear_cross_entropy(**half))
    assert torch.autograd.grad(loss, tensors["weight"])[0].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for and no graphs")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_host_never_waits_and_a_graph_can_be_captured(reduction, device, small_chunks):
    tensors = draw((4, 100), bias=True, device=device, dtype=torch.bfloat16)
    wanted = differentiable(tensors)

    def step():
        loss = linear_cross_entropy(**tensors, z_loss=1e-3, reduction=reduction, backend="triton")
        return loss, *torch.autograd.grad(loss.sum(), wanted)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_double_backward_raises(reduction, device):
    tensors = draw(device=device)
    loss = linear_cross_entropy(**tensors, reduction=reduction)
    (dx,) = torch.autograd.grad(loss.sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no double backward"):
        torch.autograd.grad(dx.sum(), tensors["weight"])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_with_a_dynamic_length(reduction, backend, device):
    torch._dynamo.reset()

    def function(x, weight, bias, targets):
        options = {"z_loss": 1e-3, "softcap": 3.0, "reduction": reduction, "backend": backend}
        return linear_cross_entropy(x, weight, targets, bias=bias, **options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 9):
        tensors = draw((2, length), bias=True, device=device)
        arguments = (tensors["x"], tensors["weight"], tensors["bias"], tensors["targets"])
        actual, expected = compiled(*arguments), function(*arguments)
        assert torch.equal(actual, expected)
        for one, other in zip(
            torch.autograd.grad(actual.sum(), arguments[:3]), torch.autograd.grad(expected.sum(), arguments[:3])
        ):
            torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), expected)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_func_grad_and_vmap(reduction, fused, device):
    tensors = draw((3, 7), device=device)
    x, weight, targets = tensors["x"].detach(), tensors["weight"].detach(), tensors["targets"]

    def loss(backend):
        def of(x, weight, targets):
            return linear_cross_entropy(x, weight, targets, reduction=reduction, backend=backend).square().sum()

        return torch.func.vmap(torch.func.grad(of, argnums=(0, 1)), in_dims=(0, None, 0))

    for actual, expected in zip(loss(fused)(x, weight, targets), loss("reference")(x, weight, targets)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck_of_the_registered_ops(backend, device):
    tensors = draw((9,), bias=True, device=device)
    arguments = (tensors["x"], tensors["weight"], tensors["targets"], tensors["bias"])
    options = (-100, 0.1, 3.0, 1e-3, backend)
    ops = torch.ops.pytransformer
    torch.library.opcheck(ops.linear_cross_entropy_total, (*arguments, True, True, True, *options))
    torch.library.opcheck(ops.linear_cross_entropy_losses, (*arguments, *options))
    plain = tuple(tensor.detach() for tensor in arguments)
    dlosses = torch.randn(9, device=device)
    torch.library.opcheck(ops.linear_cross_entropy_backward, (dlosses, *plain, True, False, True, *options))


def test_export(device):
    class Loss(torch.nn.Module):
        def forward(self, x, weight, targets):
            return linear_cross_entropy(x, weight, targets)

    tensors = {name: tensor.detach() for name, tensor in draw((6,), device=device).items()}
    program = torch.export.export(Loss(), tuple(tensors.values()))
    assert torch.equal(program.module()(*tensors.values()), Loss()(*tensors.values()))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
        ({"x": torch.zeros(4, HIDDEN).int()}, TypeError, "x must be of dtype .*, got int32"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(..., hidden_size\) .*, got \(\)"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"hidden_size of at least 1, got \(4, 0\)"),
        ({"x": torch.zeros(HIDDEN, 4).t()}, ValueError, "x must be contiguous in its last dimension"),
        ({"weight": torch.zeros(VOCAB, 8)}, ValueError, r"weight must have shape .* = \(any, 24\), got \(53, 8\)"),
        ({"weight": torch.zeros(0, HIDDEN)}, ValueError, "weight must have at least one row"),
        (
            {"weight": torch.zeros(VOCAB, HIDDEN).half()},
            TypeError,
            r"weight must have the dtype of x \(float32\), got float16",
        ),
        ({"weight": torch.zeros(HIDDEN, VOCAB).t()}, ValueError, "weight must be contiguous in its last dimension"),
        ({"weight": torch.zeros(VOCAB, HIDDEN, device="meta")}, ValueError, "weight must be on .*, got meta"),
        ({"targets": torch.zeros(4)}, TypeError, "targets must be of dtype int64 or int32, got float32"),
        ({"targets": torch.zeros(5).long()}, ValueError, r"targets must have shape x.shape\[:-1\] = \(4\), got \(5,\)"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must have shape \(vocab_size\) = \(53\), got \(8,\)"),
        ({"bias": torch.zeros(VOCAB).half()}, TypeError, "bias must have the dtype of x"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between 0.0 and 1.0, got 1.5"),
        ({"softcap": -1}, ValueError, "softcap must be at least 0.0, got -1"),
        ({"z_loss": float("nan")}, ValueError, "z_loss must be finite, got nan"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'max'"),
        (
            {"x": torch.zeros(4, HIDDEN).double(), "weight": torch.zeros(VOCAB, HIDDEN).double(), "backend": "triton"},
            NotImplementedError,
            "float64 is not served",
        ),
    ],
)
def test_bad_input(changes, error, message, device):
    tensors = {name: tensor.detach() for name, tensor in draw((4,), device=device).items()}
    moved = {
        name: value.to(device) if isinstance(value, torch.Tensor) and not value.is_meta else value
        for name, value in changes.items()
    }
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**tensors, **moved})


@pytest.mark.parametrize(("target", "ignore_index"), [(VOCAB, -100), (-1, -100), (-100, -1)])
def test_targets_out_of_range(target, ignore_index, device, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)
    tensors = draw((4,), device=device, ignored=False)
    tensors["targets"][2] = target
    with pytest.raises(ValueError, match=rf"targets must hold token ids, .* from 0 to 52, got {target} at index \[2\]"):
        linear_cross_entropy(**tensors, ignore_index=ignore_index)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocab=st.integers(1, 40),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    softcap=st.sampled_from([0.0, 2.0]),
    z_loss=st.sampled_from([0.0, 0.5]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    has_bias=st.booleans(),
    seed=st.integers(0, 100),
)
def test_torch_agrees_with_the_reference_on_any_call(
    tokens, vocab, label_smoothing, softcap, z_loss, reduction, has_bias, seed
):
    """In float64, where only a wrong formula can make a difference."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(vocab, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets = torch.randint(0, vocab, (tokens,)).where(torch.rand(tokens) > 0.3, -7)
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None]
    results = []
    for backend in ("torch", "reference"):
        loss = linear_cross_entropy(
            x,
            weight,
            targets,
            bias=bias,
            ignore_index=-7,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
            reduction=reduction,
            backend=backend,
        )
        gradients = torch.autograd.grad(loss, wanted, torch.ones_like(loss) * 0.7)
        results.append((loss, *gradients))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("size", [103, 104])
def test_what_lies_behind_the_logits_of_a_row_does_not_reach_the_gradients(size: int) -> None:
    """oneDNN with AMX (torch 2.13) reads on behind a slice's last column, where uninitialised padding may hold a NaN."""
    from pytransformer.ops.linear_cross_entropy.chunks import product_into

    padded = torch.full((48, 128), torch.nan, dtype=torch.bfloat16)
    padded[:, :size] = 1.0
    for left, right in ((padded[:, :size], torch.ones(size, 32)), (padded[:, :size].t(), torch.ones(48, 32))):
        out = torch.full((left.shape[0], 32), torch.nan, dtype=torch.bfloat16)
        product_into(out, left, right.bfloat16())
        assert torch.equal(out, torch.full_like(out, left.shape[1]))
