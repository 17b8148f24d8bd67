"""Naive encoders: what a token sees, vectors and classes of a sequence, against torch's layers and losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from pytransformer import TransformerConfig
from pytransformer.reference import Transformer, label_loss, label_probabilities
from pytransformer.reference.heads import pool

VOCAB, HIDDEN, HEADS = 30, 16, 4


def make(device, **changes):
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": 2,
        "num_heads": HEADS,
        "intermediate_size": 24,
        "max_seqlen": 12,
    }
    model = Transformer(TransformerConfig.bert(**{**shape, **changes}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, mean=1.0 if parameter.dim() == 1 else 0.0)
    return model.double().to(device).eval()


def make_ids(device):
    ids = torch.randint(VOCAB, (2, 7), device=device)
    mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    mask[1, 5:] = False
    return ids, mask


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_layers_equal_torchs_encoder(placement, device):
    """Both directions, and no weight for padding."""
    model = make(
        device,
        head="none",
        tie_embeddings=False,
        norm_placement=placement,
        final_norm=False,
        activation="relu",
        norm_eps=1e-5,
    )
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 24, 0.0, "relu", batch_first=True, norm_first=placement == "pre")
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().to(device)
    names = {
        "self_attn.in_proj_": "attention.qkv_proj.", "self_attn.out_proj": "attention.out_proj", "linear1": "feed_forward.up_proj",
        "linear2": "feed_forward.down_proj", "norm1": "attention_norm", "norm2": "feed_forward_norm",
    }  # fmt: skip
    state = model.model.state_dict()
    converted = {}
    for name in theirs.state_dict():
        ours = name
        for their_part, our_part in names.items():
            ours = ours.replace(their_part, our_part)
        converted[name] = state[ours]
    theirs.load_state_dict(converted)
    ids, mask = make_ids(device)
    stream = model.model.embed(model.model.embed_tokens(ids), torch.arange(7, device=device).expand(2, 7), None)
    assert_close(model(ids, mask)[mask], theirs(stream, src_key_padding_mask=~mask)[mask])


def test_masks_of_two_three_and_four_dimensions_mean_the_same(device):
    model = make(device)
    ids, mask = make_ids(device)
    expected = model(ids, mask)
    pairs = mask[:, None, :].expand(2, 7, 7)
    for same in (mask.long(), pairs, pairs[:, None], mask[:, None, None, :]):
        assert torch.equal(model(ids, same)[mask], expected[mask])
    assert not torch.allclose(model(ids)[1, :5], expected[1, :5])
    with pytest.raises(ValueError, match="2, 3 or 4 dimensions, got shape"):
        model(ids, mask[0])


def test_a_window_reaches_to_both_sides(device):
    model = make(device, num_layers=1, sliding_window=3)
    ids, _ = make_ids(device)
    for changed_at in range(7):
        changed = ids.clone()
        changed[:, changed_at] = (ids[:, changed_at] + 1) % VOCAB
        differs = (model(ids) - model(changed)).abs().amax(dim=(0, 2)) > 0
        assert differs.tolist() == [abs(t - changed_at) < 3 for t in range(7)]


def test_types_and_vectors_in_the_place_of_ids(device):
    model = make(device, scale_embeddings=True)
    ids, mask = make_ids(device)
    vectors = model.model.embed_tokens(ids)
    assert torch.equal(model(inputs_embeds=vectors, attention_mask=mask), model(ids, mask))
    zeros = torch.zeros_like(ids)
    assert torch.equal(model(ids, token_type_ids=zeros), model(ids))
    assert not torch.allclose(model(ids, token_type_ids=zeros + 1), model(ids))
    moved = torch.arange(7, device=device) + 3
    assert not torch.allclose(model(ids, positions=moved), model(ids))
    assert torch.equal(model(ids, positions=moved - 3), model(ids))
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_pooling(device):
    hidden = torch.randn(3, 5, HIDDEN, dtype=torch.float64, device=device)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0]], device=device)
    assert torch.equal(pool(hidden, mask, "first"), hidden[:, 0])
    assert torch.equal(pool(hidden, mask, "last"), torch.stack([hidden[0, 4], hidden[1, 1], hidden[2, 3]]))
    means = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0), hidden[2, 2:4].mean(0)])
    assert_close(pool(hidden, mask, "mean"), means)
    assert torch.equal(pool(hidden, None, "last"), hidden[:, -1])
    assert_close(pool(hidden, None, "mean"), hidden.mean(1))
    with pytest.raises(ValueError, match="'max'"):
        pool(hidden, mask, "max")


@pytest.mark.parametrize("pooling", ["first", "last", "mean"])
def test_heads_are_what_they_say(pooling, device):
    ids, mask = make_ids(device)
    head = {"tie_embeddings": False, "head_transform": None, "pooling": pooling}
    vectors = make(device, head="none", **head)
    hidden = vectors.model(ids, mask)
    assert torch.equal(vectors(ids, mask), pool(hidden, mask, pooling))
    assert make(device, head="none", head_transform=None, tie_embeddings=False)(ids, mask).shape == (2, 7, HIDDEN)

    model = make(device, head="classification", **{**head, "head_transform": "tanh"}, pooler=True, num_labels=3)
    pooled = torch.tanh(F.linear(pool(model.model(ids, mask), mask, pooling), model.pooler.weight, model.pooler.bias))
    part = model.classifier
    inner = torch.tanh(F.linear(pooled, part.transform.weight, part.transform.bias))
    assert_close(model(ids, mask), F.linear(inner, part.weight, part.bias))


def test_masked_language_model_head(device):
    model = make(device, logit_scale=0.5)
    ids, mask = make_ids(device)
    head = model.lm_head
    inner = F.gelu(F.linear(0.5 * model.model(ids, mask), head.transform.weight, head.transform.bias))
    inner = F.layer_norm(inner, (HIDDEN,), head.transform_norm.weight, head.transform_norm.bias, 1e-12)
    assert_close(model(ids, mask), inner @ model.model.embed_tokens.weight.T + head.bias)


@pytest.mark.parametrize(
    ("problem", "labels", "expected", "probabilities"),
    [
        ("multi_class", torch.tensor([2, 0]), F.cross_entropy, lambda s: s.softmax(-1)),
        ("multi_label", torch.tensor([[1, 0, 1], [0, 0, 1]]), F.binary_cross_entropy_with_logits, torch.sigmoid),
        ("binary", torch.tensor([[1, 0, 0], [0, 1, 1]]), F.binary_cross_entropy_with_logits, torch.sigmoid),
        ("regression", torch.tensor([[0.5, -2.0, 1.0], [3.0, 0.0, 0.1]]), F.mse_loss, lambda s: s),
    ],
)
def test_losses_and_probabilities_of_labels(problem, labels, expected, probabilities, device):
    scores = 3 * torch.randn(2, 3, dtype=torch.float64, device=device)
    labels = labels.to(device)
    theirs = expected(scores, labels if problem == "multi_class" else labels.double())
    assert_close(label_loss(scores, labels, problem), theirs)
    assert_close(label_probabilities(scores, problem), probabilities(scores))
    assert bool(label_loss(1000 * scores, labels, problem).isfinite())
    for function in (lambda: label_probabilities(scores, "rank"), lambda: label_loss(scores, labels.float(), "rank")):
        with pytest.raises(ValueError, match="'rank'"):
            function()
    if problem != "multi_class":  # one label may be left out of the shape
        assert_close(label_loss(scores[:, :1], labels[:, 0], problem), expected(scores[:, :1], labels[:, :1].double()))
