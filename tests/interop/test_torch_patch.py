"""patch_sdpa: what it reaches, where it ends, and what torch.compile makes of it."""

from __future__ import annotations

import contextlib
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pytransformer.nn.functional as served_by
from pytransformer.interop.torch import patch_sdpa
from pytransformer.ops.backend import use_backend
from pytransformer.verification import SEEDS, Contract
from tests.support.snippets import run_snippets


@pytest.fixture
def served(monkeypatch):
    """The calls that reach our attention."""
    calls = []
    attention = served_by.attention
    monkeypatch.setattr(
        served_by, "attention", lambda *args, **options: calls.append(options) or attention(*args, **options)
    )
    return calls


def sdpa(device, **options):
    q = torch.randn(1, 2, 5, 16, device=device)
    return F.scaled_dot_product_attention(q, q, q, **options)


def test_only_inside_and_nested(served, device):
    sdpa(device)
    with patch_sdpa():
        sdpa(device, is_causal=True)
        with patch_sdpa():
            sdpa(device)
        sdpa(device)
    sdpa(device)
    assert len(served) == 3 and served[0]["causal"]


def test_it_ends_after_an_exception(served, device):
    with pytest.raises(KeyError), patch_sdpa():
        raise KeyError
    with pytest.raises(RuntimeError, match="dropout_p must be between 0 and 1"), patch_sdpa():
        sdpa(device, dropout_p=2.0)
    sdpa(device)
    assert not served and not torch._C._is_torch_function_mode_enabled()


def test_other_threads_keep_torchs(served, device):
    with patch_sdpa():
        thread = threading.Thread(target=sdpa, args=(device,))
        thread.start()
        thread.join()
    assert not served


def test_no_module_globals_change():
    before = F.scaled_dot_product_attention, torch.nn.functional.multi_head_attention_forward
    with patch_sdpa():
        assert (F.scaled_dot_product_attention, F.multi_head_attention_forward) == before


def test_backward_after_the_block(served, device):
    q = torch.randn(1, 2, 5, 16, device=device, requires_grad=True)
    with patch_sdpa():
        out = F.scaled_dot_product_attention(q, q, q)
    out.sum().backward()
    assert len(served) == 1 and bool(q.grad.isfinite().all())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torchs_own_layers_are_reached(served, training, device):
    """The attention inside multi_head_attention_forward, in eval mode too, where torch has a fused function for whole layers."""
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device).train(training)
        x = torch.randn(2, 7, 32, device=device)
        padding = torch.zeros(2, 7, dtype=torch.bool, device=device)
        padding[1, 4:] = True
        with torch.set_grad_enabled(training):
            plain = model(x, src_key_padding_mask=padding)
            with patch_sdpa():
                actual = model(x, src_key_padding_mask=padding)
            golden = model.double()(x.double(), src_key_padding_mask=padding)
        kept = ~padding
        contract.add("out", actual=actual[kept], plain=plain[kept], golden=golden[kept])
    contract.check()
    assert len(served) == 2 * SEEDS


