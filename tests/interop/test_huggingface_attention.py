"""The attention function by itself: what it is given, what it refuses, and how models switch to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, masking_utils

import pytransformer.interop.huggingface.attention as surface
from pytransformer import reference
from pytransformer.interop.huggingface import attention_forward, attention_mask
from pytransformer.verification import SEEDS, Contract
from tests.interop.huggingface_models import (
    ComputeInFloat64,
    build,
    in_float64,
    inputs_for,
    logits_and_gradients,
    valid_rows,
)
from tests.support.snippets import run_snippets

NAME = "pytransformer"
GUIDE = Path(__file__).parents[2] / "docs" / "huggingface.md"


class Module(torch.nn.Module):
    is_causal = True


def qkv(device: torch.device, *, length: int = 6, keys: int = 6, head_dim: int = 8, value_dim: int = 8) -> list[Tensor]:
    """query with 4 heads, key and value with 2, as transformers lays them out: (batch, heads, length, head_dim)."""
    shapes = (2, 4, length, head_dim), (2, 2, keys, head_dim), (2, 2, keys, value_dim)
    return [torch.randn(shape, device=device) for shape in shapes]


def expected_of(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
    """The reference's result, tokens first, in the dtype of the inputs."""
    out = reference.attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)), **options)
    assert isinstance(out, Tensor)
    return out


def judge(tensors: list[Tensor], actual: Tensor, **options: object) -> None:
    contract = Contract(torch.float32)
    wide = {name: value.double() if is_floating(value) else value for name, value in options.items()}
    golden = expected_of(*(tensor.double() for tensor in tensors), **wide)
    contract.add("out", actual=actual, plain=expected_of(*tensors, **options), golden=golden)
    contract.check()


def is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("head_dim, value_dim", [(8, 8), (12, 12), (5, 9), (24, 16), (260, 260)])
def test_any_head_dim(head_dim, value_dim, device):
    tensors = qkv(device, head_dim=head_dim, value_dim=value_dim)
    out, weights = attention_forward(Module(), *tensors, None)
    assert weights is None and out.shape == (2, 6, 4, value_dim) and out.is_contiguous()
    judge(tensors, out, causal=True)


def test_options_beside_no_mask(device):
    tensors = qkv(device)
    sinks = torch.randn(4, device=device)
    out, _ = attention_forward(Module(), *tensors, None, scaling=0.3, softcap=2.0, s_aux=sinks, sliding_window=3)
    judge(tensors, out, causal=True, window=(2, 2), softmax_scale=0.3, softcap=2.0, sinks=sinks)
    out, _ = attention_forward(Module(), *tensors, None, is_causal=False)
    judge(tensors, out)
    # As with "sdpa": causal unless the module says otherwise.
    out, _ = attention_forward(torch.nn.Linear(1, 1), *tensors, None)
    judge(tensors, out, causal=True)


def test_no_mask_and_more_keys_than_queries_is_an_empty_cache_with_room(device):
    query, key, value = qkv(device, length=4, keys=7)
    bias = torch.randn(1, 4, 4, 7, device=device)
    out, _ = attention_forward(Module(), query, key, value, None, position_bias=bias)
    judge([query, key[:, :, :4], value[:, :, :4]], out, causal=True, bias=bias[..., :4])
    with pytest.raises(ValueError, match="where the queries stand"):
        attention_forward(Module(), *qkv(device, length=7, keys=4), None)


def test_one_query_sees_every_key(device):
    tensors = qkv(device, length=1)
    out, _ = attention_forward(Module(), *tensors, None)
    judge(tensors, out)
    bias = torch.randn(1, 4, 1, 6, device=device)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            tensors = [tensor.requires_grad_(grad) for tensor in tensors]
            out, _ = attention_forward(Module(), *tensors, None, position_bias=bias)
        judge([tensor.detach() for tensor in tensors], out, bias=bias)


def test_learnt_queries_of_batch_1_are_broadcast(device):
    query, key, value = qkv(device)
    out, _ = attention_forward(Module(), query[:1], key, value, None, is_causal=False)
    judge([query[:1].expand(2, -1, -1, -1), key, value], out)


def test_a_longer_mask_is_cut_to_the_keys(device):
    tensors = qkv(device)
    mask = torch.rand(2, 1, 6, 9, device=device) > 0.3
    mask[..., 0] = True
    out, _ = attention_forward(Module(), *tensors, mask)
    judge(tensors, out, mask=mask[..., :6])
    bias = torch.randn(2, 4, 6, 9, device=device)
    out, _ = attention_forward(Module(), *tensors, bias)
    judge(tensors, out, bias=bias[..., :6])


def test_a_mask_that_the_model_changed_counts_as_changed(device):
    tensors = qkv(device)
    window = masking_utils.sliding_window_causal_mask_function(2)
    masks = [attention_mask(2, 6, 6, mask_function=window, device=device) for _ in range(3)]
    masks[0][:, :, :, 0] = True
    masks[1][:, :, 5] = False
    for mask in masks:
        out, _ = attention_forward(Module(), *tensors, mask)
        judge(tensors, out, mask=mask.dense())
    assert [int(mask.dense().sum()) for mask in masks] == [2 * (11 + 4), 2 * (11 - 2), 2 * 11]


def test_dropout_is_that_of_the_op_with_a_seed_of_torchs_generator(device):
    tensors = qkv(device)
    torch.manual_seed(5)
    out, _ = attention_forward(Module(), *tensors, None, dropout=0.4)
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
    judge(tensors, out, causal=True, dropout_p=0.4, dropout_seed=seed)


