"""What bad input gets: one test for each message, raised before anything is launched."""

from __future__ import annotations

import pytest
import torch

from pytransformer.ops import checks
from pytransformer.ops.attention import attention
from pytransformer.ops.attention.call import AttentionCall, check_attention
from tests.ops.attention_cases import packed_qkv, qkv, starts


@pytest.fixture
def dense(device):
    return {name: tensor.to(device) for name, tensor in qkv(2, 5, 7, 4, 2).items()}


@pytest.fixture
def packed(device):
    return {name: tensor.to(device) for name, tensor in packed_qkv([3, 2], [4, 6], 4, 2).items()}


def refuses(error, message, **arguments):
    with pytest.raises(error, match=message):
        attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": 3}, TypeError, r"q must be a torch.Tensor, got 3 \(int\)"),
        ({"q": torch.zeros(2, 5, 4, 16).to_sparse()}, TypeError, "q must be a dense"),
        (
            {"q": torch.zeros(5, 4, 16)},
            ValueError,
            r"q must have 4 dimensions: \(batch, seqlen, .*got shape \(5, 4, 16\)",
        ),
        ({"q": torch.zeros(2, 5, 4, 16, dtype=torch.int32)}, TypeError, "q must be of dtype float32 or .*, got int32"),
        ({"k": torch.zeros(2, 7, 2, 16).half()}, TypeError, r"k must have the dtype of q \(float32\), got float16"),
        ({"v": torch.zeros(2, 7, 2, 16).half()}, TypeError, r"v must have the dtype of q \(float32\), got float16"),
        (
            {"k": torch.zeros(3, 7, 2, 16)},
            ValueError,
            r"k must have shape .* = \(2, any, any, 16\), got \(3, 7, 2, 16\)",
        ),
        ({"k": torch.zeros(2, 7, 2, 24)}, ValueError, r"k must have shape .*, got \(2, 7, 2, 24\)"),
        ({"v": torch.zeros(2, 8, 2, 16)}, ValueError, r"v must have shape .* = \(2, 7, 2, any\), got \(2, 8, 2, 16\)"),
        ({"v": torch.zeros(2, 7, 4, 16)}, ValueError, r"v must have shape .* = \(2, 7, 2, any\), got \(2, 7, 4, 16\)"),
        (
            {"q": torch.zeros(2, 5, 3, 16)},
            ValueError,
            "number of heads of q must be a multiple of that of k, got 3 and 2",
        ),
        ({"q": torch.zeros(2, 5, 0, 16)}, ValueError, r"q must have at least one head, got shape \(2, 5, 0, 16\)"),
        ({"v": torch.zeros(2, 7, 2, 0)}, ValueError, "v must have a head_dim of at least 1, got 0"),
        (
            {"q": torch.zeros(2, 5, 16, 4).mT},
            ValueError,
            r"q must be contiguous in its last dimension.*q\.contiguous\(\)",
        ),
        ({"v": torch.zeros(2, 7, 16, 2).mT}, ValueError, "v must be contiguous in its last dimension"),
        ({"causal": 1}, TypeError, r"causal must be True or False, got 1 \(int\)"),
        ({"window": 3}, TypeError, r"window must be a pair \(left, right\)"),
        ({"window": (-2, 0)}, ValueError, r"window\[0\] \(left\) must be at least -1, got -2"),
        ({"window": (0, 1.5)}, TypeError, r"window\[1\] \(right\) must be an int, got 1.5"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number, got '1'"),
        ({"softcap": -1.0}, ValueError, "softcap must be at least 0.0, got -1.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be finite, got inf"),
        (
            {"mask": torch.zeros(5, 7)},
            TypeError,
            "mask must be boolean or integer, got float32; pass an additive mask as bias",
        ),
        ({"mask": torch.ones(5, 6) > 0}, ValueError, r"mask must broadcast to .* = \(2, 4, 5, 7\), got shape \(5, 6\)"),
        ({"mask": torch.ones(1, 2, 4, 5, 7) > 0}, ValueError, "mask must broadcast to"),
        ({"mask": [[True]]}, TypeError, "mask must be a torch.Tensor"),
        (
            {"bias": torch.ones(5, 7) > 0},
            TypeError,
            "bias must be floating-point, got bool; pass a boolean mask as mask",
        ),
        ({"bias": torch.zeros(5, 6)}, ValueError, r"bias must broadcast to .* = \(2, 4, 5, 7\), got shape \(5, 6\)"),
        ({"bias": torch.zeros(5, 7).double()}, TypeError, "bias must be of dtype .*, got float64"),
        (
            {"key_padding_mask": torch.zeros(2, 7)},
            TypeError,
            "key_padding_mask must be boolean or integer, got float32",
        ),
        (
            {"key_padding_mask": torch.ones(2, 5) > 0},
            ValueError,
            r"key_padding_mask must have shape .* = \(2, 7\), got \(2, 5\)",
        ),
        ({"key_padding_mask": torch.ones(7) > 0}, ValueError, "key_padding_mask must have 2 dimensions"),
        (
            {"alibi_slopes": torch.zeros(2)},
            ValueError,
            r"alibi_slopes must have shape \(num_heads\) = \(4\), got \(2,\)",
        ),
        ({"alibi_slopes": torch.zeros(1, 4)}, ValueError, r"alibi_slopes must have shape .* = \(2, 4\), got \(1, 4\)"),
        ({"alibi_slopes": torch.zeros(1, 1, 4)}, ValueError, "alibi_slopes must have 1 or 2 dimensions"),
        ({"alibi_slopes": torch.ones(4).int()}, TypeError, "alibi_slopes must be of dtype .*, got int32"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must have shape \(num_heads\) = \(4\), got \(2,\)"),
        ({"sinks": torch.zeros(1, 4)}, ValueError, "sinks must have 1 dimensions"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0.0 and 1.0, got 1.5"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be finite, got nan"),
        (
            {"dropout_seed": 1.0},
            TypeError,
            r"dropout_seed must be an int, an int64 tensor \(seed, offset\) or None, got 1.0",
        ),
        ({"dropout_seed": True}, TypeError, "dropout_seed must be an int"),
        ({"dropout_seed": 2**64}, ValueError, "dropout_seed must be between"),
        ({"dropout_seed": torch.zeros(2)}, TypeError, "dropout_seed must be of dtype int64, got float32"),
        (
            {"dropout_seed": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"dropout_seed must have shape \(seed, offset\)",
        ),
        ({"dropout_seed": torch.tensor(3)}, ValueError, "dropout_seed must have 1 dimensions"),
        ({"deterministic": "no"}, TypeError, "deterministic must be True or False, got 'no'"),
        ({"return_lse": None}, TypeError, "return_lse must be True or False, got None"),
        (
            {"max_seqlen_q": 5},
            ValueError,
            "max_seqlen_q is for packed sequences: pass cu_seqlens_q too, got 5 without it",
        ),
        ({"max_seqlen_k": "7"}, TypeError, "max_seqlen_k must be an int, got '7'"),
        (
            {"backend": "flash"},
            ValueError,
            "backend must be one of 'cuda', 'triton', 'torch', 'reference', got 'flash'",
        ),
    ],
)
def test_dense(dense, device, changes, error, message):
    changes = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    refuses(error, message, **{**dense, **changes})


@pytest.mark.parametrize("name", ["mask", "key_padding_mask"])
def test_the_advice_for_a_floating_mask_gives_the_right_result(dense, name, device):
    seqlen_k = dense["k"].shape[1]
    shape = (5, seqlen_k) if name == "mask" else (2, seqlen_k)
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device) < 0.7
    allowed[:, 0] = True
    expected = attention(**dense, **{name: allowed})
    ones_and_zeros, additive = allowed.float(), torch.zeros(shape, device=device).masked_fill(~allowed, -torch.inf)
    for floating in (ones_and_zeros, additive):
        with pytest.raises(TypeError) as error:
            attention(**dense, **{name: floating})
        assert f"one of ones and zeros (1 = attend, 0 = hide) as {name}.bool()" in str(error.value)
        assert "additive" in str(error.value) and "as bias" in str(error.value)
    assert torch.equal(attention(**dense, **{name: ones_and_zeros.bool()}), expected)
    bias = additive if name == "mask" else additive[:, None, None, :]
    torch.testing.assert_close(attention(**dense, bias=bias), expected)


