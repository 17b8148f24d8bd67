"""Linear: the same results packed and not, and no packed weight that is out of date."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from pytransformer.nn import FeedForward, Linear, RowBlocks, linear, packed_weight
from pytransformer.verification import SEEDS, Contract

needs_packing = pytest.mark.skipif(
    packed_weight.why_not_packed(torch.zeros(256, 256)) is not None, reason="this build of torch packs no weights"
)


def packs(dtype, rows=1):
    """Whether weights of this dtype are packed here: oneDNN multiplies rows of bfloat16 only on a CPU with AVX-512 or better."""
    return packed_weight.why_not_packed(torch.zeros(256, 256, dtype=dtype), rows) is None


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
        assert module.pack(rows) == module.is_packed == packs(dtype, rows)
        product = module.product()
        # The number of rows that was packed for, and another one, which is served as well.
        for name, count in (("rows", rows), ("other rows", rows + 1)):
            x = torch.randn(count, 1, 300, dtype=dtype)
            with torch.no_grad():
                plain = F.linear(x, module.weight, module.bias)
                golden_bias = None if module.bias is None else module.bias.double()
                golden = F.linear(x.double(), module.weight.double(), golden_bias)
                actual = product(x)
            assert actual.shape == (count, 1, 257) and actual.dtype == dtype
            contract.add(name, actual=actual, plain=plain, golden=golden)
    contract.check()


@needs_packing
@pytest.mark.parametrize(("packed", "library"), [(True, "onednn"), (True, "mkl"), (True, "pieces"), (False, "onednn")])
@pytest.mark.parametrize("activation", packed_weight.ACTIVATIONS)
def test_an_activation_inside_the_product_is_as_near_as_behind_it(activation, packed, library, monkeypatch):
    """Plain weights with few rows and with many; packed ones in each layout."""
    if packed_weight.works(library, torch.float32):
        monkeypatch.setattr(packed_weight, "library_for", lambda rows, dtype: library)
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module = Linear(300, 257, device=CPU)
        assert module.pack()
        product = module.product(activation, packed=packed)
        for batch, rows in ((1, 1), (2, 1), (2, 70)):
            x, activate = torch.randn(batch, rows, 300), packed_weight.ACTIVATIONS[activation]
            with torch.no_grad():
                golden = activate(F.linear(x.double(), module.weight.double(), module.bias.double()))
                plain = activate(F.linear(x, module.weight, module.bias))
                contract.add(f"{batch} times {rows} rows", actual=product(x), plain=plain, golden=golden)
    contract.check()


@needs_packing
@torch.no_grad()
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("is_intel", [True, False])
def test_plain_products_of_many_rows_are_the_faster_librarys(is_intel, capability, monkeypatch):
    """Rows that do not lie beside each other, too; none of the three ways is taken for what it does not serve."""
    monkeypatch.setattr(linear, "is_intel", lambda: is_intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    real, names = packed_weight.library_product("onednn"), []
    monkeypatch.setattr(
        linear, "library_product", lambda library: lambda *given: names.append(given[3]) or real(*given)
    )
    contract, module = Contract(torch.float32), Linear(300, 513, device=CPU)
    blocks = RowBlocks(list(module.weight.split([256, 257])), module.bias)
    products = {
        "plain": (module.product(packed=False), lambda y: y),
        "blocks": (blocks.product(packed=False), lambda y: y),
        "gelu": (module.product("gelu_tanh", packed=False), packed_weight.ACTIVATIONS["gelu_tanh"]),
    }
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        x = torch.randn(2, 300, 70).transpose(1, 2)
        golden = F.linear(x.double(), module.weight.double(), module.bias.double())
        plain = F.linear(x, module.weight, module.bias)
        for name, (product, behind) in products.items():
            contract.add(name, actual=product(x), plain=behind(plain), golden=behind(golden))
    contract.check()
    assert set(names) == ({"none"} if not is_intel else set()) | {"none" if capability == "AVX2" else "gelu"}


@torch.no_grad()
def test_a_feed_forward_as_a_function_follows_what_its_projections_are():
    module = FeedForward(32, 64, activation="gelu_tanh", device=CPU)
    x = torch.randn(3, 32)
    assert torch.equal(module.product()(x), module(x))
    assert FeedForward(32, 64, activation="swiglu", device=CPU).product() is None
    module.up_proj = torch.nn.Linear(32, 64)
    assert module.product() is None


@pytest.fixture
def packed() -> Linear:
    module = Linear(256, 256, device=CPU)
    if not module.pack():
        pytest.skip("this build of torch packs no weights")
    return module


CHANGES = {
    "in place": lambda module: module.weight.mul_(2),
    "another tensor": lambda module: setattr(module, "weight", torch.nn.Parameter(module.weight * 2)),
    "loaded": lambda module: module.load_state_dict({name: 2 * t for name, t in module.state_dict().items()}),
    "assigned": lambda module: module.load_state_dict({n: 2 * t for n, t in module.state_dict().items()}, assign=True),
    "data replaced": lambda module: setattr(module.weight, "data", module.weight.data * 2),
    "data written": lambda module: module.weight.data.mul_(2),
    "first element": lambda module: module.weight.data[0, 0].add_(1),
    "last element": lambda module: module.weight.data[255, 255].sub_(1),
    "rows exchanged": lambda module: module.weight.data.copy_(module.weight.data.flip(0)),
    "another dtype": lambda module: module.bfloat16(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_packing_again_finds_every_change(packed, change):
    before = packed._packed
    packed.pack()
    assert packed._packed is before  # unchanged: nothing is packed twice
    CHANGES[change](packed)
    fresh = Linear(256, 256, device=CPU, dtype=packed.weight.dtype)
    fresh.load_state_dict(packed.state_dict())
    assert packed.pack() == fresh.pack() == packs(packed.weight.dtype) and packed._packed is not before
    x = torch.randn(1, 256).to(packed.weight.dtype)
    assert torch.equal(packed.product()(x), fresh.product()(x))


def test_another_number_of_rows_is_packed_anew(packed):
    before = packed._packed
    assert packed.pack(5) and packed._packed is not before


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_packing
@pytest.mark.parametrize("is_intel", [True, False])
def test_the_layout_follows_the_cpu_and_the_rows(is_intel, monkeypatch):
    """MKL multiplies a row with a weight on one thread, but on Intel's CPUs; as a batch of pieces it takes all."""
    monkeypatch.setattr(packed_weight, "is_intel", lambda: is_intel)
    for rows, library in ((1, "mkl" if is_intel else "pieces"), (2, "onednn")):
        if packed_weight.works(library, torch.float32):
            module = Linear(300, 257, device=CPU)
            assert module.pack(rows) and module._packed.library == library
    onednn = packed_weight.works("onednn", torch.bfloat16)
    bags = packed_weight.works("bags", torch.bfloat16) and not onednn
    assert packed_weight.library_for(1, torch.bfloat16) == ("bags" if bags else "onednn")
    assert packed_weight.library_for(2, torch.bfloat16) == "onednn"
    assert (packed_weight.why_not_packed(torch.zeros(256, 256, dtype=torch.bfloat16), 2) is None) == onednn


