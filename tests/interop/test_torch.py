"""scaled_dot_product_attention beside torch's own, and the errors it raises."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from pytransformer.interop.torch import scaled_dot_product_attention
from pytransformer.verification import SEEDS, Contract


def documented(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False):
    """The formula of torch's documentation, unfused; a row that attends to nothing gives 0."""
    scores = torch.zeros(query.size(-2), key.size(-2), dtype=query.dtype, device=query.device)
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.zeros_like(scores).masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = attn_mask + scores
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale + scores
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights.to(value.dtype) @ value


def boolean(*shape):
    return lambda: torch.rand(shape) < 0.6


def floating(*shape):
    """Additive, with keys hidden by -inf and with one row hidden altogether."""

    def draw():
        mask = torch.randn(shape).masked_fill(torch.rand(shape) < 0.3, -math.inf)
        mask[..., 0, :] = -math.inf
        return mask

    return draw


# name: shapes of q, k, v; options (a function draws a mask)
CASES = {
    "plain": ([(2, 3, 9, 16)] * 3, {}),
    "causal": ([(2, 3, 9, 16)] * 3, {"is_causal": True}),
    "causal, more keys": ([(2, 3, 6, 16), (2, 3, 9, 16), (2, 3, 9, 16)], {"is_causal": True}),
    "causal, more queries": ([(2, 3, 9, 16), (2, 3, 6, 16), (2, 3, 6, 16)], {"is_causal": True}),
    "boolean mask": ([(2, 3, 9, 16)] * 3, {"attn_mask": boolean(2, 3, 9, 9)}),
    "padding": ([(2, 3, 9, 16)] * 3, {"attn_mask": boolean(2, 1, 1, 9)}),
    "bias of all": ([(2, 3, 9, 16)] * 3, {"attn_mask": floating(2, 3, 9, 9)}),
    "bias of a head": ([(2, 3, 9, 16)] * 3, {"attn_mask": floating(3, 9, 9)}),
    "bias of a key": ([(2, 3, 9, 16)] * 3, {"attn_mask": lambda: torch.randn(2, 1, 1, 9)}),
    "mask of two dimensions": ([(2, 3, 9, 16)] * 3, {"attn_mask": floating(9, 9)}),
    "gqa": ([(2, 6, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)], {"enable_gqa": True, "is_causal": True}),
    "gqa and mask": ([(2, 6, 7, 16), (2, 2, 9, 16), (2, 2, 9, 16)], {"enable_gqa": True, "attn_mask": floating(1, 6, 7, 9)}),
    "gqa, other value heads": ([(2, 6, 7, 16), (2, 2, 9, 16), (2, 3, 9, 16)], {"enable_gqa": True}),
    "odd head_dim": ([(1, 2, 9, 59)] * 3, {"is_causal": True}),
    "other head_dim of values": ([(1, 2, 9, 12), (1, 2, 9, 12), (1, 2, 9, 37)], {}),
    "large head_dim": ([(1, 2, 5, 300), (1, 2, 9, 300), (1, 2, 9, 301)], {}),
    "scale": ([(1, 2, 9, 16)] * 3, {"scale": 0.5}),
    "two dimensions": ([(9, 16), (7, 16), (7, 16)], {"attn_mask": boolean(9, 7)}),
    "three dimensions": ([(4, 9, 16), (4, 7, 16), (4, 7, 16)], {"attn_mask": floating(4, 9, 7)}),
    "three dimensions, gqa": ([(4, 9, 16), (2, 7, 16), (2, 7, 16)], {"attn_mask": floating(4, 9, 7), "enable_gqa": True}),
    "five dimensions": ([(2, 2, 3, 9, 16)] * 3, {"attn_mask": floating(2, 1, 1, 9, 9)}),
    "five dimensions, one mask": ([(2, 2, 3, 9, 16)] * 3, {"attn_mask": floating(1, 1, 3, 9, 9)}),
    "broadcast": ([(2, 3, 9, 16), (1, 1, 9, 16), (3, 9, 16)], {}),
    "one head": ([(2, 3, 9, 16), (1, 1, 9, 16), (1, 1, 9, 16)], {"is_causal": True}),
}  # fmt: skip


def inputs(case, seed, device):
    shapes, options = CASES[case]
    torch.manual_seed(seed)
    tensors = [torch.randn(shape).to(device) for shape in shapes]
    options = {name: value().to(device) if callable(value) else value for name, value in options.items()}
    return tensors, options


