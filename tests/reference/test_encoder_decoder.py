"""The naive encoder–decoder against torch's own, its masks, shared weights, and generation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pytransformer import TransformerConfig
from pytransformer.reference import EncoderDecoder, sinusoidal_positions

SRC_VOCAB, VOCAB, HIDDEN, HEADS = 23, 29, 16, 4


def make(device, **changes):
    shape = {
        "vocab_size": VOCAB, "src_vocab_size": SRC_VOCAB, "hidden_size": HIDDEN, "num_layers": 2, "num_encoder_layers": 1,
        "num_heads": HEADS, "intermediate_size": 24, "max_seqlen": 12,
    }  # fmt: skip
    model = EncoderDecoder(TransformerConfig.original(**{**shape, **changes}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, mean=1.0 if parameter.dim() == 1 else 0.0)
    return model.double().to(device).eval()


def make_batch(device, vocab=SRC_VOCAB):
    src, tgt = torch.randint(vocab, (2, 7), device=device), torch.randint(vocab, (2, 5), device=device)
    src_mask = torch.ones(2, 7, dtype=torch.bool, device=device)
    src_mask[0, 4:] = False
    return src, tgt, src_mask


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_it_is_torchs_transformer(placement, device):
    """Embeddings × √d, interleaved sinusoidal positions, the stacks of nn.Transformer, a linear head and log-softmax."""
    model = make(device, norm_placement=placement, head_bias=True)
    theirs = nn.Transformer(
        HIDDEN, HEADS, num_encoder_layers=1, num_decoder_layers=2, dim_feedforward=24, dropout=0.0, batch_first=True,
        norm_first=placement == "pre",
    ).double().to(device)  # fmt: skip
    if placement == "post":  # torch puts a norm behind the stacks in any case
        theirs.encoder.norm = theirs.decoder.norm = None
    state, ours = theirs.state_dict(), model.state_dict()
    for name in state:
        side, rest = name.split(".", 1)
        norms = {"norm1": "attention_norm", "norm2": "feed_forward_norm"}
        if side == "decoder":
            norms = {"norm1": "attention_norm", "norm2": "cross_attention_norm", "norm3": "feed_forward_norm"}
        for their_part, our_part in {
            **norms, "self_attn.in_proj_": "attention.qkv_proj.", "self_attn": "attention", "linear1": "feed_forward.up_proj",
            "linear2": "feed_forward.down_proj",
        }.items():  # fmt: skip
            rest = rest.replace(their_part, our_part)
        rest = f"{'encoder' if side == 'encoder' else 'model'}.{rest}".replace("multihead_attn", "cross_attention")
        if "cross_attention.in_proj_" in rest:
            parts = [rest.replace("in_proj_", f"{part}_proj.") for part in ("q", "kv")]
            state[name] = torch.cat([ours[part] for part in parts])
        else:
            state[name] = ours[rest]
    theirs.load_state_dict(state)

    src, tgt, src_mask = make_batch(device)
    table = sinusoidal_positions(12, HIDDEN, device=device).double()
    embedded_src = model.encoder.embed_tokens(src) * math.sqrt(HIDDEN) + table[:7]
    embedded_tgt = model.model.embed_tokens(tgt) * math.sqrt(HIDDEN) + table[:5]
    causal = torch.ones(5, 5, dtype=torch.bool, device=device).triu(1)
    hidden = theirs(
        embedded_src, embedded_tgt, tgt_mask=causal, src_key_padding_mask=~src_mask, memory_key_padding_mask=~src_mask
    )
    logits = hidden @ model.lm_head.weight.T + model.lm_head.bias
    assert_close(model(src, tgt, src_mask), logits)
    decoded = model.decode(model.encode(src, src_mask), src_mask, tgt)
    assert_close(decoded, hidden)
    assert_close(model.generator(decoded), torch.log_softmax(logits, dim=-1))
    assert_close(make(device, head="none", tie_embeddings=False)(src, tgt).shape, torch.Size([2, 5, HIDDEN]))


def test_masks(device):
    """Source padding is seen by neither stack; a target token sees itself and those before it, less what its mask hides."""
    model = make(device)
    src, tgt, src_mask = make_batch(device)
    expected = model(src, tgt, src_mask)
    padded = src.clone()
    padded[0, 4:] = (src[0, 4:] + 1) % SRC_VOCAB
    assert torch.equal(model(padded, tgt, src_mask), expected)
    assert not torch.allclose(model(padded, tgt), model(src, tgt))
    for same in (src_mask.long(), src_mask[:, None], src_mask[:, None, None]):
        assert torch.equal(model(src, tgt, same), expected)
    triangle = torch.ones(5, 5, dtype=torch.bool, device=device).tril()
    for same in (triangle[None], triangle[None, None], torch.ones(2, 5, dtype=torch.bool, device=device)):
        assert torch.equal(model(src, tgt, src_mask, same), expected)
    later = tgt.clone()
    later[:, 3:] = (tgt[:, 3:] + 1) % VOCAB
    assert torch.equal(model(src, later, src_mask)[:, :3], expected[:, :3])
    hidden = torch.ones(2, 5, dtype=torch.bool, device=device)
    hidden[:, 1] = False
    other = tgt.clone()
    other[:, 1] = (tgt[:, 1] + 1) % VOCAB
    assert torch.equal(model(src, other, src_mask, hidden)[:, 2:], model(src, tgt, src_mask, hidden)[:, 2:])
    assert not torch.allclose(model(src, tgt, src_mask, hidden)[:, 2:], expected[:, 2:])


def test_shared_embeddings_are_one_weight(device):
    model = make(device, src_vocab_size=VOCAB, share_embeddings=True, tie_embeddings=True)
    src, tgt, src_mask = make_batch(device, VOCAB)
    state = model.state_dict()
    assert [name for name in state if "embed" in name or "lm_head" in name] == ["model.embed_tokens.weight"]
    apart = make(device, src_vocab_size=VOCAB)
    weight = state["model.embed_tokens.weight"]
    apart.load_state_dict({**state, "encoder.embed_tokens.weight": weight, "lm_head.weight": weight})
    assert torch.equal(model(src, tgt, src_mask), apart(src, tgt, src_mask))

    # Other names of the same weight load if they hold the same, and are refused if not.
    model.load_state_dict({**state, "encoder.embed_tokens.weight": weight, "lm_head.weight": weight})
    for name in ("encoder.embed_tokens.weight", "lm_head.weight"):
        with pytest.raises(RuntimeError, match=rf"{name} differs from model\.embed_tokens\.weight"):
            model.load_state_dict({**state, name: weight + 1})


def test_generate(device):
    model = make(device, decoder_start_token_id=1, pad_token_id=0)
    src, _, src_mask = make_batch(device)
    ids = model.generate(src, src_mask=src_mask, max_new_tokens=6)
    assert ids.shape == (2, 7) and ids[:, 0].tolist() == [1, 1]
    for length in range(1, 7):
        assert torch.equal(ids[:, length], model(src, ids[:, :length], src_mask)[:, -1].argmax(-1))
    end = int(ids[0, 2])
    stopped = model.generate(src, src_mask=src_mask, max_new_tokens=6, eos_token_id=end)
    first = ids[0].tolist().index(end, 1) + 1
    assert stopped[0, :first].tolist() == ids[0, :first].tolist() and set(stopped[0, first:].tolist()) <= {0}
    assert model.generate(src, max_new_tokens=100, decoder_start_token_id=2).shape == (2, 12)
    with pytest.raises(ValueError, match="decoder_start_token_id must be given"):
        make(device).generate(src, max_new_tokens=1)


def test_scaled_embeddings_start_with_unit_vectors():
    """Deviation hidden^-½ where √hidden multiplies, so that the positions, of size 1, do not drown."""
    model = EncoderDecoder(
        TransformerConfig.original(vocab_size=2000, hidden_size=64, num_layers=1, num_heads=4, max_seqlen=8)
    )
    for embedding in (model.encoder.embed_tokens, model.model.embed_tokens):
        assert float(embedding.weight.detach().std()) == pytest.approx(64**-0.5, rel=0.02)
    assert float(model.lm_head.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
