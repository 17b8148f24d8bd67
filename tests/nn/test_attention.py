"""Attention as a module of its own: to itself and to a memory, padded and packed, shapes, defaults, errors.

Its results as part of a model are compared in tests/model.
"""

from __future__ import annotations

import copy

import pytest
import torch

from pytransformer import reference
from pytransformer.nn import AlibiSlopes, Attention, RotaryEmbedding
from pytransformer.verification import SEEDS, Contract


def test_as_torchs_multihead_attention(device):
    """The same weights in ``torch.nn.MultiheadAttention`` give the same output, causal or not."""
    for causal in (True, False):
        contract = Contract(torch.float32)
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            plain = torch.nn.MultiheadAttention(32, 4, batch_first=True, device=device).eval()
            ours = Attention(32, 4, causal=causal, device=device).eval()
            names = {"in_proj_weight": "qkv_proj.weight", "in_proj_bias": "qkv_proj.bias"}
            ours.load_state_dict({names.get(name, name): tensor for name, tensor in plain.state_dict().items()})
            x = torch.randn(2, 9, 32, device=device)
            mask = torch.nn.Transformer.generate_square_subsequent_mask(9, device=device, dtype=torch.float64)
            mask = mask if causal else None
            with torch.no_grad():
                actual = ours(x)
                expected = plain(x, x, x, attn_mask=None if mask is None else mask.float(), need_weights=False)[0]
                golden = plain.double()(x.double(), x.double(), x.double(), attn_mask=mask, need_weights=False)[0]
            contract.add("output", actual=actual, plain=expected, golden=golden)
        contract.check()


def test_shapes_of_the_weights(device):
    module = Attention(
        32, 6, num_kv_heads=2, head_dim=8, bias=False, qk_norm_eps=1e-6, rotary=RotaryEmbedding(8, 16), device=device
    )
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "qkv_proj.weight": (80, 32),
        "out_proj.weight": (32, 48),
        "q_norm.weight": (8,),
        "k_norm.weight": (8,),
    }
    assert module.to(device)(torch.randn(2, 5, 32, device=device)).shape == (2, 5, 32)
    assert "num_kv_heads=2" in repr(module)


@pytest.mark.parametrize("head_dim", [5, 300])
def test_any_head_dim(head_dim, device):
    """Beside torch's module, whose head_dim is the width of a head too; with its gradient."""
    torch.manual_seed(0)
    plain = torch.nn.MultiheadAttention(2 * head_dim, 2, batch_first=True, device=device)
    ours = Attention(2 * head_dim, 2, causal=False, device=device)
    names = {"in_proj_weight": "qkv_proj.weight", "in_proj_bias": "qkv_proj.bias"}
    ours.load_state_dict({names.get(name, name): tensor for name, tensor in plain.state_dict().items()})
    x = torch.randn(2, 5, 2 * head_dim, device=device)
    torch.testing.assert_close(ours(x), plain(x, x, x)[0])
    ours(x).sum().backward()
    plain(x, x, x)[0].sum().backward()
    torch.testing.assert_close(ours.qkv_proj.weight.grad, plain.in_proj_weight.grad)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads, got 4 and 3"):
        Attention(32, 4, num_kv_heads=3)
    with pytest.raises(
        ValueError, match="hidden_size must be a multiple of num_heads when head_dim is not given, got 30 and 4"
    ):
        Attention(30, 4)