@torch.no_grad()
@pytest.mark.skipif(not packed_weight.works("bags", torch.bfloat16), reason="this build of torch is without FBGEMM")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_features", [257, 288], ids=["room in the last bag", "whole bags"])
def test_a_row_of_bfloat16_is_rounded_once_behind_its_bias(out_features, bias, monkeypatch):
    """By bags, which every CPU of x86 has; a row alone gives what it gives beside others, to a bit of bfloat16."""
    monkeypatch.setattr(packed_weight, "library_for", lambda rows, dtype: "bags")
    contract, module = Contract(torch.bfloat16), Linear(300, out_features, bias=bias, device=CPU, dtype=torch.bfloat16)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module.reset_parameters()
        assert module.pack()
        product = module.product("relu")
        for shape in ((300,), (1, 300), (1, 1, 300), (3, 300)):
            x = torch.randn(shape, dtype=torch.bfloat16)
            golden = F.linear(x.double(), module.weight.double(), None if not bias else module.bias.double()).relu()
            plain, actual = F.linear(x, module.weight, module.bias).relu(), product(x)
            assert actual.shape == plain.shape
            contract.add(f"{len(shape)} dimensions of {shape[0]}", actual=actual, plain=plain, golden=golden)
    contract.check()


@torch.no_grad()
@pytest.mark.skipif(not packed_weight.works("pieces", torch.float32), reason="this build of torch is without MKL")
@pytest.mark.parametrize("in_features", [304, 300, 257], ids=["8 pieces", "4 pieces", "one"])
def test_a_row_by_pieces_has_its_bits_from_any_number_of_threads(in_features, threads, monkeypatch):
    monkeypatch.setattr(packed_weight, "library_for", lambda rows, dtype: "pieces")
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module, x = Linear(in_features, 2500, device=CPU), torch.randn(1, in_features)
        assert module.pack()
        results = []
        for count in (1, 2):
            threads(count)
            results.append(module.product()(x))
        assert torch.equal(*results)
        golden = F.linear(x.double(), module.weight.double(), module.bias.double())
        contract.add("row", actual=results[0], plain=F.linear(x, module.weight, module.bias), golden=golden)
    contract.check()