def test_training_with_dropout_differs_each_time_and_repeats_with_the_seed(device):
    model = build("gpt2", NAME, device, attn_pdrop=0.5).train()
    ids = inputs_for("gpt2", 0, device, padding=None)["input_ids"]
    with torch.no_grad():
        first, second = model(ids).logits, model(ids).logits
        torch.manual_seed(1)
        third = model(ids).logits
        torch.manual_seed(1)
        assert torch.equal(model(ids).logits, third)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "name, value",
    [("cache", object()), ("block_table", 0), ("k_cache", 0), ("sinks", 0), ("head_mask", 0), ("score_mod", abs)],
)
def test_arguments_that_would_change_the_result_are_refused(name, value, device):
    with pytest.raises(NotImplementedError, match=rf"'pytransformer': {name}: "):
        attention_forward(Module(), *qkv(device), None, **{name: value})
    attention_forward(Module(), *qkv(device), None, **{name: None}, position_ids=torch.arange(6), use_cache=True)


def test_masks_of_another_kind_are_refused(device):
    tensors = qkv(device)
    with pytest.raises(RuntimeError, match=r"boolean .* or floating"):
        attention_forward(Module(), *tensors, torch.ones(2, 1, 6, 6, dtype=torch.long, device=device))
    with pytest.raises(ValueError, match=r"got shape \(2, 6\)"):
        attention_forward(Module(), *tensors, torch.ones(2, 6, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match="got object"):
        attention_forward(Module(), *tensors, object())
    with pytest.raises(ValueError, match="mask"):
        attention_forward(Module(), *tensors, torch.ones(2, 1, 6, 4, dtype=torch.bool, device=device))
    with pytest.raises(ValueError, match="cu_seq_lens_k is None"):
        attention_forward(Module(), *tensors, None, cu_seq_lens_q=torch.tensor([0, 12], device=device))


def test_output_attentions_is_answered_as_sdpa_answers(device, monkeypatch):
    warnings = []
    monkeypatch.setattr(surface._logger, "warning_once", warnings.append)
    assert attention_forward(Module(), *qkv(device), None, output_attentions=True)[1] is None
    assert len(warnings) == 1 and "does not support `output_attentions=True`" in warnings[0]
    model = build("llama", NAME, device)
    inputs = inputs_for("llama", 0, device)
    weights = model(**inputs, output_attentions=True).attentions
    assert all(weight is None for weight in weights or ())
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_a_model_is_switched_there_and_back(device, tmp_path):
    inputs = inputs_for("qwen3", 0, device)
    model = build("qwen3", "eager", device)
    eager = model(**inputs).logits
    model.set_attn_implementation(NAME)
    ours = model(**inputs).logits
    assert not torch.equal(ours, eager)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).to(device)
    assert loaded.config._attn_implementation == NAME
    assert torch.equal(loaded(**inputs).logits[valid_rows(inputs)], ours[valid_rows(inputs)])
    model.set_attn_implementation("eager")
    assert torch.equal(model(**inputs).logits, eager)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_bfloat16_meets_the_contract(family, device):
    plain = build(family, "eager", device).bfloat16()
    golden, ours = in_float64(plain), build(family, NAME, device).bfloat16()
    contract = Contract(torch.bfloat16)
    for seed in range(SEEDS):
        inputs = inputs_for(family, seed, device, padding="right")
        with ComputeInFloat64():
            exact = logits_and_gradients(golden, inputs)
        expected, actual = logits_and_gradients(plain, inputs), logits_and_gradients(ours, inputs)
        contract.add("logits", actual=actual[0], plain=expected[0], golden=exact[0])
        contract.add_all(actual[1], expected[1], exact[1], kind="gradient")
    contract.check()


def test_autocast_computes_in_its_dtype(device):
    tensors = qkv(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out, _ = attention_forward(Module(), *tensors, None, sliding_window=3)
    low = [tensor.bfloat16() for tensor in tensors]
    assert torch.equal(out, attention_forward(Module(), *low, None, sliding_window=3)[0])
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "family, what, backend",
    [
        ("mistral", "model", "eager"),
        pytest.param("mistral", "model", "aot_eager", marks=pytest.mark.slow),
        pytest.param("gpt2", "layers", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiles_with_fullgraph_and_any_length_as_a_whole_and_by_layers(family, what, backend, device):
    compiled = build(family, NAME, device, num_hidden_layers=1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if what == "model":
        compiled.compile(fullgraph=True, backend=backend)
    else:
        for layer in compiled.model.layers if family == "mistral" else compiled.transformer.h:
            layer.compile(fullgraph=True, backend=backend)
    contract = Contract(torch.float32)
    golden = in_float64(build(family, "eager", device, num_hidden_layers=1))
    plain = build(family, "eager", device, num_hidden_layers=1)
    for seed in range(SEEDS):
        length = 12 if seed < 5 else 16 + seed  # one more graph, of any length
        inputs = inputs_for(family, seed, device, length=length, padding=None if seed % 3 == 2 else "left")
        inputs.pop("position_ids", None)
        if seed % 2:  # other padding than the mask that was traced
            inputs["attention_mask"] = inputs["attention_mask"].roll(1, 0)
        with ComputeInFloat64():
            exact = logits_and_gradients(golden, inputs)
        expected, actual = logits_and_gradients(plain, inputs), logits_and_gradients(compiled, inputs)
        contract.add("logits", actual=actual[0], plain=expected[0], golden=exact[0])
        contract.add_all(actual[1], expected[1], exact[1], kind="gradient")
    contract.check()
    # For one length and for any; the layers see a mask or None, too.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= (2 if what == "model" else 4)
    torch._dynamo.reset()


def test_the_guide_runs():
    assert run_snippets(GUIDE) >= 4
