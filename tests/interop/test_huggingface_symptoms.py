"""What users of attention in transformers tripped over, each test named after the symptom."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import CompileConfig, DynamicCache, StaticCache, masking_utils

import pytransformer.interop.huggingface.attention as surface
from pytransformer.ops.backend import use_backend
from pytransformer.verification import SEEDS, Contract
from tests.interop.huggingface_models import (
    CONFIGS,
    DECODERS,
    VOCAB,
    ComputeInFloat64,
    build,
    in_float64,
    inputs_for,
    logits_and_gradients,
    valid_rows,
)
from tests.support.draws import pool

NAME = "pytransformer"


def tokens(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape).to(device)


@pytest.mark.parametrize("family", CONFIGS)
def test_padding_silently_ignored(family, device):
    model = build(family, NAME, device)
    inputs = inputs_for(family, 0, device, padding="left" if family in DECODERS else "right")
    changed = dict(inputs)
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            mask = inputs[name.replace("input_ids", "attention_mask")].bool()
            changed[name] = torch.where(mask, inputs[name], VOCAB - 1 - inputs[name])
            assert not torch.equal(changed[name], inputs[name])
    with torch.no_grad():
        before, after = (model(**given).logits[valid_rows(inputs)] for given in (inputs, changed))
    assert torch.equal(before, after)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding_changes_outputs(family, device):
    plain, ours = build(family, "eager", device), build(family, NAME, device)
    golden = in_float64(plain)
    contract = Contract(torch.float32)
    for seed in range(SEEDS):
        inputs = inputs_for(family, seed, device)
        mask = inputs["attention_mask"].bool()
        with torch.no_grad():
            batched = ours(**inputs).logits
            for row in range(len(mask)):
                alone = inputs["input_ids"][row : row + 1][:, mask[row]]
                with ComputeInFloat64():
                    exact = golden(alone).logits[0]
                contract.add("logits", actual=batched[row, mask[row]], plain=plain(alone).logits[0], golden=exact)
    contract.check()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_left_padding_changes_generated_tokens(family, device):
    model = build(family, NAME, device)
    inputs = inputs_for(family, 5, device)
    inputs.pop("position_ids")
    options = {"max_new_tokens": 8, "do_sample": False, "disable_compile": True, "pad_token_id": 0}
    batched = model.generate(**inputs, **options)
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model.generate(inputs["input_ids"][row : row + 1][:, mask], **options)
        assert torch.equal(alone[0, -8:], batched[row, -8:])


@pytest.mark.parametrize("mask_function", ["sliding_window_causal_mask_function", "causal_mask_function"])
@pytest.mark.parametrize("cached", [0, 4])
def test_window_off_by_one(mask_function, cached, device):
    """Which keys reach a query, read off the output: value j is the j-th unit vector."""
    length, width = 8, 3
    function = getattr(masking_utils, mask_function)
    function = function(width) if "window" in mask_function else function
    sizes = {"batch_size": 1, "q_length": length - cached, "kv_length": length, "q_offset": cached, "device": device}
    mask = surface_mask(mask_function=function, allow_is_causal_skip=False, **sizes)
    query, key = (torch.randn(1, 2, count, 8, device=device) for count in (length - cached, length))
    value = torch.eye(length, device=device).expand(1, 2, length, length)
    out, _ = surface.attention_forward(torch.nn.Module(), query, key, value, mask)
    expected = masking_utils.sdpa_mask(mask_function=function, allow_is_causal_skip=False, **sizes)
    assert torch.equal(out > 0, expected.transpose(1, 2).expand(out.shape))


def surface_mask(**call):
    mask = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[NAME](**call)
    assert mask is not None
    return mask


@functools.cache
@torch.no_grad()
def whole_prompts(family: str, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Prompts, and the logits of "eager" for each as a whole: plain and golden. The same for every cache."""
    plain = build(family, "eager", device)
    golden, found = in_float64(plain), []
    for _ in range(SEEDS):
        ids = tokens(device, 2, 14)
        with ComputeInFloat64():
            exact = golden(ids, use_cache=False).logits
        found.append((ids, plain(ids, use_cache=False).logits, exact))
    return found


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_top_left_and_bottom_right_confused_when_a_prompt_comes_in_parts(family, static, device):
    ours, contract = build(family, NAME, device), Contract(torch.float32)
    for ids, expected, exact in whole_prompts(family, device):
        cache = StaticCache(ours.config, max_cache_len=20) if static else DynamicCache(config=ours.config)
        with torch.no_grad():
            parts = [ours(part, past_key_values=cache).logits for part in ids.split([5, 1, 4, 3, 1], dim=1)]
        contract.add("logits", actual=torch.cat(parts, 1), plain=expected, golden=exact)
    contract.check()


