"""layer_norm and rms_norm as people call them: every backend, autograd, transforms, compilation, and what bad input gets."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pytransformer
from pytransformer import layer_norm, reference, rms_norm, use_backend
from pytransformer.verification import SEEDS, Contract
from tests.ops.norm_cases import (
    ALL_BACKENDS,
    ALL_KERNELS,
    ALL_OPS,
    BACKENDS,
    BFLOAT16,
    EMULATED,
    FLOAT16,
    FLOAT32,
    KERNEL_BACKENDS,
    OPS,
    draw,
    results,
    run,
)
from tests.support.dispatch import SeenOps, refuse_dispatch

# --- the contract -----------------------------------------------------------------------------------------------------------------------


@ALL_BACKENDS
@ALL_OPS
@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        (FLOAT32, {}),
        (FLOAT16, {}),
        (BFLOAT16, {"weight": FLOAT32, "bias": FLOAT32}),
        (BFLOAT16, {"residual": FLOAT32}),
        (BFLOAT16, {"residual": None, "weight": BFLOAT16, "bias": None}),
        (FLOAT32, {"residual": None, "weight": None, "bias": None}),
    ],
    ids=str,
)
def test_contract(op: str, backend: str, dtype: torch.dtype, others: dict, device: torch.device) -> None:
    function, naive = OPS[op]
    contract = Contract(dtype)
    # The offset belongs to rms_norm; with a weight of None it must do nothing.
    options = {"weight_offset": 1.0} if op == "rms_norm" else {}
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        tensors = draw(op, device, (2, 8, 24), dtype, **others)
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        actual = results(function, tensors, backend=backend, **options)
        plain, golden = results(naive, on_cpu, **options), results(naive, on_cpu, torch.float64, **options)
        for values, kind in zip(zip(actual, plain, golden), ("output", "gradient")):
            contract.add_all(*values, kind=kind)
            assert all(values[0][name].dtype == values[1][name].dtype for name in values[0])
    contract.check()


@ALL_OPS
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_torch_sums_weight_gradients_of_many_rows_in_float32(op: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = draw(op, device, (2000, 16), dtype, residual=None)
    on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    contract = Contract(dtype)
    actual, plain, golden = (
        results(function, inputs, wanted, **options)[1]
        for function, inputs, wanted, options in (
            (OPS[op][0], tensors, None, {"backend": "torch"}),
            (OPS[op][1], on_cpu, None, {}),
            (OPS[op][1], on_cpu, torch.float64, {}),
        )
    )
    contract.add_all(actual, plain, golden, kind="gradient")
    contract.check()


@ALL_BACKENDS
def test_agrees_with_torch(backend: str, device: torch.device) -> None:
    tensors = draw("layer_norm", device, residual=None)
    x, weight, bias = tensors.values()
    torch.testing.assert_close(layer_norm(x, weight, bias, backend=backend), F.layer_norm(x, (24,), weight, bias))
    torch.testing.assert_close(layer_norm(x, eps=0.1, backend=backend), F.layer_norm(x, (24,), eps=0.1))
    torch.testing.assert_close(rms_norm(x, weight, backend=backend), F.rms_norm(x, (24,), weight, 1e-6))
    torch.testing.assert_close(
        rms_norm(x, weight, weight_offset=1.0, backend=backend), F.rms_norm(x, (24,), weight + 1, 1e-6)
    )


@ALL_BACKENDS
@ALL_OPS
def test_the_sum_is_exact_and_is_what_is_normalised(op: str, backend: str, device: torch.device) -> None:
    function = OPS[op][0]
    x, residual = (torch.randn(9, 40, device=device).to(BFLOAT16) for _ in range(2))
    y, total = function(x, residual=residual, backend=backend)
    assert torch.equal(total, (x.float() + residual.float()).to(BFLOAT16))
    assert torch.equal(y, function(total, backend=backend))
    y, total = function(x, residual=residual.float(), backend=backend)
    assert y.dtype == BFLOAT16 and torch.equal(total, x.float() + residual.float())


@ALL_BACKENDS
@ALL_OPS
def test_leading_shape_and_strides_are_free(op: str, backend: str, device: torch.device) -> None:
    function = OPS[op][0]
    x = torch.randn(3, 4, 5, 16, device=device)
    expected = function(x, backend=backend)
    for view in (
        x.permute(2, 0, 1, 3),
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        x.repeat(1, 1, 1, 2)[..., :16],
    ):
        back = function(view, backend=backend)
        torch.testing.assert_close(back.permute(1, 2, 0, 3) if view.shape[0] == 5 else back, expected)
    torch.testing.assert_close(function(x[0, 0, 0], backend=backend), expected[0, 0, 0])


# --- autograd ---------------------------------------------------------------------------------------------------------------------------


@ALL_BACKENDS
@ALL_OPS
@pytest.mark.parametrize("used", ["y", "s"])
def test_gradient_of_one_of_the_outputs(op: str, backend: str, used: str, device: torch.device) -> None:
    gradients = []
    tensors = draw(op, device)
    for function, options in ((OPS[op][0], {"backend": backend}), (OPS[op][1], {})):
        y, total = run(function, tensors, **options)
        wanted = [tensors[name] for name in ("x", "residual")]
        gradients.append(torch.autograd.grad((y if used == "y" else total).square().sum(), wanted))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


@ALL_BACKENDS
def test_only_what_requires_grad_gets_a_gradient(backend: str, device: torch.device) -> None:
    for wanted in ("x", "weight", "bias", "residual"):
        tensors = {name: value.detach() for name, value in draw("layer_norm", device).items()}
        tensors[wanted].requires_grad_()
        y, total = run(layer_norm, tensors, backend=backend)
        (y.sum() + total.square().sum()).backward()
        assert {name for name, value in tensors.items() if value.grad is not None} == {wanted}
        expected = tensors[wanted].grad.clone()
        tensors[wanted].grad = None
        y, total = run(reference.layer_norm, tensors)
        (y.sum() + total.square().sum()).backward()
        torch.testing.assert_close(expected, tensors[wanted].grad)


@ALL_KERNELS
def test_gradients_of_x_and_residual_do_not_share_memory(backend: str, device: torch.device) -> None:
    tensors = draw("rms_norm", device)
    y, total = run(rms_norm, tensors, backend=backend)
    (y.sum() + total.sum()).backward()
    assert torch.equal(tensors["x"].grad, tensors["residual"].grad)
    tensors["x"].grad.zero_()
    assert bool(tensors["residual"].grad.any())


@ALL_KERNELS
@ALL_OPS
def test_double_backward_of_the_kernel_is_refused(op: str, backend: str, device: torch.device) -> None:
    tensors = draw(op, device, residual=None)
    (y,) = run(OPS[op][0], tensors, backend=backend)
    (dx,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@ALL_OPS
def test_double_backward_elsewhere(op: str, backend: str, device: torch.device) -> None:
    tensors = {
        name: value.detach().double().requires_grad_()
        for name, value in draw(op, device, (2, 5), residual=None).items()
    }
    assert torch.autograd.gradgradcheck(lambda *values: OPS[op][0](*values, backend=backend), tuple(tensors.values()))


@ALL_BACKENDS
@ALL_OPS
def test_functorch(op: str, backend: str, device: torch.device) -> None:
    tensors = draw(op, device)
    names, values = tuple(tensors), tuple(value.detach() for value in tensors.values())

    def loss(*arguments: Tensor) -> Tensor:
        y, total = OPS[op][0](**dict(zip(names, arguments)), backend=backend)
        return (y.sin() + total.square()).sum()

    expected = torch.autograd.grad(loss(*tensors.values()), tuple(tensors.values()))
    for ours, theirs in zip(torch.func.grad(loss, argnums=tuple(range(len(names))))(*values), expected):
        torch.testing.assert_close(ours, theirs)
    x, weight = values[:2]
    mapped = torch.func.vmap(lambda row: OPS[op][0](row, weight, backend=backend))(x)
    torch.testing.assert_close(mapped, OPS[op][0](x, weight, backend=backend))


@ALL_KERNELS
@ALL_OPS
def test_forward_mode_is_refused_by_the_kernel_rather_than_lost(op: str, backend: str, device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            OPS[op][0](dual, backend=backend)
        assert torch.autograd.forward_ad.unpack_dual(OPS[op][0](dual, backend="torch")).tangent is not None


# --- registration, compilation, modes ---------------------------------------------------------------------------------------------------


def test_opcheck(device: torch.device) -> None:
    x, weight = torch.randn(3, 5, 16, device=device), torch.randn(16, device=device)
    forward, backward = torch.ops.pytransformer.norm_forward, torch.ops.pytransformer.norm_backward
    for arguments in ((x, weight, weight, x, 1e-5, 0.0, False), (x[:, ::2], None, None, None, 1e-5, 1.0, True)):
        torch.library.opcheck(forward, (*arguments, KERNEL_BACKENDS[0]))
    _, s, mean, rstd = forward(x, weight, weight, x, 1e-5, 0.0, False, KERNEL_BACKENDS[0])
    torch.library.opcheck(backward, (x, s, s, weight, mean, rstd, 0.0, False, True, FLOAT16, KERNEL_BACKENDS[0]))
    torch.library.opcheck(backward, (x, None, x, None, mean, rstd, 0.0, False, False, None, KERNEL_BACKENDS[0]))


@ALL_KERNELS
@ALL_OPS
def test_fake_tensors_are_like_the_real_ones(op: str, backend: str, device: torch.device) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = draw(op, device, (4, 3, 8), BFLOAT16, residual=FLOAT32)
    tensors["x"] = tensors["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    real = run(OPS[op][0], tensors, backend=backend)
    with FakeTensorMode() as mode:
        fake = run(OPS[op][0], {name: mode.from_tensor(value) for name, value in tensors.items()}, backend=backend)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride(), one.device) == (
            other.shape,
            other.dtype,
            other.stride(),
            other.device,
        )


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
def test_compiles_whole_with_dynamic_shapes(backend: str, device: torch.device) -> None:
    def block(x: Tensor, weight: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        y, total = layer_norm(x, weight, bias, residual=residual, backend=backend)
        return rms_norm(2 * y, weight, weight_offset=1.0, backend=backend) + total

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        tensors = tuple(draw("layer_norm", device, (rows, 24)).values())
        expected, actual = block(*tensors), compiled(*tensors)
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), tensors) for out in (actual, expected))):
            torch.testing.assert_close(ours, theirs)


@ALL_BACKENDS
def test_exports(backend: str, device: torch.device) -> None:
    class Block(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return rms_norm(x, weight, residual=x, backend=backend)

    x, weight = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    program = torch.export.export(Block(), (x, weight))
    for exported, direct in zip(program.module()(x, weight), Block()(x, weight)):
        torch.testing.assert_close(exported, direct)


@ALL_KERNELS
@ALL_OPS
def test_modes_see_registered_ops(op: str, backend: str, device: torch.device) -> None:
    tensors = draw(op, device)
    expected = results(OPS[op][0], tensors, backend=backend)
    with SeenOps() as seen:
        again = results(OPS[op][0], tensors, backend=backend)
    assert {"pytransformer.norm_forward.default", "pytransformer.norm_backward.default"} <= set(seen.names)
    for one, other in zip(expected, again):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.skipif(EMULATED, reason="about Triton: an op of the extension is always called through the dispatcher")
@ALL_OPS
def test_plain_tensors_skip_the_dispatcher(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = draw(op, device)
    refuse_dispatch(monkeypatch)
    results(OPS[op][0], tensors, backend="triton")
    with torch.no_grad():
        run(OPS[op][0], tensors, backend="triton")


@ALL_BACKENDS
@ALL_OPS
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_autocast_does_not_change_the_dtype(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    tensors = draw(op, device, dtype=dtype, weight=FLOAT32, bias=FLOAT32)
    expected = run(OPS[op][0], tensors, backend=backend)
    with torch.autocast(device.type, BFLOAT16):
        actual = run(OPS[op][0], tensors, backend=backend)
    for ours, theirs in zip(actual, expected):
        assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)


@ALL_BACKENDS
@ALL_OPS
def test_inference_mode(op: str, backend: str, device: torch.device) -> None:
    tensors = draw(op, device)
    expected = run(OPS[op][0], tensors, backend=backend)
    with torch.inference_mode():
        for ours, theirs in zip(run(OPS[op][0], tensors, backend=backend), expected):
            torch.testing.assert_close(ours, theirs.detach())


@ALL_BACKENDS
@ALL_OPS
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)])
def test_nothing_to_normalise(op: str, backend: str, shape: tuple[int, ...], device: torch.device) -> None:
    tensors = draw(op, device, shape)
    y, total = run(OPS[op][0], tensors, backend=backend)
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert torch.equal(tensors["weight"].grad, torch.zeros(shape[-1], device=device))
    assert tensors["x"].grad.shape == shape


# --- choice of backend ------------------------------------------------------------------------------------------------------------------


def test_choice(device: torch.device) -> None:
    x = torch.randn(2, 8, device=device)
    with use_backend("reference"):
        assert torch.equal(layer_norm(x), reference.layer_norm(x))
    # On a CPU kernels are interpreted or emulated on request only.
    chosen = BACKENDS[0] if device.type == "cuda" else "torch"
    assert torch.equal(rms_norm(x), rms_norm(x, backend=chosen))
    for backend in KERNEL_BACKENDS:
        message = f"layer_norm: backend {backend!r} cannot serve this call: float64"
        with pytest.raises(NotImplementedError, match=re.escape(message)):
            layer_norm(x.double(), backend=backend)
    if "cuda" not in BACKENDS:
        with pytest.raises(NotImplementedError, match=r"rms_norm: backend 'cuda' cannot serve"):
            rms_norm(x, backend="cuda")
    assert layer_norm(x.double()).dtype == torch.float64
    assert pytransformer.rms_norm is rms_norm
