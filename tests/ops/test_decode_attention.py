"""decode_attention as a public op: every backend within the contract, every error message, torch's machinery around it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import pytransformer
from pytransformer.ops import checks
from pytransformer.ops.backend import use_backend
from pytransformer.ops.decode_attention import CHOICE, by_torch, decode_attention
from pytransformer.ops.decode_attention.gather import widen
from pytransformer.verification import SEEDS, Contract
from tests.kernels.decode_contract import EDGE_LENGTHS, Decode, draw, golden
from tests.support.draws import pool

BACKENDS = ("triton", "torch", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EDGE_PAIRS = tuple(zip(EDGE_LENGTHS[::2], EDGE_LENGTHS[1::2]))


def check_contract(case: Decode, backend: str, device: torch.device, return_lse: bool = True) -> None:
    contract = Contract(case.dtype)
    for seed in range(SEEDS):
        drawn = replace(case, lengths=EDGE_PAIRS[seed]) if len(case.lengths) == 2 else case
        inputs = draw(drawn, seed, device)
        plain = golden(inputs, drawn, drawn.dtype)
        # Slots that no query may read hold NaN here, for every backend.
        call = {**inputs.tensors, **inputs.options, "backend": backend, "return_lse": return_lse}
        actual = pytransformer.decode_attention(**call)
        exact = golden(inputs, drawn, torch.float64)
        contract.add("out", actual=actual[0] if return_lse else actual, plain=plain[0], golden=exact[0])
        if return_lse:
            contract.add("lse", actual=actual[1], plain=plain[1], golden=exact[1])
    contract.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("page_size", [0, 3])
def test_contract(page_size, backend, dtype, device):
    for seqlen_q, options in ((1, {}), (4, {"window": (20, -1)}), (3, {"causal": False, "window": (-1, 1)})):
        case = Decode(heads=(4, 2), dims=(16, 24), seqlen_q=seqlen_q, dtype=dtype, page_size=page_size, options=options)
        for return_lse in (False, True):
            check_contract(case, backend, device, return_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_of_triton(dtype, device):
    check_contract(Decode(heads=(4, 2), seqlen_q=2, dtype=dtype, page_size=16), "triton", device)


@pytest.mark.parametrize(
    "name", ["mask", "bias", "alibi_slopes", "leftpad", "packed", "quantised", "rows", "softcap", "sinks", "everything"]
)
def test_options_of_torch(name, device):
    cases = {
        "mask": Decode(seqlen_q=2, options={"mask": lambda g: torch.rand(2, 2, 2, 140, generator=g) < 0.2}),
        "bias": Decode(seqlen_q=2, options={"bias": lambda g: torch.randn(2, 1, 140, generator=g)}),
        "alibi_slopes": Decode(seqlen_q=2, options={"alibi_slopes": lambda g: torch.rand(2, 2, generator=g)}),
        "leftpad": Decode(lengths=(30, 100, 1), options={"cache_leftpad": torch.tensor([7, 40, 0], dtype=torch.int32)}),
        "packed": Decode(queries=(1, 5, 0, 2), lengths=(30, 100, 7, 1), heads=(4, 2)),
        "quantised": Decode(cache_dtype=torch.float8_e4m3fn, scale_per_token=True, page_size=3),
        "rows": Decode(lengths=(20, 20, 20), options={"window": (7, -1)}, heads=(4, 2)),
        "softcap": Decode(seqlen_q=3, options={"softcap": 2.0}),
        "sinks": Decode(seqlen_q=3, options={"sinks": lambda g: torch.randn(2, generator=g), "window": (9, -1)}),
        "everything": Decode(
            queries=(1, 5, 0, 2),
            lengths=(30, 100, 7, 1),
            heads=(4, 2),
            page_size=3,
            cache_dtype=torch.int8,
            options={
                "softcap": 2.0,
                "sinks": lambda g: torch.randn(4, generator=g),
                "alibi_slopes": lambda g: torch.rand(4, 4, generator=g),
                "bias": lambda g: torch.randn(4, 1, 5, 100, generator=g),
                "mask": lambda g: torch.rand(1, 4, 1, 100, generator=g) < 0.9,
            },
        ),
    }
    check_contract(cases[name], "torch", device)


def test_options_of_triton_reach_the_kernel(device):
    """Every option at once through the public op; the kernel's own tests take them one by one."""
    options = {
        "window": (50, -1), "softcap": 5.0, "sinks": torch.tensor([0.3, -0.5]), "alibi_slopes": torch.tensor([0.1, 0.01]),
        "mask": lambda g: (torch.rand(1, 2, 1, 140, generator=g) < 0.7).int(), "bias": lambda g: torch.randn(140, generator=g),
        "cache_leftpad": torch.tensor([7, 0, 3], dtype=torch.int32), "num_splits": 2,
    }  # fmt: skip
    case = Decode(queries=(2, 1, 3), lengths=(100, 40, 9), page_size=16, options=options)
    check_contract(case, "triton", device)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(data=st.data())
