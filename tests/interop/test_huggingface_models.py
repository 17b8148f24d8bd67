"""attn_implementation="pytransformer" beside "eager": logits, gradients and generated tokens of ten families."""

from __future__ import annotations

import pytest
import torch

from pytransformer.verification import Contract
from tests.interop.huggingface_models import (
    CONFIGS,
    DECODERS,
    DRAWS,
    ENCODER_DECODERS,
    ComputeInFloat64,
    build,
    draws_for,
    in_float64,
    inputs_for,
    logits_and_gradients,
)
from tests.support.draws import pool

NAME = "pytransformer"


def judge(family: str, device: torch.device, *, padding: str | None, checkpointing: dict | None = None) -> None:
    """The contract: golden = eager in float64, plain = eager in float32."""
    plain = build(family, "eager", device)
    golden, ours = in_float64(plain), build(family, NAME, device)
    assert ours.config._attn_implementation == NAME
    if checkpointing is not None:
        ours.train().gradient_checkpointing_enable(checkpointing)
        ours.enable_input_require_grads()
    contract = Contract(torch.float32)

    def add(index: int) -> None:
        inputs = draws_for(family, index, device, padding=padding)
        with ComputeInFloat64():
            golden_logits, golden_gradients = logits_and_gradients(golden, inputs)
        plain_logits, plain_gradients = logits_and_gradients(plain, inputs)
        logits, gradients = logits_and_gradients(ours, inputs)
        assert gradients.keys() == golden_gradients.keys()
        contract.add("logits", actual=logits, plain=plain_logits, golden=golden_logits)
        contract.add_all(gradients, plain_gradients, golden_gradients, kind="gradient")

    pool(contract, add, DRAWS).check()


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_all_gradients_meet_the_contract_with_padding(family, device):
    judge(family, device, padding="left" if family in DECODERS else "right")


@pytest.mark.parametrize("family", CONFIGS)
def test_logits_and_all_gradients_meet_the_contract_without_padding(family, device):
    judge(family, device, padding=None)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["mistral", "bert", "t5"])
def test_gradient_checkpointing_meets_the_contract(family, reentrant, device):
    """Masks are saved and handed in again; T5 makes a bias of zeros that requires a gradient."""
    judge(family, device, padding="right", checkpointing={"use_reentrant": reentrant})


def generate(model, inputs, **options):
    inputs = {name: tensor for name, tensor in inputs.items() if "decoder" not in name and name != "position_ids"}
    return model.generate(**inputs, max_new_tokens=9, do_sample=False, disable_compile=True, pad_token_id=0, **options)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS])
def test_greedy_generation_of_a_padded_batch_gives_the_same_tokens(family, cache, device):
    eager, ours = build(family, "eager", device), build(family, NAME, device)
    inputs = inputs_for(family, 5, device, padding="left" if family in DECODERS else "right")
    expected = generate(eager, inputs)
    options = {} if cache is None else {"cache_implementation": cache}
    assert torch.equal(generate(ours, inputs, **options), expected)
