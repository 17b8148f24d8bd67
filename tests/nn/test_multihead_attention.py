"""MultiheadAttention beside torch's module: the same constructor, weights, arguments, results and gradients."""

from __future__ import annotations

import copy
import inspect
import io
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

import pytransformer.nn.multihead_attention as module
from pytransformer.nn import MultiheadAttention
from pytransformer.verification import SEEDS, Contract

EMBED, HEADS, BATCH, SEQLEN_Q, SEQLEN_K = 24, 4, 2, 5, 7  # a head_dim of 6, no multiple of 8


def hidden(*shape):
    """True = ignore, and never everything: torch's module gives NaN then."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def added(*shape):
    return torch.randn(shape).masked_fill(hidden(*shape), -math.inf)


PER_HEAD = (BATCH * HEADS, SEQLEN_Q, SEQLEN_K)
# name: constructor's arguments, what is the same tensor ("self", "cross": key is value, "three"), forward's arguments
CASES = {
    "self": ({}, "self", {}),
    "self, batch_first": ({"batch_first": True}, "self", {}),
    "self, no bias": ({"bias": False}, "self", {"key_padding_mask": lambda: hidden(BATCH, SEQLEN_Q)}),
    "cross": ({}, "cross", {"attn_mask": lambda: hidden(SEQLEN_Q, SEQLEN_K)}),
    "cross, batch_first": ({"batch_first": True}, "cross", {"key_padding_mask": lambda: hidden(BATCH, SEQLEN_K)}),
    "three inputs": ({}, "three", {"attn_mask": lambda: added(SEQLEN_Q, SEQLEN_K)}),
    "a mask per head": ({"batch_first": True}, "three", {"attn_mask": lambda: hidden(*PER_HEAD)}),
    "a float mask per head": ({}, "cross", {"attn_mask": lambda: added(*PER_HEAD)}),
    "float padding": ({}, "cross", {"key_padding_mask": lambda: added(BATCH, SEQLEN_K)}),
    "both masks": (
        {"batch_first": True}, "cross",
        {"attn_mask": lambda: hidden(SEQLEN_Q, SEQLEN_K), "key_padding_mask": lambda: hidden(BATCH, SEQLEN_K) & hidden(1, SEQLEN_K)},
    ),
    "both float masks": (
        {}, "cross", {"attn_mask": lambda: torch.randn(PER_HEAD), "key_padding_mask": lambda: added(BATCH, SEQLEN_K)},
    ),
    "widths": ({"kdim": 12, "vdim": 20}, "three", {"key_padding_mask": lambda: hidden(BATCH, SEQLEN_K)}),
    "bias_k": ({"add_bias_kv": True}, "cross", {"attn_mask": lambda: hidden(SEQLEN_Q, SEQLEN_K)}),
    "zero attention": (
        {"add_zero_attn": True, "add_bias_kv": True, "batch_first": True}, "three",
        {"attn_mask": lambda: added(SEQLEN_Q, SEQLEN_K), "key_padding_mask": lambda: hidden(BATCH, SEQLEN_K)},
    ),
    "causal": ({}, "self", {"is_causal": True, "attn_mask": lambda: causal(SEQLEN_Q)}),
    "causal, padding": (
        {}, "self", {"is_causal": True, "attn_mask": lambda: causal(SEQLEN_Q), "key_padding_mask": lambda: hidden(BATCH, SEQLEN_Q)},
    ),
    "each head's weights": ({"batch_first": True}, "cross", {"average_attn_weights": False}),
}  # fmt: skip


def causal(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def inputs(options, kind, batched=True):
    def draw(length, width):
        shape = (BATCH, length) if options.get("batch_first") else (length, BATCH)
        return torch.randn(*(shape if batched else (length,)), width)

    query = draw(SEQLEN_Q, EMBED)
    if kind == "self":
        return [query]
    key = draw(SEQLEN_K, options.get("kdim", EMBED))
    return [query, key] if kind == "cross" else [query, key, draw(SEQLEN_K, options.get("vdim", EMBED))]


def run(attention, tensors, masks, options):
    """Outputs, and gradients of inputs, weights and float masks."""
    dtype = next(attention.parameters()).dtype
    device = next(attention.parameters()).device
    tensors = [tensor.to(device, dtype).requires_grad_() for tensor in tensors]
    masks = {name: mask.to(device, dtype if mask.is_floating_point() else None) for name, mask in masks.items()}
    leaves = {f"input {index}": tensor for index, tensor in enumerate(tensors)} | dict(attention.named_parameters())
    for name, mask in masks.items():
        if mask.is_floating_point():
            leaves[name] = mask.requires_grad_()
    query, key, value = (tensors * 3)[:3] if len(tensors) == 1 else (*tensors, tensors[-1])[:3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a boolean mask beside a floating one
        out, weights = attention(query, key, value, **masks, **options)
    ramp = torch.linspace(-1, 1, out.numel(), dtype=dtype, device=device).view(out.shape)
    loss = (out * ramp).sum() + (0.0 if weights is None else weights.square().sum())
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    outputs = {"out": out} if weights is None else {"out": out, "weights": weights}
    return outputs, dict(zip(leaves, gradients))


def compared(case, dtype, device, need_weights, batched=True):
    constructor, kind, forward = CASES[case]
    contract = Contract(dtype)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        plain = torch.nn.MultiheadAttention(EMBED, HEADS, **constructor)
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        plain = plain.to(device, dtype)
        ours = MultiheadAttention(EMBED, HEADS, **constructor).to(device, dtype)
        assert list(ours.state_dict()) == list(plain.state_dict())
        ours.load_state_dict(plain.state_dict())
        tensors = [tensor.to(dtype).float() for tensor in inputs(constructor, kind, batched)]
        drawn = {name: value() for name, value in forward.items() if callable(value)}
        drawn = {name: mask.to(dtype).float() if mask.is_floating_point() else mask for name, mask in drawn.items()}
        if not batched:
            drawn = {
                n: (mask[0] if n == "key_padding_mask" else mask[:HEADS] if mask.ndim == 3 else mask)
                for n, mask in drawn.items()
            }
        options = {name: value for name, value in forward.items() if not callable(value)} | {
            "need_weights": need_weights
        }
        golden, golden_gradients = run(copy.deepcopy(plain).double(), tensors, drawn, options)
        expected, expected_gradients = run(plain, tensors, drawn, options)
        actual, gradients = run(ours, tensors, drawn, options)
        contract.add_all(actual, expected, golden)
        contract.add_all(gradients, expected_gradients, golden_gradients, kind="gradient")
    contract.check()


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
@pytest.mark.parametrize("case", CASES)
def test_as_torchs_module(case, need_weights, device):
    compared(case, torch.float32, device, need_weights)


@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
def test_bfloat16(need_weights, device):
    compared("cross, batch_first", torch.bfloat16, device, need_weights)


@pytest.mark.parametrize(
    "case", ["self, batch_first", "both masks", "both float masks", "zero attention", "each head's weights"]
)
@pytest.mark.parametrize("need_weights", [False, True], ids=["output", "weights"])
def test_without_a_batch(case, need_weights, device):
    compared(case, torch.float32, device, need_weights, batched=False)


def test_the_same_signatures():
    theirs = torch.nn.MultiheadAttention
    assert isinstance(MultiheadAttention(16, 2), theirs)
    names = list(inspect.signature(theirs.forward).parameters.items())
    ours = list(inspect.signature(MultiheadAttention.forward).parameters.items())
    assert [(name, value.default) for name, value in ours] == [(name, value.default) for name, value in names]
    function = [
        (name, value.default) for name, value in inspect.signature(F.multi_head_attention_forward).parameters.items()
    ]
    served = inspect.signature(module.multi_head_attention_forward).parameters.items()
    assert [(name, value.default) for name, value in served] == function


def test_the_same_initial_weights():
    for options in ({}, {"kdim": 8, "vdim": 12, "add_bias_kv": True}, {"bias": False}):
        modules = []
        for kind in (torch.nn.MultiheadAttention, MultiheadAttention):
            torch.manual_seed(3)
            modules.append(kind(16, 2, **options))
        theirs, ours = (one.state_dict() for one in modules)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_static_keys_of_the_function(device):
    """static_k and static_v replace the projections."""
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(16, 2).to(device)
    x = torch.randn(5, 2, 16, device=device)
    static = [torch.randn(4, 7, 8, device=device) for _ in range(2)]
    args = (
        x,
        x,
        x,
        16,
        2,
        theirs.in_proj_weight,
        theirs.in_proj_bias,
        None,
        None,
        False,
        0.0,
        theirs.out_proj.weight,
        theirs.out_proj.bias,
    )
    options = {"static_k": static[0], "static_v": static[1], "need_weights": False}
    torch.testing.assert_close(
        module.multi_head_attention_forward(*args, **options), F.multi_head_attention_forward(*args, **options)
    )
    with pytest.raises(AssertionError, match="static_k must have shape"):
        module.multi_head_attention_forward(*args, static_k=static[0][:3])


def test_no_nan_from_fully_masked_rows(device):
    """Padding that hides every key, in a batch beside another sequence: zero weights, the bias as output, finite gradients."""
    ours = MultiheadAttention(16, 2, batch_first=True).to(device)
    torch.nn.init.normal_(ours.out_proj.bias)
    x = torch.randn(2, 5, 16, device=device)
    padding = torch.tensor([[False] * 5, [True] * 5], device=device)
    for need_weights in (False, True):
        for mask in (padding, torch.zeros(2, 5, device=device).masked_fill(padding, -math.inf)):
            out, weights = ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)
            assert torch.equal(out[1], ours.out_proj.bias.expand(5, 16)) and bool(out.isfinite().all())
            assert weights is None or not bool(weights[1].any())
            gradients = torch.autograd.grad(out.square().sum(), list(ours.parameters()))
            assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_padding_is_not_ignored(device):
    """What stands in padded keys changes no bit of the output."""
    ours = MultiheadAttention(16, 2, batch_first=True).to(device).eval()
    q, k = torch.randn(2, 5, 16, device=device), torch.randn(2, 7, 16, device=device)
    padding = torch.zeros(2, 7, dtype=torch.bool, device=device)
    padding[1, 4:] = True
    for need_weights in (False, True):
        before = ours(q, k, k, padding, need_weights)[0]
        k[1, 4:] = 1000.0
        assert torch.equal(ours(q, k, k, padding, need_weights)[0], before)


def test_masks_are_not_expanded(device, monkeypatch):
    """Padding costs (batch, seqlen_k) booleans, and a mask of two dimensions stays one."""
    seen = {}
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda *args, **options: seen.update(options) or attend(*args, **options))
    ours = MultiheadAttention(16, 2).to(device)
    x = torch.randn(5, 3, 16, device=device)
    padding, mask = torch.zeros(3, 5, dtype=torch.bool, device=device), causal(5).to(device)
    ours(x, x, x, padding, False, mask)
    assert seen["key_padding_mask"].shape == (3, 5) and seen["mask"].shape == (5, 5) and seen["bias"] is None
    ours(x, x, x, None, False, mask, is_causal=True)
    assert seen["mask"] is None and seen["top_left_causal"]


def test_encoder_layers_do_not_go_past_it(device, monkeypatch):
    """torch's encoder layers have a fused function for eval mode that takes the weights and never calls forward."""
    calls = []
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda *args, **options: calls.append(1) or attend(*args, **options))
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).to(device).eval()
    layer.self_attn.__class__ = torch.nn.MultiheadAttention
    ours = MultiheadAttention(16, 2, batch_first=True).to(device).eval()
    ours.load_state_dict(layer.self_attn.state_dict())
    x = torch.randn(2, 5, 16, device=device)
    with torch.no_grad():
        expected = layer(x)
        assert not calls
        layer.self_attn = ours
        torch.testing.assert_close(layer(x), expected)
        assert len(calls) == 1
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2], device=device)
        encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        assert bool(encoder(x, src_key_padding_mask=padding).isfinite().all())
    assert len(calls) == 3


