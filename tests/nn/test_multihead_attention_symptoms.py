"""What users of torch.nn.MultiheadAttention met with ours, by symptom; what torch's module gives is right."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytransformer.interop.torch import patch_sdpa
from pytransformer.nn import MultiheadAttention, patch, unpatch
from pytransformer.verification import SEEDS, Contract


def pair(device: torch.device, *args: Any, **kwargs: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours of the same weights, biases too."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(*args, **kwargs).to(device)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = MultiheadAttention(*args, **kwargs).to(device)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


EMPTY = {
    "no batch": ((0, 5, 16), (0, 5, 16)),
    "no tokens": ((2, 0, 16), (2, 0, 16)),
    "no keys": ((2, 3, 16), (2, 0, 16)),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 16, "vdim": 16}], ids=str
)
@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
def test_cannot_reshape_tensor_of_0_elements(sizes, options, need_weights, device):
    theirs, ours = pair(device, 16, 2, batch_first=True, **options)
    query, key = (torch.randn(size, device=device, requires_grad=True) for size in sizes)
    key = query if sizes[0] == sizes[1] else key
    masks = {
        "key_padding_mask": torch.zeros(key.shape[:2], dtype=torch.bool, device=device),
        "attn_mask": torch.zeros(query.shape[1], key.shape[1], device=device),
    }
    for given in ({}, {"key_padding_mask": masks["key_padding_mask"]}, {"attn_mask": masks["attn_mask"]}):
        try:
            right, weights = theirs(query, key, key, need_weights=need_weights, **given)
        except RuntimeError:  # torch reshapes a mask of nothing to -1 there
            assert given and not need_weights
            right = theirs(query, key, key, **given)[0]
        out, own_weights = ours(query, key, key, need_weights=need_weights, **given)
        torch.testing.assert_close(out, right)
        if need_weights:
            torch.testing.assert_close(own_weights, weights)
        gradients = [torch.autograd.grad(result.sum(), (query, key)) for result in (right, out)]
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("way", ["patch", "patch_sdpa"])
@pytest.mark.parametrize("size", [(0, 5, 16), (2, 0, 16)], ids=str)
def test_an_encoder_layer_has_no_tokens_once_patched(size, way, device):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).to(device)
    empty = torch.zeros(size, device=device)
    for training in (True, False):
        layer.train(training)
        right = layer(empty)
        if way == "patch":
            patch(layer)
            out = layer(empty)
            unpatch(layer)
        else:
            with patch_sdpa():
                out = layer(empty)
        torch.testing.assert_close(out, right)


def test_static_keys_of_no_length(device):
    """As the function of torch that they are for; no keys at all are the output bias."""
    _, ours = pair(device, 16, 2)
    query = torch.randn(3, 2, 16, device=device)
    static = torch.zeros(4, 0, 8, device=device)
    weights = (ours.in_proj_weight, ours.in_proj_bias, None, None, False, 0.0, ours.out_proj.weight, ours.out_proj.bias)
    for need_weights in (True, False):
        arguments = {"static_k": static, "static_v": static, "need_weights": need_weights}
        right = F.multi_head_attention_forward(query, query, query, 16, 2, *weights, **arguments)[0]
        with patch_sdpa():
            out = F.multi_head_attention_forward(query, query, query, 16, 2, *weights, **arguments)[0]
        torch.testing.assert_close(out, right)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", ["attn_mask", "key_padding_mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_mask_under_autocast(dtype, name, need_weights, device):
    """The mask's dtype was compared with that of a query which autocast had not cast yet."""
    theirs, ours = pair(device, 16, 2, batch_first=True)
    golden, contract = copy.deepcopy(theirs).double(), Contract(torch.bfloat16)
    size = {"attn_mask": (5, 5), "key_padding_mask": (2, 5)}[name]
    masks = {}
    for _ in range(SEEDS):
        x, masks[name] = torch.randn(2, 5, 16, device=device), torch.randn(size, device=device).to(dtype)
        with torch.autocast(device.type, torch.bfloat16):
            out, right = (module(x, x, x, need_weights=need_weights, **masks)[0] for module in (ours, theirs))
        assert out.dtype == right.dtype
        wide = golden(*[x.double()] * 3, **{name: masks[name].double()})[0]
        contract.add("out", actual=out, plain=right, golden=wide)
    contract.check()
    with pytest.raises(RuntimeError, match=f"a floating {name} must have the dtype of query"):
        ours(x, x, x, need_weights=need_weights, **masks)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}], ids=["one weight", "three weights"])