def test_heads_without_features_are_refused_by_every_backend(device):
    tensors = {name: tensor[..., :0].to(device) for name, tensor in qkv().items()}
    for backend in (None, "torch", "reference", "triton"):
        refuses(ValueError, "q must have a head_dim of at least 1, got 0", **tensors, backend=backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": None}, ValueError, "cu_seqlens_k is given, cu_seqlens_q is None"),
        ({"cu_seqlens_k": None}, ValueError, "cu_seqlens_q is given, cu_seqlens_k is None"),
        ({"q": torch.zeros(1, 5, 4, 16)}, ValueError, r"q must have 3 dimensions: \(total_tokens, "),
        ({"v": torch.zeros(9, 2, 16)}, ValueError, r"v must have shape .* = \(10, 2, any\), got \(9, 2, 16\)"),
        ({"k": torch.zeros(10, 2, 24)}, ValueError, r"k must have shape .*, got \(10, 2, 24\)"),
        ({"cu_seqlens_q": starts([3, 2]).long()}, TypeError, "cu_seqlens_q must be of dtype int32, got int64"),
        ({"cu_seqlens_k": [0, 4, 10]}, TypeError, "cu_seqlens_k must be a torch.Tensor"),
        (
            {"cu_seqlens_k": starts([4, 3, 3])},
            ValueError,
            r"cu_seqlens_k must have 3 entries \(batch \+ 1\), got shape \(4,\)",
        ),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, ValueError, "cu_seqlens_q must have at least 1 entry"),
        ({"cu_seqlens_q": torch.zeros(6, dtype=torch.int32)[::2]}, ValueError, "cu_seqlens_q must be contiguous"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q must be at least 0, got -1"),
        (
            {"mask": torch.ones(3, 1, 3, 6) > 0},
            ValueError,
            r"mask of packed sequences must broadcast to .*got shape \(3, 1, 3, 6\)",
        ),
        ({"alibi_slopes": torch.zeros(3, 4)}, ValueError, r"alibi_slopes must have shape .* = \(2, 4\)"),
        (
            {"key_padding_mask": torch.ones(3, 6) > 0},
            ValueError,
            "key_padding_mask of packed sequences must have shape",
        ),
    ],
)
def test_packed(packed, device, changes, error, message):
    changes = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    refuses(error, message, **{**packed, **changes})


