"""Linear: the same results packed and not, and no packed weight that is out of date."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from pytransformer.nn import Linear, linear
from pytransformer.verification import SEEDS, Contract

needs_packing = pytest.mark.skipif(
    linear.why_not_packed(torch.zeros(256, 256)) is not None, reason="this build of torch packs no weights"
)
CPU = torch.device("cpu")  # packing is for CPUs alone


@needs_packing
@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_packed_results_are_as_near_as_plain_ones(rows, dtype, bias):
    contract = Contract(dtype)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module = Linear(300, 257, bias=bias, device=CPU, dtype=dtype)
        assert module.pack(rows)
        x = torch.randn(rows, 1, 300, dtype=dtype)
        with torch.no_grad():
            golden = F.linear(x.double(), module.weight.double(), None if module.bias is None else module.bias.double())
            actual = module(x)
            contract.add("y", actual=actual, plain=F.linear(x, module.weight, module.bias), golden=golden)
        assert actual.shape == (rows, 1, 257) and actual.dtype == dtype
    contract.check()


@pytest.fixture
def packed() -> Linear:
    module = Linear(256, 256, device=CPU)
    if not module.pack():
        pytest.skip("this build of torch packs no weights")
    return module


def plain(module: Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight, module.bias)


CHANGES = {
    "in place": lambda module: module.weight.mul_(2),
    "another tensor": lambda module: setattr(module, "weight", torch.nn.Parameter(module.weight * 2)),
    "loaded": lambda module: module.load_state_dict({name: 2 * t for name, t in module.state_dict().items()}),
    "assigned": lambda module: module.load_state_dict({n: 2 * t for n, t in module.state_dict().items()}, assign=True),
    "data replaced": lambda module: setattr(module.weight, "data", module.weight.data * 2),
    "another dtype": lambda module: module.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_seen_at_once(packed, change):
    x = torch.randn(1, 256)
    with torch.no_grad():
        before = packed(x)
        CHANGES[change](packed)
        x = x.to(packed.weight.dtype)
        assert torch.equal(packed(x), plain(packed, x))
        assert packed._packed is None and not torch.equal(packed(x), before)


@pytest.mark.parametrize("element", [(0, 0), (255, 255), (17, 3)])
def test_a_write_through_data_is_found_by_packing_again(packed, element):
    before = packed._packed
    packed.pack()
    assert packed._packed is before  # unchanged: nothing is packed twice
    packed.weight.data[element] += 1
    assert packed.pack() and packed._packed is not before
    fresh = Linear(256, 256, device=CPU)
    fresh.load_state_dict(packed.state_dict())
    fresh.pack()
    x = torch.randn(1, 256)
    with torch.no_grad():
        assert torch.equal(packed(x), fresh(x))


def test_an_exchange_of_rows_through_data_is_found(packed):
    before = packed._packed
    packed.weight.data.copy_(packed.weight.data.flip(0))
    packed.pack()
    assert packed._packed is not before


def test_another_number_of_rows_is_served_plainly_or_packed_anew(packed):
    with torch.no_grad():
        x = torch.randn(5, 256)
        assert torch.equal(packed(x), plain(packed, x))
    before = packed._packed
    assert packed.pack(5) and packed._packed is not before


def test_training_never_sees_the_packed_weight(packed):
    x = torch.randn(1, 256, requires_grad=True)
    inputs = (x, packed.weight, packed.bias)
    expected = torch.autograd.grad(plain(packed, x).sum(), inputs)
    for actual, gradient in zip(torch.autograd.grad(packed(x).sum(), inputs), expected):
        assert torch.equal(actual, gradient)


def test_autocast_and_compile_are_served_plainly(packed):
    x = torch.randn(1, 256)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert packed(x).dtype == torch.bfloat16
        compiled = torch.compile(packed, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain(packed, x))


def test_the_packed_copy_is_not_state(packed):
    assert set(packed.state_dict()) == {"weight", "bias"}
    for twin in (copy.deepcopy(packed), torch.load(saved(packed), weights_only=False)):
        assert twin._packed is None and torch.equal(twin.weight, packed.weight)
    packed.unpack()
    assert packed._packed is None


def saved(module: Linear) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return buffer


def test_what_is_not_packed_says_why():
    for weight, rows, reason in (
        (torch.zeros(256, 256, device="meta"), 1, "packing is for CPUs, the weight is on meta"),
        (
            torch.zeros(256, 256, dtype=torch.float16),
            1,
            "packing is for float32 and bfloat16, the weight is torch.float16",
        ),
        (torch.zeros(256, 256), 17, "packing is for 1 to 16 rows, got 17"),
        (torch.zeros(8, 8), 1, "packing is for weights of at least 65536 elements, this one has 64"),
    ):
        assert linear.why_not_packed(weight, rows) == reason
    with torch.inference_mode():
        assert "inference_mode" in linear.why_not_packed(torch.zeros(256, 256))
    assert Linear(8, 8, device=CPU).pack() is False


def test_without_the_libraries_everything_is_plain(monkeypatch):
    monkeypatch.setattr(linear, "_works", lambda library, dtype: False)
    module = Linear(256, 256, device=CPU)
    assert module.pack() is False and "this build of torch packs no" in linear.why_not_packed(module.weight)
    with torch.no_grad():
        assert module(torch.zeros(1, 256)).shape == (1, 256)


def test_a_library_that_is_missing_or_wrong_is_not_used(monkeypatch):
    def missing(*arguments):
        raise AttributeError("no such op")

    for broken in (missing, lambda library, weight, rows: weight + 1):
        monkeypatch.setattr(linear, "_reorder", broken)
        linear._works.cache_clear()
        assert not linear._works("onednn", torch.float32)
    linear._works.cache_clear()
