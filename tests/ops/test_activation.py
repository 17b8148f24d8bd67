"""swiglu, geglu and gelu as people call them: every backend, autograd, transforms, compilation, and what bad input gets."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import pytransformer
from pytransformer import geglu, gelu, reference, swiglu, use_backend
from pytransformer.verification import SEEDS, Contract
from tests.support.dispatch import SeenOps, refuse_dispatch

BACKENDS = ("triton", "torch", "reference")
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
# The op, its reference, and the names of its tensors.
Op = tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[str, ...]]


def op(name: str, *tensors: str, **options: str) -> Op:
    return (
        functools.partial(getattr(pytransformer, name), **options),
        functools.partial(getattr(reference, name), **options),
        tensors,
    )


OPS: dict[str, Op] = {
    "swiglu": op("swiglu", "gate"),
    "swiglu of two": op("swiglu", "gate", "up"),
    "geglu": op("geglu", "gate"),
    "geglu tanh of two": op("geglu", "gate", "up", approximate="tanh"),
    "gelu": op("gelu", "x"),
    "gelu tanh": op("gelu", "x", approximate="tanh"),
}
# One of each way that tensors come in.
FORMS = ("swiglu", "geglu tanh of two", "gelu")
ALL_BACKENDS = pytest.mark.parametrize("backend", BACKENDS)
ALL_OPS = pytest.mark.parametrize("op", OPS)
ALL_FORMS = pytest.mark.parametrize("op", FORMS)


def draw(
    op: str, device: torch.device, shape: tuple[int, ...] = (3, 5, 24), dtype: torch.dtype = FLOAT32
) -> list[Tensor]:
    """The tensors of a call, requiring grad."""
    return [(2 * torch.randn(shape)).to(device, dtype).requires_grad_() for _ in OPS[op][2]]


def results(
    function, tensors: list[Tensor], dtype: torch.dtype | None = None, **options
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and gradients for an output gradient that is the same in every dtype."""
    leaves = [value.detach().to(dtype or value.dtype).requires_grad_() for value in tensors]
    out = function(*leaves, **options)
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(BFLOAT16)
    return out.detach(), torch.autograd.grad(out, leaves, drawn.to(out.device, out.dtype))


# --- the contract -----------------------------------------------------------------------------------------------------------------------