@pytest.mark.parametrize("memory_size", [None, 24])
def test_a_memory_as_torchs_multihead_attention(memory_size, device):
    """Cross-attention with padding, from the packed projection and from one for memories of another width; with gradients."""
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        width = memory_size or 32
        plain = torch.nn.MultiheadAttention(32, 4, batch_first=True, kdim=width, vdim=width, device=device)
        ours = Attention(32, 4, causal=False, memory_size=memory_size, device=device)
        load(ours, plain)
        x, memory = torch.randn(2, 5, 32, device=device), torch.randn(2, 7, width, device=device)
        padding = torch.zeros(2, 7, dtype=torch.bool, device=device)
        padding[1, 4:] = True
        results = []
        for module, dtype in (
            (ours, torch.float32),
            (plain, torch.float32),
            (copy.deepcopy(plain).double(), torch.float64),
        ):
            inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, memory)]
            if module is ours:
                out = ours(*inputs, key_padding_mask=~padding)
            else:
                out = module(inputs[0], inputs[1], inputs[1], key_padding_mask=padding, need_weights=False)[0]
            results.append((out.detach(), torch.autograd.grad(out.square().sum(), inputs)))
        contract.add("out", actual=results[0][0], plain=results[1][0], golden=results[2][0])
        for name, *three in zip(("x", "memory"), *(gradients for _, gradients in results)):
            contract.add(name, actual=three[0], plain=three[1], golden=three[2], kind="gradient")
    contract.check()


def load(ours, plain):
    """torch's projections into ours."""
    state = plain.state_dict()
    with torch.no_grad():
        if ours.memory_size is None:
            ours.qkv_proj.weight.copy_(state["in_proj_weight"])
            ours.qkv_proj.bias.copy_(state["in_proj_bias"])
        else:
            ours.q_proj.weight.copy_(state["q_proj_weight"])
            ours.kv_proj.weight.copy_(torch.cat([state["k_proj_weight"], state["v_proj_weight"]]))
            ours.q_proj.bias.copy_(state["in_proj_bias"][:32])
            ours.kv_proj.bias.copy_(state["in_proj_bias"][32:])
        ours.out_proj.load_state_dict({name: state[f"out_proj.{name}"] for name in ("weight", "bias")})


def test_a_memory_with_every_option(device):
    """GQA, window, softcap, ALiBi, QK-norm, a mask and a bias, causal to the memory's end: as the reference given the same q, k, v."""
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        module = Attention(
            32, 4, num_kv_heads=2, window=(3, -1), softcap=5.0, alibi=AlibiSlopes(4), qk_norm_eps=1e-6, memory_size=24
        ).to(device)
        x, memory = torch.randn(2, 5, 32, device=device), torch.randn(2, 7, 24, device=device)
        mask, bias = torch.rand(2, 1, 5, 7, device=device) < 0.7, torch.randn(4, 1, 7, device=device)
        q = module.q_norm(module.q_proj(x).unflatten(-1, (4, 8)))
        k, v = module.kv_proj(memory).unflatten(-1, (4, 8)).split(2, dim=-2)
        options = {"causal": True, "mask": mask, "bias": bias}
        terms = {"window": (3, -1), "softcap": 5.0, "alibi_slopes": module.alibi.slopes}
        actual = module(x, memory, **options)
        plain, golden = (
            reference.attention(q.to(dtype), module.k_norm(k).to(dtype), v.to(dtype), **options, **terms).flatten(-2)
            for dtype in (torch.float32, torch.float64)
        )
        weight, bias_out = module.out_proj.weight, module.out_proj.bias
        contract.add(
            "out",
            actual=actual,
            plain=plain @ weight.T + bias_out,
            golden=golden @ weight.T.double() + bias_out.double(),
        )
        weights = module.weights(x, memory, **options)
        assert weights.shape == (2, 4, 5, 7) and torch.equal(weights > 0, visible(mask, (2, 4, 5, 7)))
    contract.check()


def visible(mask, shape):
    """mask, causality to the end of the memory and a window of 3 keys back."""
    distance = torch.arange(2, 7, device=mask.device)[:, None] - torch.arange(7, device=mask.device)
    return (mask & (distance >= 0) & (distance <= 3)).expand(shape)


def test_left_padding_does_not_change_the_output(device):
    """With a padding mask and positions that start behind it."""
    module = Attention(32, 4, num_kv_heads=2, rotary=RotaryEmbedding(8, 16)).to(device)
    x = torch.randn(1, 5, 32, device=device)
    padded = torch.cat([torch.full((1, 3, 32), 50.0, device=device), x], dim=1)
    keep = torch.tensor([[False] * 3 + [True] * 5], device=device)
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]], device=device)
    actual = module(padded, key_padding_mask=keep, positions=positions)[:, 3:]
    torch.testing.assert_close(actual, module(x))


