"""What the rarer choices of a configuration mean in the naive transformer: length-dependent RoPE, given positions, parallel sublayers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from pytransformer import TransformerConfig
from pytransformer.reference import Transformer, rope_tables
from pytransformer.reference.blocks import Attention, Block, Inputs
from tests.reference.test_transformer import GPT2, HEAD_DIM, HIDDEN, MAX_SEQLEN, make_config, make_ids, randomise

LONG = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 6},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.0, 2.0, 2.0],
        "long_factor": [1.0, 3.0, 5.0, 9.0],
        "original_max_position_embeddings": 6,
    },
}


@pytest.mark.parametrize("method", LONG)
def test_frequencies_follow_the_length_of_each_sequence(method, device):
    """A sequence rotates in a batch as it does alone: padding behind it makes it no longer, and a longer neighbour changes nothing."""
    config = make_config(rope_scaling=LONG[method], rope_base=20.0)
    model = randomise(Transformer(config)).double().to(device)
    ids = make_ids(device, batch=3)
    lengths = [11, 8, 5]
    mask = torch.arange(11, device=device) < torch.tensor(lengths, device=device)[:, None]
    together = model(ids, mask)
    for row, length in enumerate(lengths):
        assert_close(together[row, :length], model(ids[[row], :length])[0])
    # The first five tokens alone have other frequencies than as the beginning of eleven.
    assert not torch.allclose(model(ids[:1, :5]), together[:1, :5])
    # What they are: one set up to the original length, then long factors, or a base that grows with the length.
    attention, places = model.model.layers[0].attention, torch.arange(3, device=device)
    scaling = {"max_position_embeddings": MAX_SEQLEN, **LONG[method]}
    for length in (2, 6, 7, 11):
        cos, sin = rope_tables(HEAD_DIM, length, base=20.0, scaling=scaling, device=device)
        for actual, expected in zip(attention.rope_tables(places, length), (cos[:3], sin[:3]), strict=True):
            assert torch.equal(actual[:2], expected[:2])
    assert torch.equal(attention.rope_tables(places, 2)[0], attention.rope_tables(places, 6)[0])
    assert torch.equal(attention.rope_tables(places, 7)[0], attention.rope_tables(places, 11)[0]) == (
        method == "longrope"
    )


def test_positions_move_what_stands_before_padding(device):
    """Left padding with positions that count real tokens gives the logits of the tokens alone; without them RoPE still sees distances."""
    ids = make_ids(device, batch=1)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    counted = (mask.cumsum(-1) - 1).clamp(min=0)
    for choices in (
        {},
        GPT2,
        {**GPT2, "positions": "sinusoidal"},
        {**GPT2, "positions": "alibi"},
        {**GPT2, "positions": "t5"},
    ):
        model = randomise(Transformer(make_config(**choices))).double().to(device)
        alone = model(ids[:, 4:])
        assert_close(model(ids, mask, positions=counted)[:, 4:], alone)
        assert torch.allclose(model(ids, mask)[:, 4:], alone) == (
            make_config(**choices).positions in ("rope", "alibi", "t5")
        )
    falcon = {**GPT2, "positions": "alibi"}
    model = randomise(
        Transformer(TransformerConfig.from_dict({**make_config(**falcon).to_dict(), "alibi_bfloat16": True}))
    )
    model = model.double().to(device)
    assert_close(model(ids, mask, positions=counted)[:, 4:], model(ids[:, 4:]))


def test_scores_are_divided_by_the_number_of_the_layer(device):
    config = TransformerConfig.from_dict({**make_config().to_dict(), "scale_by_layer": True})
    model = randomise(Transformer(config)).double().to(device)
    scales = [layer.attention.scale() for layer in model.model.layers]
    assert scales == [HEAD_DIM**-0.5, HEAD_DIM**-0.5 / 2]
    scaled = TransformerConfig.from_dict({**config.to_dict(), "softmax_scale": 0.3})
    assert [layer.attention.scale() for layer in Transformer(scaled).model.layers] == [0.3, 0.15]


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
def test_vectors_of_distances_join_the_scores(kind, device):
    """Softmax of (q·k + q·a[i - j] (+ k·a[i - j])) / sqrt(head_dim), pair by pair; a has the distance 1 - max_seqlen in its first row."""
    encoder = {**make_config(**GPT2, norm_placement="post").to_dict(), "architecture": "encoder", "causal": False}
    config = SimpleNamespace(**vars(TransformerConfig.from_dict(encoder)) | {"positions": kind})
    attention = randomise(Attention(config, 0)).double().to(device)
    x = torch.randn(1, 5, HIDDEN, dtype=torch.float64, device=device)
    q, k, v = attention.project(x)
    vectors = attention.relative_keys.weight
    assert vectors.shape == (2 * MAX_SEQLEN - 1, HEAD_DIM)
    heads = []
    for head in range(config.num_heads):
        scores = torch.empty(5, 5, dtype=torch.float64, device=device)
        for i in range(5):
            for j in range(5):
                of_distance = vectors[MAX_SEQLEN - 1 + i - j]
                product = q[0, i, head] @ (k[0, j, head] + of_distance)
                if kind == "relative_key_query":
                    product = product + k[0, j, head] @ of_distance
                scores[i, j] = product / HEAD_DIM**0.5
        heads.append(scores.softmax(-1) @ v[0, :, head])
    expected = attention.out_proj(torch.stack(heads, dim=1).flatten(1))
    inputs = Inputs(torch.arange(5, device=device)[None], lengths=[5])
    assert_close(attention(x, inputs)[0], expected)


@pytest.mark.parametrize("norms", [1, 2])
def test_parallel_sublayers(norms, device):
    config = TransformerConfig.from_dict({**make_config().to_dict(), "parallel": True, "parallel_norms": norms})
    block = randomise(Block(config, 0)).double().to(device)
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64, device=device)
    inputs = Inputs(torch.arange(5, device=device).expand(2, 5), lengths=[5, 5])
    second = block.attention_norm if norms == 1 else block.feed_forward_norm
    expected = x + block.attention(block.attention_norm(x), inputs) + block.feed_forward(second(x))
    assert_close(block(x, inputs), expected)
    assert ("feed_forward_norm.weight" in block.state_dict()) == (norms == 2)