def run(function, tensors, options, dtype, dout=None):
    """{name: result} of a function in a dtype: its output and the gradients of q, k, v and a floating mask."""
    leaves = dict(zip("qkv", (tensor.to(dtype).requires_grad_() for tensor in tensors)))
    options = dict(options)
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options["attn_mask"] = leaves["mask"] = mask.to(dtype).requires_grad_()
    out = function(leaves["q"], leaves["k"], leaves["v"], **options)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out) if dout is None else dout.to(out)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out}, {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in CASES),
        *((case, torch.bfloat16) for case in ("causal, more queries", "gqa and mask", "odd head_dim", "broadcast")),
    ],
    ids=str,
)
def test_as_torchs_own(case, dtype, device):
    """The golden result is torch's function in float64, the plain one its documentation's formula."""
    contract = Contract(dtype)
    for seed in range(SEEDS):
        tensors, options = inputs(case, seed, device)
        tensors = [tensor.to(dtype).float() for tensor in tensors]
        if "attn_mask" in options and options["attn_mask"].is_floating_point():
            options["attn_mask"] = options["attn_mask"].to(dtype).float()
        golden, golden_gradients = run(F.scaled_dot_product_attention, tensors, options, torch.float64)
        plain, plain_gradients = run(documented, tensors, options, dtype)
        actual, gradients = run(scaled_dot_product_attention, tensors, options, dtype)
        assert actual["out"].dtype == dtype
        contract.add_all(actual, plain, golden)
        contract.add_all(gradients, plain_gradients, golden_gradients, kind="gradient")
    contract.check()


def test_top_left_and_bottom_right_are_not_confused(device):
    """With q = 0 each query returns the mean of the values it sees, so the output tells which: here values are 0, 1, 2, …"""
    means = {
        (3, 5): {"top-left": [0.0, 0.5, 1.0], "bottom-right": [1.0, 1.5, 2.0]},
        (5, 3): {"top-left": [0.0, 0.5, 1.0, 1.0, 1.0], "bottom-right": [0.0, 0.0, 0.0, 0.5, 1.0]},
    }
    for (seqlen_q, seqlen_k), expected in means.items():
        q, k = (torch.zeros(1, 1, length, 8, device=device) for length in (seqlen_q, seqlen_k))
        v = torch.arange(seqlen_k, device=device, dtype=torch.float32).view(1, 1, -1, 1).expand(1, 1, seqlen_k, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of NaN, which its kernels give to queries without keys
            lower_right = causal_lower_right(seqlen_q, seqlen_k)
        calls = {
            "top-left": ({"is_causal": True}, {"attn_mask": causal_upper_left(seqlen_q, seqlen_k)}),
            "bottom-right": ({"attn_mask": lower_right},),
        }
        for alignment, all_options in calls.items():
            for options in all_options:
                out = scaled_dot_product_attention(q, k, v, **options)[0, 0, :, 0]
                assert torch.equal(out, torch.tensor(expected[alignment], device=device)), (alignment, seqlen_q)


def test_no_nan_from_fully_masked_rows(device):
    for mask in (torch.zeros(4, 6, dtype=torch.bool), torch.full((4, 6), -math.inf)):
        tensors = [torch.randn(2, 2, length, 16, device=device, requires_grad=True) for length in (4, 6, 6)]
        out = scaled_dot_product_attention(*tensors, attn_mask=mask.to(device))
        gradients = torch.autograd.grad(out.sum(), tensors)
        assert not any(bool(tensor.any()) for tensor in (out, *gradients))


def test_padding_is_not_ignored(device):
    """What stands in padded keys and values changes no bit of the output."""
    q, k, v = (torch.randn(2, 2, 9, 16, device=device) for _ in range(3))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=device)
    mask[1, ..., 5:] = False
    before = scaled_dot_product_attention(q, k, v, mask)
    k[1, :, 5:], v[1, :, 5:] = 100.0, -100.0
    assert torch.equal(scaled_dot_product_attention(q, k, v, mask), before)


