"""grouped_linear by every backend: the contract, torch's own grouped product, the compiler, transforms, and each error."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from pytransformer import grouped_linear, reference
from pytransformer.ops import checks
from pytransformer.ops.grouped_linear import by_torch
from pytransformer.ops.grouped_linear.call import GroupedLinearCall, GroupedLinearGradientCall
from pytransformer.verification import SEEDS, Contract, measure
from pytransformer.verification.cases import FLOATS, Case

FUSED = ("triton", "torch")
ROUTINGS = {"ragged": (3, 9, 1), "empty ones": (0, 13, 0), "no rows": (0, 0, 0)}


def draw(sizes=(3, 0, 10), features=(16, 24), device=None, dtype=torch.float32):
    total, groups = sum(sizes), len(sizes)
    return {
        "x": torch.randn(total, features[0], device=device, dtype=dtype).requires_grad_(),
        "weight": torch.randn(groups, *reversed(features), device=device, dtype=dtype).requires_grad_(),
        "offsets": torch.tensor((0, *sizes)).cumsum(0).to(device, torch.int32),
        "bias": torch.randn(groups, features[1], device=device, dtype=dtype).requires_grad_(),
    }


def differentiable(tensors):
    return [tensors[name] for name in ("x", "weight", "bias")]


@pytest.mark.parametrize("backend", (*FUSED, "reference"))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_within_the_contract(dtype, backend, device):
    def inputs(size):
        return {name: tensor.detach() for name, tensor in draw((5, 0, 20)).items()}

    case = Case(
        "grouped_linear",
        "some empty",
        inputs,
        lambda tensors, backend: {"y": grouped_linear(**tensors, backend=backend)},
        lambda tensors: {"y": reference.grouped_linear(**tensors)},
        ("x", "weight", "bias"),
    )
    measure(case, dtype, backend, device).check()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_groups_of_all_sizes(routing, backend, device, poison_empty):
    tensors = draw(ROUTINGS[routing], device=device)
    y, expected = grouped_linear(**tensors, backend=backend), reference.grouped_linear(**tensors)
    assert_close(y, expected)
    dy, wanted = torch.randn_like(y), differentiable(tensors)
    assert_close(torch.autograd.grad(y, wanted, dy), torch.autograd.grad(expected, wanted, dy))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_torch_reads_no_rows_of_other_groups(dtype, device, poison_empty):
    """NaN beside a group's rows, in rows that have a stride, changes nothing of its own."""
    tensors = draw((3, 5, 9), (40, 24), device, dtype)
    holder = torch.full((17, 51), float("nan"), device=device, dtype=dtype)
    holder[3:8, 5:45] = tensors["x"].detach()[3:8]
    x = holder[:, 5:45].detach().requires_grad_()
    y, expected = (grouped_linear(**{**tensors, "x": each}, backend="torch") for each in (x, tensors["x"]))
    assert torch.equal(y[3:8], expected[3:8])
    dy = torch.randn_like(expected)
    dy[:3] = dy[8:] = float("nan")
    found = torch.autograd.grad(y, (x, tensors["weight"]), dy)
    wanted = torch.autograd.grad(expected, (tensors["x"], tensors["weight"]), dy)
    assert torch.equal(found[0][3:8], wanted[0][3:8]) and torch.equal(found[1][1], wanted[1][1])
    assert not bool(found[1][1].isnan().any())


@pytest.mark.parametrize("sizes", [(5, 0, 20), (0, 0, 7), (3, 4)])
def test_torchs_own_grouped_product(sizes, device):
    """What a GPU takes in bfloat16, on whatever device torch has it."""
    tensors = {name: tensor.detach() for name, tensor in draw(sizes, (16, 24), device, torch.bfloat16).items()}
    x, weight, offsets, bias = tensors.values()
    dy = torch.randn(sum(sizes), 24, device=device, dtype=torch.bfloat16)
    y = by_torch.grouped_product(GroupedLinearCall(x, weight, offsets, None))
    assert_close(y, reference.grouped_linear(x, weight, offsets))
    call = GroupedLinearGradientCall(dy, x, weight, offsets, True, True, True)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    expected = torch.autograd.grad(reference.grouped_linear(*leaves[:2], offsets, bias=leaves[2]), leaves, dy)
    assert_close(by_torch.grouped_gradients(call), expected)


def test_float64_is_for_torch_and_the_reference(device):
    tensors = draw(device=device, dtype=torch.float64)
    y = grouped_linear(**tensors, backend="torch")
    assert_close(y, reference.grouped_linear(**tensors))
    with pytest.raises(NotImplementedError, match="float64 is served by torch"):
        grouped_linear(**tensors, backend="triton")


@pytest.mark.parametrize("missing", ["x", "weight", "bias"])
def test_only_wanted_gradients_are_computed(missing, device):
    tensors = draw(device=device)
    tensors[missing] = tensors[missing].detach()
    grouped_linear(**tensors).sum().backward()
    for name in ("x", "weight", "bias"):
        assert (tensors[name].grad is None) == (name == missing)


