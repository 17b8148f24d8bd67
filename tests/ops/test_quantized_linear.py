"""quantized_linear by every backend: the contract, blocks of rows, the compiler, transforms, and each error."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from pytransformer import quantized_linear, reference
from pytransformer.ops import checks
from pytransformer.ops.quantized_linear import by_torch
from pytransformer.verification import measure
from pytransformer.verification.cases import FLOATS, Case

FUSED = ("triton", "torch")
KINDS = ("int8", "int4", "int4 with zero points")


def draw(kind, rows=(3, 5), features=(64, 40), device=None, dtype=torch.float32):
    num_in, num_out = features
    tensors = {"x": torch.randn(*rows, num_in, device=device, dtype=dtype).requires_grad_()}
    if kind == "int8":
        tensors["weight"] = torch.randint(-128, 128, (num_out, num_in), dtype=torch.int8, device=device)
        tensors["scale"] = torch.rand(num_out, device=device) / 64
    else:
        tensors["weight"] = torch.randint(256, (num_out, num_in // 2), device=device).byte()
        tensors["scale"] = torch.rand(num_out, num_in // 32, device=device) / 8
        if "zero" in kind:
            tensors["zero_point"] = torch.randint(16, (num_out, num_in // 32), device=device).byte()
    tensors["bias"] = torch.randn(num_out, device=device, dtype=dtype).requires_grad_()
    return tensors


@pytest.mark.parametrize("backend", (*FUSED, "reference"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_within_the_contract(kind, dtype, backend, device):
    case = Case(
        "quantized_linear",
        kind,
        lambda size: {name: tensor.detach() for name, tensor in draw(kind).items()},
        lambda tensors, backend: {"y": quantized_linear(**tensors, backend=backend)},
        lambda tensors: {"y": reference.quantized_linear(**tensors)},
        ("x", "bias"),
    )
    measure(case, dtype, backend, device).check()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_takes_the_weight_in_blocks_of_rows(kind, dtype, device, monkeypatch, poison_empty):
    """Several blocks with a rest, whose sums in the backward pass are rounded once."""
    monkeypatch.setattr(by_torch, "_BLOCK", 16 * 64)
    monkeypatch.setattr(by_torch, "_BLOCK_ON_GPU", 16 * 64)
    case = Case(
        "quantized_linear",
        kind,
        lambda size: {name: tensor.detach() for name, tensor in draw(kind, (9,), (64, 90)).items()},
        lambda tensors, backend: {"y": quantized_linear(**tensors, backend=backend)},
        lambda tensors: {"y": reference.quantized_linear(**tensors)},
        ("x", "bias"),
    )
    measure(case, dtype, "torch", device).check()


@pytest.mark.parametrize("backend", (*FUSED, "reference"))
@pytest.mark.parametrize("rows", [(), (0,), (2, 0), (1,), (1, 1, 3)])
def test_shapes_of_x(rows, backend, device):
    tensors = draw("int4", rows, device=device)
    y = quantized_linear(**tensors, backend=backend)
    assert y.shape == (*rows, 40)
    assert_close(y, reference.quantized_linear(**tensors))
    assert torch.autograd.grad(y.sum(), tensors["x"])[0].shape == (*rows, 64)


def test_float64_is_for_torch_and_the_reference(device):
    tensors = draw("int8", device=device, dtype=torch.float64)
    assert_close(quantized_linear(**tensors, backend="torch"), reference.quantized_linear(**tensors))
    with pytest.raises(NotImplementedError, match="float64 is served by torch"):
        quantized_linear(**tensors, backend="triton")


@pytest.mark.parametrize("missing", ["x", "bias"])
def test_only_wanted_gradients_are_computed(missing, device):
    tensors = draw("int4", device=device)
    tensors[missing] = tensors[missing].detach()
    quantized_linear(**tensors).sum().backward()
    for name in ("x", "bias"):
        assert (tensors[name].grad is None) == (name == missing)


def test_autocast_is_that_of_a_linear_layer(device):
    tensors = draw("int8", device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = quantized_linear(**tensors)
    half = {**tensors, **{name: tensors[name].detach().bfloat16() for name in ("x", "bias")}}
    assert torch.equal(y, quantized_linear(**half))
    assert torch.autograd.grad(y.sum(), tensors["x"])[0].dtype == torch.float32


def test_double_backward_raises(device):
    tensors = draw("int4", device=device)
    (dx,) = torch.autograd.grad(quantized_linear(**tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="quantized_linear has no double backward"):
        torch.autograd.grad(dx.sum(), tensors["x"])


@pytest.mark.parametrize("backend", FUSED)
def test_fullgraph(backend, device):
    torch._dynamo.reset()

    def function(x, weight, scale, zero_point, bias):
        return quantized_linear(x, weight, scale, zero_point=zero_point, bias=bias, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in ((3, 5), (2, 7)):
        tensors = draw("int4 with zero points", rows, device=device)
        actual, expected = compiled(*tensors.values()), function(*tensors.values())
        assert torch.equal(actual, expected)
        wanted = [tensors["x"], tensors["bias"]]
        assert_close(torch.autograd.grad(actual.sum(), wanted), torch.autograd.grad(expected.sum(), wanted))


@pytest.mark.parametrize("backend", FUSED)
def test_func_grad_and_vmap(backend, device):
    tensors = draw("int4 with zero points", (3, 4), device=device)
    x = tensors.pop("x").detach()
    tensors["bias"] = tensors["bias"].detach()
    tensors["scale"] /= 8  # results near 1, as the tolerances suppose

    def gradients(backend):
        def of(x):
            return quantized_linear(x, **tensors, backend=backend).square().sum()

        return torch.func.vmap(torch.func.grad(of))(x)

    assert_close(gradients(backend), gradients("reference"))


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck_of_the_registered_ops(backend, device):
    x, weight, scale, zero_point, bias = draw("int4 with zero points", (5,), device=device).values()
    ops = torch.ops.pytransformer
    torch.library.opcheck(ops.quantized_linear_forward, (x, weight, scale, zero_point, bias, backend))
    torch.library.opcheck(ops.quantized_linear_forward, (x, weight, scale, None, None, backend))
    dy = torch.randn(5, 40, device=device)
    torch.library.opcheck(ops.quantized_linear_backward, (dy, weight, scale, zero_point, backend))


CODES = torch.zeros(40, 32, dtype=torch.uint8)
ERRORS = [
    ("int8", {"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
    ("int8", {"x": torch.zeros(3, 64).int()}, TypeError, "x must be of dtype .*, got int32"),
    ("int8", {"x": torch.zeros(3, 32)}, ValueError, r"x must have shape .* = \(any, 64\), got \(3, 32\)"),
    ("int8", {"weight": torch.zeros(40, 64)}, TypeError, "weight must be of dtype int8 or uint8, got float32"),
    ("int8", {"weight": torch.zeros(64, dtype=torch.int8)}, ValueError, "weight must have 2 dimensions: int8"),
    ("int8", {"weight": torch.zeros(0, 64, dtype=torch.int8)}, ValueError, "at least one output and input feature"),
    ("int8", {"weight": torch.zeros(64, 40, dtype=torch.int8).t()}, ValueError, "weight must be contiguous"),
    ("int8", {"weight": torch.zeros(40, 64, dtype=torch.int8, device="meta")}, ValueError, "weight must be on"),
    ("int8", {"scale": torch.ones(40, 1)}, ValueError, r"scale must have 1 dimensions: \(out_features\) with int8"),
    ("int8", {"scale": torch.ones(41)}, ValueError, r"scale must have shape .* = \(40\), got \(41,\)"),
    ("int8", {"scale": torch.ones(40).int()}, TypeError, "scale must be of dtype"),
    ("int8", {"zero_point": torch.zeros(40, 2).byte()}, ValueError, "zero_point is for 4-bit codes"),
    ("int8", {"bias": torch.zeros(3)}, ValueError, r"bias must have shape .* = \(40\), got \(3,\)"),
    ("int8", {"bias": torch.zeros(40).half()}, TypeError, r"bias must have the dtype of x \(float32\), got float16"),
    ("int8", {"scale": torch.ones(40, requires_grad=True)}, RuntimeError, "scale requires grad"),
    ("int4", {"scale": torch.ones(40)}, ValueError, "scale must have 2 dimensions"),
    ("int4", {"scale": torch.ones(40, 4)}, ValueError, "64 columns of weight into groups of 32, 64, 128, got 4 groups"),
    ("int4", {"zero_point": torch.zeros(40, 2)}, TypeError, "zero_point must be of dtype uint8"),
    ("int4", {"zero_point": torch.zeros(40, 1).byte()}, ValueError, r"zero_point must have shape scale.shape"),
    ("int4", {"zero_point": torch.full((40, 2), 16).byte()}, ValueError, "zero_point must hold 4-bit codes .*, got 16"),
    ("int4", {"backend": "cuda"}, NotImplementedError, "quantized_linear"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "error", "message"), ERRORS)
def test_errors(kind, changes, error, message, device, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)
    tensors = {name: tensor.detach() for name, tensor in draw(kind, (3,), device=device).items()}
    moved = {
        name: each.detach().to(device).requires_grad_(each.requires_grad)
        if isinstance(each, torch.Tensor) and not each.is_meta
        else each
        for name, each in changes.items()
    }
    with pytest.raises(error, match=message):
        quantized_linear(**{**tensors, **moved})
