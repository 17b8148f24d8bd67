"""The encoder–decoder of teaching code, and its conversion: what its LayerNorm is, which spellings are known, and equal outputs."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from pytransformer import TransformerConfig
from pytransformer.reference import EncoderDecoder, convert_teaching, layer_norm, sinusoidal_positions
from pytransformer.reference.teaching import TeachingLayerNorm, TeachingTransformer, torch_norm_of

SRC_VOCAB, TGT_VOCAB, D_MODEL, HEADS, MAX_SEQLEN = 29, 31, 16, 4, 20


def make_teaching(**changes):
    """In evaluation mode, with every parameter random, norms and biases too."""
    shape = {"d_model": D_MODEL, "num_heads": HEADS, "d_ff": 24, "num_layers": 2, "max_seqlen": MAX_SEQLEN, **changes}
    model = TeachingTransformer(SRC_VOCAB, TGT_VOCAB, **shape)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.2 if parameter.dim() == 1 else 0.8 * shape["d_model"] ** -0.5
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model.eval()


def make_batch(device, vocab=SRC_VOCAB):
    """Source and target ids, and the masks of such code: the second source ends with padding."""
    src = torch.randint(vocab, (2, 7), device=device)
    tgt = torch.randint(vocab, (2, 6), device=device)
    src_mask = torch.ones(2, 1, 1, 7, dtype=torch.int64, device=device)
    src_mask[1, ..., 5:] = 0
    return src, tgt, src_mask, torch.ones(6, 6, dtype=torch.int64, device=device).tril()[None, None]


def convert(teaching, **arguments):
    """Our naive model of its weights."""
    fields, state = convert_teaching(teaching.state_dict(), **{"num_heads": HEADS, **arguments})
    ours = EncoderDecoder(TransformerConfig(**fields))
    ours.load_state_dict(state)
    return ours.to(next(iter(state.values())).device).eval()


def outputs(teaching, src, tgt, src_mask, tgt_mask):
    """Log-probabilities, and the gradient of a random projection of them with respect to the target's embedding."""
    log_p = teaching.project(teaching.decode(teaching.encode(src, src_mask), src_mask, tgt, tgt_mask))
    return log_p.detach(), gradient(log_p, teaching.tgt_embed.embedding.weight)


def our_outputs(ours, src, tgt, src_mask, tgt_mask):
    log_p = ours.generator(ours.decode(ours.encode(src, src_mask), src_mask, tgt, tgt_mask))
    return log_p.detach(), gradient(log_p, ours.model.embed_tokens.weight)


def gradient(log_p, weight):
    direction = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(1)).to(log_p)
    return torch.autograd.grad((log_p * direction).sum(), weight)[0]


# ---- the norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 16, 512])
def test_the_teaching_norm_is_a_layer_norm_up_to_eps(width, device):
    """Its own formula; with eps = 0 the conversion is exact, else off by less than eps / std of the normalised value."""
    norm = TeachingLayerNorm(width).double().to(device)
    with torch.no_grad():
        norm.alpha.normal_()
        norm.bias.normal_()
    x = (
        torch.randn(400, width, dtype=torch.float64, device=device)
        * 10 ** torch.linspace(-8, 3, 400, device=device)[:, None]
    )
    centred = x - x.mean(-1, keepdim=True)
    std = torch.sqrt((centred**2).sum(-1, keepdim=True) / (width - 1))
    assert_close(norm(x), norm.alpha * centred / (std + 1e-6) + norm.bias)

    weight, eps = torch_norm_of(norm.alpha, norm.eps)
    assert_close(eps, 1e-12 * (width - 1) / width, rtol=1e-12, atol=0.0)
    converted = layer_norm(x, weight, norm.bias, eps=eps)
    value = norm(x) - norm.bias
    error = (converted - norm.bias - value).abs()
    assert bool((error <= value.abs() * norm.eps / std + 1e-14 * (norm.bias.abs() + value.abs())).all())
    wide = std[:, 0] >= 0.25
    assert int(wide.sum()) >= 100 and bool((error <= 4e-6 * value.abs())[wide].all())
    # Without the correction of the unbiased deviation it would be another function.
    assert not torch.allclose(layer_norm(x, norm.alpha, norm.bias, eps=eps)[wide], norm(x)[wide], rtol=1e-4)
    norm.eps = 0.0
    assert_close(layer_norm(x[wide], torch_norm_of(norm.alpha, 0.0)[0], norm.bias, eps=0.0), norm(x[wide]))