def test_any_shape(data, device):
    """Shapes and options drawn by hypothesis, torch and the interpreted kernels against float64."""
    group, kv_heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2))
    capacity = data.draw(st.integers(1, 40))
    lengths = tuple(data.draw(st.lists(st.integers(0, capacity), min_size=1, max_size=2)))
    options = {
        "causal": data.draw(st.booleans()),
        "window": data.draw(st.tuples(st.integers(-1, 9), st.integers(-1, 3))),
    }
    case = Decode(
        lengths=lengths,
        capacity=capacity,
        seqlen_q=data.draw(st.integers(1, 4)),
        heads=(group * kv_heads, kv_heads),
        dims=(data.draw(st.sampled_from([8, 24])), data.draw(st.sampled_from([8, 32]))),
        page_size=data.draw(st.integers(0, 9)),
        options=options,
    )
    for backend in ("triton", "torch"):
        contract = Contract(case.dtype)

        def add(seed, backend=backend, contract=contract):
            inputs = draw(case, seed, device)
            actual = decode_attention(**inputs.tensors, **inputs.options, backend=backend)
            exact, plain = golden(inputs, case, torch.float64)[0], golden(inputs, case, case.dtype)[0]
            contract.add("out", actual=actual, plain=plain, golden=exact)

        pool(contract, add, 1).check()


# --- Errors ------------------------------------------------------------------------------------------------------------------------------


def arguments(device: torch.device, **changes):
    """A valid call, then changed."""
    call = {
        "q": torch.randn(2, 1, 4, 16, device=device),
        "k_cache": torch.randn(2, 12, 2, 16, device=device),
        "v_cache": torch.randn(2, 12, 2, 24, device=device),
        "cache_seqlens": torch.tensor([3, 12], dtype=torch.int32, device=device),
    }
    changes = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    return {**call, **changes}


def paged(device: torch.device, **changes):
    pages = {"k_cache": torch.randn(9, 4, 2, 16), "v_cache": torch.randn(9, 4, 2, 24)}
    table = torch.tensor([[3, 1, 0], [5, 8, 7]], dtype=torch.int32)
    return arguments(device, **{**pages, "block_table": table, **changes})


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def quantised(dtype: torch.dtype = torch.int8, **changes):
    caches = {"k_cache": torch.zeros(2, 12, 2, 16).to(dtype), "v_cache": torch.zeros(2, 12, 2, 24).to(dtype)}
    return {**caches, "k_scale": torch.ones(2), "v_scale": torch.ones(2), **changes}