def test_packed_sequences(device):
    """Each as on its own: RoPE starts anew, nothing is seen across a boundary; a memory is packed likewise."""
    lengths, memory_lengths = (3, 5), (4, 2)
    x, memory = torch.randn(8, 32, device=device), torch.randn(6, 32, device=device)
    starts, memory_starts = (
        torch.tensor([0, *ends], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
        for ends in (lengths, memory_lengths)
    )
    rotary = Attention(32, 4, num_kv_heads=2, rotary=RotaryEmbedding(8, 16)).to(device)
    alone = [rotary(part[None])[0] for part in x.split(lengths)]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    for options in ({"max_seqlen": 5}, {"positions": positions}):
        torch.testing.assert_close(rotary(x, cu_seqlens=starts, **options), torch.cat(alone))
    cross = Attention(32, 4, causal=False).to(device)
    alone = [cross(part[None], other[None])[0] for part, other in zip(x.split(lengths), memory.split(memory_lengths))]
    actual = cross(x, memory, cu_seqlens=starts, memory_cu_seqlens=memory_starts, memory_max_seqlen=4)
    torch.testing.assert_close(actual, torch.cat(alone))


def test_an_adapter_in_place_of_the_projection_is_called(device):
    """Cross-attention takes parts of the packed weight, unless something else stands in its place."""
    module = Attention(32, 4, causal=False).to(device)
    x, memory = torch.randn(2, 5, 32, device=device), torch.randn(2, 7, 32, device=device)
    expected = module(x, memory)
    module.qkv_proj = torch.nn.Sequential(module.qkv_proj)
    torch.testing.assert_close(module(x, memory), expected)
    module.qkv_proj = torch.nn.Sequential(*module.qkv_proj, torch.nn.Dropout(1.0))
    assert torch.equal(module(x, memory), module.out_proj.bias.expand(2, 5, 32))


def test_fullgraph_with_dynamic_lengths(device):
    torch._dynamo.reset()
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    module = Attention(32, 4, causal=False).to(device)
    compiled = torch.compile(module, fullgraph=True, backend=count, dynamic=True)
    for length, memory_length in ((5, 9), (6, 11), (7, 13)):
        x, memory = (torch.randn(2, each, 32, device=device) for each in (length, memory_length))
        torch.testing.assert_close(compiled(x, memory), module(x, memory))
    assert len(graphs) == 1


def test_arguments_that_do_not_go_together():
    x = torch.zeros(1, 4, 32)
    causal, cross = Attention(32, 4), Attention(32, 4, memory_size=24)
    rotary = Attention(32, 4, rotary=RotaryEmbedding(8, 16))
    starts = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="this module is causal: to attend to a memory say causal=False"):
        causal(x, x)
    with pytest.raises(ValueError, match="made with memory_size, for cross-attention alone: pass memory"):
        cross(x)
    with pytest.raises(ValueError, match="a module with rotary attends to no memory"):
        rotary(x, x, causal=False)
    with pytest.raises(ValueError, match="rotary is for self-attention"):
        Attention(32, 4, memory_size=24, rotary=RotaryEmbedding(8, 16))
    with pytest.raises(ValueError, match="positions are for RoPE, and this module has rotary=None"):
        causal(x, positions=torch.arange(4))
    with pytest.raises(
        ValueError, match="memory_cu_seqlens and memory_max_seqlen describe a memory, and there is none"
    ):
        causal(x[0], memory_cu_seqlens=starts)
    with pytest.raises(ValueError, match="a cache knows the sequence and its positions: leave mask out"):
        rotary(x, cache=object(), mask=torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="leave cu_seqlens out"):
        causal.weights(x, cu_seqlens=starts)
