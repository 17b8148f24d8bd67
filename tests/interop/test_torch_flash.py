"""torch's flash operators served by the kernels, through torch's dispatcher and autograd."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from pytransformer import attention, reference
from pytransformer.interop import torch_flash
from pytransformer.ops.backend import use_backend
from pytransformer.verification import Contract

SMALL = 4  # seeds of the cases that the interpreter runs


@pytest.fixture
def active(device):
    """Our kernels for the device under test; torch has none for CPUs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells that its kernels are overridden
        activation = torch_flash.activate(device.type.upper())
    yield
    activation.remove()


def draw(device, *shapes, dtype=torch.float32):
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, **options)[0]


def dense_reference(q, k, v, is_causal=False, scale=None):
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return reference.attention(q, k, v, causal=is_causal, softmax_scale=scale).transpose(1, 2)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}], ids=str)
def test_dense(active, options, device):
    contract = Contract(torch.float32)
    for seed in range(SMALL):
        torch.manual_seed(seed)
        leaves = draw(device, (1, 2, 20, 16), (1, 2, 20, 16), (1, 2, 20, 16))
        add(contract, leaves, lambda *qkv: dense(*qkv, **options), lambda *qkv: dense_reference(*qkv, **options))
    contract.check()


def test_packed_with_a_window(active, device):
    """As torch.nn.attention.varlen calls it."""
    starts = torch.tensor([0, 5, 12], dtype=torch.int32, device=device)

    def ours(q, k, v):
        args = (q, k, v, starts, starts, 7, 7, 0.0, True, False)
        return torch.ops.aten._flash_attention_forward(*args, window_size_left=3, window_size_right=0)[0]

    def plain(q, k, v):
        return reference.attention(q, k, v, causal=True, window=(3, 0), cu_seqlens_q=starts, cu_seqlens_k=starts)

    contract = Contract(torch.float32)
    for seed in range(SMALL):
        torch.manual_seed(seed)
        add(contract, draw(device, (12, 2, 16), (12, 1, 16), (12, 1, 16)), ours, plain)
    contract.check()


def add(contract, leaves, ours, plain):
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = []
    for function, inputs in ((ours, leaves), (plain, leaves), (plain, wide)):
        out = function(*inputs)
        dout = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).view(out.shape)
        results.append((out, torch.autograd.grad(out, inputs, dout)))
    (out, grads), (plain_out, plain_grads), (golden, golden_grads) = results
    contract.add("out", actual=out, plain=plain_out, golden=golden)
    for name, *three in zip("qkv", grads, plain_grads, golden_grads):
        contract.add(f"d{name}", actual=three[0], plain=three[1], golden=three[2], kind="gradient")


def test_dropout_is_the_same_in_the_backward_pass(active, device):
    """The seed that the forward operator returns gives attention's own result and gradients, bit for bit."""
    leaves = draw(device, (1, 2, 20, 16), (1, 2, 20, 16), (1, 2, 20, 16))
    out, *_, rng_state, _, _ = torch.ops.aten._scaled_dot_product_flash_attention(*leaves, 0.3, True)
    expected = attention(
        *(leaf.transpose(1, 2) for leaf in leaves),
        causal=True,
        dropout_p=0.3,
        dropout_seed=rng_state.view(torch.int64),
        deterministic=False,
        backend=backend(leaves, 0.3),
    ).transpose(1, 2)
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    pairs = zip(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout))
    for gradient, other in list(pairs)[1:]:  # dq is summed in any order on a GPU
        assert torch.equal(gradient, other)


def test_results_lie_in_memory_as_torch_promises(active, device):
    """Output and gradients have the strides of empty_like(input), which compiled code relies on."""
    for order in ("heads first", "sequence first"):
        leaves = [leaf.detach() for leaf in draw(device, (1, 2, 20, 16), (1, 2, 20, 16), (1, 2, 20, 16))]
        if order == "sequence first":
            leaves = [leaf.transpose(1, 2).contiguous().transpose(1, 2) for leaf in leaves]
        for leaf in leaves:
            leaf.requires_grad_()
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*leaves)
        assert out.stride() == leaves[0].stride() and lse.shape == (1, 2, 20) and lse.dtype == torch.float32
        for gradient in torch.autograd.grad(out.sum(), leaves):
            assert gradient.stride() == leaves[0].stride()


def test_the_in_place_operator(active, device):
    if not hasattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace"):
        pytest.skip("this torch has no such operator")
    q, k, v = (leaf.detach() for leaf in draw(device, (1, 20, 2, 16), (1, 20, 2, 16), (1, 20, 2, 16)))
    args = (q, k, v, None, None, 20, 20, 0.0, True, False)
    out = torch.empty_like(q)
    lse = torch.ops.aten._flash_attention_forward_no_dropout_inplace(out, *args)
    expected, expected_lse, *_ = torch.ops.aten._flash_attention_forward(*args)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


def test_options_that_are_not_served_are_refused(active, device):
    q, k, v = (leaf.detach() for leaf in draw(device, (1, 20, 2, 16), (1, 20, 2, 16), (1, 20, 2, 16)))
    args = (q, k, v, None, None, 20, 20, 0.0, True)
    with pytest.raises(NotImplementedError, match="does not serve alibi_slopes"):
        torch.ops.aten._flash_attention_forward(*args, False, alibi_slopes=torch.ones(2, device=device))
    with pytest.raises(NotImplementedError, match="does not serve return_debug_mask"):
        torch.ops.aten._flash_attention_forward(*args, True)


def test_registry():
    registry = torch.nn.attention
    if not hasattr(registry, "register_flash_attention_impl"):
        with pytest.raises(NotImplementedError, match=r"has no torch\.nn\.attention\.register_flash_attention_impl"):
            torch_flash.register_flash_attention()
        return
    assert torch_flash.register_flash_attention() == "pytransformer"
    assert "pytransformer" in registry.list_flash_attention_impls()
    if not hasattr(registry, "restore_flash_attention_impl"):
        pytest.skip("this torch cannot give its own kernels back")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        registry.activate_flash_attention_impl("pytransformer")
    assert registry.current_flash_attention_impl() == "pytransformer"
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None


def backend(leaves, dropout_p=0.0):
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves)
    return torch_flash._backend(q, k, v, True, (-1, -1), dropout_p, None, None)


def test_torchs_own_attention_is_no_choice_here(active, device, monkeypatch):
    """It would end in these operators again."""
    leaves = draw(device, *[(1, 2, 20, 16)] * 3)
    for name in ("torch", None):
        with use_backend(name):
            assert backend(leaves) in ("cuda", "triton")
    with use_backend("reference"):
        assert backend(leaves) == "reference"
    monkeypatch.setattr(torch_flash.CHOICE.__class__, "why_not", lambda *args: "away")
    with pytest.raises(NotImplementedError, match=r"in place of torch's flash attention: .*away"):
        backend(leaves)