def test_qkv_same_embed_dim_says_what_torch_says(widths, patched, device):
    """PEFT refuses a module of three weights, and torch's tests hand the flag on to the function."""
    theirs, ours = pair(device, 8, 2, **widths)
    if patched:
        ours = copy.deepcopy(theirs)
        patch(ours)
    assert ours._qkv_same_embed_dim is theirs._qkv_same_embed_dim
    x, key, value = (
        torch.randn(5, 3, width, device=device) for width in (8, widths.get("kdim", 8), widths.get("vdim", 8))
    )
    out, _ = F.multi_head_attention_forward(
        x, key, value, 8, 2, ours.in_proj_weight, ours.in_proj_bias, None, None, False, 0.0, ours.out_proj.weight,
        ours.out_proj.bias, use_separate_proj_weight=not ours._qkv_same_embed_dim, q_proj_weight=ours.q_proj_weight,
        k_proj_weight=ours.k_proj_weight, v_proj_weight=ours.v_proj_weight,
    )  # fmt: skip
    torch.testing.assert_close(out, ours(x, key, value)[0])


def calls_of(layer: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the attention of a layer is called as a module, in eval mode without gradients."""
    calls = []
    forward = MultiheadAttention.forward
    monkeypatch.setattr(
        MultiheadAttention, "forward", lambda self, *args, **kw: calls.append(1) or forward(self, *args, **kw)
    )
    with torch.inference_mode():
        layer.eval()(x)
    monkeypatch.undo()
    return len(calls)


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_torchs_fused_layer_goes_past_no_copy_of_the_module(make, device, monkeypatch):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).to(device).eval()
    x = torch.randn(2, 5, 16, device=device)
    assert calls_of(layer, x, monkeypatch) == 0
    patch(layer)
    copied = make(layer)
    assert calls_of(copied, x, monkeypatch) == 1
    unpatch(copied)
    assert calls_of(copied, x, monkeypatch) == 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in copied.modules())


def test_a_patched_encoder_layer_is_compiled_in_eval_mode(device):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).to(device).eval()
    patch(layer)
    x = torch.randn(2, 5, 16, device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_torchs_fused_layer_and_a_module_from_an_old_file(device, monkeypatch):
    """What was pickled when the flag kept torch away has no hooks."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).to(device)
    state = nn.MultiheadAttention(16, 2, batch_first=True).to(device).__dict__
    layer.self_attn = MultiheadAttention.__new__(MultiheadAttention)
    layer.self_attn.__setstate__(state)
    assert calls_of(layer, torch.randn(2, 5, 16, device=device), monkeypatch) == 1


def test_hooks_of_the_user_are_called(device):
    _, ours = pair(device, 16, 2)
    x, seen = torch.randn(3, 2, 16, device=device), []
    handle = ours.register_forward_hook(lambda module, args, out: seen.append(module))
    ours(x, x, x)
    handle.remove()
    ours(x, x, x)
    assert seen == [ours] and not ours._forward_hooks


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"kdim": 6, "vdim": 10}, {"bias": False}, {"add_bias_kv": True}], ids=str
)
def test_torchscript_of_a_model_that_contains_the_module(options, device):
    theirs, ours = pair(device, 8, 2, **options)
    sizes = (8, options.get("kdim", 8), options.get("vdim", 8))
    query, key, value = (torch.randn(5, 3, size, device=device) for size in sizes)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(ours), buffer)
    buffer.seek(0)
    for module in (torch.jit.script(ours), torch.jit.load(buffer)):
        for need_weights in (True, False):
            torch.testing.assert_close(
                module(query, key, value, need_weights=need_weights),
                theirs(query, key, value, need_weights=need_weights),
            )


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    "dtypes", [(torch.float64, torch.float16), (torch.float32, torch.float64), (torch.float32, torch.bfloat16)], ids=str
)
def test_an_in_proj_bias_of_another_dtype(dtypes, same, device):
    theirs, ours = pair(device, 16, 2, batch_first=True, dtype=dtypes[0])
    for module in (theirs, ours):
        module.in_proj_bias = nn.Parameter(module.in_proj_bias.detach().to(dtypes[1]))
    query = torch.randn(2, 5, 16, device=device, dtype=dtypes[0])
    key = query if same else torch.randn(2, 7, 16, device=device, dtype=dtypes[0])
    for need_weights in (True, False):
        out, right = (module(query, key, key, need_weights=need_weights)[0] for module in (ours, theirs))
        assert out.dtype == dtypes[0]
        torch.testing.assert_close(out, right)
        gradients = [
            torch.autograd.grad(result.sum(), module.in_proj_bias)[0]
            for result, module in ((out, ours), (right, theirs))
        ]
        assert gradients[0].dtype == dtypes[1]


def test_numpys_numbers_in_the_constructor(device):
    theirs, ours = pair(device, np.int64(16), np.int64(2), dropout=np.float32(0.0), batch_first=np.bool_(True))
    x = torch.randn(2, 5, 16, device=device)
    torch.testing.assert_close(
        ours(x, x, x, need_weights=np.bool_(False))[0], theirs(x, x, x, need_weights=np.bool_(False))[0]
    )
    dropping = MultiheadAttention(np.int64(16), np.int32(2), dropout=np.float32(0.1)).to(device)
    assert dropping(x, x, x, need_weights=False)[0].shape == x.shape
