"""A quantised model: memory, files, decoding with its packed codes, training beside it, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from pytransformer import Transformer, TransformerConfig, load, save
from pytransformer.generation import bound
from pytransformer.generation.prepare import prepare
from pytransformer.model.heads import QuantizedLMHead
from pytransformer.model.quantized import memory_of, quantize
from pytransformer.nn import QuantizedLinear
from pytransformer.nn.packed_codes import why_not_packed
from pytransformer.training.loss import summed_loss

KINDS = [(8, 64, "int8"), (4, 32, "int4-32")]
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64}
CONFIGS = {
    "gpt2": TransformerConfig.gpt2(**{**SIZES, "intermediate_size": 128}),
    "llama": TransformerConfig.llama(**SIZES, tie_embeddings=False, logit_softcap=5.0, logit_scale=0.5),
    "head with a layer": TransformerConfig.bert(**SIZES),
    "pair": TransformerConfig(**SIZES, architecture="encoder-decoder", decoder_start_token_id=0),
}


@pytest.fixture(scope="module")
def models() -> dict[str, Transformer]:
    torch.manual_seed(0)
    return {name: Transformer(config).eval() for name, config in CONFIGS.items()}


def outputs(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, ids) if model.config.is_encoder_decoder else model(ids)


@pytest.mark.parametrize(("bits", "group_size", "word"), KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_what_its_codes_stand_for_and_comes_back_from_a_file(
    name, bits, group_size, word, models, tmp_path
):
    exact, ids = models[name], torch.randint(61, (2, 7))
    model = quantize(copy.deepcopy(exact), bits, group_size=group_size)
    assert model.config.quantization == word and isinstance(model.lm_head, QuantizedLMHead)
    assert torch.equal(model.model.embed_tokens.weight, exact.model.embed_tokens.weight)
    # The same model in full precision, with the weights that the codes stand for.
    plain = copy.deepcopy(exact)
    if exact.config.tie_embeddings:
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    for place, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain.get_submodule(place).weight.data = layer.dequantized()
    expected = outputs(plain, ids)
    assert_close(outputs(model, ids), expected, atol=2e-5, rtol=1e-4)
    assert not torch.equal(expected, outputs(exact, ids))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(outputs(loaded, ids), outputs(model, ids))
    assert loaded.num_parameters() == model.num_parameters() == sum(map(torch.numel, plain.parameters()))
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "model" / "model.safetensors").values()) == memory_of(
        model
    )
    half = load(tmp_path / "model", dtype=torch.float16)
    assert half.lm_head.scale.dtype == torch.bfloat16 and half.model.embed_tokens.weight.dtype == torch.float16


@pytest.mark.parametrize(("bits", "group_size", "word"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_with_packed_codes_chooses_what_the_layers_choose(bits, group_size, word, dtype, models):
    model = quantize(copy.deepcopy(models["llama"]), bits, group_size=group_size).to(dtype)
    ids = torch.randint(61, (2, 5))
    prepare(model, 2, 100, None)
    packs = why_not_packed(model.lm_head.weight) is None  # codes of 8 bits: only on a CPU that multiplies them exactly
    assert all(layer.is_packed == packs for layer in model.modules() if isinstance(layer, QuantizedLinear))
    with torch.no_grad():
        assert bound.why_not_bound(model) is None
        decoder, head = bound.bind(model)
        assert decoder is not model.model
        found, expected = head(decoder(ids[:, :1]))[:, 0], model(ids[:, :1])[:, 0]
    # Inputs and outputs of each layer are rounded to bfloat16; the spread of the logits is near 0.1.
    assert found.dtype == dtype and (found - expected).abs().max() < 0.01
    assert not (packs and torch.equal(found, expected))
    few = copy.deepcopy(model)
    prepare(few, 2, 3, None)
    assert not few.lm_head.is_packed


def test_adapters_beside_frozen_codes_can_be_trained(models):
    """A gradient reaches what stands before and behind each layer, by the loss that training takes."""
    model = quantize(copy.deepcopy(models["gpt2"]), 4, group_size=32)
    ids = torch.randint(61, (2, 6))
    loss = summed_loss(model, ids[:, :-1], ids[:, 1:])
    assert_close(
        loss, torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    )
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert bool(model.model.embed_tokens.weight.grad.any())


def test_what_is_refused_leaves_the_model_as_it_was(models, tmp_path: Path):
    model = copy.deepcopy(models["llama"])
    with pytest.raises(ValueError, match=r"qkv_proj: group_size must divide in_features \(32\), got 64"):
        quantize(model, 4)
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match="lm_head: weight must be finite"):
        quantize(model, 8)
    assert model.config.quantization is None and not any(isinstance(m, QuantizedLinear) for m in model.modules())
    with pytest.raises(ValueError, match="is on the meta device and has no values"):
        quantize(Transformer(CONFIGS["llama"], device="meta"), 8)
    quantised = quantize(copy.deepcopy(models["llama"]), 8)
    with pytest.raises(ValueError, match="it is quantised to 'int8'"):
        quantize(quantised, 8)
    with pytest.raises(ValueError, match="family must be 'pytransformer' or None, got 'llama'"):
        save(quantised, tmp_path / "model", family="llama")
    with pytest.raises(ValueError, match=r"quantization must be one of None, 'int8', .*, got 'int3'"):
        TransformerConfig(**SIZES, quantization="int3")