def test_constant_rows_become_the_bias(device):
    norm = TeachingLayerNorm(8).to(device)
    weight, eps = torch_norm_of(norm.alpha, norm.eps)
    assert torch.equal(norm(torch.full((1, 8), 3.0, device=device)), torch.zeros(1, 8, device=device))
    assert torch.equal(
        layer_norm(torch.full((1, 8), 3.0, device=device), weight, norm.bias, eps=eps), torch.zeros(1, 8, device=device)
    )


# ---- whole models --------------------------------------------------------------------------------------------------

MODELS = {
    "pre-norm": {},
    "post-norm": {"pre_norm": False},
    "biases": {"attention_bias": True},
    "one head of 512": {"d_model": 512, "num_heads": 1, "num_layers": 1},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_the_same(name, device):
    choices = MODELS[name]
    teaching = make_teaching(**choices).double().to(device)
    ours = convert(teaching, num_heads=choices.get("num_heads", HEADS)).double()
    batch = make_batch(device)
    # eps of the norms, 1e-6 of standard deviations of about 1, is the only difference; the norms' own 4e-6 bounds it here.
    for expected, actual in zip(outputs(teaching, *batch), our_outputs(ours, *batch), strict=True):
        assert float((actual - expected).abs().max()) <= 4e-6 * float(expected.abs().max())
    # A mask of the real tokens does what the four-dimensional one does.
    src, tgt, src_mask, _ = batch
    assert_close(our_outputs(ours, src, tgt, src_mask[:, 0, 0], None), our_outputs(ours, *batch))


def test_a_converted_model_in_float32_is_as_near_as_the_teaching_one(device):
    """Each against the same model in float64, as the contract counts it."""
    teaching = make_teaching().to(device)
    batch = make_batch(device)
    ours = our_outputs(convert(teaching), *batch)
    plain, golden = outputs(teaching, *batch), outputs(teaching.double(), *batch)
    for actual, theirs, exact in zip(ours, plain, golden, strict=True):
        largest = float(exact.abs().max())
        allowed = 4 * float((theirs - exact).abs().max()) + 4e-6 * largest
        assert float((actual - exact).abs().max()) <= allowed


def test_equal_embeddings_become_one(device):
    teaching = TeachingTransformer(
        TGT_VOCAB, TGT_VOCAB, d_model=D_MODEL, num_heads=HEADS, d_ff=24, num_layers=1, max_seqlen=MAX_SEQLEN
    )
    teaching.src_embed = teaching.tgt_embed
    teaching.projection_layer.proj.weight = teaching.tgt_embed.embedding.weight
    teaching = teaching.double().to(device).eval()
    ours = convert(teaching).double()
    assert ours.config.share_embeddings and ours.config.tie_embeddings
    assert [name for name in ours.state_dict() if "embed" in name or "lm_head.weight" in name] == [
        "model.embed_tokens.weight"
    ]
    batch = make_batch(device)
    actual, expected = our_outputs(ours, *batch)[0], outputs(teaching, *batch)[0]
    assert float((actual - expected).abs().max()) <= 4e-6 * float(expected.abs().max())


def test_greedy_translations_are_the_same(device):
    teaching = make_teaching().double().to(device)
    src, _, src_mask, _ = make_batch(device)
    generated = convert(teaching).double().generate(src, src_mask=src_mask, max_new_tokens=6, decoder_start_token_id=2)
    ids = torch.full((2, 1), 2, device=device)
    memory = teaching.encode(src, src_mask)
    for length in range(1, 7):
        mask = torch.ones(length, length, device=device).tril()
        log_p = teaching.project(teaching.decode(memory, src_mask, ids, mask))
        ids = torch.cat([ids, log_p[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, ids)


# ---- spellings -----------------------------------------------------------------------------------------------------


def annotated(name):
    """Of a widely read walk through the paper."""
    name = re.sub(r"\.self_attention\.w_([qkvo])", lambda m: f".self_attn.linears.{'qkvo'.index(m[1])}", name)
    name = re.sub(r"\.cross_attention\.w_([qkvo])", lambda m: f".src_attn.linears.{'qkvo'.index(m[1])}", name)
    name = name.replace("linear_", "w_").replace("residual_connections", "sublayer")
    name = re.sub(r"norm\.alpha$", "norm.a_2", name)
    name = re.sub(r"norm\.bias$", "norm.b_2", name)
    name = re.sub(r"(src|tgt)_embed\.embedding", r"\1_embed.0.lut", name)
    name = re.sub(r"(src|tgt)_pos\.", r"\1_embed.1.", name)
    return name.replace("projection_layer", "generator")


def blocks(name):
    """Of a widely watched course."""
    name = re.sub(r"(self_attention|cross_attention|feed_forward)\.", r"\1_block.", name)
    return f"module.{name}"


def numbered(name):
    """Norms that are numbered, attention with q_linear, and one file for both sides' stacks."""
    name = re.sub(r"residual_connections\.(\d)\.norm", lambda m: f"norm_{int(m[1]) + 1}", name)
    side = name.split(".")[0]
    name = name.replace(".self_attention", ".attn_1" if side == "decoder" else ".attn").replace(
        ".cross_attention", ".attn_2"
    )
    name = re.sub(r"w_([qkv])", r"\1_linear", name).replace("w_o", "out").replace("feed_forward", "ff")
    name = name.replace("src_embed.embedding", "encoder.embed.embed").replace(
        "tgt_embed.embedding", "decoder.embed.embed"
    )
    return (
        name.replace("src_pos", "encoder.pe").replace("tgt_pos", "decoder.pe").replace("projection_layer.proj", "out")
    )


@pytest.mark.parametrize("spelling", [annotated, blocks, numbered])
def test_spellings_of_the_names(spelling):
    state = make_teaching(attention_bias=True).state_dict()
    expected_fields, expected = convert_teaching(state, num_heads=HEADS)
    renamed = {spelling(name): tensor for name, tensor in state.items()}
    assert not set(renamed) & set(state) or spelling is numbered
    fields, converted = convert_teaching(renamed, num_heads=HEADS)
    assert fields == expected_fields and set(converted) == set(expected)
    assert all(torch.equal(converted[name], expected[name]) for name in expected)


def test_post_norm_with_torch_norms_and_separate_lists_of_layers(device):
    """The other common shape: nn.LayerNorm behind the residual additions, encoder_layers.0.norm1, W_q, fc1, one table, a head fc."""
    teaching = make_teaching(pre_norm=False).double().to(device)
    for layer in (*teaching.encoder.layers, *teaching.decoder.layers):
        for connection in layer.residual_connections:
            connection.norm = nn.LayerNorm(D_MODEL, dtype=torch.float64, device=device)
            nn.init.normal_(connection.norm.weight)
    state = {}
    for name, tensor in teaching.state_dict().items():
        name = re.sub(r"(encoder|decoder)\.layers", r"\1_layers", name)
        name = re.sub(r"residual_connections\.(\d)\.norm", lambda m: f"norm{int(m[1]) + 1}", name)
        name = name.replace("self_attention", "self_attn").replace("cross_attention", "cross_attn")
        name = re.sub(r"w_([qkvo])", r"W_\1", name).replace("linear_", "fc").replace("projection_layer.proj", "fc")
        name = name.replace("src_embed.embedding", "encoder_embedding").replace(
            "tgt_embed.embedding", "decoder_embedding"
        )
        if "tgt_pos" not in name:
            state[name.replace("src_pos", "positional_encoding")] = tensor
    fields, converted = convert_teaching(state, num_heads=HEADS)
    assert (fields["norm_placement"], fields["final_norm"], fields["norm_eps"]) == ("post", False, 1e-5)
    assert (fields["positions"], fields["max_seqlen"]) == ("sinusoidal", MAX_SEQLEN)
    ours = EncoderDecoder(TransformerConfig(**fields)).double().to(device).eval()
    ours.load_state_dict(converted)
    batch = make_batch(device)
    assert_close(our_outputs(ours, *batch), outputs(teaching, *batch))


def test_tables_of_positions(device):
    """The sinusoidal one is known whatever its shape, as rows or halves, rounded as float32 angles are; another one is kept."""
    teaching = make_teaching().to(device)
    state = teaching.state_dict()
    halves = sinusoidal_positions(MAX_SEQLEN, D_MODEL, halves=True, device=device)
    steps = torch.exp(torch.arange(0, D_MODEL, 2).float() * (-math.log(10000.0) / D_MODEL))
    angles = torch.arange(5000).float()[:, None] * steps
    in_float32 = torch.stack([angles.sin(), angles.cos()], -1).flatten(-2).to(device)
    for table, expected in (
        (state["src_pos.pe"][0], {"sinusoidal_halves": False, "max_seqlen": MAX_SEQLEN}),
        (halves[:, None], {"sinusoidal_halves": True, "max_seqlen": MAX_SEQLEN}),
        (in_float32[None], {"sinusoidal_halves": False, "max_seqlen": 5000}),
    ):
        fields, _ = convert_teaching({**state, "src_pos.pe": table, "tgt_pos.pe": table}, num_heads=HEADS)
        assert fields["positions"] == "sinusoidal" and {name: fields[name] for name in expected} == expected
    without = {name: tensor for name, tensor in state.items() if not name.endswith("pe")}
    assert convert_teaching(without, num_heads=HEADS, max_seqlen=9)[0]["max_seqlen"] == 9
    with pytest.raises(ValueError, match="max_seqlen must be given"):
        convert_teaching(without, num_heads=HEADS)
    with pytest.raises(ValueError, match=r"src_pe must have 16 features, as the embeddings, got shape \(20, 15\)"):
        convert_teaching({**state, "src_pos.pe": halves[:, 1:]}, num_heads=HEADS)

    with torch.no_grad():  # a table of its own on one side: the exponents of another formula, say
        teaching.tgt_pos.pe[0, :, 2:] = halves[:, 2:] + 0.1
    ours = convert(teaching)
    assert ours.config.positions == "learned"
    batch = make_batch(device)
    actual, expected = our_outputs(ours.double(), *batch)[0], outputs(teaching.double(), *batch)[0]
    assert float((actual - expected).abs().max()) <= 4e-6 * float(expected.abs().max())
    with pytest.raises(ValueError, match="max_seqlen must be at most 20"):
        convert(teaching, max_seqlen=21)


def test_one_alpha_for_all_features(device):
    state = make_teaching().to(device).state_dict()
    single = {name: tensor[:1] if re.search(r"norm\.(alpha|bias)", name) else tensor for name, tensor in state.items()}
    spread = {
        name: tensor[:1].expand(D_MODEL) if re.search(r"norm\.(alpha|bias)", name) else tensor
        for name, tensor in state.items()
    }
    (fields, ours), (expected_fields, expected) = (convert_teaching(s, num_heads=HEADS) for s in (single, spread))
    assert fields == expected_fields
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_what_is_refused_is_listed():
    state = make_teaching().state_dict()
    with pytest.raises(ValueError, match=r"unknown tensors: rotary\.cos, encoder\.layers\.0\.gate\.weight"):
        convert_teaching(
            {**state, "rotary.cos": state["src_pos.pe"], "encoder.layers.0.gate.weight": state["src_pos.pe"]},
            num_heads=HEADS,
        )
    lost = ("encoder.layers.1.self_attention.w_k.weight", "projection_layer.proj.weight")
    with pytest.raises(ValueError, match=r"missing: encoder\.1\.self\.k\.weight, head\.weight"):
        convert_teaching({name: tensor for name, tensor in state.items() if name not in lost}, num_heads=HEADS)
    with pytest.raises(ValueError, match=r"more than the other layers have: decoder\.1\.self\.v\.bias"):
        convert_teaching({**state, "decoder.layers.1.self_attention.w_v.bias": torch.zeros(D_MODEL)}, num_heads=HEADS)
    with pytest.raises(ValueError, match=r"mean what another one does: encoder_embedding\.weight"):
        convert_teaching({**state, "encoder_embedding.weight": state["src_embed.embedding.weight"]}, num_heads=HEADS)
    with pytest.raises(ValueError, match="num_heads must divide the 16 rows of the projection to q, got 3"):
        convert_teaching(state, num_heads=3)
    with pytest.raises(ValueError, match='norm must be "teaching", "torch" or None'):
        convert_teaching(state, num_heads=HEADS, norm="rms")
    gammas = {
        name.replace("norm.alpha", "norm.gamma").replace("norm.bias", "norm.beta"): t for name, t in state.items()
    }
    with pytest.raises(ValueError, match="norm must be given: its weights are called gamma"):
        convert_teaching(gammas, num_heads=HEADS)
    assert convert_teaching(gammas, num_heads=HEADS, norm="torch", norm_eps=1e-12)[0]["norm_eps"] == 1e-12