@pytest.fixture
def values_are_readable(monkeypatch):
    """On a GPU values are read back for checking only with PYTRANSFORMER_DEBUG=1."""
    monkeypatch.setattr(checks, "DEBUG", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": [0, 4, 3]}, r"cu_seqlens_q must start at 0, never decrease and end .*\(5\), got \[0, 4, 3\]"),
        ({"cu_seqlens_q": [1, 3, 5]}, r"cu_seqlens_q must start at 0, .* got \[1, 3, 5\]"),
        ({"cu_seqlens_k": [0, 4, 11]}, r"cu_seqlens_k must start at 0, .*\(10\), got \[0, 4, 11\]"),
        ({"max_seqlen_q": 2}, r"max_seqlen_q must be at least the longest sequence \(3\), got 2"),
        ({"max_seqlen_k": 5}, r"max_seqlen_k must be at least the longest sequence \(6\), got 5"),
        ({"mask": torch.ones(2, 6) > 0}, r"mask of packed .* = \(2, 4, at least 3, at least 6\), got shape \(2, 6\)"),
        ({"bias": torch.zeros(1, 1, 3, 5)}, r"bias of packed .* at least 6\), got shape \(1, 1, 3, 5\)"),
        (
            {"key_padding_mask": torch.ones(2, 5) > 0},
            r"key_padding_mask of packed .* = \(2, at least 6\), got \(2, 5\)",
        ),
    ],
)
def test_packed_values(packed, device, values_are_readable, changes, message):
    changes = {
        name: torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
        for name, value in changes.items()
    }
    changes = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    refuses(ValueError, message, **{**packed, **changes})


def test_all_tensors_are_on_one_device(dense):
    for name in ("k", "v"):
        refuses(
            ValueError,
            f"{name} must be on .* like the other tensors, got meta",
            **{**dense, name: dense[name].to("meta")},
        )
    refuses(ValueError, "mask must be on", **dense, mask=torch.ones(5, 7, dtype=torch.bool, device="meta"))
    refuses(ValueError, "sinks must be on", **dense, sinks=torch.zeros(4, device="meta"))
    refuses(
        ValueError, "dropout_seed must be on", **dense, dropout_seed=torch.zeros(2, dtype=torch.int64, device="meta")
    )


def test_nothing_is_read_back_where_that_would_synchronise(packed, monkeypatch):
    """Checks of values are skipped for tensors that are not readable; hints then stand for the lengths."""
    monkeypatch.setattr(checks, "readable", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("read back"))
    call = AttentionCall(softmax_scale=None, **packed, max_seqlen_q=3, max_seqlen_k=6, mask=torch.ones(3, 6) > 0)
    assert check_attention(call).softmax_scale == 0.25
    with pytest.raises(ValueError, match=r"mask of packed .* = \(2, 4, at least 4, at least 6\)"):
        check_attention(call._replace(max_seqlen_q=4))