def test_autocast_is_that_of_a_linear_layer(device):
    tensors = draw(device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = grouped_linear(**tensors)
    half = {name: t if name == "offsets" else t.detach().bfloat16() for name, t in tensors.items()}
    assert torch.equal(y, grouped_linear(**half))
    assert torch.autograd.grad(y.sum(), tensors["weight"])[0].dtype == torch.float32


def test_double_backward_raises(device):
    tensors = draw(device=device)
    (dx,) = torch.autograd.grad(grouped_linear(**tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="grouped_linear has no double backward"):
        torch.autograd.grad(dx.sum(), tensors["weight"])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", FUSED)
def test_fullgraph(backend, dynamic, device):
    torch._dynamo.reset()

    def function(x, weight, offsets, bias):
        return grouped_linear(x, weight, offsets, bias=bias, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for sizes in ((3, 0, 10), (0, 7, 2)):
        tensors = draw(sizes, device=device)
        actual, expected = compiled(*tensors.values()), function(*tensors.values())
        assert torch.equal(actual, expected)
        wanted = differentiable(tensors)
        assert_close(torch.autograd.grad(actual.sum(), wanted), torch.autograd.grad(expected.sum(), wanted))


@pytest.mark.parametrize("backend", FUSED)
def test_func_grad_and_vmap(backend, device):
    tensors = draw(device=device)
    weight = tensors["weight"].detach()

    def gradients(backend, x, weight):
        def of(x, weight):
            return grouped_linear(x, weight, tensors["offsets"], backend=backend).square().sum()

        return torch.func.vmap(torch.func.grad(of, argnums=(0, 1)), in_dims=(0, None))(x, weight)

    contract = Contract(torch.float32)
    for _ in range(SEEDS):
        x = torch.randn(3, 13, 16, device=device)
        results = gradients(backend, x, weight), gradients("torch", x, weight)
        golden = gradients("reference", x.double(), weight.double())
        for name, actual, plain, exact in zip(("x", "weight"), *results, golden):
            contract.add(name, actual=actual, plain=plain, golden=exact, kind="gradient")
    contract.check()


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck_of_the_registered_ops(backend, device):
    x, weight, offsets, bias = draw(device=device).values()
    ops = torch.ops.pytransformer
    torch.library.opcheck(ops.grouped_linear_forward, (x, weight, offsets, bias, backend))
    torch.library.opcheck(ops.grouped_linear_forward, (x, weight, offsets, None, backend))
    dy = torch.randn(13, 24, device=device)
    gradient = (dy, x.detach(), weight.detach(), offsets)
    torch.library.opcheck(ops.grouped_linear_backward, (*gradient, True, True, True, backend))
    torch.library.opcheck(ops.grouped_linear_backward, (*gradient, True, False, False, backend))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for and no graphs")
@pytest.mark.parametrize("backend", FUSED)
def test_the_host_never_waits_and_a_graph_can_be_captured(backend, device):
    tensors = draw((30, 0, 100), device=device, dtype=torch.bfloat16)
    if backend == "torch":  # whose grouped product has none
        del tensors["bias"]
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]

    def step():
        y = grouped_linear(**tensors, backend=backend)
        return y, *torch.autograd.grad(y.sum(), wanted)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        # Other sizes of the same rows: the graph asks the device for them.
        tensors["offsets"].copy_(torch.tensor([0, 100, 130, 130]))
        graph.replay()
        expected = step()
    torch.cuda.synchronize()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor"),
        ({"x": torch.zeros(13, 16).int()}, TypeError, "x must be of dtype .*, got int32"),
        ({"x": torch.zeros(16)}, ValueError, r"x must have 2 dimensions: \(total, in_features\)"),
        ({"x": torch.zeros(13, 8)}, ValueError, r"x must have shape .* = \(any, 16\), got \(13, 8\)"),
        ({"x": torch.zeros(16, 13).t()}, ValueError, "x must be contiguous in its last dimension"),
        ({"weight": torch.zeros(24, 16)}, ValueError, "weight must have 3 dimensions"),
        ({"weight": torch.zeros(0, 24, 16)}, ValueError, r"at least one group, .* got shape \(0, 24, 16\)"),
        (
            {"weight": torch.zeros(3, 24, 16).half()},
            TypeError,
            r"weight must have the dtype of x \(float32\), got float16",
        ),
        ({"weight": torch.zeros(3, 16, 24).mT}, ValueError, "weight must be contiguous in its last dimension"),
        ({"weight": torch.zeros(3, 24, 16, device="meta")}, ValueError, "weight must be on .*, got meta"),
        ({"bias": torch.zeros(24)}, ValueError, "bias must have 2 dimensions"),
        (
            {"bias": torch.zeros(3, 16)},
            ValueError,
            r"bias must have shape weight.shape\[:2\] = \(3, 24\), got \(3, 16\)",
        ),
        ({"offsets": torch.zeros(4)}, TypeError, "offsets must be of dtype int32, got float32"),
        (
            {"offsets": torch.zeros(3).int()},
            ValueError,
            r"offsets must have 4 entries \(groups \+ 1\), got shape \(3,\)",
        ),
        (
            {"offsets": torch.tensor([0, 5, 3, 13]).int()},
            ValueError,
            r"never decrease and end at .* \(13\), got \[0, 5, 3",
        ),
        ({"offsets": torch.tensor([0, 5, 5, 12]).int()}, ValueError, r"end at the number of tokens \(13\)"),
        ({"backend": "cuda"}, NotImplementedError, "grouped_linear"),
    ],
)
def test_errors(changes, error, message, device, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)
    tensors = {name: tensor.detach() for name, tensor in draw(device=device).items()}
    moved = {
        name: each.to(device) if isinstance(each, torch.Tensor) and not each.is_meta else each
        for name, each in changes.items()
    }
    with pytest.raises(error, match=message):
        grouped_linear(**{**tensors, **moved})