@torch.no_grad()
@pytest.mark.skipif(not packed_weight.works("pieces", torch.float32), reason="this build of torch is without MKL")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out_features", [320, 323, 257], ids=["whole blocks", "and three rows", "and one"])
def test_one_row_with_a_plain_weight_is_a_batch_of_blocks(out_features, bias, threads, monkeypatch):
    """Where threads are to be had and MKL would use one; what is written to the weight later is seen."""
    monkeypatch.setattr(packed_weight, "is_intel", lambda: False)
    threads(1)
    weight = torch.nn.Parameter(torch.zeros(out_features, 300))
    assert packed_weight.product_of_one_row(weight, None) is None
    threads(2)
    assert packed_weight.product_of_one_row(weight[:8], None) is None  # small
    assert packed_weight.product_of_one_row(weight.t(), None) is None  # rows that do not lie one behind the other
    assert packed_weight.product_of_one_row(torch.zeros(3, 1 << 15), None) is None  # fewer rows than blocks
    contract = Contract(torch.float32)
    module = Linear(300, out_features, bias=bias, device=CPU)
    product = module.product(packed=False)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module.reset_parameters()
        for x in (torch.randn(1, 300), torch.randn(1, 1, 300), torch.randn(300, 2).t()[1:]):
            golden = F.linear(x.double(), module.weight.double(), None if not bias else module.bias.double())
            plain, actual = F.linear(x, module.weight, module.bias), product(x)
            assert actual.shape == plain.shape
            contract.add(f"{x.ndim} dimensions", actual=actual, plain=plain, golden=golden)
    contract.check()


@torch.no_grad()
@pytest.mark.skipif(not packed_weight.works("pieces", torch.float32), reason="this build of torch is without MKL")
@pytest.mark.parametrize("asks", [True, False], ids=["asked for", "refused"])
def test_a_large_packed_weight_lies_in_memory_of_its_own(asks, monkeypatch):
    """In huge pages where the system gives them; one that refuses makes no difference but for the time."""
    if not asks:
        monkeypatch.setattr(packed_weight.mmap, "MADV_HUGEPAGE", -1, raising=False)
    monkeypatch.setattr(packed_weight, "library_for", lambda rows, dtype: "pieces")
    module, x = Linear(1024, 1024, bias=False, device=CPU), torch.ones(1, 1024)
    module.weight.copy_(torch.arange(1024.0)[:, None].expand(1024, 1024) / 1024)
    assert module.pack() and torch.equal(module.product()(x)[0], torch.arange(1024.0))
    twin = copy.deepcopy(module)
    module.unpack()
    assert twin.pack() and torch.equal(twin.product()(x)[0], torch.arange(1024.0))


def test_the_forward_pass_is_torchs(packed):
    """Training, autocast and torch.compile never see the packed weight."""
    assert Linear.forward is torch.nn.Linear.forward


def test_the_packed_copy_is_not_state(packed):
    assert set(packed.state_dict()) == {"weight", "bias"}
    for twin in (copy.deepcopy(packed), torch.load(saved(packed), weights_only=False)):
        assert not twin.is_packed and torch.equal(twin.weight, packed.weight)
    packed.unpack()
    assert not packed.is_packed
    x = torch.randn(3, 256)
    with torch.no_grad():
        assert torch.equal(packed.product()(x), packed(x))


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
        assert packed_weight.why_not_packed(weight, rows) == reason
    with torch.inference_mode():
        assert "inference_mode" in packed_weight.why_not_packed(torch.zeros(256, 256))
    assert Linear(8, 8, device=CPU).pack() is False


def test_without_the_libraries_everything_is_plain(monkeypatch):
    for module in (linear, packed_weight):
        monkeypatch.setattr(module, "works", lambda library, dtype: False)
    module = Linear(256, 256, device=CPU)
    assert module.pack() is False and "this build of torch packs no" in packed_weight.why_not_packed(module.weight)
    with torch.no_grad():
        assert torch.equal(module.product()(torch.ones(1, 256)), module(torch.ones(1, 256)))


def test_a_library_that_is_missing_or_wrong_is_not_used(monkeypatch):
    def missing(*arguments):
        raise AttributeError("no such op")

    for broken in (missing, lambda library, weight, rows: weight + 1):
        monkeypatch.setattr(packed_weight, "reorder", broken)
        packed_weight.works.cache_clear()
        assert not packed_weight.works("onednn", torch.float32)
    packed_weight.works.cache_clear()
