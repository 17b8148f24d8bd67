"""attention inside torch's machinery: opcheck, torch.compile, torch.func, export, FLOP counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytransformer.ops.attention import attention
from pytransformer.ops.attention.call import AttentionCall, check_attention
from pytransformer.ops.backend import use_backend
from tests.ops.attention_cases import bias_with_holes, packed_qkv, qkv, starts

# It reaches torch's machinery as 'triton' does, through the registered op.
REFERENCE = pytest.param("reference", marks=pytest.mark.slow)


def inputs(device, requires_grad=True, **sizes):
    return [tensor.to(device).requires_grad_(requires_grad) for tensor in qkv(**sizes).values()]


def same_results(actual, expected, wanted):
    """Asserts equal outputs and gradients; on a GPU torch's own kernels add in any order."""
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    grads = [torch.randn_like(out) for out in expected]
    pairs = [
        *zip(actual, expected),
        *zip(torch.autograd.grad(actual, wanted, grads), torch.autograd.grad(expected, wanted, grads)),
    ]
    exact = {} if pairs[0][0].is_cuda else {"rtol": 0.0, "atol": 0.0}
    for one, other in pairs:
        torch.testing.assert_close(one, other, **exact)


def op_arguments(device, backend, requires_grad=True, **options):
    """Arguments of the registered forward op for a call."""
    tensors = dict(zip("qkv", inputs(device, requires_grad, num_heads=2, num_kv_heads=1, seqlen_q=3, seqlen_k=4)))
    return (*check_attention(AttentionCall(**{**tensors, **options})), backend)


OPTIONS = [
    {"causal": True, "return_lse": True},
    {"bias": bias_with_holes(1, 2, 3, 4), "sinks": torch.zeros(2), "dropout_p": 0.2, "dropout_seed": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["lse", "bias, sinks, dropout"])
@pytest.mark.parametrize("backend", ["triton", REFERENCE])
def test_opcheck_of_the_registered_ops(backend, options, device):
    options = {
        name: value.to(device).requires_grad_() if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    forward = op_arguments(device, backend, **options)
    torch.library.opcheck(torch.ops.pytransformer.attention_forward, forward)
    plain = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in forward)
    out, lse = torch.ops.pytransformer.attention_forward(*plain)
    backward = (torch.randn_like(out), torch.randn_like(lse), out, lse, *plain[:-1], True, True, backend)
    torch.library.opcheck(torch.ops.pytransformer.attention_backward, backward)


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_opcheck_of_packed_sequences(backend, device):
    packed = {name: tensor.to(device) for name, tensor in packed_qkv([3, 2], [3, 4]).items()}
    if backend == "torch" and device.type == "cuda":
        pytest.skip("scaled_dot_product_attention takes no packed sequences on a GPU")
    for key in "qkv":
        packed[key].requires_grad_()
    arguments = op_arguments(device, backend, causal=True, **packed)
    torch.library.opcheck(torch.ops.pytransformer.attention_forward, arguments)


def test_opcheck_of_an_op_around_the_torch_path(device):
    """Aliasing, fake tensors and dynamic shapes of everything that backend='torch' does, as a user's own op would use it."""

    @torch.library.custom_op("pytransformer_tests::attention_by_torch", mutates_args=())
    def attention_by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, causal=True, mask=mask, backend="torch").clone()

    @attention_by_torch.register_fake
    def _(q, k, v, mask):
        return attention(q, k, v, causal=True, mask=mask, backend="torch").clone()

    mask = torch.rand(2, 1, 5, 6, device=device) > 0.3
    torch.library.opcheck(attention_by_torch, (*inputs(device, False, seqlen_q=5, seqlen_k=6, num_heads=4), mask))


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("torch", [{"causal": True}, {"window": (3, 1)}]),
        ("triton", [{"causal": True, "return_lse": True}]),
        pytest.param("reference", [{"softcap": 3.0, "return_lse": True}], marks=pytest.mark.slow),
    ],
    ids=["torch", "triton", "reference"],
)
def test_fullgraph_with_dynamic_lengths(backend, options, device):
    torch._dynamo.reset()

    def function(q, k, v):
        results = []
        for each in options:
            out = attention(q, k, v, backend=backend, **each)
            results.extend(out if isinstance(out, tuple) else (out,))
        return tuple(results)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen_q, seqlen_k in ((5, 9), (6, 11)):
        tensors = inputs(device, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=4)
        same_results(compiled(*tensors), function(*tensors), tensors)
    with torch.no_grad():
        compiled(*tensors)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_fullgraph_of_packed_sequences(backend, device):
    if backend == "torch" and device.type == "cuda":
        pytest.skip("scaled_dot_product_attention takes no packed sequences on a GPU")
    torch._dynamo.reset()
    # The same tensor twice: cu_seqlens of self-attention.
    function = lambda q, k, v, cu: attention(q, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k=cu, backend=backend)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([3, 4], [2, 0, 7]):
        packed = packed_qkv(lengths, lengths)
        tensors = [packed[key].to(device).requires_grad_() for key in "qkv"]
        cu = starts(lengths).to(device)
        same_results(compiled(*tensors, cu), function(*tensors, cu), tensors)


