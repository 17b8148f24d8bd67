"""The fused model against its naive twin for what other families choose: encoders, encoder–decoders, experts, and rarer decoders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pytransformer import reference
from pytransformer.verification import Contract
from tests.model.configs import EXPERT_CONFIGS, FAMILY_CONFIGS, make_model, make_twin, random_ids

pytestmark = pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")

ALL_CONFIGS = {**FAMILY_CONFIGS, **EXPERT_CONFIGS}
STEPS, ALLOWED_RATIO = 20, 2.0
# Fewer seeds than the contract's, so that all configurations cost less than the first ones do.
FEW_SEEDS = 4


def batch_of(config, seed, device):
    """Arguments of a call: ids, a second sequence that ends with padding, token types; of an encoder–decoder source and target."""
    lengths = torch.tensor([11, 7], device=device)
    mask = torch.arange(11, device=device) < lengths[:, None]
    if config.is_encoder_decoder:
        src = random_ids(config.encoder, (2, 11), seed, device)
        return {"src": src, "tgt": random_ids(config, (2, 6), seed + 1, device), "src_mask": mask}
    ids = random_ids(config, (2, 11), seed, device)
    if config.positions_skip_padding:
        ids = torch.where(mask, 1 + ids % (config.vocab_size - 1), config.pad_token_id)
    call = {"input_ids": ids, "attention_mask": mask}
    if config.type_vocab_size:
        call["token_type_ids"] = ids % config.type_vocab_size
    return call


def real_part(config, output, call):
    """The logits (or vectors) that padding does not stand at."""
    per_token = not config.is_encoder_decoder and config.pooling is None
    return output[call["attention_mask"]] if per_token else output


def results(model, call):
    """Result, and the gradients of a fixed random projection of it, tied weights under one name."""
    result = real_part(model.config, model(**call), call)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    model.zero_grad()
    (result * direction).sum().backward()
    shared = "encoder.embed_tokens.weight" if model.config.share_embeddings else None
    names = {"model.embed_tokens.weight" if name == shared else name: p for name, p in model.named_parameters()}
    return result.detach(), {name: parameter.grad for name, parameter in names.items() if parameter.grad is not None}


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_results_and_gradients_are_those_of_the_twin(name, device):
    contract = Contract(torch.float32)
    for seed in range(FEW_SEEDS):
        model = make_model(ALL_CONFIGS[name], seed, device)
        call = batch_of(model.config, seed, device)
        (actual, actual_gradients), (plain, plain_gradients), (golden, golden_gradients) = (
            results(each, call) for each in (model, make_twin(model), make_twin(model, torch.float64))
        )
        contract.add("result", actual=actual, plain=plain, golden=golden)
        assert set(actual_gradients) == set(golden_gradients)
        contract.add_all(actual_gradients, plain_gradients, golden_gradients, kind="gradient")
    contract.check()


GENERATING = [name for name, config in ALL_CONFIGS.items() if config.architecture != "encoder" and name != "odd-ones"]


@pytest.mark.parametrize("name", GENERATING)
def test_generated_tokens_are_those_of_the_twin(name, device):
    """With a cache and without, across the length at which RoPE's frequencies change."""
    model = make_model(ALL_CONFIGS[name], 0, device)
    twin = make_twin(model, torch.float64)
    if model.config.is_encoder_decoder:
        prompts = random_ids(model.config.encoder, (2, 7), 0, device)
    else:
        prompts = random_ids(model.config, (2, 5), 0, device)
    expected = twin.generate(prompts, max_new_tokens=8)
    for options in ({}, {"use_cache": False}):
        assert torch.equal(model.generate(prompts, 8, **options), expected)


def losses(model, config, batches):
    """The loss of each training step, in float64, with the router's losses where there are experts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    values = []
    for call, labels in batches:
        router_logits = []
        if not config.num_experts:
            logits = model(**call)
        elif isinstance(model, reference.Transformer | reference.EncoderDecoder):
            logits = model(**call, router_logits=router_logits)
        else:
            output = model(**call, return_router_logits=True)
            logits, router_logits = output.logits, output.router_logits
        loss = F.cross_entropy(real_part(config, logits, call).double().flatten(0, -2), labels.flatten())
        if router_logits:
            k = config.experts_per_token
            mask = call.get("attention_mask")
            loss = loss + 0.1 * reference.load_balancing_loss(router_logits, k, mask)
            loss = loss + 0.01 * reference.router_z_loss(router_logits, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", ["gemma2", "bert", "bert-classes", "original", "t5", "mixtral"])
def test_twenty_training_losses_are_as_near_as_the_plain_ones(name, device):
    """Largest deviation from the golden run, mean over seeds, at most twice that of the twin in float32 (see test_training_drift)."""
    config, drift = ALL_CONFIGS[name], {"fused": 0.0, "plain": 0.0}
    golden = torch.empty(0)
    for seed in range(FEW_SEEDS):
        batches = []
        for step in range(STEPS):
            call = batch_of(config, 100 * seed + step, device)
            shape = real_part(
                config, torch.empty(2, 6 if config.is_encoder_decoder else 11, 1, device=device), call
            ).shape[:-1]
            labels = torch.arange(shape.numel() if config.pooling is None else 2, device=device) % 3
            batches.append((call, labels))
        model = make_model(config, seed, device)
        golden = losses(make_twin(model, torch.float64), config, batches)
        for kind, each in (("plain", make_twin(model)), ("fused", model)):
            drift[kind] += float((losses(each, config, batches) - golden).abs().max())
    assert drift["plain"] > 0.0 and golden[-1] < golden[0]
    assert drift["fused"] <= ALLOWED_RATIO * drift["plain"], drift