def test_dropout(device):
    """The weights that are returned are those that were used, dropped and scaled, as in torch's module."""
    ours = MultiheadAttention(16, 2, dropout=0.5).to(device)
    theirs = torch.nn.MultiheadAttention(16, 2, dropout=0.5).to(device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 16, device=device)
    results = []
    for attention in (ours, theirs):
        torch.manual_seed(1)
        results.append(attention(x, x, x, average_attn_weights=False))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
    ours.eval()
    assert torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])


def test_copies_and_files(device):
    ours = MultiheadAttention(16, 2, kdim=8).to(device)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    q, k, v = (torch.randn(5, 1, width, device=device) for width in (16, 8, 16))
    for twin in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert torch.equal(twin(q, k, v)[0], ours(q, k, v)[0])


def test_autocast(device):
    ours = MultiheadAttention(16, 2, batch_first=True).to(device)
    x = torch.randn(2, 5, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        for need_weights in (False, True):
            out, _ = ours(x, x, x, need_weights=need_weights, attn_mask=torch.zeros(5, 5, device=device))
            assert out.dtype == torch.bfloat16


def test_fullgraph_with_dynamic_lengths(device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    ours = MultiheadAttention(16, 2, batch_first=True).to(device)
    compiled = torch.compile(ours, fullgraph=True, backend=count, dynamic=True)
    for length in (5, 7, 11):
        x = torch.randn(2, length, 16, device=device)
        padding = torch.zeros(2, length, dtype=torch.bool, device=device)
        torch.testing.assert_close(compiled(x, x, x, padding, False), ours(x, x, x, padding, False))
    assert len(graphs) == 1


X = torch.zeros(5, 2, 16)
MISTAKES = {
    "four dimensions": (([X[None]] * 3), {}, AssertionError, r"query must have 2 dimensions .* or 3, got shape \(1, 5, 2, 16\)"),
    "key without a batch": (([X, X[:, 0], X[:, 0]]), {}, AssertionError, "key must have as many dimensions as query"),
    "width": (([X[..., :8]] * 3), {}, AssertionError, "embed_dim = 16, got shape"),
    "key and value": (([X, X, X[:4]]), {}, AssertionError, "does not match value shape"),
    "batches": (([X, X[:, :1], X[:, :1]]), {}, RuntimeError, "query and key must have the same batch"),
    "mask shape": (([X] * 3), {"attn_mask": torch.zeros(5, 4)}, RuntimeError, r"2D attn_mask is \(5, 4\), but should be \(5, 5\)"),
    "mask of heads": (([X] * 3), {"attn_mask": torch.zeros(2, 5, 5)}, RuntimeError, r"should be \(4, 5, 5\)"),
    "mask dimensions": (([X] * 3), {"attn_mask": torch.zeros(5)}, (RuntimeError, AssertionError), "2 or 3 dimensions"),
    "mask dtype": (([X] * 3), {"attn_mask": torch.zeros(5, 5).int()}, AssertionError, "attn_mask must be boolean"),
    "padding shape": (([X] * 3), {"key_padding_mask": torch.zeros(2, 4)}, AssertionError, r"= \(2, 5\), got \(2, 4\)"),
    "float64 mask": (([X] * 3), {"attn_mask": torch.zeros(5, 5).double()}, RuntimeError, "dtype of query"),
    "causal without a mask": (([X] * 3), {"is_causal": True}, RuntimeError, "is_causal=True is a hint about attn_mask"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_raise_what_torch_raises(mistake):
    tensors, options, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words):
        MultiheadAttention(16, 2)(*tensors, **options)
    with pytest.raises(error):
        torch.nn.MultiheadAttention(16, 2)(*tensors, **options)


def test_one_head_of_512(device):
    """As in a textbook's first transformer."""
    torch.manual_seed(0)
    ours, torchs = MultiheadAttention(512, 1).to(device), torch.nn.MultiheadAttention(512, 1).to(device)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 512, device=device)
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], torchs(x, x, x, need_weights=False)[0])


def test_what_is_refused():
    with pytest.raises(AssertionError, match="embed_dim must be divisible by num_heads"):
        MultiheadAttention(10, 3)
    nested = torch.nested.nested_tensor([torch.zeros(3, 16), torch.zeros(4, 16)], layout=torch.jagged)
    with pytest.raises(
        NotImplementedError, match="takes no nested tensors, query is one; pad it and pass key_padding_mask"
    ):
        MultiheadAttention(16, 2, batch_first=True)(nested, nested, nested)