def test_inductor_compiles_the_torch_path(device):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *qkv: attention(*qkv, causal=True, backend="torch"), fullgraph=True)
    with torch.no_grad():
        tensors = inputs(device, num_heads=2)
        torch.testing.assert_close(compiled(*tensors), attention(*tensors, causal=True, backend="torch"))


def test_the_choice_of_backend_is_guarded(device):
    """A compiled function follows use_backend, and does not keep what was chosen when it was traced."""
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    tensors = inputs(device, False)
    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for backend in ("torch", "triton", "torch"):
        with use_backend(backend):
            expected = attention(*tensors)
            assert torch.equal(compiled(*tensors), expected)
    with use_backend("triton"), Record():
        attention(*tensors)
    assert seen == ["pytransformer.attention_forward.default"]


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
def test_func_grad_and_vmap(backend, device):
    tensors = [tensor.unflatten(0, (2, 1)) for tensor in inputs(device, False, num_heads=4)]
    loss = lambda *qkv: attention(*qkv, causal=True, backend=backend).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*tensors)
    for sample in range(2):
        own = [tensor[sample].clone().requires_grad_() for tensor in tensors]
        for gradient, expected in zip(per_sample, torch.autograd.grad(loss(*own), own)):
            torch.testing.assert_close(gradient[sample], expected)


def test_func_grad_through_lse_bias_and_sinks(device):
    q, k, v = inputs(device, False)
    bias, sinks = torch.randn(7, 7, device=device), torch.randn(2, device=device)

    def loss(backend):
        def of(q, bias, sinks):
            out, lse = attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, backend=backend)
            return out.square().sum() + lse.sum()

        return of

    for gradient, expected in zip(
        torch.func.grad(loss("triton"), argnums=(0, 1, 2))(q, bias, sinks),
        torch.func.grad(loss("reference"), argnums=(0, 1, 2))(q, bias, sinks),
    ):
        torch.testing.assert_close(gradient, expected)


def test_func_refuses_a_second_derivative(device):
    q, k, v = inputs(device, False)
    first = torch.func.grad(lambda q: attention(q, k, v, backend="triton").square().sum())
    with pytest.raises(RuntimeError, match="attention has no double backward"):
        torch.func.grad(lambda q: first(q).sum())(q)


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_export_with_a_dynamic_length(backend, strict, device):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True, backend=backend)

    length = torch.export.Dim("length", min=2, max=64)
    example = tuple(inputs(device, False))
    program = torch.export.export(Module(), example, dynamic_shapes=({1: length},) * 3, strict=strict)
    others = inputs(device, False, seqlen_q=11, seqlen_k=11)
    assert torch.equal(program.module()(*others), Module()(*others))
    targets = [str(node.target) for node in program.graph.nodes]
    wanted = "aten.scaled_dot_product_attention" if backend == "torch" else "pytransformer.attention_forward"
    assert any(wanted in target for target in targets)


def test_meta_tensors_have_the_shapes_of_results():
    q, k, v = (torch.empty(2, 5, heads, 16, device="meta") for heads in (4, 2, 2))
    assert attention(q, k, v, causal=True, backend="torch").shape == (2, 5, 4, 16)
    out, lse = torch.ops.pytransformer.attention_forward(
        *check_attention(AttentionCall(q, k, v, return_lse=True)), "triton"
    )
    assert (out.shape, lse.shape) == ((2, 5, 4, 16), (2, 4, 5))
    assert out.device.type == lse.device.type == "meta"