@pytest.mark.parametrize("family", ["llama", "gemma3", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_static_cache_recompiles(family, device):
    """A second generation and all but the first steps of each use what was compiled before: as many graphs as with "sdpa"."""
    # Tracing takes seconds a layer: one of each kind.
    layers = {} if family == "gemma3" else {"num_hidden_layers": 1}
    ours, eager = build(family, NAME, device, **layers), build(family, "eager", device, **layers)
    inputs = inputs_for(family, 5, device)
    inputs.pop("position_ids")
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    compiling = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    expected = eager.generate(**inputs, **options, disable_compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        for _ in range(2):
            static = {"cache_implementation": "static", "compile_config": compiling}
            assert torch.equal(ours.generate(**inputs, **options, **static), expected)
        # A sliding layer has one form until it is full and another after that.
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == (1 if family != "gemma3" else 2)
    finally:
        torch._dynamo.reset()


def packed_inputs(lengths: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(ids, position_ids) of sequences in one row, and the arguments transformers' flash path takes for them."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    cu_seq_lens = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return tokens(device, 1, sum(lengths)), positions, cu_seq_lens


@functools.cache
def sequences_alone(family: str, device: torch.device) -> list[tuple]:
    """Packed inputs, and what "eager" makes of each sequence by itself: plain and golden. The same for every way of packing."""
    lengths, plain = (9, 1, 4, 7), build(family, "eager", device)
    golden, found = in_float64(plain), []
    for _ in range(SEEDS):
        packed = packed_inputs(lengths, device)
        inputs = {"input_ids": packed[0]}
        with ComputeInFloat64():
            exact = results_of_sequences(golden, inputs, lengths)
        found.append((packed, results_of_sequences(plain, inputs, lengths), exact))
    return found


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3"])
def test_packed_sequences_attend_to_each_other(family, by, device):
    ours, contract = build(family, NAME, device), Contract(torch.float32)
    for (ids, positions, cu_seq_lens), expected, exact in sequences_alone(family, device):
        packed = {"input_ids": ids, "position_ids": positions, **(cu_seq_lens if by != "position_ids" else {})}
        if by == "cu_seq_lens":
            packed["attention_mask"] = torch.ones_like(ids)  # with it transformers looks for no packing in position_ids
        actual = results_of_sequences(ours, packed, None)
        contract.add("logits", actual=actual[0], plain=expected[0], golden=exact[0])
        contract.add("gradient", actual=actual[1], plain=expected[1], golden=exact[1], kind="gradient")
    contract.check()


def test_packed_sequences_of_a_model_that_leaves_position_ids_out_of_its_mask(device):
    """GPT-OSS makes its masks without them: the texts see each other, as in "eager". cu_seq_lens keep them apart."""
    lengths = (9, 1, 4)
    plain, ours = build("gpt_oss", "eager", device), build("gpt_oss", NAME, device)
    ids, positions, cu_seq_lens = packed_inputs(lengths, device)
    packed = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        together, eager = ours(**packed).logits[0], plain(**packed).logits[0]
        apart = ours(**packed, **cu_seq_lens).logits[0]
        alone = torch.cat([plain(part, use_cache=False).logits[0] for part in ids.split(lengths, dim=1)])
    for actual, expected in ((together, eager), (apart, alone)):
        torch.testing.assert_close(actual / expected.abs().max(), expected / expected.abs().max())
    assert (together - apart).abs().max() > 0.1 * apart.abs().max()


def results_of_sequences(model, inputs, lengths):
    """Logits, and the gradient of the first key projection; each sequence by itself where lengths are given."""
    model.zero_grad()
    ids = inputs["input_ids"]
    if lengths is None:
        logits = model(**inputs, use_cache=False).logits[0]
    else:
        logits = torch.cat([model(part, use_cache=False).logits[0] for part in ids.split(lengths, dim=1)])
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)).to(logits)).sum().backward()
    return logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()


def test_a_mask_and_a_bias_beside_cu_seq_lens_both_hold(device):
    starts = torch.tensor([0, 3, 5, 8, 12], dtype=torch.int32, device=device)
    query, key, value = (torch.randn(2, 2, 6, 8, device=device) for _ in range(3))
    bias, mask = torch.randn(1, 2, 6, 6, device=device), torch.rand(2, 1, 6, 6, device=device) > 0.3
    mask |= torch.eye(6, dtype=torch.bool, device=device)
    out, _ = surface.attention_forward(
        torch.nn.Module(), query, key, value, mask, position_bias=bias, cu_seq_lens_q=starts, cu_seq_lens_k=starts
    )
    ids = torch.tensor([[0, 0, 0, 1, 1, 2], [2, 2, 3, 3, 3, 3]], device=device)
    mask = mask & (ids[:, None, :, None] == ids[:, None, None, :])
    expected, _ = surface.attention_forward(torch.nn.Module(), query, key, value, mask, position_bias=bias)
    assert torch.equal(out, expected)


def test_mask_and_gqa_fall_back_to_repeated_heads_or_a_dense_mask(device, monkeypatch):
    """Padding, windows and packing reach the op as options, and keys as they are."""
    calls = []

    def record(q, k, v, **options):
        calls.append((q, k, options))
        return attention(q, k, v, **options)

    attention = surface.attention
    monkeypatch.setattr(surface, "attention", record)
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda **sizes: pytest.fail("a mask was filled"))
    inputs = inputs_for("mistral", 0, device)
    model = build("mistral", NAME, device)
    model(**inputs, use_cache=False)
    ids, positions, _ = packed_inputs((5, 7), device)
    model(ids, position_ids=positions, use_cache=False)
    padded, packed = calls[0], calls[2]
    assert padded[0].shape[2] == 4 and padded[1].shape[2] == 2
    assert padded[2]["mask"] is None and padded[2]["key_padding_mask"].shape == (3, 12)
    assert padded[2]["causal"] and padded[2]["window"] == (4, 0)
    assert packed[2]["cu_seqlens_q"].tolist() == [0, 5, 12] and packed[2].get("mask") is None


