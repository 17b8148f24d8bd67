"""A model beside its logits: what it leaves for inspection, masks in every form, and mistakes named as they were made."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pytransformer import Transformer
from tests.model.configs import CONFIGS, EXPERT_CONFIGS, FAMILY_CONFIGS, make_model, make_twin, random_ids

ALL = {**CONFIGS, **FAMILY_CONFIGS, **EXPERT_CONFIGS}
ONE_OF_EACH = ("llama", "bert", "bert-classes", "t5", "original")


def inputs_of(config, device, src_len=7, tgt_len=5):
    """Ids, or source and target."""
    tgt = random_ids(config, (2, tgt_len), 1, device)
    return (random_ids(config.encoder, (2, src_len), 0, device), tgt) if config.is_encoder_decoder else (tgt,)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@torch.no_grad()
def test_padding_in_a_mask_of_four_dimensions_is_not_pooled(pooling, device):
    config = dataclasses.replace(FAMILY_CONFIGS["mean-vectors-window"], pooling=pooling)
    model = make_model(config, 0, device)
    (ids,), real = inputs_of(config, device), torch.ones(2, 5, dtype=torch.bool, device=device)
    real[1, 3:] = False
    expected = model(ids, real)
    for mask in (real[:, None], real[:, None, None], real[:, None, None].long()):
        torch.testing.assert_close(model(ids, mask), expected)
        torch.testing.assert_close(make_twin(model)(ids, mask), expected)


@torch.no_grad()
def test_left_padding_moves_nothing_in_the_twin_of_falcons_alibi(device):
    """A sink is where a shift of all the biases of a row would be seen."""
    config = dataclasses.replace(FAMILY_CONFIGS["falcon-alibi"], sinks=True)
    model = make_model(config, 0, device)
    (ids,), real = inputs_of(config, device), torch.ones(2, 5, dtype=torch.bool, device=device)
    real[1, :3] = False
    twin = make_twin(model)
    torch.testing.assert_close(twin(ids, real)[1, 3:], twin(ids[1:, 3:])[0])
    torch.testing.assert_close(model(ids, real)[real], twin(ids, real)[real])


@pytest.mark.parametrize("name", ["llama", "bloom", "original"])
@torch.no_grad()
def test_assigning_weights_to_a_meta_model_makes_its_tables(name, device):
    model = make_model(ALL[name], 0, device)
    other = Transformer(ALL[name], device="meta").eval()
    other.load_state_dict(model.state_dict(), assign=True)
    inputs = inputs_of(model.config, device)
    assert torch.equal(other(*inputs), model(*inputs))