def test_mask_and_gqa_do_not_repeat_heads(device, monkeypatch):
    """Keys and values reach the op with the heads they have, masks with the shapes they have."""
    import pytransformer.nn.functional as module

    seen = {}
    attention = module.attention
    monkeypatch.setattr(module, "attention", lambda q, k, v, **o: seen.update(k=k, v=v, **o) or attention(q, k, v, **o))
    q, k, v = (torch.randn(2, heads, 9, 16, device=device) for heads in (8, 2, 2))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=device)
    scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    assert seen["k"].shape == seen["v"].shape == (2, 9, 2, 16)
    assert seen["k"].data_ptr() == k.data_ptr() and seen["v"].data_ptr() == v.data_ptr()
    assert seen["mask"].shape == (2, 1, 1, 9)
    five = torch.randn(2, 3, 8, 9, 16, device=device)
    scaled_dot_product_attention(five, five, five, torch.zeros(9, 9, device=device))
    assert seen["bias"].shape == (9, 9)


def test_dropout_keeps_or_drops_and_scales(device):
    """With the identity as values the output is the weights: each is 0 or twice what it is without dropout."""
    q, k = (torch.randn(1, 2, 16, 16, device=device) for _ in range(2))
    v = torch.eye(16, device=device).expand(1, 2, 16, 16)
    out = scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    kept = out != 0
    assert 0.3 < float(kept.float().mean()) < 0.7
    contract = Contract(torch.float32)
    golden = 2 * documented(q.double(), k.double(), v.double())[kept]
    contract.add("kept", actual=out[kept], plain=2 * documented(q, k, v)[kept], golden=golden)
    contract.check()
    assert not bool(scaled_dot_product_attention(q, k, v, dropout_p=1.0).any())


def test_any_strides(device):
    q, k, v = (torch.randn(2, 3, 9, 16, device=device) for _ in range(3))
    out = scaled_dot_product_attention(q, k, v)
    transposed = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in (q, k, v)]
    assert torch.equal(scaled_dot_product_attention(*transposed), out)
    assert scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]).is_contiguous()


def test_numbers_as_torch_takes_them(device):
    q = torch.randn(1, 2, 5, 16, device=device)
    expected = scaled_dot_product_attention(q, q, q, scale=0.5)
    for scale in (np.float32(0.5), np.float64(0.5), torch.tensor(0.5)):
        assert torch.equal(scaled_dot_product_attention(q, q, q, scale=scale), expected)


def test_autocast_casts_as_torchs_function(device):
    q, k, v = (torch.randn(2, 2, 5, 16, device=device) for _ in range(3))
    with torch.autocast(device.type, torch.bfloat16):
        out = scaled_dot_product_attention(q, k.bfloat16(), v, torch.zeros(5, 5, device=device))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [(0, 5, 16, 16), (5, 0, 16, 16), (5, 5, 0, 16)], ids=str)
def test_empty(sizes, device):
    seqlen_q, seqlen_k, head_dim, value_dim = sizes
    q, k = (torch.randn(2, 2, length, head_dim, device=device) for length in (seqlen_q, seqlen_k))
    v = torch.randn(2, 2, seqlen_k, value_dim, device=device)
    out = scaled_dot_product_attention(q, k, v)
    assert out.shape == (2, 2, seqlen_q, value_dim) and not bool(out.isnan().any())
    if seqlen_k == 0:
        assert not bool(out.any())