@pytest.mark.parametrize("additive", [False, True])
def test_custom_four_dimensional_masks_are_ignored(additive, device):
    """A user's own pattern (here: some later tokens are seen too) counts, not the module's idea of causality."""
    plain, ours = build("llama", "eager", device), build("llama", NAME, device)
    golden = in_float64(plain)
    contract = Contract(torch.float32)
    for _ in range(SEEDS):
        inputs = {"input_ids": tokens(device, 2, 8)}
        mask = torch.ones(2, 1, 8, 8, dtype=torch.bool, device=device).tril()
        mask[:, :, :3, :3] = True
        mask[1, :, :, 1] = False
        mask[1, :, 1, 0] = True
        hidden = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        with torch.no_grad(), ComputeInFloat64():
            exact = golden(**inputs, attention_mask=hidden.double()).logits
        with torch.no_grad():
            expected = plain(**inputs, attention_mask=hidden).logits
            actual = ours(**inputs, attention_mask=hidden if additive else mask).logits
        contract.add("logits", actual=actual, plain=expected, golden=exact)
    contract.check()


@pytest.mark.parametrize("family", CONFIGS)
def test_nan_from_fully_masked_rows(family, device):
    model = build(family, NAME, device)
    inputs = inputs_for(family, 0, device)
    inputs["attention_mask"][2] = 0
    logits, gradients = logits_and_gradients(model, inputs)
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("family", ["gpt_oss", "t5"])
def test_served_by_triton_forward_backward_and_decoding(family, device):
    small = {"num_layers": 1, "num_decoder_layers": 1} if family == "t5" else {"num_key_value_heads": 1}
    plain, ours = (build(family, name, device, **small, num_attention_heads=2) for name in ("eager", NAME))
    golden = in_float64(plain)
    contract = Contract(torch.float32)
    padding = "left" if family in DECODERS else "right"

    def add(seed: int) -> None:
        inputs = inputs_for(family, seed, device, batch=2, length=5, padding=padding)
        with ComputeInFloat64():
            exact = logits_and_gradients(golden, inputs)
        expected = logits_and_gradients(plain, inputs)
        with use_backend("triton"):
            actual = logits_and_gradients(ours, inputs)
        contract.add("logits", actual=actual[0], plain=expected[0], golden=exact[0])
        contract.add_all(actual[1], expected[1], exact[1], kind="gradient")

    # Interpreted kernels are slow; with torch's the surface meets the contract with all draws (test_huggingface_models).
    pool(contract, add, 2).check()
    inputs = inputs_for(family, SEEDS, device, batch=2, length=5, padding=padding)
    prompts = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    with use_backend("triton"):
        generated = ours.generate(**prompts, **options)
    assert torch.equal(generated, plain.generate(**prompts, **options))
