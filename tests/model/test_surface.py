"""A model beside its logits: what it leaves for inspection, masks in every form, and mistakes named as they were made."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pytransformer import Transformer
from pytransformer.generation import KVCache
from pytransformer.model.transformer import EncoderDecoder
from pytransformer.nn.experts import load_balancing_loss, router_z_loss
from tests.model.configs import CONFIGS, EXPERT_CONFIGS, FAMILY_CONFIGS, make_model, make_twin, random_ids

ALL = {**CONFIGS, **FAMILY_CONFIGS, **EXPERT_CONFIGS}
ONE_OF_EACH = ("llama", "bert", "bert-classes", "t5", "original")


def inputs_of(config, device, src_len=7, tgt_len=5):
    """Ids, or source and target."""
    tgt = random_ids(config, (2, tgt_len), 1, device)
    return (random_ids(config.encoder, (2, src_len), 0, device), tgt) if config.is_encoder_decoder else (tgt,)


@pytest.mark.parametrize("name", ONE_OF_EACH)
@torch.no_grad()
def test_every_layer_leaves_its_stream_and_its_weights(name, device):
    model = make_model(ALL[name], 0, device)
    config, inputs = model.config, inputs_of(model.config, device)
    output = model(*inputs, return_attention=True, return_hidden_states=True)
    assert torch.equal(output.logits, model(*inputs))
    sides = [(output.hidden_states, output.attentions, config, 5, 5)]
    if config.is_encoder_decoder:
        sides.append((output.encoder_hidden_states, output.encoder_attentions, config.encoder, 7, 7))
        sides.append((output.hidden_states, output.cross_attentions, config, 5, 7))
    for streams, weights, side, queries, keys in sides:
        assert [stream.shape for stream in streams] == [(2, queries, config.hidden_size)] * (side.num_layers + 1)
        assert [of_layer.shape for of_layer in weights] == [(2, side.num_heads, queries, keys)] * side.num_layers
        for of_layer in weights:
            torch.testing.assert_close(of_layer.sum(-1), torch.ones_like(of_layer[..., 0]))
    for found, expected in zip(model.attention_weights(*inputs), output.attentions, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@torch.no_grad()
def test_the_last_lens_is_the_logits(name, device):
    model = make_model(ALL[name], 0, device)
    inputs = inputs_of(model.config, device)
    lens = model.logit_lens(*inputs)
    assert len(lens) == model.config.num_layers + 1
    torch.testing.assert_close(lens[-1], model(*inputs))


def test_a_pair_of_experts_has_a_mask_for_each_side(device):
    config = dataclasses.replace(EXPERT_CONFIGS["pair-of-experts"], router_aux_coef=0.5, router_z_coef=0.25)
    model = make_model(config, 0, device)
    routed = model(*inputs_of(config, device), return_router_logits=True).router_logits
    masks = torch.arange(7, device=device) < torch.tensor([[7], [4]], device=device), torch.ones(2, 5, device=device)
    masks[1][0, 3:] = 0
    count = config.num_encoder_layers

    def of_layer(logits, mask):
        return 0.5 * load_balancing_loss([logits], 1, mask) + 0.25 * router_z_loss([logits], mask)

    expected = [of_layer(logits, masks[layer >= count]) for layer, logits in enumerate(routed)]
    actual = model.router_loss(routed, masks[1], src_mask=masks[0])
    torch.testing.assert_close(actual, torch.stack(expected).mean())
    everywhere = torch.stack([of_layer(logits, None) for logits in routed]).mean()
    torch.testing.assert_close(model.router_loss(routed), everywhere)


def test_active_parameters_are_those_of_the_chosen_experts():
    model = Transformer(EXPERT_CONFIGS["qwen2-moe"])
    expert = model.model.layers[0].feed_forward.experts
    of_one = sum(parameter[0].numel() for parameter in expert.parameters())
    assert model.num_parameters() - model.num_active_parameters() == 3 * of_one


@pytest.mark.parametrize("name", ["mean", "last", "longrope", "dynamic-ntk", "falcon-alibi", "original"])
@torch.no_grad()
def test_padding_is_padding_in_a_mask_of_any_form(name, device):
    """For what is pooled, and for frequencies and biases that depend on how long a sequence is."""
    if name in ("mean", "last"):
        config = dataclasses.replace(FAMILY_CONFIGS["mean-vectors-window"], pooling=name)
    else:
        config = dataclasses.replace(FAMILY_CONFIGS[name], sinks=True)
    model = make_model(config, 0, device)
    inputs, real = inputs_of(config, device, 12, 12), torch.ones(2, 12, dtype=torch.bool, device=device)
    real[0, 7:] = False
    real[1, :5] = False
    for each in (model, make_twin(model)):
        rows = slice(None) if config.is_encoder_decoder or config.pooling else real
        expected = each(*inputs, real)[rows]
        for mask in (real.int(), real[:, None], real[:, None, None], real[:, None, None].long()):
            assert torch.equal(each(*inputs, mask)[rows], expected)
    if not config.is_encoder_decoder and not config.pooling:
        everywhere = real[:1, None, None]
        torch.testing.assert_close(model(*inputs, everywhere)[0, :7], model(*inputs, real)[0, :7])
        torch.testing.assert_close(model(*inputs, real)[real], make_twin(model)(*inputs, real)[real])


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


IDS = torch.ones(2, 5, dtype=torch.int64)
MEMORY = torch.zeros(2, 7, 32)
MISTAKES = [
    (lambda pair, one: pair(IDS), ValueError, "give either tgt or tgt_embeds, got neither"),
    (lambda pair, one: pair(tgt=IDS), ValueError, "give either src or src_embeds, got neither"),
    (lambda pair, one: one(), ValueError, "give either input_ids or inputs_embeds, got neither"),
    (lambda pair, one: pair(IDS, IDS.repeat(1, 5)), ValueError, "tgt must have at most max_seqlen = 24 tokens, got 25"),
    (lambda pair, one: pair(IDS + 60, IDS), ValueError, "src must hold token ids from 0 to 52, got 61"),
    (lambda pair, one: pair(IDS, IDS, IDS[:, 1:]), ValueError, r"src_mask must have shape .* = \(2, 5\), got \(2, 4\)"),
    (
        lambda pair, one: pair(IDS, IDS, None, torch.ones(5, 4, dtype=torch.bool)[None]),
        ValueError,
        r"tgt_mask must broadcast to .* = \(2, 4, 5, 5\), .*got shape \(1, 5, 4\)",
    ),
    (lambda pair, one: pair.decode(None, None, IDS), ValueError, "memory must be given"),
    (
        lambda pair, one: pair.decode(MEMORY[0], None, IDS),
        ValueError,
        r"memory must .* = \(2, any, 32\), got \(7, 32\)",
    ),
    (
        lambda pair, one: pair.decode(MEMORY[:1], None, IDS),
        ValueError,
        r"memory must .* = \(2, any, 32\), got \(1, 7, 32\)",
    ),
    (lambda pair, one: pair.decode(IDS, None, IDS), TypeError, "memory must be a floating tensor"),
    (
        lambda pair, one: one(IDS, memory=MEMORY),
        ValueError,
        "memory and memory_mask are for the decoder of an encoder-dec",
    ),
    (lambda pair, one: pair.encode(IDS, None, memory=MEMORY), ValueError, "memory and memory_mask are for"),
    (lambda pair, one: one(inputs_embeds=IDS), TypeError, "inputs_embeds must be a floating tensor, got a torch.int64"),
    (
        lambda pair, one: one(IDS, token_type_ids=IDS[:, 1:]),
        ValueError,
        r"token_type_ids must .* \(2, 5\), got \(2, 4\)",
    ),
    (lambda pair, one: one.generator(MEMORY), ValueError, "generator is for heads that predict tokens"),
    (lambda pair, one: EncoderDecoder(one.config), ValueError, "architecture 'encoder-decoder', got 'encoder'"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES)
def test_a_mistake_is_named_as_it_was_made(call, error, message):
    types = dataclasses.replace(FAMILY_CONFIGS["mean-vectors-window"], type_vocab_size=2)
    with pytest.raises(error, match=message):
        call(Transformer(FAMILY_CONFIGS["original"]), Transformer(types))


@torch.no_grad()
def test_what_a_cache_cannot_serve_is_refused():
    model = Transformer(CONFIGS["llama"])
    for options, message in (
        ({"return_attention": True}, "return_attention is for whole sequences"),
        (
            {"attention_mask": IDS[:, None, None].expand(2, 1, 5, 5)},
            r"with a cache attention_mask must be \(batch, seqlen\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model(IDS, cache=KVCache(model.config, 2, 8), **options)
