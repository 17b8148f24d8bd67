"""The fused model against its naive twin for what other families choose: encoders, encoder–decoders, experts, and rarer decoders."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from pytransformer import Transformer, TransformerConfig, reference
from pytransformer.reference.teaching import TeachingTransformer
from pytransformer.verification import Contract
from tests.model.configs import EXPERT_CONFIGS, FAMILY_CONFIGS, make_model, make_twin, random_ids
from tests.support.draws import pool

pytestmark = pytest.mark.filterwarnings("ignore:.*the reference.*:RuntimeWarning")

ALL_CONFIGS = {**FAMILY_CONFIGS, **EXPERT_CONFIGS}
STEPS = 20
# Fewer seeds than the contract's: with so many configurations what is wrong is wrong for every seed, and all of them cost as one file does.
FEW_SEEDS = 2


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


GENERATING = [name for name, config in ALL_CONFIGS.items() if config.architecture != "encoder"]


@pytest.mark.parametrize("name", GENERATING)
def test_generated_tokens_are_those_of_the_twin(name, device):
    """Past the length at which RoPE's frequencies change, too."""
    model = make_model(ALL_CONFIGS[name], 0, device)
    config, twin = model.config, make_twin(model, torch.float64)
    prompts = random_ids(config.encoder if config.is_encoder_decoder else config, (2, 5), 0, device)
    expected = twin.generate(prompts, max_new_tokens=8, eos_token_id=config.eos_token_id)
    for options in ({}, {"use_cache": False}):
        assert torch.equal(model.generate(prompts, 8, **options), expected)


def losses(model, call, labels):
    """The loss of each training step, in float64, with the router's losses where there are experts.

    Gradient descent with momentum: AdamW makes a full step of a gradient that is nothing but rounding (a bias of k, a unit of ReLU that
    wakes up), and two runs part that are the same.
    """
    config = model.config
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    values = []
    for _ in range(STEPS):
        router_logits: list[torch.Tensor] = []
        if isinstance(model, reference.Transformer | reference.EncoderDecoder):
            logits = model(**call, router_logits=router_logits)
        elif config.num_experts:
            output = model(**call, return_router_logits=True)
            logits, router_logits = output.logits, output.router_logits
        else:
            logits = model(**call)
        loss = F.cross_entropy(real_part(config, logits, call).double().flatten(0, -2), labels.flatten())
        if router_logits:
            mask = call.get("attention_mask")
            loss = loss + 0.1 * reference.load_balancing_loss(router_logits, config.experts_per_token, mask)
            loss = loss + 0.01 * reference.router_z_loss(router_logits, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", ["gemma2", "bert-classes", "original", "mixtral"])
def test_twenty_training_losses_are_those_of_the_twin(name, device):
    config, contract = ALL_CONFIGS[name], Contract(torch.float32)

    def add(seed: int) -> None:
        call = batch_of(config, seed, device)
        tokens = (
            torch.Size([2])
            if config.pooling is not None
            else call["tgt" if config.is_encoder_decoder else "input_ids"].shape
        )
        labels = real_part(config, torch.arange(tokens.numel(), device=device).view(tokens) % 3, call)
        model = make_model(config, seed, device)
        golden = losses(make_twin(model, torch.float64), call, labels)
        contract.add(
            "losses", actual=losses(model, call, labels), plain=losses(make_twin(model), call, labels), golden=golden
        )
        assert golden[-1] < 0.8 * golden[0]

    # The losses of twenty steps are as many numbers as twenty draws have of one.
    pool(contract, add, 1).check()


@pytest.mark.parametrize(("width", "num_heads"), [(16, 4), (512, 1)])
def test_a_teaching_model_becomes_a_fused_one(width, num_heads, device):
    """Many courses have one head of 512. The eps of the norms moves into the root: 4e-6 (see tests/reference/test_teaching)."""
    theirs = TeachingTransformer(
        29, 31, d_model=width, num_heads=num_heads, d_ff=24, num_layers=1, max_seqlen=12, pre_norm=width == 16
    )
    theirs = theirs.to(device).eval()
    fields, weights = reference.convert_teaching(theirs.state_dict(), num_heads=num_heads)
    model = Transformer(TransformerConfig(**fields), device=device).eval()
    model.load_state_dict(weights)
    src, tgt = torch.randint(29, (2, 7), device=device), torch.randint(31, (2, 5), device=device)
    src_mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3], device=device)[:, None, None]
    tgt_mask = torch.ones(5, 5, dtype=torch.int64, device=device).tril()[None, None]
    with torch.no_grad():
        memory = model.encode(src, src_mask)
        actual = model.generator(model.decode(memory, src_mask, tgt, tgt_mask))
        plain, golden = (
            each.project(each.decode(each.encode(src, src_mask), src_mask, tgt, tgt_mask))
            for each in (theirs, copy.deepcopy(theirs).double())
        )
    allowed = 4 * float((plain - golden).abs().max()) + 4e-6 * float(golden.abs().max())
    assert float((actual - golden).abs().max()) <= allowed