F = torch.randn
ERRORS = [
    ({"q": [1.0]}, TypeError, r"q must be a torch.Tensor, got \[1.0\]"),
    ({"q": F(2, 4, 16)}, ValueError, r"q must have 4 dimensions: \(batch, seqlen_q, num_heads, head_dim\), got shape \(2, 4, 16\)"),
    ({"q": torch.zeros(2, 1, 4, 16, dtype=torch.int32)}, TypeError,
     "q must be of dtype float32 or float16 or bfloat16 or float64, got int32"),
    ({"q": F(2, 1, 0, 16)}, ValueError, r"q must have at least one head, got shape \(2, 1, 0, 16\)"),
    ({"q": F(2, 1, 3, 16)}, ValueError, "the number of heads of q must be a multiple of that of k_cache, got 3 and 2"),
    ({"q": F(2, 1, 4, 24)}, ValueError, r"k_cache must have the head_dim of q \(24\), got shape \(2, 12, 2, 16\)"),
    ({"q": F(2, 1, 4, 0), "k_cache": F(2, 12, 2, 0)}, ValueError, "q must have a head_dim of at least 1, got 0"),
    ({"q": F(2, 1, 16, 4).transpose(2, 3)}, ValueError, "q must be contiguous in its last dimension"),
    ({"k_cache": F(12, 2, 16)}, ValueError, r"k_cache must have 4 dimensions: \(batch, capacity, num_kv_heads, head_dim\) or \(pages"),
    ({"k_cache": F(2, 12, 2, 16).half(), "v_cache": F(2, 12, 2, 24).half()}, TypeError,
     r"k_cache must have the dtype of q \(float32\), or be quantised \(int8, float8_e4m3fn\), got float16"),
    ({"v_cache": F(2, 12, 2, 24).half()}, TypeError, r"v_cache must have the dtype of k_cache \(float32\), got float16"),
    ({"v_cache": F(2, 11, 2, 24)}, ValueError, r"v_cache must have shape .* = \(2, 12, 2, any\), got \(2, 11, 2, 24\)"),
    ({"v_cache": F(2, 12, 2, 0)}, ValueError, "v_cache must have a head_dim of at least 1, got 0"),
    ({"k_cache": F(3, 12, 2, 16), "v_cache": F(3, 12, 2, 24)}, ValueError,
     r"k_cache must have batch = 2 rows unless block_table or cache_batch_idx is given, got shape \(3, 12, 2, 16\)"),
    ({"cache_seqlens": torch.tensor([3, 12])}, TypeError, "cache_seqlens must be of dtype int32, got int64"),
    ({"cache_seqlens": int32(3)}, ValueError, r"cache_seqlens must have shape \(batch\) = \(2\), got \(1,\)"),
    ({"cache_seqlens": int32(3, 0, 4, 0)[::2]}, ValueError, "cache_seqlens must be contiguous, of shape"),
    ({"cu_seqlens_q": int32(0, 1, 2)}, ValueError, r"q must have 3 dimensions: \(total_q, num_heads, head_dim\)"),
    ({"cu_seqlens_q": int32(0, 2), "q": F(2, 4, 16)}, ValueError, r"cu_seqlens_q must have 3 entries \(batch \+ 1\)"),
    ({"max_seqlen_q": 1}, ValueError, "max_seqlen_q is for packed queries: pass cu_seqlens_q too, got 1 without it"),
    ({"max_seqlen_q": -1, "cu_seqlens_q": int32(0, 1, 2), "q": F(2, 4, 16)}, ValueError, "max_seqlen_q must be at least 0, got -1"),
    ({"cache_leftpad": int32(3)}, ValueError, r"cache_leftpad must be contiguous, of shape \(batch\) = \(2\)"),
    ({"cache_batch_idx": torch.zeros(2, dtype=torch.int64)}, TypeError, "cache_batch_idx must be of dtype int32, got int64"),
    ({"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ({"window": 3}, TypeError, r"window must be a pair \(left, right\) of ints, got 3"),
    ({"window": (-2, 0)}, ValueError, r"window\[0\] \(left\) must be at least -1, got -2"),
    ({"softcap": -1.0}, ValueError, "softcap must be at least 0.0, got -1.0"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
    ({"num_splits": -1}, ValueError, "num_splits must be at least 0, got -1"),
    ({"num_splits": 1.5}, TypeError, "num_splits must be an int, got 1.5"),
    ({"return_lse": None}, TypeError, "return_lse must be True or False, got None"),
    ({"mask": F(2, 4, 1, 12)}, TypeError, "mask must be boolean or integer, got float32; pass an additive mask as bias"),
    ({"mask": torch.ones(3, 1, 12, dtype=torch.bool)}, ValueError,
     r"mask must broadcast to \(batch, num_heads, seqlen_q, longest cache_seqlens\)"),
    ({"mask": torch.ones(1, 2, 4, 1, 12, dtype=torch.bool)}, ValueError, "mask must broadcast to"),
    ({"bias": torch.ones(12, dtype=torch.bool)}, TypeError, "bias must be floating-point, got bool; pass a boolean mask as mask"),
    ({"bias": F(2, 4, 2, 12)}, ValueError, r"bias must broadcast to .* got shape \(2, 4, 2, 12\)"),
    ({"alibi_slopes": F(3)}, ValueError, r"alibi_slopes must have shape \(num_heads\) = \(4\), got \(3,\)"),
    ({"sinks": F(1, 4)}, ValueError, r"sinks must have 1 dimensions: \(num_heads\), got shape \(1, 4\)"),
    ({"sinks": F(2)}, ValueError, r"sinks must have shape \(num_heads\) = \(4\), got \(2,\)"),
    ({"k_scale": F(2)}, ValueError, r"k_scale is for quantised caches \(int8, float8_e4m3fn\); k_cache is float32"),
    (quantised(v_scale=None), ValueError, "v_scale must be given with caches of int8"),
    (quantised(k_scale=torch.ones(2).double()), TypeError, "k_scale must be of dtype float32, got float64"),
    (quantised(k_scale=torch.ones(3)), ValueError,
     r"k_scale must have shape \(num_kv_heads\) = \(2,\) or that of the cache .* \(2, 12, 2\), got \(3,\)"),
    (quantised(torch.float8_e4m3fn, v_scale=torch.ones(2, 12, 2)), ValueError,
     "k_scale and v_scale must both be per head or both per token"),
    ({"backend": "cudnn"}, ValueError, "backend must be one of 'cuda', 'triton', 'torch', 'reference', got 'cudnn'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS, ids=[message[:60] for _, _, message in ERRORS])
def test_error(changes, error, message, device):
    with pytest.raises(error, match=message):
        decode_attention(**arguments(device, **changes))


PAGED_ERRORS = [
    ({"cache_batch_idx": int32(0, 1)}, ValueError, "cache_batch_idx is for contiguous caches: with block_table"),
    ({"block_table": torch.zeros(2, 3)}, TypeError, "block_table must be of dtype int32, got float32"),
    ({"block_table": torch.zeros(3, 3, dtype=torch.int32)}, ValueError,
     r"block_table must have shape \(batch, max_pages\) = \(2, any\), got \(3, 3\)"),
    ({"block_table": torch.zeros(3, 2, dtype=torch.int32).t()}, ValueError, "block_table must be contiguous in its last dimension"),
    ({"k_cache": F(9, 0, 2, 16), "v_cache": F(9, 0, 2, 24)}, ValueError, "k_cache must have pages of at least 1 slot with block_table"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"), PAGED_ERRORS, ids=[message[:60] for _, _, message in PAGED_ERRORS]
)
def test_error_of_pages(changes, error, message, device):
    with pytest.raises(error, match=message):
        decode_attention(**paged(device, **changes))


VALUES = [
    (arguments, {"cache_seqlens": int32(3, 13)},
     r"cache_seqlens must be from 0 to the capacity of the cache \(12\), got 13 for sequence 1"),
    (arguments, {"cache_seqlens": int32(-1, 3)}, r"cache_seqlens must be from 0 .* got -1 for sequence 0"),
    (arguments, {"cache_seqlens": int32(3, 12), "cache_leftpad": int32(0, 1)},
     r"\(12 minus its cache_leftpad of 1\), got 12 for sequence 1"),
    (arguments, {"cache_leftpad": int32(-1, 0)}, r"cache_leftpad must hold slots to skip from 0 to 12, got -1 at index \[0\]"),
    (arguments, {"cache_batch_idx": int32(0, 2)}, r"cache_batch_idx must hold rows of the cache from 0 to 1, got 2 at index \[1\]"),
    (arguments, {"cu_seqlens_q": int32(0, 2, 1), "q": F(2, 4, 16)},
     r"cu_seqlens_q must start at 0, never decrease and end at .* \(2\), got \[0, 2, 1\]"),
    (arguments, {"cu_seqlens_q": int32(0, 0, 2), "q": F(2, 4, 16), "max_seqlen_q": 1},
     r"max_seqlen_q must be at least the longest sequence \(2\), got 1"),
    (arguments, {"mask": torch.ones(11, dtype=torch.bool)}, r"mask must broadcast to .* \(2, 4, 1, at least 12\), got shape \(11,\)"),
    (arguments, {**quantised(), "k_scale": torch.tensor([1.0, float("nan")])}, "k_scale must not contain NaN"),
    (paged, {"block_table": torch.tensor([[9, 1, 0], [5, 8, 7]], dtype=torch.int32)},
     r"block_table must hold pages from 0 to 8 where cache_seqlens reaches, got 9 at index \[0, 0\]"),
    (paged, {"block_table": torch.tensor([[0, 1, 0], [5, 8, -1]], dtype=torch.int32)}, r"got -1 at index \[1, 2\]"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "changes", "message"), VALUES, ids=[message[:60] for _, _, message in VALUES])
def test_values_are_checked_where_reading_is_free(base, changes, message, device, monkeypatch):
    """Always on a CPU; on a GPU with the debug switch."""
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(ValueError, match=message):
        decode_attention(**base(device, **changes))


def test_unused_table_entries_are_not_checked(device, monkeypatch):
    monkeypatch.setattr(checks, "DEBUG", True)
    table = torch.tensor([[3, -1, 99], [-7, 8, 7]], dtype=torch.int32)
    decode_attention(
        **paged(device, block_table=table, window=(5, -1)), backend="reference" if device.type == "cuda" else "torch"
    )


def test_it_has_no_gradient(device):
    call = arguments(device)
    for name in ("q", "k_cache", "v_cache"):
        call[name].requires_grad_()
        with pytest.raises(RuntimeError, match=f"decode_attention is not differentiable, but {name} requires grad"):
            decode_attention(**call)
        with torch.no_grad():
            assert not decode_attention(**call).requires_grad
        call[name] = call[name].detach()


# --- Backends ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"sinks": torch.zeros(4)}, {"return_lse": True}], ids=str)
def test_automatic_choice_is_never_the_reference(options, device):
    call = arguments(device, **options)
    best = "triton" if device.type == "cuda" else "torch"
    torch.testing.assert_close(decode_attention(**call), decode_attention(**call, backend=best), rtol=0, atol=0)


def test_float64(device):
    call = {name: value.double() if value.is_floating_point() else value for name, value in arguments(device).items()}
    with pytest.raises(NotImplementedError, match="float64 is served by torch and the reference"):
        decode_attention(**call, backend="triton")
    out, lse = decode_attention(**call, backend="reference", return_lse=True)
    assert out.dtype == lse.dtype == torch.float64


def test_use_backend(device):
    call = arguments(device)
    with use_backend("reference"):
        assert torch.equal(decode_attention(**call), decode_attention(**call, backend="reference"))
    assert CHOICE.report(device.type)["torch"] == "serves"


def test_autocast_follows_the_cache(device):
    call = arguments(device)
    caches = {name: call[name].bfloat16() for name in ("k_cache", "v_cache")}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = decode_attention(**{**call, **caches})
        assert decode_attention(**call).dtype == torch.float32  # a float32 cache stays what it is
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, decode_attention(**{**call, **caches, "q": call["q"].bfloat16()}))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "seqlen_q", "capacity"), [(0, 1, 4), (2, 0, 4), (2, 1, 0)])
def test_nothing_to_do(batch, seqlen_q, capacity, backend, device):
    q = torch.randn(batch, seqlen_q, 4, 16, device=device)
    cache = torch.randn(batch, capacity, 2, 16, device=device)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    assert torch.equal(decode_attention(q, cache, cache, lengths, backend=backend), torch.zeros_like(q))


class _Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes in memory of its own."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("batch_lengths", [(300,), (300, 300), (300, 200)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=str)
def test_generation_on_a_cpu_copies_no_cache(heads, batch_lengths):
    """The inner loop of text generation: nothing larger than q, the result and its statistics is allocated."""
    batch = len(batch_lengths)
    q = torch.randn(batch, 1, heads[0], 64)
    cache = torch.randn(2, batch, 512, heads[1], 64)
    lengths = torch.tensor(batch_lengths, dtype=torch.int32)
    with _Allocations(q, cache, lengths) as allocations:
        decode_attention(q, cache[0], cache[1], lengths, backend="torch")
    assert allocations.largest <= q.numel()


@pytest.mark.parametrize("cache_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("page_size", [0, 3])
@pytest.mark.parametrize("at_once", [1, 2**24])
def test_the_bits_of_a_sequence_on_a_cpu_are_its_own(at_once, page_size, cache_dtype, monkeypatch):
    """Neighbours of the same length, of others and without keys; gathered one by one and all at once."""
    monkeypatch.setattr(by_torch, "_MOST_GATHERED", at_once)
    case = Decode(
        lengths=(20, 20, 0, 37, 20), heads=(4, 2), page_size=page_size, cache_dtype=cache_dtype, scale_per_token=True,
        options={"window": (25, -1)},
    )  # fmt: skip
    inputs = draw(case, 0, torch.device("cpu"))
    call = {**inputs.tensors, **inputs.options, "backend": "torch"}
    together = decode_attention(**call)
    per_sequence = {"q", "cache_seqlens", "block_table"} | (
        {"k_cache", "v_cache", "k_scale", "v_scale"} if not page_size else set()
    )
    for row in range(5):
        alone = {
            name: value[row : row + 1] if name in per_sequence and value is not None else value
            for name, value in call.items()
        }
        assert torch.equal(decode_attention(**alone)[0], together[row])
    assert together.isfinite().all() and not together[2].any() and together[3].any()


def test_every_code_of_float8_is_widened_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(8, 2, 16)
    scale = torch.rand(8, 2)
    expected = codes.float() * scale[..., None]
    assert torch.equal(widen(codes, scale, torch.float32).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert expected.isnan().sum() == 2


# --- torch's machinery --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    from pytransformer.ops.decode_attention.call import DecodeCall, check_decode_attention

    call = dict.fromkeys(DecodeCall._fields) | {
        "causal": True,
        "window": (-1, -1),
        "softcap": 0.0,
        "num_splits": 0,
        "return_lse": False,
    }
    for base in (arguments, paged):
        checked = check_decode_attention(DecodeCall(**(call | base(device))))
        torch.library.opcheck(torch.ops.pytransformer.decode_attention.default, (*checked, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend, device):
    """One graph for changing batch, query and cache sizes; the same bits as eager."""
    torch._dynamo.reset()

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def compiled(q, k_cache, v_cache, cache_seqlens):
        return decode_attention(q * 2, k_cache, v_cache, cache_seqlens, window=(9, -1), backend=backend)

    for batch, seqlen_q, capacity in ((3, 5, 20), (5, 3, 31)):
        q, cache = (
            torch.randn(batch, seqlen_q, 4, 16, device=device),
            torch.randn(batch, capacity, 2, 16, device=device),
        )
        lengths = torch.arange(batch, dtype=torch.int32, device=device) + 10
        expected = decode_attention(q * 2, cache, cache, lengths, window=(9, -1), backend=backend)
        assert torch.equal(compiled(q, cache, cache, lengths), expected)
    assert sum("pytransformer.decode_attention" in graph.code for graph in counter.graphs) == 1
    torch._dynamo.reset()


def test_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        call = {name: mode.from_tensor(value) for name, value in arguments(torch.device("cpu")).items()}
        for backend in ("torch", "reference"):
            out = decode_attention(**call, backend=backend)
            assert out.shape == (2, 1, 4, 24)
            assert out.is_contiguous()
        _, lse = decode_attention(**call, backend="reference", return_lse=True)
        assert lse.shape == (2, 4, 1)


def test_a_sequence_without_keys_needs_no_page_behind_its_left_padding(device):
    q, cache = torch.randn(1, 1, 2, 16, device=device), torch.randn(4, 3, 2, 16, device=device)
    cache_seqlens, leftpad = (torch.tensor([number], dtype=torch.int32, device=device) for number in (0, 11))
    block_table = torch.tensor([[0, 1, 2, 10**6]], dtype=torch.int32, device=device)
    out = pytransformer.decode_attention(
        q, cache, cache, cache_seqlens, block_table=block_table, cache_leftpad=leftpad, backend="reference"
    )
    assert torch.equal(out, torch.zeros_like(q))