def test_a_padded_batch_in_evaluation_takes_torchs_fast_path(served, device):
    """It would go past the block, as nested tensors too, and leaves zeros where there is padding."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).to(device).eval()
    x, padding = torch.randn(2, 6, 16, device=device), torch.zeros(2, 6, dtype=torch.bool, device=device)
    padding[1, 4:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        assert not served
        with patch_sdpa():
            actual = model(x, src_key_padding_mask=padding)
    assert len(served) == 2
    torch.testing.assert_close(actual[~padding], expected[~padding])
    assert not expected[padding].any() and actual[padding].any()


def test_left_padding_under_a_causal_mask_is_finite_without_gradients(served, device):
    """Rows of padding see no key: torch's fast path makes NaN of them, and of the whole sequence one layer later."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device).eval()
    x, padding = torch.randn(2, 6, 16, device=device), torch.zeros(2, 6, dtype=torch.bool, device=device)
    padding[1, :2] = True
    causal = torch.ones(6, 6, dtype=torch.bool, device=device).triu(1)
    expected = model(x, mask=causal, src_key_padding_mask=padding).detach()
    assert not served
    with torch.no_grad(), patch_sdpa():
        actual = model(x, mask=causal, src_key_padding_mask=padding)
    assert len(served) == 2
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("fallback", [False, True])
def test_nested_tensors_are_refused_as_the_guide_says(fallback, served, device):
    module = torch.nn.MultiheadAttention(16, 2, batch_first=True).to(device).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], device=device)
        heads = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(5, 2, 8)], layout=torch.jagged)
        heads = heads.to(device).transpose(1, 2)
        with torch.no_grad():
            module(nested, nested, nested, need_weights=False)
            expected = F.scaled_dot_product_attention(heads, heads, heads)
            with patch_sdpa(fallback=fallback):
                with pytest.raises(AssertionError, match="outside of its fast path"):
                    module(nested, nested, nested, need_weights=False)
                if fallback:
                    left = F.scaled_dot_product_attention(heads, heads, heads)
                    for part, wanted in zip(left.unbind(), expected.unbind()):
                        assert torch.equal(part, wanted)
                else:
                    with pytest.raises(NotImplementedError, match="nested"):
                        F.scaled_dot_product_attention(heads, heads, heads)
    assert not served


def test_torchscript_is_reached_by_tracing_alone(served, device):
    def attend(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(1, 2, 5, 16, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(attend)
        with patch_sdpa():
            scripted(q)
            assert not served
            traced = torch.jit.trace(attend, (q,))
    assert served
    torch.testing.assert_close(traced(q), attend(q))


def test_asking_for_weights_stays_with_torch(served, device):
    module = torch.nn.MultiheadAttention(16, 2).to(device)
    x = torch.randn(5, 1, 16, device=device)
    expected = module(x, x, x)
    with patch_sdpa():
        actual = module(x, x, x)
    assert not served and all(torch.equal(one, other) for one, other in zip(actual, expected))


def test_what_cannot_be_served(served, device):
    """By a backend that was named; the automatic choice finds another one."""
    wide = torch.randn(1, 1, 3, 300, device=device)
    with use_backend("triton"):
        with pytest.raises(NotImplementedError, match="at most 256, got 300"), patch_sdpa():
            F.scaled_dot_product_attention(wide, wide, wide)
        expected = F.scaled_dot_product_attention(wide, wide, wide)
        with patch_sdpa(fallback=True), pytest.warns(RuntimeWarning, match="leaves a call to torch: .* got 300"):
            assert torch.equal(F.scaled_dot_product_attention(wide, wide, wide), expected)
            sdpa(device)
    assert len(served) == 3  # two of which raised


def test_our_own_use_of_torchs_function_inside(device):
    """The torch backend calls the function that is patched: it must not come back here."""
    q = torch.randn(1, 2, 5, 16, device=device)
    with use_backend("torch"):
        expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        with patch_sdpa():
            torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q, is_causal=True), expected)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_fullgraph(where, device):
    torch._dynamo.reset()
    graphs = []

    def record(graph, example_inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    def function(q):
        with patch_sdpa() if where == "inside" else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    compiled = torch.compile(function, fullgraph=True, backend=record)
    q = torch.randn(1, 2, 5, 16, device=device)
    with use_backend("reference"):  # the registered op, and not torch's function, can then be seen in the graph
        with patch_sdpa() if where == "around" else contextlib.nullcontext():
            actual = compiled(q)
        torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, q, q, is_causal=True))
        assert len(graphs) == 1 and any("attention_forward" in target for target in graphs[0])
        if where == "around":  # outside of it the compiled function is torch's again
            compiled(q)
            assert not any("attention_forward" in target for target in graphs[1])


def test_fullgraph_of_torchs_module(served, device):
    torch._dynamo.reset()
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True).to(device)
    compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], fullgraph=True, backend="eager")
    x = torch.randn(2, 5, 32, device=device)
    with patch_sdpa():
        torch.testing.assert_close(compiled(x), module(x, x, x, need_weights=False)[0])
    assert served


def test_the_guide_runs():
    guide = Path(__file__).resolve().parents[2] / "docs" / "pytorch.md"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_snippets(guide) == 8