Q = torch.zeros(2, 4, 5, 16)
K = V = torch.zeros(2, 4, 7, 16)
MASK = torch.ones(5, 7, dtype=torch.bool)
MISTAKES = {
    "a list": (([1], K, V), {}, TypeError, r"query must be a torch.Tensor, got \[1\] \(list\)"),
    "no value": ((Q, K, None), {}, TypeError, "value must be a torch.Tensor, got None"),
    "a mask of lists": ((Q, K, V, [[True]]), {}, TypeError, "attn_mask must be a torch.Tensor"),
    "positional scale": ((Q, K, V, None, 0.0, False, 0.1), {}, TypeError, "positional"),
    "scale": ((Q, K, V), {"scale": "a"}, TypeError, "scale must be a number, got 'a'"),
    "dropout": ((Q, K, V), {"dropout_p": "a"}, TypeError, "dropout_p must be a number"),
    "is_causal": ((Q, K, V), {"is_causal": 1}, TypeError, "is_causal must be True or False, got 1"),
    "enable_gqa": ((Q, K, V), {"enable_gqa": 1}, TypeError, "enable_gqa must be True or False"),
    "dropout range": ((Q, K, V), {"dropout_p": 1.5}, RuntimeError, "dropout_p must be between 0 and 1, got 1.5"),
    "one dimension": ((Q[0, 0, 0], K, V), {}, RuntimeError, r"query must have at least 2 dimensions.*\(16,\)"),
    "dtypes": ((Q, K.half(), V), {}, RuntimeError, "one dtype, got float32 .query. and float16 .key."),
    "integers": ((Q.long(), K.long(), V.long()), {}, RuntimeError, "query must be float32.*got int64"),
    "complex": ((Q.cfloat(), K.cfloat(), V.cfloat()), {}, NotImplementedError, "got complex64"),
    "devices": ((Q, K.to("meta"), V), {}, RuntimeError, "one device, got cpu .query. and meta .key."),
    "head_dim": ((Q, K[..., :8], V), {}, RuntimeError, "query and key must have one head_dim"),
    "lengths": ((Q, K, V[:, :, :6]), {}, RuntimeError, "key and value must have one length"),
    "batch": ((Q, K[:1].expand(3, 4, 7, 16), V), {}, RuntimeError, "leading dimensions of query, key and value must"),
    "heads": ((Q, K[:, :2], V[:, :2]), {}, RuntimeError, "number of heads .enable_gqa=True lets"),
    "gqa": ((Q, K[:, :3], V[:, :3]), {"enable_gqa": True}, RuntimeError, r"\(3\) and value \(3\) must divide .* \(4\)"),
    "mask dtype": ((Q, K, V, MASK.int()), {}, RuntimeError, "attn_mask must be boolean.*got int32"),
    "mask float64": ((Q, K, V, MASK.double()), {}, RuntimeError, "attn_mask must be boolean.*got float64"),
    "mask shape": ((Q, K, V, MASK[:, :6]), {}, RuntimeError, r"= \(2, 4, 5, 7\), got shape \(5, 6\)"),
    "mask too wide": ((Q[:1], K[:1], V[:1], MASK.expand(3, 1, 5, 7)), {}, RuntimeError, "attn_mask must broadcast"),
    "mask of more dimensions": ((Q, K, V, MASK.expand(1, 1, 1, 5, 7)), {}, RuntimeError, "attn_mask must broadcast"),
    "mask and causal": ((Q, K, V, MASK), {"is_causal": True}, RuntimeError, "attn_mask and is_causal=True exclude"),
    "mask device": ((Q, K, V, MASK.to("meta")), {}, RuntimeError, "attn_mask must be on query's device"),
    "CausalBias and causal": ((Q, K, V, causal_lower_right(5, 7)), {"is_causal": True}, ValueError, "exclude each other"),
    "CausalBias size": ((Q, K, V, causal_lower_right(5, 9)), {}, RuntimeError, r"size \(5, 9\)"),
    "sparse": ((Q.to_sparse(), K, V), {}, NotImplementedError, "query must be a dense tensor, got a torch.sparse_coo one"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_what_torch_raises(mistake):
    args, options, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words):
        scaled_dot_product_attention(*args, **options)
    # torch's function on a CPU overlooks some of these; where it raises, the type is the same.
    try:
        F.scaled_dot_product_attention(*args, **options)
    except Exception as raised:
        assert isinstance(raised, error) or error is NotImplementedError


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.zeros(2, 3, 8), torch.zeros(2, 4, 8)], layout=torch.jagged)
    with pytest.raises(
        NotImplementedError, match="query must be a dense tensor, got a nested one; pad it and pass a mask"
    ):
        scaled_dot_product_attention(nested, nested, nested)


def test_fullgraph_with_dynamic_lengths(device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    def function(q, k, v, mask):
        causal = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return causal, scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    compiled = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
    for seqlen_q, seqlen_k in ((5, 9), (6, 11), (7, 13)):
        q, k, v = (
            torch.randn(2, heads, length, 12, device=device)
            for heads, length in ((4, seqlen_q), (2, seqlen_k), (2, seqlen_k))
        )
        mask = torch.randn(seqlen_q, seqlen_k, device=device)
        for actual, expected in zip(compiled(q, k, v, mask), function(q, k, v, mask)):
            torch.testing.assert_close(actual, expected)
    assert len(graphs) == 1


def test_fullgraph_of_the_gradient(device):
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    tensors = [torch.randn(1, 2, 5, 12, device=device, requires_grad=True) for _ in range(3)]
    mask = torch.randn(5, 5, device=device, requires_grad=True)
    actual, expected = (
        torch.autograd.grad(function(*tensors, mask).square().sum(), [*tensors, mask])
        for function in (compiled, scaled_dot_product_attention)
    )
    torch.testing.assert_close(actual, expected)