@ALL_BACKENDS
@ALL_OPS
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_contract(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    function, naive, names = OPS[op]
    contract = Contract(dtype)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        tensors = draw(op, device, (2, 8, 24), dtype)
        on_cpu = [tensor.cpu() for tensor in tensors]
        actual = results(function, tensors, backend=backend)
        plain, golden = results(naive, on_cpu), results(naive, on_cpu, torch.float64)
        assert actual[0].dtype == dtype
        contract.add("out", actual=actual[0], plain=plain[0], golden=golden[0])
        for name, ours, theirs, exact in zip(names, actual[1], plain[1], golden[1], strict=True):
            assert ours.dtype == dtype
            contract.add(f"grad {name}", actual=ours, plain=theirs, golden=exact, kind="gradient")
    contract.check()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_16_bit_is_rounded_once(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    contract = Contract(dtype)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        x = draw("swiglu", device, (9, 64), dtype)
        golden = results(reference.swiglu, x, torch.float64)
        actual = results(swiglu, x, backend=backend)
        # Nothing beats the golden result rounded once.
        best = golden[0].to(dtype), golden[1][0].to(dtype)
        contract.add("out", actual=actual[0], plain=best[0], golden=golden[0])
        contract.add("grad", actual=actual[1][0], plain=best[1], golden=golden[1][0])
    contract.check()


@ALL_BACKENDS
@ALL_FORMS
def test_leading_shape_and_strides_are_free(op: str, backend: str, device: torch.device) -> None:
    function, _, names = OPS[op]
    tensors = [torch.randn(3, 4, 5, 16, device=device) for _ in names]
    expected = function(*tensors, backend=backend)
    for view in (
        lambda x: x.permute(2, 0, 1, 3),
        lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        lambda x: x.repeat(1, 1, 1, 2)[..., :16],
    ):
        out = function(*map(view, tensors), backend=backend)
        torch.testing.assert_close(out.permute(1, 2, 0, 3) if out.shape[0] == 5 else out, expected)
    torch.testing.assert_close(function(*(x[0, 0, 0] for x in tensors), backend=backend), expected[0, 0, 0])


@ALL_BACKENDS
@ALL_FORMS
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_nothing_to_do(op: str, backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    tensors = draw(op, device, shape)
    out = OPS[op][0](*tensors, backend=backend)
    assert out.shape == (*shape[:-1], shape[-1] // 2 if op == "swiglu" else shape[-1])
    out.sum().backward()
    assert all(tensor.grad.shape == shape for tensor in tensors)


# --- autograd ---------------------------------------------------------------------------------------------------------------------------


@ALL_BACKENDS
def test_only_what_requires_grad_gets_a_gradient(backend: str, device: torch.device) -> None:
    for wanted in range(2):
        tensors = [tensor.detach() for tensor in draw("swiglu of two", device)]
        tensors[wanted].requires_grad_()
        swiglu(*tensors, backend=backend).square().sum().backward()
        expected = tensors[wanted].grad.clone()
        assert tensors[1 - wanted].grad is None
        tensors[wanted].grad = None
        reference.swiglu(*tensors).square().sum().backward()
        torch.testing.assert_close(expected, tensors[wanted].grad)


@ALL_FORMS
def test_the_kernel_keeps_nothing_but_its_inputs(op: str, device: torch.device) -> None:
    tensors = draw(op, device)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda x: x):
        OPS[op][0](*tensors, backend="triton")
    assert kept == [tensor.data_ptr() for tensor in tensors]


@ALL_FORMS
def test_double_backward_of_the_kernel_is_refused(op: str, device: torch.device) -> None:
    tensors = draw(op, device)
    out = OPS[op][0](*tensors, backend="triton")
    (dgate,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dgate.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@ALL_FORMS
def test_double_backward_elsewhere(op: str, backend: str, device: torch.device) -> None:
    tensors = draw(op, device, (2, 4), torch.float64)
    assert torch.autograd.gradgradcheck(lambda *values: OPS[op][0](*values, backend=backend), tensors)


@ALL_BACKENDS
@ALL_FORMS
def test_functorch(op: str, backend: str, device: torch.device) -> None:
    tensors = draw(op, device)
    values = [tensor.detach() for tensor in tensors]

    def loss(*arguments: Tensor) -> Tensor:
        return OPS[op][0](*arguments, backend=backend).sin().sum()

    expected = torch.autograd.grad(loss(*tensors), tensors)
    for ours, theirs in zip(torch.func.grad(loss, argnums=tuple(range(len(values))))(*values), expected):
        torch.testing.assert_close(ours, theirs)
    mapped = torch.func.vmap(lambda *rows: OPS[op][0](*rows, backend=backend))(*values)
    torch.testing.assert_close(mapped, OPS[op][0](*values, backend=backend))


def test_forward_mode_is_refused_by_the_kernel_rather_than_lost(device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            swiglu(dual, backend="triton")
        assert torch.autograd.forward_ad.unpack_dual(swiglu(dual, backend="torch")).tangent is not None


# --- registration, compilation, modes ---------------------------------------------------------------------------------------------------


def test_opcheck(device: torch.device) -> None:
    x = torch.randn(3, 5, 16, device=device)
    forward, backward = torch.ops.pytransformer.activation_forward, torch.ops.pytransformer.activation_backward
    for arguments in ((x, None, "silu", True), (x[:, ::2], x[:, ::2], "gelu", True), (x, None, "gelu_tanh", False)):
        torch.library.opcheck(forward, (*arguments, "triton"))
        torch.library.opcheck(backward, (forward(*arguments, "triton"), *arguments, "triton"))


@ALL_FORMS
def test_fake_tensors_are_like_the_real_ones(op: str, device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = [tensor.detach().transpose(0, 1) for tensor in draw(op, device, (4, 3, 8), BFLOAT16)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in tensors]
        leaves = [fake.requires_grad_() for fake in fakes]
        fake = OPS[op][0](*leaves, backend="triton")
        fake_gradients = torch.autograd.grad(fake.sum(), leaves)
    real, gradients = results(functools.partial(OPS[op][0], backend="triton"), tensors)
    for one, other in zip((real, *gradients), (fake, *fake_gradients), strict=True):
        assert (one.shape, one.dtype, one.stride(), one.device) == (
            *(other.shape, other.dtype, other.stride()),
            other.device,
        )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiles_whole_with_dynamic_shapes(backend: str, device: torch.device) -> None:
    def block(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        inner = geglu(gate, up, approximate="tanh", backend=backend)
        return swiglu(x, backend=backend) + gelu(inner, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        tensors = [torch.randn(rows, cols, device=device).requires_grad_() for cols in (24, 12, 12)]
        expected, actual = block(*tensors), compiled(*tensors)
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (actual, expected))):
            torch.testing.assert_close(ours, theirs)


@ALL_BACKENDS
def test_exports(backend: str, device: torch.device) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return swiglu(x, backend=backend)

    x = torch.randn(3, 8, device=device)
    program = torch.export.export(Block(), (x,))
    torch.testing.assert_close(program.module()(x), Block()(x))


@ALL_FORMS
def test_modes_see_registered_ops(op: str, device: torch.device) -> None:
    tensors = draw(op, device)
    expected, gradients = results(OPS[op][0], tensors, backend="triton")
    with SeenOps() as seen:
        again, gradients_again = results(OPS[op][0], tensors, backend="triton")
    assert {f"pytransformer.activation_{way}.default" for way in ("forward", "backward")} <= set(seen.names)
    assert torch.equal(expected, again) and all(map(torch.equal, gradients, gradients_again))


@ALL_FORMS
def test_plain_tensors_skip_the_dispatcher(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(op, device)
    refuse_dispatch(monkeypatch)
    results(OPS[op][0], tensors, backend="triton")
    with torch.no_grad():
        OPS[op][0](*tensors, backend="triton")


@ALL_BACKENDS
@ALL_FORMS
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_autocast_does_not_change_the_dtype(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = draw(op, device, dtype=dtype)
    expected = OPS[op][0](*tensors, backend=backend)
    with torch.autocast(device.type, BFLOAT16):
        actual = OPS[op][0](*tensors, backend=backend)
    assert actual.dtype == dtype and torch.equal(actual, expected)


@ALL_BACKENDS
def test_inference_mode(backend: str, device: torch.device) -> None:
    tensors = draw("swiglu", device)
    expected = swiglu(*tensors, backend=backend)
    with torch.inference_mode():
        torch.testing.assert_close(swiglu(*tensors, backend=backend), expected.detach())


# --- choice of backend ------------------------------------------------------------------------------------------------------------------


def test_choice(device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    with use_backend("reference"):
        assert torch.equal(swiglu(x), reference.swiglu(x))
    # On a CPU kernels are interpreted on request only.
    chosen = "triton" if device.type == "cuda" else "torch"
    for function in (swiglu, geglu, gelu):
        assert torch.equal(function(x), function(x, backend=chosen))
        assert function(x.double()).dtype == torch.float64
        message = f"{function.__name__}: backend 'triton' cannot serve this call: float64"
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            function(x.double(), backend="triton")
        with pytest.raises(NotImplementedError, match=f"{function.__name__}: backend 'cuda' cannot serve"):
            function(x, backend="cuda")


# --- bad input --------------------------------------------------------------------------------------------------------------------------

X = torch.ones(2, 3, 8)
DTYPES = "float32 or float16 or bfloat16 or float64"
BAD_INPUT = [
    (TypeError, "gate must be a torch.Tensor, got [1.0, 2.0] (list)", swiglu, ([1.0, 2.0],), {}),
    (TypeError, f"gate must be of dtype {DTYPES}, got int64", geglu, (X.long(),), {}),
    (TypeError, "gate must be a dense (strided) tensor, got layout torch.sparse_coo", swiglu, (X.to_sparse(),), {}),
    (ValueError, "gate must have at least 1 dimension: (..., width), got shape ()", swiglu, (X[0, 0, 0],), {}),
    (ValueError, "gate must have an even last dimension, [gate; up], when up is not given, got shape (2, 3, 7)", swiglu, (X[..., 1:],), {}),
    (TypeError, "up must be a torch.Tensor, got 1.0 (float)", geglu, (X, 1.0), {}),
    (TypeError, "up must have the dtype of gate (float32), got float16", swiglu, (X, X.half()), {}),
    (ValueError, "up must have shape of gate = (2, 3, 8), got (3, 8)", swiglu, (X, X[0]), {}),
    (ValueError, "up must be on cpu like the other tensors, got meta", swiglu, (X, X.to("meta")), {}),
    (ValueError, "approximate must be 'none' or 'tanh', got 'sigmoid'", geglu, (X,), {"approximate": "sigmoid"}),
    (ValueError, "approximate must be 'none' or 'tanh', got True", gelu, (X,), {"approximate": True}),
    (ValueError, "approximate must be 'none' or 'tanh', got ['tanh']", gelu, (X,), {"approximate": ["tanh"]}),
    (TypeError, f"x must be of dtype {DTYPES}, got bool", gelu, (X.bool(),), {}),
    (ValueError, "x must have at least 1 dimension: (..., width), got shape ()", gelu, (X[0, 0, 0],), {}),
    (ValueError, "backend must be one of 'cuda', 'triton', 'torch', 'reference', got 'trition'", gelu, (X,), {"backend": "trition"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "message", "function", "arguments", "options"),
    BAD_INPUT,
    ids=[message[:40] for _, message, *_ in BAD_INPUT],
)
def test_bad_input(error, message: str, function, arguments: tuple, options: dict) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments, **options)
