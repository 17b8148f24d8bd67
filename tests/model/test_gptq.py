"""GPTQ against the formula it comes from, and against rounding to the nearest on inputs that are alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pytransformer import Transformer, TransformerConfig
from pytransformer.model.gptq import choose_codes, gptq, hessians
from pytransformer.model.quantized import layers_of, quantize
from pytransformer.nn.quantized import round_to_nearest
from pytransformer.reference import dequantize


def inputs_that_are_alike(features: int, count: int = 300) -> Tensor:
    """(count, features) of a few hidden directions, as layers see them, and some noise."""
    return torch.randn(count, 6) @ torch.randn(6, features) + 0.3 * torch.randn(count, features)


def one_column_after_another(weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """Codes of 8 bits by the optimal brain surgeon's formula as it is written: an inverse of what is left for each column."""
    weight, hessian = weight.double().clone(), hessian.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    codes = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        codes[:, column] = (weight[:, column] / scale).round().clamp(-127, 127)
        error = (weight[:, column] - codes[:, column] * scale) / inverse[0, 0]
        weight[:, column:] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("features", [20, 150])
def test_it_is_the_formula_of_the_paper(features: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(9, features), inputs_that_are_alike(features)
    codes = choose_codes(weight, x.t() @ x, 8, 64)
    expected = one_column_after_another(weight, x.t() @ x, codes.scale.double())
    # Single precision may fall on the other side of a tie.
    assert ((codes.weight - expected).abs() > 0).float().mean() < 0.01
    assert (codes.weight != round_to_nearest(weight, 8).weight).float().mean() > 0.05  # and not rounding


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_output_is_nearer_than_by_rounding(bits: int, act_order: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 128), inputs_that_are_alike(128)
    x[:, 5] = 0  # an input that is never there
    codes = choose_codes(weight, x.t() @ x, bits, 32, act_order=act_order)
    errors = [
        (x @ (dequantize(*each, torch.float32) - weight).t()).square().mean()
        for each in (codes, round_to_nearest(weight, bits, 32))
    ]
    # Of 128 directions the inputs fill 6: an error in the others costs little.
    assert errors[0] < 0.35 * errors[1]


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig.llama(vocab_size=61, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64)
    return Transformer(config).eval()


def test_the_hessian_is_that_of_the_layers_inputs(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.randint(61, (2, 7)), torch.randint(61, (1, 5))]
    with torch.no_grad():
        hidden = torch.cat([model.model(ids).flatten(0, 1) for ids in batches])
    names = [name for name, _ in layers_of(model)]
    torch.testing.assert_close(hessians(model, batches, names[-1])["lm_head"], hidden.t() @ hidden)
    assert list(hessians(model, batches, names[0])) == names
    monkeypatch.setattr("pytransformer.model.gptq.HESSIAN_BYTES", 3 * 4 * 32 * 32)
    assert list(hessians(model, batches, names[0])) == names[:3]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_is_quantised_by_it(model: Transformer) -> None:
    import copy

    batches = [torch.randint(61, (4, 16))]
    exact = model(batches[0])
    errors = {}
    for name in ("gptq", "nearest"):
        quantised = copy.deepcopy(model)
        quantizer = gptq(quantised, batches, 4, group_size=32) if name == "gptq" else None
        errors[name] = (quantize(quantised, 4, group_size=32, quantizer=quantizer)(batches[0]) - exact).square().mean()
    assert errors["gptq"] < 0.7 * errors["nearest"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, "batches must hold token ids"),
        ({"batches": [torch.zeros(5, dtype=torch.int64)]}, r"batches must hold token ids \(batch, seqlen\)"),
        ({"damping": 0.0}, "damping must be above 0, got 0.0"),
        ({"bits": 3}, "bits must be 8 or 4, got 3"),
        ({"group_size": 50}, "group_size must be one of 32, 64, 128, got 50"),
    ],
)
def test_errors(changes: dict, message: str, model: Transformer) -> None:
    with pytest.raises(ValueError, match=message):
        gptq(model, **{"batches": [torch.zeros(1, 4, dtype=torch.int64)], **changes})


def test_an_encoder_is_refused() -> None:
    config = TransformerConfig.bert(vocab_size=11, hidden_size=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="must be a decoder for calibration, got architecture 'encoder'"):
        gptq(Transformer(config), [torch.zeros(1, 4, dtype=torch.int64)])
